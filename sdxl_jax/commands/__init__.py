"""Commands of `sdxl-jax`: one module per command, with its options and what it does."""
