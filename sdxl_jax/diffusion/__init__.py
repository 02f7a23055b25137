"""The maths of the forward process: how noise is added, what the network predicts, how its error is weighted.

Depends on numpy and jax.numpy only: no networks, no solvers.
"""
