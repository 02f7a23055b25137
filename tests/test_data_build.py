"""sdxl_jax.data.build: an interrupted build that is run again gives the same bytes; nothing is left out silently."""

import contextlib
import fcntl
import io
import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdxl_jax.data.build import destinations
from sdxl_jax.data.build.build import Built, _build, _identity, build
from sdxl_jax.data.build.destinations import find_duplicates
from sdxl_jax.data.build.records import Record, Unit, units
from sdxl_jax.data.shards import open_shards
from sdxl_jax.data.sources import Refused
from sdxl_jax.errors import InputError, MachineError

TESTS = str(Path(__file__).parent)
COLUMNS = "caption_start first_caption hash name_start number_000 record shard shard_extent size"


class Fake:
    """A source of `pieces` pieces of `images` images, picklable. Piece 1 is empty, piece 2 has refusals alone.

    The first image of every piece from 3 on has the bytes of the first image of piece 0.
    """

    def __init__(self, pieces=5, images=4, seconds=0.0, image_bytes=2000, mark=""):
        self.pieces, self.images, self.seconds, self.image_bytes, self.mark = pieces, images, seconds, image_bytes, mark

    def units(self, source: str) -> list[Unit]:
        piece = (self.images, self.seconds, self.image_bytes, self.mark)
        return [Unit(number, f"piece {number}", piece) for number in range(self.pieces)]

    def read(self, unit: Unit):
        images, seconds, image_bytes, _ = unit.piece
        for image in range(0 if unit.number == 1 else images):
            time.sleep(seconds)
            name = f"{unit.number}/{image}"
            if unit.number == 2 or image == 1:
                yield Refused(f"{name}.txt", "empty caption")
            if unit.number != 2:
                seed = (0, 0) if unit.number > 2 and image == 0 else (unit.number, image)
                data = np.random.default_rng(seed).bytes(image_bytes + 7 * image)
                captions = tuple(f"caption {k} of {name}" for k in range(1 + image % 2))
                yield Record(name, data, (image + 1, unit.number + 1), captions, {"score": 1.0} if image else {})

    def build(self, destination, *, source="fake", workers=0, drop_duplicates=False):
        return _build(
            source,
            destination,
            self.units,
            self.read,
            workers=workers,
            drop_duplicates=drop_duplicates,
            progress=False,
        )


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "shards"
    Fake().build(folder)
    return folder


def test_everything_of_the_source_is_there_in_its_order(finished):
    shards = open_shards(finished)
    fake = Fake()
    items = [item for unit in fake.units("") for item in fake.read(unit)]
    records = [item for item in items if isinstance(item, Record)]
    assert len(shards) == len(records) == 12
    for number, record in enumerate(records):
        assert shards.name(number) == record.name
        assert shards.captions(number) == record.captions
        assert shards.read(number) == record.image
        assert tuple(shards.sizes[number]) == record.size
        assert shards.numbers["score"][number] == record.numbers.get("score") or not record.numbers
    assert list(shards.refused()) == [item for item in items if isinstance(item, Refused)]
    assert sorted(files(finished)) == sorted(
        ["captions.bin", "names.bin", "refused.jsonl", "shards.json"]
        + [f"shards/{number:05d}.array_record" for number in (0, 3, 4)]
        + [f"index/{column}.npy" for column in COLUMNS.split()]
    )


def test_the_counts_are_those_of_the_source(tmp_path):
    built = Fake().build(tmp_path / "shards")
    size = sum(len(data) for name, data in files(tmp_path / "shards").items() if name.startswith("shards/"))
    assert built == Built(images=12, captions=18, refused=4 + 3, duplicates=2, bytes=size)


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_builds_the_same_bytes(finished, tmp_path, workers):
    Fake().build(tmp_path / "shards", workers=workers)
    assert files(tmp_path / "shards") == files(finished)


