"""The reverse process: from noise to a latent, a table of weights per sampler, one `lax.scan` for all."""
