"""The data pipeline: from folders of captioned images to bucketed batches. numpy and Grain, no jax, no models."""
