"""`sdxl-jax data build --runner beam`: the workers of an Apache Beam pipeline read the source, on any machines.

    lists of pieces ─ Reshuffle ─ each piece: read, checked, written (Destination.write) ─┐
                                                          one worker: the index of all ◄──┘ (destinations.complete)

Pieces, files and bytes are those of a build by local processes: a piece is one shard, whoever writes it, and the index
is in the order of the source. What is finished is skipped when the same command runs again. Pieces travel in lists, as
files of the destination, since a pipeline's description has to be small.

Counters, namespace `sdxl_jax`: images, captions and refused, of the pieces written in this run; duplicates, of all.

Needs apache-beam, so that this module is imported only where it is used. Not here: what is read and written.
"""

import json
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import apache_beam  # pyright: ignore[reportMissingImports]  # an extra
from apache_beam.metrics import Metrics  # pyright: ignore[reportMissingImports]
from apache_beam.options.pipeline_options import PipelineOptions  # pyright: ignore[reportMissingImports]

from sdxl_jax.data.build.destinations import RESUME, Destination, NothingUsable, Read, complete
from sdxl_jax.data.build.records import Unit
from sdxl_jax.errors import InputError, MachineError
from sdxl_jax.progress import tqdm

_NAMESPACE = "sdxl_jax"
_LIST_PIECES = 16
"""Pieces per list: of a folder, with the names of 1000 images each, a megabyte or so."""
_FAILURES = "failures.json"


def run(
    destination: Destination,
    options: dict[str, Any],
    pieces: list[Unit],
    read: Read,
    origin: Path | None,
    arguments: Sequence[str],
) -> dict[str, Any]:
    """Runs the pipeline and returns the content of shards.json. `arguments`: the pipeline's options.

    Raises InputError for what is wrong with the source, MachineError where the pipeline fails.
    """
    done = destination.finished()
    missing = [unit for unit in pieces if unit.number not in done]
    lists = [missing[start : start + _LIST_PIECES] for start in range(0, len(missing), _LIST_PIECES)]
    for number, units in enumerate(lists):
        destination.put(_list_name(number), pickle.dumps(units))
    _put_failures(destination, [])
    pipeline = apache_beam.Pipeline(options=PipelineOptions(list(arguments)))
    failures = (
        pipeline
        | "Number the lists" >> apache_beam.Create(range(len(lists)))
        | "Read the lists" >> apache_beam.FlatMap(_read_list, destination)
        | "Spread the pieces" >> apache_beam.Reshuffle()
        | "Write the pieces" >> apache_beam.ParDo(_Write(destination, read, origin))
    )
    _ = (
        pipeline
        | "Begin the index" >> apache_beam.Create([len(pieces)])
        | "Write the index" >> apache_beam.Map(_complete, destination, options, apache_beam.pvalue.AsList(failures))
    )
    _wait(pipeline)
    described = destination.description()
    if described is None:
        failed = json.loads(destination.get(_FAILURES) or b"{}")
        if not failed.get("messages"):
            raise MachineError(f"The pipeline ended before the index was written. {RESUME}")
        first, *others = failed["messages"]
        kind = NothingUsable if failed["nothing_usable"] else InputError
        raise kind(first + (f"\n{len(others)} more pieces failed" if others else ""))
    return described


def _put_failures(destination: Destination, messages: list[str], *, nothing_usable: bool = False) -> None:
    content = {"messages": messages, "nothing_usable": nothing_usable}
    destination.put(_FAILURES, json.dumps(content).encode())


def _list_name(number: int) -> str:
    return f"list-{number:05d}.pickle"


def _read_list(number: int, destination: Destination) -> Iterator[Unit]:
    content = destination.get(_list_name(number))
    assert content is not None, f"{_list_name(number)} is missing in {destination.path}"
    yield from pickle.loads(content)


class _Write(apache_beam.DoFn):
    """Writes a piece; yields the message where the source is at fault, since writing it again will not help. Any other
    error is raised, and the runner tries again."""

    def __init__(self, destination: Destination, read: Read, origin: Path | None):
        self._destination, self._read, self._origin = destination, read, origin

    def process(self, unit: Unit) -> Iterator[str]:
        try:
            counts = self._destination.write(self._read, unit, self._origin, lambda images: None)
        except InputError as problem:
            yield str(problem)
            return
        for name, count in counts._asdict().items():
            Metrics.counter(_NAMESPACE, name).inc(count)


def _complete(pieces: int, destination: Destination, options: dict[str, Any], failures: list[str]) -> None:
    """The last step. Does nothing where it is done already, as when a runner repeats it."""
    if failures:
        _put_failures(destination, sorted(failures))
    elif destination.description() is None:
        try:
            described = complete(destination, options, pieces, hide=True)
            Metrics.counter(_NAMESPACE, "duplicates").inc(described["duplicates"])
        except InputError as problem:
            _put_failures(destination, [str(problem)], nothing_usable=isinstance(problem, NothingUsable))


def _wait(pipeline: apache_beam.Pipeline) -> None:
    """Runs the pipeline to its end, prints its counters, and cancels it where this process is interrupted."""
    result: Any = None
    try:
        result = pipeline.run()
        result.wait_until_finish()
    except Exception as problem:  # of any kind, as the runner has it
        lines = str(problem).strip().splitlines() or [type(problem).__name__]
        raise MachineError(f"The pipeline failed ({lines[-1][:500]}). {RESUME}") from problem
    except BaseException:
        if result is not None:
            result.cancel()
        raise
    counters = result.metrics().query()["counters"]
    ours = {each.key.metric.name: each.result for each in counters if each.key.metric.namespace == _NAMESPACE}
    tqdm.write("  counted by the pipeline: " + ", ".join(f"{name} {ours.get(name, 0)}" for name in sorted(ours)))