def test_duplicates_are_dropped_only_on_request_and_the_first_stays(finished, tmp_path):
    built = Fake().build(tmp_path / "shards", drop_duplicates=True)
    assert (built.images, built.duplicates) == (10, 2)
    every, fewer = open_shards(finished), open_shards(tmp_path / "shards")
    kept = [number for number in range(12) if every.name(number) not in ("3/0", "4/0")]
    assert [fewer.name(number) for number in range(10)] == [every.name(number) for number in kept]
    for number, image in enumerate(kept):
        assert fewer.read(number) == every.read(image)
        assert fewer.captions(number) == every.captions(image)
    np.testing.assert_array_equal(fewer.sizes, every.sizes[kept])
    np.testing.assert_array_equal(fewer.numbers["score"], every.numbers["score"][kept])
    assert fewer.fingerprint != every.fingerprint and fewer.duplicates == every.duplicates == 2


def test_duplicates_are_found_across_blocks_and_rounds(monkeypatch):
    monkeypatch.setattr(destinations, "_BLOCK", 64)
    hashes = np.random.default_rng(0).integers(0, 256, (3000, 16), np.uint8)
    hashes[:, 1:] = 0
    hashes[1000:, 9] = 1  # the halves alone are not equal
    seen, expected = set(), []
    for row in hashes:
        expected.append(row.tobytes() in seen)
        seen.add(row.tobytes())
    np.testing.assert_array_equal(find_duplicates(hashes), expected)


# Killed

KILLED_ANYWHERE = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_data_build import Fake, files

reference, folder = Path(sys.argv[2]), sys.argv[3]

def in_child(destination, kill_at):
    if (child := os.fork()) == 0:
        seen = 0
        def count(event, arguments):
            nonlocal seen
            touches = event == "open" or event.startswith(("os.", "shutil."))
            if touches and any(str(argument).startswith(destination) for argument in arguments):
                seen += 1
                if seen == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(count)
        Fake().build(destination)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

