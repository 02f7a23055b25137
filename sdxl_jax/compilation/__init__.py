"""Compiled programs of earlier starts, in files: jax's persistent compilation cache, and what spares tracing."""
