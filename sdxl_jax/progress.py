"""Progress of long work, and the messages that are printed meanwhile: a bar for people, lines for a log.

    from sdxl_jax.progress import tqdm

is tqdm's class with this display:

| where | format |
|---|---|
| a terminal, a notebook | tqdm's bar |
| anything else: a file, a pipe, Slurm, systemd | `TEXT`: a line at the start, one every 30 s, and one at the end |
| Cloud Logging: Cloud Run, Kubernetes on a Google machine | `JSON`: the same as one JSON object per line |

Whatever `tqdm.write` prints follows the format too. The variable SDXL_JAX_LOG_FORMAT (auto, text or json) overrides it
for a process and its children, `logging.format` for a run.
"""

import contextlib
import datetime
import enum
import faulthandler
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm as _Bar

from sdxl_jax.errors import InputError

VARIABLE = "SDXL_JAX_LOG_FORMAT"
SECONDS_BETWEEN_LINES = 30.0
_PRODUCT = Path("/sys/class/dmi/id/product_name")
_LINE = "{n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
_LINE_WITHOUT_TOTAL = "{n_fmt} [{elapsed}, {rate_fmt}{postfix}]"


class LogFormat(enum.Enum):
    """How progress and messages are printed."""

    AUTO = "auto"
    """A bar in a terminal or a notebook; JSON under Cloud Logging; otherwise text."""
    TEXT = "text"
    """Lines of text, one every 30 s."""
    JSON = "json"
    """The same as JSON objects with severity, message and time; for progress also activity, done, total and unit, in
    training step, steps, loss and images_per_second."""


@contextlib.contextmanager
def log_format(chosen: LogFormat) -> Iterator[None]:
    """Inside, this process and the children that it starts use the format. AUTO changes nothing."""
    before = os.environ.get(VARIABLE)
    if chosen is not LogFormat.AUTO:
        os.environ[VARIABLE] = chosen.value
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(VARIABLE, None)
        else:
            os.environ[VARIABLE] = before


def _format_for(stream: Any) -> LogFormat | None:
    """The format of a stream; None: a bar. Raises InputError for an unknown value of the variable."""
    value = os.environ.get(VARIABLE, LogFormat.AUTO.value)
    try:
        chosen = LogFormat(value)
    except ValueError as error:
        known = ", ".join(each.value for each in LogFormat)
        raise InputError(f"The environment has {VARIABLE}={value}. Give one of {known}") from error
    if chosen is not LogFormat.AUTO:
        return chosen
    is_notebook = type(stream).__module__.startswith("ipykernel.")
    if is_notebook or (hasattr(stream, "isatty") and stream.isatty()):
        return None
    return LogFormat.JSON if _has_cloud_logging() else LogFormat.TEXT


def _has_cloud_logging() -> bool:
    """Whether what is printed goes to Cloud Logging, which reads JSON: on Cloud Run, and on GKE."""
    if "K_SERVICE" in os.environ or "CLOUD_RUN_JOB" in os.environ:
        return True
    try:
        product = _PRODUCT.read_text()
    except OSError:  # no such information, as in a sandbox
        return False
    return "KUBERNETES_SERVICE_HOST" in os.environ and product.startswith("Google")


def json_line(message: str, severity: str = "INFO", **fields: Any) -> str:
    """A line for Cloud Logging, with the time. severity: INFO, WARNING, ERROR."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    return json.dumps({"severity": severity, "message": message, "time": now, **fields}, ensure_ascii=False)


def report_error(message: str) -> None:
    """Prints an error on stderr, in the format of the log."""
    with contextlib.suppress(InputError):  # an unknown format, which may be the error
        if _format_for(sys.stderr) is LogFormat.JSON:
            message = json_line(message, "ERROR")
    print(message, file=sys.stderr, flush=True)


def print_stacks() -> None:
    """Prints the stacks of all threads on stderr, if that is a file."""
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        faulthandler.dump_traceback()


class tqdm(_Bar):
    """tqdm, displayed as the module says."""

    fields: dict[str, Any] | None = None
    """What a line of JSON says in addition."""

    def __init__(self, *args: Any, **options: Any):
        self._format = _format_for(options.get("file") or sys.stderr)
        self._next_line, self._last_line = 0.0, -1
        if self._format is not None:
            if options.get("disable", False) is None:  # tqdm: no bar without a terminal
                options["disable"] = False
            options |= {"gui": True, "miniters": 1}  # gui: tqdm moves no cursor
        super().__init__(*args, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> Any:
        if self._format is None:
            return super().display(msg, pos)
        if (now := time.time()) >= self._next_line:
            self._next_line = now + SECONDS_BETWEEN_LINES
            self._print_line()
        return True

    def close(self) -> None:
        if not getattr(self, "disable", True) and self._format is not None:
            is_short = self.delay > 0 and time.time() < self.start_t + self.delay
            if self.n != self._last_line and not is_short:
                self._print_line()
        super().close()

    def clear(self, nolock: bool = False) -> None:
        if self._format is None:
            super().clear(nolock)

    def _print_line(self) -> None:
        self._last_line = self.n
        activity, form = self.desc.removesuffix(": "), _LINE_WITHOUT_TOTAL if self.total is None else _LINE
        line = self.format_meter(**{**self.format_dict, "bar_format": form, "ncols": None})
        line = f"{activity}: {line}" if activity else line
        if self._format is LogFormat.JSON:
            progress = {"activity": activity, "done": self.n, "total": self.total, "unit": self.unit.strip()}
            line = json_line(line, **progress, **(self.fields or {}))
        self.fp.write(line + "\n")
        self.fp.flush()

    @classmethod
    def write(cls, s: str, file: Any = None, end: str = "\n", nolock: bool = False) -> None:
        stream = sys.stdout if file is None else file
        style = _format_for(stream)
        if style is LogFormat.JSON:
            s, end = json_line(s.strip()), "\n"
        super().write(s, stream, end, nolock)
        if style is not None:
            stream.flush()  # a pipe's buffer would keep it for hours
