"""From folders of captioned pictures to bucketed batches. numpy and Grain; no jax arrays, no models."""
