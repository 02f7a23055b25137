"""`load_model`: a path to a model, whatever the path holds. What it holds is found out, not asked.

A run directory, or one checkpoint in it: the averaged weights of the newest, or that, checkpoint.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sdxl_jax import config as configuration
from sdxl_jax import model as models
from sdxl_jax import sharding
from sdxl_jax.config import TrainConfig
from sdxl_jax.errors import InputError
from sdxl_jax.model import Model
from sdxl_jax.sharding import MeshConfig
from sdxl_jax.training.checkpoint import latest_step, restore_ema, restore_frozen
from sdxl_jax.training.state import merge, partition


def load_model(path: str | Path, dtype: jnp.dtype | None = None, mesh: Mesh | None = None) -> Model:
    """The model at a path, its parameters placed on `mesh` (default: a copy on every device).

    dtype: of the parameters; None keeps theirs. It is not that of the computation, which `Compute` sets.

    Raises InputError if there is no model that this version can read.
    """
    run_dir, step = Path(path).absolute(), None
    if run_dir.name.isdecimal() and run_dir.parent.name == "checkpoints":
        run_dir, step = run_dir.parents[1], int(run_dir.name)
    if not (run_dir / "config.json").is_file():
        what = "There is nothing at" if not Path(path).exists() else "There is no model at"
        raise InputError(f"{what} {path}. Expected a run directory of `sdxl-jax train`, or RUN/checkpoints/STEP in one")
    newest = latest_step(run_dir / "checkpoints")
    step = newest if step is None else step
    if step is None or newest is None:
        raise InputError(f"{run_dir} has no checkpoint yet. Train on, or wait for the first")

    if not (run_dir / "checkpoints" / str(step)).is_dir():
        raise InputError(f"{run_dir} has no checkpoint of step {step}. Its newest is that of {newest}")
    config = saved_config(run_dir)
    mesh = mesh or sharding.make_mesh(MeshConfig())
    abstract = jax.eval_shape(functools.partial(models.init, config=config.model), jax.random.key(0))
    trained, frozen = partition(sharding.placed(mesh, abstract), config.training.trains)
    ema = restore_ema(run_dir / "checkpoints", step, trained)
    params = merge(ema, restore_frozen(run_dir, frozen))
    return Model(config.model, params if dtype is None else jax.tree.map(lambda leaf: leaf.astype(dtype), params))


def saved_config(run_dir: Path) -> TrainConfig:
    """The resolved configuration of a run. Raises InputError if it cannot be read."""
    return configuration.from_json(configuration.read_saved(run_dir / "config.json")["config"], TrainConfig)
