"""Metrics of models and images. Uses sampling, never training."""
