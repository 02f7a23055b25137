"""A run under a real Slurm, of two nodes on this machine, ends like an undisturbed one although it is requeued in the
middle.

It needs slurmctld, slurmd and munged (Debian: `apt-get install --no-install-recommends slurm-wlm munge`), and root; the
daemons are the test's own, with their files in its folder.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import compiling
import pytest
import tiny

from sdxl_jax.training.observe.metrics import TIMES

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(map(shutil.which, ("slurmctld", "slurmd", "munged"))),
        reason="Slurm (slurm-wlm, munge) is not installed",
    ),
    pytest.mark.skipif(os.geteuid() != 0, reason="Slurm's daemons start tasks as root"),
]

ROOT = Path(__file__).parents[1]
STEPS = 30

CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=30
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
NodeName={host} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 State=UNKNOWN
NodeName=localhost NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 State=UNKNOWN
"""
"""jax takes the coordinator's address from the names of the nodes, so that both must be resolved. A requeued job waits
until its credentials have expired."""


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("localhost", 0))
        return [each.getsockname()[1] for each in sockets]


def wait_for(what: str, condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(1)


class Slurm:
    """A cluster of two nodes, and its jobs."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = os.environ | {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        }

    def output(self, *command: str) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        folder, host = self.folder, socket.gethostname()
        (folder / "state").mkdir()
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o600)
        (folder / "slurm.conf").write_text(CONF.format(folder=folder, host=host, ports=free_ports(3)))
        files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        munged = [f"--{option}={folder}/munge.{name}" for option, name in files.items()]
        daemons = [
            ["munged", "--foreground", "--force", *munged],
            ["slurmctld", "-D", "-c"],
            *(["slurmd", "-D", "-N", node] for node in (host, "localhost")),
        ]
        with contextlib.ExitStack() as stack:
            for number, command in enumerate(daemons):
                log = stack.enter_context((folder / f"daemon_{number}.log").open("wb"))
                daemon = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)
                stack.callback(daemon.wait, 60)
                stack.callback(daemon.send_signal, signal.SIGTERM)
                time.sleep(0.5)
                assert daemon.poll() is None, (folder / f"daemon_{number}.log").read_text()[-3000:]
            wait_for("the nodes are idle", self._idle, 60)
            try:
                yield
            finally:  # tasks outlive the daemons
                self.output("scancel", "--partition", "all")
                wait_for("the last tasks end", self._idle, 90)

    def _idle(self) -> bool:
        return self.output("sinfo", "--noheader", "--format", "%T %D") == "idle 2"

    def state(self, job: str) -> str:
        return self.output("squeue", "--noheader", "--states", "all", "--job", job, "--format", "%T")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    folder = tmp_path_factory.mktemp("slurm")
    folder.chmod(0o755)
    cluster = Slurm(folder)
    cluster.environment |= compiling.environment(folder / "compiled")
    with cluster.running():
        yield cluster


def lines(run: Path) -> list[dict[str, object]]:
    """metrics.jsonl without times."""
    path = run / "metrics.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [{name: value for name, value in line.items() if name not in TIMES} for line in found]


def submit(slurm: Slurm, run: Path, images: Path) -> str:
    """The number of the job that trains in the folder `run`; its output is beside it, in `run`.out."""
    options = ("--data.folder", images, "--training.steps", STEPS, "--mesh.data", 2, "--checkpoint.every-steps", 10)
    untrained = ("--training.init-from", "--training.init-parts", "None")
    return slurm.output(
        *("sbatch", "--parsable", "--nodes", "2", "--output", f"{run}.out", "--export", "ALL"),
        *("launch/slurm.sbatch", "configs/smoke/sdxl_base_256.py", str(run)),
        *map(str, (*options, *untrained)),
    )


def completed(slurm: Slurm, job: str, run: Path) -> str:
    """The output of the job, which has ended well."""
    wait_for("the job ends", lambda: slurm.state(job) not in ("PENDING", "RUNNING", "COMPLETING"), 1800)
    output = Path(f"{run}.out").read_text()
    assert slurm.state(job) == "COMPLETED", output[-3000:]
    return output


@pytest.fixture(scope="module")
def images(slurm: Slurm) -> Path:
    return tiny.make_folder(slurm.folder / "images")


@pytest.fixture(scope="module")
def whole(slurm: Slurm, images: Path) -> list[dict[str, object]]:
    """The lines of an undisturbed run of two tasks."""
    run = slurm.folder / "whole"
    completed(slurm, submit(slurm, run, images), run)
    found = lines(run)
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))
    return found


@pytest.mark.parametrize(
    "stop",
    [("scontrol", "requeue"), ("scancel", "--signal", "TERM")],  # the second is what --signal=TERM@120 sends
    ids=["requeued", "near its time limit"],
)
def test_requeued_run_of_two_tasks_is_the_undisturbed_run(
    slurm: Slurm, images: Path, whole: list[dict[str, object]], stop: tuple[str, ...]
) -> None:
    run = slurm.folder / stop[0]
    job = submit(slurm, run, images)
    wait_for("half of the steps", lambda: len(lines(run)) >= STEPS // 2, 900)
    slurm.output(*stop, job)
    output = completed(slurm, job, run)
    print(output)
    assert lines(run) == whole
    assert f"start 1 of job {job}" in output
    assert stop[0] == "scontrol" or "ended with 143\nrequeued, to resume" in output
