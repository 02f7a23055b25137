"""SDXL, trained and sampled in JAX."""
