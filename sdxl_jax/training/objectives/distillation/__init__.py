"""Distillation: a student learns from a frozen teacher to need fewer evaluations of the network, one file per method.

`teacher` has what all methods share: configuration, teacher, student, and how they are called.
"""
