"""Scores of models and pictures. Uses sampling, never training."""
