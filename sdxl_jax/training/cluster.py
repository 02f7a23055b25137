"""How the processes of a run find each other: explicit variables, or what jax detects.

| described by | processes |
|---|---|
| JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID | as they say |
| JAX_NUM_PROCESSES=1 | one, without detection |
| Open MPI's, Slurm's, a TPU's or a Kubernetes Job's variables and services | as jax detects |
| nothing, or only by what cannot describe several | one |

Under Slurm and Open MPI jax gives each task one GPU, the one with its number within the machine; JAX_LOCAL_DEVICE_IDS
overrides it. A description that cannot be used is refused before a process waits for others.
"""

import importlib.util
import math
import os
import sys
from pathlib import Path

import jax
from jax._src.clusters.k8s_cluster import K8sCluster  # no public name

from sdxl_jax.errors import InputError, MachineError

_EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_LAUNCHERS = (
    *("SLURM_PROCID", "SLURM_NTASKS", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "JOB_COMPLETION_INDEX"),
    *("TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES", "MEGASCALE_SLICE_ID", "MEGASCALE_NUM_SLICES"),
)
_GPU_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
_GPU_FILES = Path("/proc/driver/nvidia/gpus")
"""One entry per GPU of the machine."""


def join(timeout_seconds: float) -> None:
    """Joins the other processes of this run; does nothing where nothing describes any.

    Raises InputError for a description that is incomplete, not permitted to be read, or leaves GPUs unused;
    MachineError for processes that could not join. jax ends the process without an exception at its own timeout, a
    minute after `timeout_seconds`.
    """
    count, index = _number("JAX_NUM_PROCESSES"), _number("JAX_PROCESS_ID")
    if count == 1 and not index:
        return
    check_gpus()
    described = [name for name in _EXPLICIT if name in os.environ]
    complete = len(described) == len(_EXPLICIT) and _local_rank() is None
    jax.config.update("jax_enable_preemption_service", False)  # its handler of SIGTERM would replace ours
    try:
        jax.distributed.initialize(
            num_processes=count,
            process_id=index,
            cluster_detection_method="deactivate" if complete else None,
            initialization_timeout=math.ceil(timeout_seconds) + 60,
        )
    except jax.errors.JaxRuntimeError as error:
        raise MachineError(
            f"This process could not join the others: {str(error).rstrip('.')}. Start all of them again"
        ) from error
    except Exception as error:
        if not described and _alone(error):
            return
        raise _explained(error, described) from error


def check_slices(slices: int) -> None:
    """Raises InputError if `mesh.slices` is not the number of TPU slices that the environment describes; that of TPU
    VMs is only known once they have joined."""
    described = os.environ.get("MEGASCALE_NUM_SLICES")
    if described and described.isdecimal() and slices not in (-1, int(described)):
        raise InputError(
            f"mesh.slices={slices}, but the environment has MEGASCALE_NUM_SLICES={described}. Set mesh.slices to "
            f"{described}"
        )


def check_gpus() -> None:
    """Raises InputError if Slurm or Open MPI started fewer tasks on this machine than it has GPUs for them, or the task
    cannot see its GPU: jax gives each task one."""
    rank, gpus = _local_rank(), _visible_gpus()
    if rank is None or not gpus or "JAX_LOCAL_DEVICE_IDS" in os.environ:
        return
    tasks = _local_tasks()
    if rank >= gpus:
        raise InputError(
            f"Task {rank} of this machine would use GPU {rank}, but sees {gpus} GPU{'s' * (gpus > 1)}. Let all tasks "
            "see all GPUs (Slurm: --ntasks-per-node without --gpus-per-task), or set JAX_LOCAL_DEVICE_IDS=0"
        )
    if tasks < gpus:
        raise InputError(
            f"This machine has {gpus} GPUs and {tasks} task{'s' * (tasks > 1)} of this run, each of which would use "
            f"one GPU. Start one per GPU (Slurm: --ntasks-per-node={gpus}), or let one task use all of them: "
            f"JAX_LOCAL_DEVICE_IDS={','.join(map(str, range(gpus)))}"
        )


