"""Paths, atomic writes, tree differences, text files, locks: nothing of the domain."""
