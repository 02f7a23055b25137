"""Weights at a path: opened, loaded and converted, in every layout. No torch, no optimiser, no image library."""
