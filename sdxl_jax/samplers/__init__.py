"""The reverse process: from noise to a latent, one pure step function a sampler, one `lax.scan` for all."""