step = int(sys.argv[4])
moment, unfinished = 1, 0
while True:
    destination = f"{folder}/{moment}"
    if in_child(destination, moment) == 0:
        break
    if moment // step % 2:  # and a second time during the resume
        in_child(destination, moment // 2)
    unfinished += not os.path.exists(f"{destination}/shards.json")
    assert in_child(destination, None) == 0, moment
    assert files(Path(destination)) == files(reference), moment
    moment += step
print(moment, unfinished)
"""


def kill_anywhere(finished, tmp_path, step):
    command = [sys.executable, "-c", KILLED_ANYWHERE, TESTS, str(finished), str(tmp_path), str(step)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return map(int, run.stdout.split())


def test_a_build_killed_at_some_moments_resumes_to_the_same_bytes(finished, tmp_path):
    moments, unfinished = kill_anywhere(finished, tmp_path, 17)
    assert moments > 100 and unfinished > 5


@pytest.mark.slow
def test_a_build_killed_at_any_moment_resumes_to_the_same_bytes(finished, tmp_path):
    """Before each time that the build opens, makes, renames or removes a file."""
    moments, unfinished = kill_anywhere(finished, tmp_path, 1)
    print(f"killed at {moments} moments, {unfinished} of them before the end")
    assert unfinished > 80


IN_PROCESSES = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job, as tests may be, ignores it
if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    from test_data_build import Fake
    print(Fake(int(sys.argv[3]), 20, 0.005).build(sys.argv[2], workers=2))
"""


def start(script: Path, destination: Path, pieces: int = 12) -> subprocess.Popen:
    script.write_text(IN_PROCESSES)
    return subprocess.Popen(
        [sys.executable, str(script), TESTS, str(destination), str(pieces)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def others_of(session: int) -> list[int]:
    """Processes of the session that still run."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, of = status.read_text().rsplit(")", 1)[1].split()[:4]
            if int(of) == session and state != "Z":
                found.append(int(status.parent.name))
    return found


@pytest.mark.slow
def test_a_build_killed_with_its_workers_running_resumes_to_the_same_bytes(tmp_path):
    Fake(12, 20, 0.005).build(tmp_path / "reference")
    destination = tmp_path / "shards"
    for parts in (1, 6):
        process = start(tmp_path / "script.py", destination)
        done = destination / "parts"
        wait_until(lambda done=done, parts=parts: len([*done.glob("[0-9]????")]) >= parts)
        process.kill()
        process.communicate()
        wait_until(lambda process=process: not others_of(process.pid))  # the workers end with their parent
        assert not (destination / "shards.json").exists()
        with pytest.raises(InputError, match="not finished: run the same command again"):
            open_shards(destination)
    process = start(tmp_path / "script.py", destination)
    output, problems = process.communicate()
    assert process.returncode == 0, problems
    assert files(destination) == files(tmp_path / "reference")
    assert "was_finished=False" in output


def test_ctrl_c_ends_all_processes_and_loses_nothing(tmp_path):
    process = start(tmp_path / "script.py", tmp_path / "shards", pieces=300)  # 15 s: it cannot end before the signal
    wait_until(lambda: [*(tmp_path / "shards" / "parts").glob("[0-9]????")])
    os.killpg(process.pid, signal.SIGINT)
    _, problems = process.communicate(timeout=30)
    assert process.returncode and problems.count("KeyboardInterrupt") == 1
    assert [*(tmp_path / "shards" / "parts").glob("[0-9]????")]


def test_finished_pieces_are_not_read_again(tmp_path):
    read = []

    class Noting(Fake):
        def read(self, unit):
            if unit.number == 3 and read.count(3) < 1:
                read.append(3)
                raise OSError("the disk is away")
            read.append(unit.number)
            yield from super().read(unit)

    with pytest.raises(InputError, match=r"can no longer be read, at piece 3 \(the disk is away\).*same command again"):
        Noting().build(tmp_path / "shards")
    Noting().build(tmp_path / "shards")
    assert read == [0, 1, 2, 3, 3, 4]


# Refused


def test_a_finished_build_reports_it_and_changes_nothing(finished):
    before = files(finished)
    built = Fake().build(finished)
    assert built.was_finished and built.images == 12
    assert files(finished) == before


@pytest.mark.parametrize("state", ["a finished", "an unfinished"])
def test_another_build_in_the_same_folder_is_refused(tmp_path, state):
    folder = tmp_path / "shards"
    Fake().build(folder)
    if state == "an unfinished":
        (folder / "shards.json").rename(folder / "build.json")
    before = files(folder)
    with pytest.raises(InputError, match=f"holds {state} build with source=fake, and now other is given"):
        Fake().build(folder, source="other")
    with pytest.raises(InputError, match=f"holds {state} build with drop_duplicates=False, and now True is given"):
        Fake().build(folder, drop_duplicates=True)
    if state == "an unfinished":
        with pytest.raises(InputError, match=f"fake has changed since {state} build"):
            Fake(mark="newer").build(folder)
    assert files(folder) == before


def test_a_folder_with_other_files_or_a_file_is_refused(tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "thesis.tex").touch()
    with pytest.raises(InputError, match="holds other files"):
        Fake().build(tmp_path / "shards")
    with pytest.raises(InputError, match="is a file"):
        Fake().build(tmp_path / "shards" / "thesis.tex")
    assert [*files(tmp_path)] == ["shards/thesis.tex"]


def test_two_builds_at_once_in_one_folder_are_refused(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    other = os.open(folder, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(MachineError, match=r"Another process is building.*give another folder"):
        Fake().build(folder)
    os.close(other)
    Fake().build(folder)


def test_workers_below_zero_are_refused(tmp_path):
    with pytest.raises(InputError, match="workers=-1 is out of range"):
        Fake().build(tmp_path / "shards", workers=-1)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_source_that_disappears_loses_nothing_finished(tmp_path, workers):
    source = tmp_path / "source"
    source.mkdir()

    piece = r"\d" if workers else "3"  # the other process may be at any
    with pytest.raises(InputError, match=rf"source.* disappeared while piece {piece} was read.*same command"):
        Vanishing().build(tmp_path / "shards", source=str(source), workers=workers)
    if not workers:
        assert sorted(path.name for path in (tmp_path / "shards" / "parts").glob("[0-9]????")) == [
            "00000",
            "00001",
            "00002",
        ]
    source.mkdir()
    Fake().build(tmp_path / "shards", source=str(source), workers=workers)
    Fake().build(tmp_path / "reference", source=str(source))
    assert files(tmp_path / "shards") == files(tmp_path / "reference")


class Vanishing(Fake):
    """Its folder is removed while piece 3 is read."""

    def units(self, source):
        self.folder = source
        return super().units(source)

    def read(self, unit):
        if unit.number == 3:
            os.rmdir(self.folder)
        elif unit.number > 3:
            time.sleep(0.3)
        yield from super().read(unit)


@pytest.mark.parametrize("limit", [100_000, 1_000], ids=["records", "columns"])
def test_a_full_disk_is_reported_and_loses_nothing_finished(tmp_path, limit):
    """A limit on the size of a file stands in for a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    fake = Fake(4, 300)
    try:
        with pytest.raises(MachineError, match=r"Cannot write to .*File too large.*same command again"):
            fake.build(tmp_path / "shards")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    fake.build(tmp_path / "shards")
    fake.build(tmp_path / "reference")
    assert files(tmp_path / "shards") == files(tmp_path / "reference")


class Dying(Fake):
    def read(self, unit):
        if unit.number == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        yield from super().read(unit)


def test_a_worker_that_dies_is_reported(tmp_path):
    with pytest.raises(MachineError, match=r"A worker process died.*fewer than 2 workers"):
        Dying().build(tmp_path / "shards", workers=2)
    Fake().build(tmp_path / "shards", workers=2)
    assert len(open_shards(tmp_path / "shards")) == 12


def test_a_source_without_a_usable_image_is_refused_and_read_again(tmp_path):
    class Empty(Fake):
        def read(self, unit):
            yield Refused(f"{unit.number}.jpg", "zero bytes")

    with pytest.raises(InputError, match=r"(?s)has no usable image.*0.jpg.*zero bytes.*Fix the source"):
        Empty().build(tmp_path / "shards")
    assert not files(tmp_path / "shards")
    assert Fake().build(tmp_path / "shards").images == 12


# A real source


IDENTITY = "import sys; from sdxl_jax.data.build import build; print(build._identity(build.units(sys.argv[1])))"


def test_a_folder_of_images_is_built_in_processes(tmp_path):
    source = tmp_path / "images"
    source.mkdir()
    rng = np.random.default_rng(0)
    for number, suffix in zip(range(9), itertools.cycle([".png", ".jpg", ".webp"]), strict=False):
        image = Image.fromarray(rng.integers(0, 256, (10 + number, 30, 3), np.uint8))
        image.save(source / f"{number}{suffix}")
        (source / f"{number}.txt").write_text(f"number {number} – naïve")
    (source / "cut.png").write_bytes((source / "0.png").read_bytes()[:100])
    (source / "cut.txt").write_text("cut")
    for name, workers in (("one", 0), ("two", 2)):
        built = build(str(source), tmp_path / name, workers=workers, progress=False)
        assert (built.images, built.captions, built.refused, built.duplicates) == (9, 9, 1, 0)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    shards = open_shards(tmp_path / "one")
    for number in range(len(shards)):
        assert shards.read(number) == (source / shards.name(number)).read_bytes()
        with Image.open(io.BytesIO(shards.read(number))) as image:
            assert tuple(shards.sizes[number]) == (image.height, image.width)
        assert shards.captions(number) == (f"number {shards.name(number)[0]} – naïve",)
    assert json.loads((tmp_path / "one" / "refused.jsonl").read_bytes())["file"] == "cut.png"
    identities = set()  # of the same source, in processes that hash strings differently
    for seed in "12":
        command = [sys.executable, "-c", IDENTITY, str(source)]
        environment = os.environ | {"PYTHONHASHSEED": seed}
        identities.add(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert identities == {f"{_identity(units(str(source)))}\n"}
