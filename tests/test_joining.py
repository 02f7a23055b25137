"""The promises of joining: processes find each other as each environment describes them, and one that cannot join says
what to do.

TPU pods, Slurm and Kubernetes are emulated by their variables, a metadata server and a package; a real Slurm is in
test_slurm.py.
"""

import contextlib
import functools
import http.server
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import pytest

from sdxl_jax.errors import InputError, MachineError
from sdxl_jax.training import cluster

DESCRIBING = ("JAX_", "SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "KUBERNETES_", "JOB_COMPLETION", "GCE_", "CUDA_")
"""Prefixes of variables that describe processes."""

JOIN = """
import json, os, sys, time
import jax
if "GCE_METADATA_IP" in os.environ:
    os.environ.pop("TPU_SKIP_MDS_QUERY", None)  # jax sets it where it sees no TPU chip
from sdxl_jax.errors import REPORTED
from sdxl_jax.training.processes import Processes
try:
    with Processes(30) as processes:
        texts = processes.gather(str(processes.index))
        print(json.dumps({"index": processes.index, "count": processes.count, "texts": texts}), flush=True)
        if "WAITS" in os.environ:
            processes.wait(lambda: time.sleep(100))
except REPORTED as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(error.code)
"""


def clean(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if not name.startswith(DESCRIBING)}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def start(environment: dict[str, str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", JOIN],
        env=clean(os.environ) | {"JAX_PLATFORMS": "cpu"} | environment,
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outcomes(environments: list[dict[str, str]]) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of processes that run at the same time."""
    children = [start(environment) for environment in environments]
    try:
        texts = [child.communicate(timeout=90) for child in children]
    finally:
        for child in children:
            child.kill()
    return [(child.returncode, *text) for child, text in zip(children, texts, strict=True)]


def assert_joined(environments: list[dict[str, str]]) -> None:
    """Each process has the number of its place in the list, and hears from all."""
    count = len(environments)
    for index, (code, output, errors) in enumerate(outcomes(environments)):
        assert code == 0, errors
        assert json.loads(output) == {"index": index, "count": count, "texts": [str(each) for each in range(count)]}


class Metadata(http.server.BaseHTTPRequestHandler):
    """The metadata server of one worker of a TPU VM."""

    def __init__(self, worker: int, *arguments: Any):
        self._attributes = {
            "agent-worker-number": str(worker),
            "worker-network-endpoints": "localhost,localhost",
            "tpu-env": "MEGASCALE_NUM_SLICES: ''\n",
        }
        super().__init__(*arguments)

    def do_GET(self) -> None:
        value = self._attributes.get(self.path.rsplit("/", 1)[-1])
        self.send_response(404 if value is None else 200)
        self.end_headers()
        self.wfile.write((value or "").encode())

    def log_message(self, format: str, *arguments: Any) -> None:
        del format, arguments


@contextlib.contextmanager
def metadata_server(worker: int) -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Metadata, worker))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_two_slices_of_gke_join() -> None:
    """As GKE's webhook and JobSet describe them: one host per slice."""
    common = {"JAX_FORCE_TPU_INIT": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}
    slices = {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_COORDINATOR_ADDRESS": "localhost:8080"}
    port = {"JAX_COORDINATOR_PORT": str(free_port())}
    assert_joined([common | slices | port | {"MEGASCALE_SLICE_ID": str(index)} for index in range(2)])


def test_two_workers_of_a_tpu_vm_join_by_its_metadata() -> None:
    common = {"JAX_FORCE_TPU_INIT": "1", "JAX_COORDINATOR_PORT": str(free_port())}
    with metadata_server(0) as first, metadata_server(1) as second:
        assert_joined([common | {"GCE_METADATA_IP": address} for address in (first, second)])


def slurm_task(index: int, count: int, local: str = "0,1") -> dict[str, str]:
    return {
        "SLURM_JOB_ID": str(free_port() % 4096 if index == 0 else 0),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": str(count),
        "SLURM_PROCID": str(index),
        "SLURM_LOCALID": str(index),
        "SLURM_GTIDS": local,
    }


@pytest.mark.slow
def test_two_tasks_of_srun_join() -> None:
    first, second = slurm_task(0, 2), slurm_task(1, 2)
    assert_joined([first, second | {"SLURM_JOB_ID": first["SLURM_JOB_ID"]}])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("mpirun") is None, reason="Open MPI (mpirun) is not installed")
def test_two_processes_of_mpirun_join() -> None:
    done = subprocess.run(
        ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable, "-c", JOIN],
        env=clean(os.environ) | {"JAX_PLATFORMS": "cpu"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = sorted((json.loads(line) for line in done.stdout.splitlines()), key=lambda line: line["index"])
    assert lines == [{"index": index, "count": 2, "texts": ["0", "1"]} for index in range(2)]


@pytest.mark.slow
def test_survivor_of_a_killed_coordinator_ends_with_1() -> None:
    """jax aborts it at the moment when its connection breaks."""
    port = free_port()
    common = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2", "WAITS": "1"}
    children = [start(common | {"JAX_PROCESS_ID": str(index)}) for index in range(2)]
    try:
        for child in children:
            assert child.stdout is not None
            assert child.stdout.readline(), child.communicate()[1]  # it has joined
        time.sleep(0.5)
        children[0].send_signal(signal.SIGKILL)
        _, errors = children[1].communicate(timeout=60)
    finally:
        for child in children:
            child.kill()
            child.communicate()
    assert children[1].returncode == 1, errors
    assert f"error: Process 0 stopped: it no longer listens on localhost:{port}" in errors


@pytest.fixture
def empty(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Nothing describes processes; jax's backend, which other tests have started, counts as not started."""
    for name in os.environ:
        if name.startswith(DESCRIBING):
            monkeypatch.delenv(name)
    monkeypatch.setattr("jax._src.distributed.xla_bridge.backends_are_initialized", lambda: False)
    return monkeypatch


def test_without_a_description_there_is_one_process(empty: pytest.MonkeyPatch) -> None:
    del empty
    cluster.join(1.0)
    assert not jax.distributed.is_initialized()


def test_one_process_is_not_looked_for(empty: pytest.MonkeyPatch) -> None:
    """JAX_NUM_PROCESSES=1 overrules what jax would detect."""
    for name, value in (slurm_task(1, 2) | {"JAX_NUM_PROCESSES": "1"}).items():
        empty.setenv(name, value)
    cluster.join(1.0)
    assert not jax.distributed.is_initialized()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "node0", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}, "is HOST:PORT"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, "no JAX_COORDINATOR_ADDRESS, .* all three or none"),
        ({"JAX_PROCESS_ID": "-1"}, "The environment has JAX_PROCESS_ID=-1. Give a whole number, 0 or more"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, "has OMPI_COMM_WORLD_RANK=0, .*set JAX_COORD"),
    ],
    ids=["port", "address", "number", "Open MPI 5"],
)
def test_an_incomplete_description_is_refused(
    empty: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    for name, value in variables.items():
        empty.setenv(name, value)
    with pytest.raises(InputError, match=message):
        cluster.join(1.0)


# A pod of Kubernetes


class ConfigException(Exception):
    """kubernetes.config.ConfigException."""


ConfigException.__module__ = "kubernetes.config.config_exception"


class ApiException(Exception):
    status, reason = 403, "Forbidden"


def owner(kind: str) -> SimpleNamespace:
    return SimpleNamespace(controller=True, kind=kind)


class Kubernetes:
    """The `kubernetes` package, in a pod with these owners; None: it may not read pods."""

    def __init__(self, owners: list[SimpleNamespace] | None, *, service_account: bool = True):
        self.config = SimpleNamespace(load_incluster_config=self._load)
        self.client = SimpleNamespace(
            CoreV1Api=lambda: self, BatchV1Api=lambda: self, exceptions=SimpleNamespace(ApiException=ApiException)
        )
        self._owners, self._service_account = owners, service_account

    def _load(self) -> None:
        if not self._service_account:
            raise ConfigException("Service host/port is not set.")

    def list_namespaced_pod(self, **_: str) -> SimpleNamespace:
        if self._owners is None:
            raise ApiException
        metadata = SimpleNamespace(name="pod", labels={}, owner_references=self._owners)
        return SimpleNamespace(items=[SimpleNamespace(metadata=metadata)])

    def read_namespaced_job(self, name: str, namespace: str) -> SimpleNamespace:
        raise AssertionError(f"{name} in {namespace}: it belongs to no Job")


def in_pod(monkeypatch: pytest.MonkeyPatch, package: Kubernetes) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("HOSTNAME", "localhost")
    module = ModuleType("kubernetes")
    module.__dict__.update(config=package.config, client=package.client)
    monkeypatch.setitem(sys.modules, "kubernetes", module)
    detected = cluster.K8sCluster
    monkeypatch.setattr(detected, "_namespace", lambda: "default")
    for name in ("_pod", "_job", "_controller"):
        detected.__dict__[name].__func__.cache_clear()


@pytest.mark.parametrize(
    "owners", [[owner("ReplicaSet")], [owner("StatefulSet")], []], ids=["Deployment", "notebook", "bare"]
)
def test_a_pod_that_belongs_to_no_job_trains_alone(
    empty: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], owners: list[SimpleNamespace]
) -> None:
    in_pod(empty, Kubernetes(owners))
    cluster.join(1.0)
    assert not jax.distributed.is_initialized()
    assert capsys.readouterr().err == "This pod belongs to no Job: training as a single process\n"


@pytest.mark.parametrize(
    ("package", "reason"),
    [
        (Kubernetes([], service_account=False), "Service host/port is not set"),
        (Kubernetes(None), "Kubernetes API Error: 403 - Forbidden"),
    ],
    ids=["service account", "permission"],
)
def test_a_pod_that_may_not_ask_kubernetes_is_told_what_to_do(
    empty: pytest.MonkeyPatch, package: Kubernetes, reason: str
) -> None:
    in_pod(empty, package)
    with pytest.raises(InputError) as refused:
        cluster.join(1.0)
    for text in (reason, "service account that may read pods, jobs and services", "JAX_NUM_PROCESSES=1", "set JAX_C"):
        assert text in str(refused.value)


def test_three_variables_need_no_service_account(empty: pytest.MonkeyPatch) -> None:
    """Nor a metadata server: nothing is asked when everything is given."""
    in_pod(empty, Kubernetes([], service_account=False))
    asked = dict[str, Any]()
    empty.setattr(jax.distributed, "initialize", lambda **arguments: asked.update(arguments))
    variables = {"JAX_COORDINATOR_ADDRESS": "node0:1234", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    for name, value in variables.items():
        empty.setenv(name, value)
    cluster.join(1.0)
    assert (asked["num_processes"], asked["process_id"], asked["cluster_detection_method"]) == (2, 1, "deactivate")


# TPUs without a metadata server


@pytest.fixture
def tpu(empty: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with a TPU whose metadata server does not answer."""
    for module in ("cloud_tpu_cluster", "cluster"):
        empty.setattr(f"jax._src.clusters.{module}.running_in_cloud_tpu_vm", True)
    empty.setenv("GCE_METADATA_IP", f"127.0.0.1:{free_port()}")
    return empty


@pytest.mark.parametrize("hosts", [None, "localhost"])
def test_a_tpu_without_metadata_server_trains_alone(
    tpu: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], hosts: str | None
) -> None:
    """As on Colab and Kaggle."""
    if hosts is not None:
        tpu.setenv("TPU_WORKER_HOSTNAMES", hosts)
    cluster.join(1.0)
    assert not jax.distributed.is_initialized()
    assert "no metadata server, and no other machine is described: training as a single" in capsys.readouterr().err


def test_tpu_hosts_without_metadata_server_are_told_what_to_do(tpu: pytest.MonkeyPatch) -> None:
    tpu.setenv("TPU_WORKER_HOSTNAMES", "host0,host1")
    with pytest.raises(
        MachineError, match=r"metadata server .* does not answer\. Start it again, or set JAX_COORDINATOR"
    ):
        cluster.join(1.0)


def test_slices_of_the_environment_and_the_mesh_agree(empty: pytest.MonkeyPatch) -> None:
    cluster.check_slices(4)
    empty.setenv("MEGASCALE_NUM_SLICES", "2")
    for slices in (2, -1):
        cluster.check_slices(slices)
    with pytest.raises(InputError, match=r"mesh\.slices=4, but the environment has MEGASCALE_NUM_SLICES=2"):
        cluster.check_slices(4)


# GPUs


@pytest.fixture
def gpus(empty: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """A machine with four GPUs, and jax for them."""
    for number in range(4):
        (tmp_path / str(number)).mkdir()
    empty.setattr(cluster, "_GPU_FILES", tmp_path)
    empty.setattr(cluster, "_GPU_PLUGINS", ("jax",))
    before = jax.config.values["jax_platforms"]
    jax.config.update("jax_platforms", None)
    yield empty
    jax.config.update("jax_platforms", before)


def task(monkeypatch: pytest.MonkeyPatch, rank: int, tasks: int) -> None:
    for name, value in slurm_task(rank, tasks, ",".join(map(str, range(tasks)))).items():
        monkeypatch.setenv(name, value)


def test_one_task_on_a_machine_with_several_gpus_is_told_what_to_do(gpus: pytest.MonkeyPatch) -> None:
    task(gpus, 0, 1)
    with pytest.raises(InputError) as refused:
        cluster.join(1.0)
    message = str(refused.value)
    assert "This machine has 4 GPUs and 1 task of this run" in message
    assert "--ntasks-per-node=4" in message
    assert "JAX_LOCAL_DEVICE_IDS=0,1,2,3" in message


def test_open_mpi_with_several_gpus_is_told_too(gpus: pytest.MonkeyPatch) -> None:
    gpus.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "1")
    gpus.setenv("OMPI_COMM_WORLD_LOCAL_SIZE", "2")
    with pytest.raises(InputError, match="4 GPUs and 2 tasks"):
        cluster.check_gpus()


def test_a_task_that_cannot_see_its_gpu_is_told_what_to_do(gpus: pytest.MonkeyPatch) -> None:
    """`--gpus-per-task=1`: each task sees its own, as number 0."""
    task(gpus, 2, 4)
    gpus.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(InputError, match=r"Task 2 .* would use GPU 2, but sees 1 GPU\. .* without --gpus-per-task"):
        cluster.check_gpus()


@pytest.mark.parametrize("usable", ["a task per GPU", "chosen", "another platform", "no plugin", "no launcher"])
def test_what_uses_all_gpus_or_none_is_not_refused(gpus: pytest.MonkeyPatch, usable: str) -> None:
    task(gpus, 0, 4 if usable == "a task per GPU" else 1)
    match usable:
        case "chosen":
            gpus.setenv("JAX_LOCAL_DEVICE_IDS", "0,1,2,3")
        case "another platform":
            jax.config.update("jax_platforms", "cpu")
        case "no plugin":
            gpus.setattr(cluster, "_GPU_PLUGINS", ("not_installed",))
        case "no launcher":
            gpus.delenv("SLURM_STEP_NODELIST")
    cluster.check_gpus()
