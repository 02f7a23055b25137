"""The networks: parameters and arrays in, arrays out. They know nothing of noise, data or meshes.

The only folder that imports flax. Each network is described by a frozen dataclass (what its weights depend on) and run
under a `Compute` (what its weights do not depend on: precision, memory, kernels).
"""
