"""Commands of `sdxl-jax` that are more than a few lines: what they parse, and what they do with it."""
