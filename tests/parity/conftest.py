"""The parity table: what each test measured against the reference, printed when the run ends.

A figure travels with the test's report (`record_property`), so the table is whole under pytest-xdist. Without torch,
diffusers or transformers the tests skip and say which is missing; see `reference.py`.
"""

from collections.abc import Callable

import numpy as np
import pytest
from agreement import TOLERANCE, Agree, Note

_PROPERTY = "parity"


@pytest.fixture
def note(record_property: Callable[[str, object], None]) -> Note:
    """note(what, measured): a line of the table, for a test that measures in its own way."""
    return lambda what, measured: record_property(_PROPERTY, [what, measured])


@pytest.fixture
def agree(note: Note) -> Agree:
    """agree(what, ours, theirs) asserts agreement within `tolerance` of the largest value, and notes the figure."""

    def check(what: str, ours: object, theirs: object, tolerance: float = TOLERANCE) -> None:
        given, expected = np.asarray(ours), np.asarray(theirs)
        assert given.shape == expected.shape, f"{what}: shape {given.shape}, the reference has {expected.shape}"
        largest = float(np.abs(expected).max())
        assert largest > 0, f"{what}: the reference is zero everywhere, which would prove nothing"
        difference = float(np.abs(given - expected).max()) / largest
        note(what, f"{difference:.1e}  (allowed {tolerance:.0e})")
        assert difference <= tolerance, (
            f"{what}: differs by {difference:.2e} of the maximum, allowed is {tolerance:.0e}"
        )

    return check


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    rows = [
        value
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, [])
        for name, value in getattr(report, "user_properties", [])
        if name == _PROPERTY
    ]
    if not rows:
        return
    terminalreporter.section("parity: largest difference / largest value of the reference, float32")
    width = max(len(what) for what, _ in rows)
    for what, measured in sorted(rows):
        terminalreporter.line(f"{what:<{width}}  {measured}")
