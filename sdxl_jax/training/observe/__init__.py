"""Observability of a run: metrics, time accounting, MFU, profiler traces, validation images."""
