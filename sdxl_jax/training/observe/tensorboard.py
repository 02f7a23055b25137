"""RUN/tensorboard: scalars in event files, with tensorboardX. Imported after the first step."""

import contextlib
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue] (generated)
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue] (generated)

from sdxl_jax.progress import tqdm


class TensorBoard:
    """Scalars in an event file. Written synchronously: tensorboardX's background thread dies silently on a full disk,
    and later writes then block for ever."""

    def __init__(self, folder: Path, purge_step: int):
        """purge_step: TensorBoard discards events of earlier starts from this step on."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._files, self._full = folder, 0, False
        self._events: EventsWriter | None = None
        """The file; None: the next event begins one."""
        started = SessionLog(status=SessionLog.START)
        self._write(Event(step=purge_step, wall_time=time.time(), session_log=started))

    def add(self, scalars: Mapping[str, float], step: int) -> None:
        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._write(Event(step=step, wall_time=time.time(), summary=Summary(value=values)))

    def close(self) -> None:
        """Later scalars go to another file, which TensorBoard reads after this one."""
        if self._events is not None:
            with contextlib.suppress(OSError):  # reported already
                self._events.close()
            self._events = None

    def _write(self, event: Event) -> None:
        if self._full:
            return
        try:
            if self._events is None:
                self._files += 1  # keeps files of the same second apart
                self._events = EventsWriter(str(self._folder / "events"), f".{self._files:06d}")
            self._events.write_event(event)
            self._events.flush()
        except OSError as error:  # a partial event makes everything after it unreadable
            tqdm.write(f"  TensorBoard gets no more scalars until the next start: {error.strerror}")
            self._full = True
