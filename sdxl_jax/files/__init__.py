"""Paths, atomic writes, tree differences, text files, locks. Independent of images and models."""
