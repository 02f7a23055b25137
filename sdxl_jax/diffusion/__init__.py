"""The maths of the forward process: how noise is added, what the network is asked for, what an error costs.

Depends on numpy and jax.numpy only: no networks, no solvers.
"""
