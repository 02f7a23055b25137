"""`sdxl-jax compile`: the real programs, compiled for TPU slices that are not here."""
