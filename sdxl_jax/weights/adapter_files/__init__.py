"""Adapter files: read, written, listed, and computed with. How they are merged into a model: `weights.lora`."""
