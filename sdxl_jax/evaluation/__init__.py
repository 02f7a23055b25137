"""Scores of models and pictures. Uses the pipeline, never the training."""
