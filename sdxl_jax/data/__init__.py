"""From folders of captioned images to bucketed batches. numpy and Grain; no jax arrays, no models."""