def environment() -> str:
    """What the environment says of this process and the others, for messages."""
    values = {name: os.environ.get(name) for name in _EXPLICIT}
    explicit = [f"no {name}" if value is None else f"{name}={value}" for name, value in values.items()]
    detected = [f"{name}={os.environ[name]}" for name in _LAUNCHERS if name in os.environ]
    return ", ".join(detected if detected and not any(values.values()) else [*explicit, *detected])


def _number(name: str) -> int | None:
    value = os.environ.get(name)
    if value is None:
        return None
    if not value.isdecimal():
        raise InputError(f"The environment has {name}={value}. Give a whole number, 0 or more")
    return int(value)


def _local_rank() -> int | None:
    """The number of this task within its machine, if Slurm or Open MPI started it; srun's and mpirun's own variables,
    not those of a batch script."""
    if "SLURM_STEP_NODELIST" in os.environ:
        return _number("SLURM_LOCALID")
    return _number("OMPI_COMM_WORLD_LOCAL_RANK")


def _local_tasks() -> int:
    """Tasks of this run on this machine."""
    if "SLURM_STEP_NODELIST" in os.environ:
        return len(os.environ.get("SLURM_GTIDS", "0").split(","))
    return _number("OMPI_COMM_WORLD_LOCAL_SIZE") or 1


def _visible_gpus() -> int:
    """NVIDIA GPUs that jax would find here, without starting them."""
    platforms = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]  # made at run time
    if platforms and not {"cuda", "gpu"} & set(platforms.split(",")):
        return 0
    if not any(importlib.util.find_spec(name) for name in _GPU_PLUGINS):
        return 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip() not in ("", "-1", "NoDevFiles")])
    return len(list(_GPU_FILES.iterdir())) if _GPU_FILES.is_dir() else 0


def _in_pod() -> bool:
    return "KUBERNETES_SERVICE_HOST" in os.environ


def _tpu_hosts() -> list[str]:
    """Hosts of this process's TPU slice, as the environment gives them."""
    names = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES") or ""
    return [name for name in names.split(",") if name]


def _from(error: Exception, package: str) -> bool:
    return type(error).__module__.split(".")[0] == package


def _alone(error: Exception) -> bool:
    """Whether detection failed because this is the only process."""
    if "must be called before" in str(error):
        return True
    if "coordinator_address should be defined" in str(error):
        return (_number("OMPI_COMM_WORLD_SIZE") or 1) == 1  # jax does not detect every Open MPI
    elsewhere = {"MEGASCALE_NUM_SLICES", "TPU_PROCESS_ADDRESSES_PATH"} & os.environ.keys()
    if _from(error, "requests") and len(_tpu_hosts()) < 2 and not elsewhere:
        note = "This TPU machine has no metadata server, and no other machine is described"
    elif _in_pod() and not _from(error, "kubernetes") and _pod_of_no_job():
        note = "This pod belongs to no Job"
    else:
        return False
    print(f"{note}: training as a single process", file=sys.stderr)
    return True


def _pod_of_no_job() -> bool:
    """Whether Kubernetes runs this pod for something that is not a Job: a Deployment, a notebook, itself."""
    try:
        owners = K8sCluster._pod().metadata.owner_references or []
    except Exception:  # what failed before has the reason
        return False
    return not any(owner.controller and owner.kind == "Job" for owner in owners)


def _explained(error: Exception, described: list[str]) -> InputError | MachineError:
    """The error with its remedy."""
    failed = f"This process could not join the others: {str(error).rstrip('.')}. The environment has {environment()}"
    if described:
        return InputError(f"{failed}. Set {', '.join(_EXPLICIT)}, all three or none; the address is HOST:PORT")
    three = f"set {', '.join(_EXPLICIT)}"
    if _from(error, "requests"):
        return MachineError(f"{failed}. The metadata server of the machine does not answer. Start it again, or {three}")
    if _in_pod():
        return InputError(
            f"{failed}. In a pod either {three}, or give it a service account that may read pods, jobs and services, "
            "in an Indexed Job with a headless service; JAX_NUM_PROCESSES=1 trains as a single process"
        )
    return InputError(f"{failed}. To start the processes without detection, {three}")
