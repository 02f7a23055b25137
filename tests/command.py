"""Runs a command of `sdxl-jax` in this process."""

import contextlib
import io
from typing import NamedTuple

from sdxl_jax.__main__ import main


class Outcome(NamedTuple):
    """Exit code, stdout and stderr."""

    code: int
    out: str
    err: str


def call(*arguments: object) -> Outcome:
    """Runs one command. SystemExit, as of the argument parser, becomes its exit code."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stopped:
            code = stopped.code
    assert isinstance(code, int)
    return Outcome(code, out.getvalue(), err.getvalue())
