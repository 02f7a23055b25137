"""AOT compilation, `sdxl-jax compile`: the programs of training and sampling, compiled for TPU slices without a TPU."""
