"""Weights at a path: opened, loaded, converted, in every layout there is. No torch, no optimiser, no image library."""
