"""How closely a network must agree with its reference, and why."""

from collections.abc import Callable

TOLERANCE = 2e-5
"""Largest difference allowed, as a share of the reference's largest absolute value.

Sums of a few hundred float32 products in another order differ by about 1e-6 of the result; thirty layers make a few
1e-6 of it. The references are made such that small mistakes are far beyond: an eps of 1e-5 for 1e-6 moves the result by
8e-4 or more, the tanh form of GELU by 1e-4.
"""

Agree = Callable[..., None]
"""agree(what, ours, theirs): see `conftest.agree`."""

Note = Callable[[str, str], None]
"""note(what, measured): see `conftest.note`."""
