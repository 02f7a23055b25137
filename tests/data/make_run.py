"""Makes `run_c97d0f8.tar.xz`: a run of commit c97d0f8, and what that commit made of it. See README.md beside it.

It imports names alone that the code has in both places. Where one of them is renamed, `config` follows, for the test
that resumes the run; to make the archive again, take this file as it was when the archive was made.
"""

import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from safetensors.numpy import load_file

import sdxl_jax
from sdxl_jax import config as configuration
from sdxl_jax import model as models
from sdxl_jax.conditioning.micro import MicroConfig
from sdxl_jax.conditioning.text import END_OF_TEXT, Tower
from sdxl_jax.model import Model, ModelConfig
from sdxl_jax.models.clip import Activation, ClipTextConfig
from sdxl_jax.models.initialisers import Parameter
from sdxl_jax.models.unet import UNetConfig
from sdxl_jax.models.vae import VaeConfig

BUCKETS = ((32, 32), (24, 40))
MODEL = ModelConfig(
    unet=UNetConfig(
        block_channels=(4, 8),
        resnets_per_block=1,
        transformer_depth=(0, 1),
        middle_depth=1,
        heads=(1, 2),
        context_dim=8,
        vector_dim=4 + 6 * 4,
        groups=2,
    ),
    vae=VaeConfig(block_channels=(4, 4, 4, 4), resnets_per_block=1, groups=2),
    text=(
        Tower("text_encoder", ClipTextConfig(4, 2, 2, 8), END_OF_TEXT),
        Tower("text_encoder_2", ClipTextConfig(4, 2, 2, 8, Activation.GELU, 4), 0),
    ),
    micro=MicroConfig(embedding_dim=4),
    default_size=(32, 32),
)
SAMPLE = (
    *("--prompt", "image number 3", "--height", "24", "--width", "40", "--steps", "4", "--guidance", "3"),
    *("--sampler", "euler", "--timestep-spacing", "leading", "--seed", "7", "--save-latents"),
)
LAYOUTS = {"diffusers": "diffusers", "single-file": "model.safetensors"}
"""And where `main` writes each."""


def config() -> configuration.TrainConfig:
    """Four steps over the images of `write_images` in ./images, from the weights in ./start."""
    return configuration.TrainConfig(
        data=configuration.DataConfig(folder="images", buckets=BUCKETS, batch_size=8),
        model=MODEL,
        optimiser=configuration.OptimiserConfig(learning_rate=1e-3, warmup_steps=2),
        ema=configuration.EmaConfig(decay=0.9),
        training=configuration.TrainingConfig(steps=4, init_from=("start",)),
        checkpoint=configuration.CheckpointConfig(every_steps=2),
        validation=configuration.ValidationConfig(every_steps=None),
    )


def write_images(folder: Path, images: int = 16) -> None:
    """Captioned images for two buckets, whose files are the same on every machine: BMP is not compressed, and a run
    knows its data by names, captions, sizes and lengths of files. Half of them are twice as large as their bucket, the
    others are cropped by some pixels."""
    folder.mkdir()
    lines = []
    for number in range(images):
        height, width = BUCKETS[number % 2]
        if number % 4 > 1:
            height, width = 2 * height, 2 * width
        elif number % 2:
            height += number
        else:
            width += number + 1
        row, column, channel = np.ogrid[:height, :width, :3]
        pixels = (row * (number + 1) + column * (number + 5) + row * column // 3 + channel * 85) % 256
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number:02d}.bmp")
        lines.append(json.dumps({"file_name": f"{number:02d}.bmp", "text": f"image number {number}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def start_model() -> Model:
    """Every parameter random, so that everything that the UNet is conditioned on has a say. The rows of the token
    embeddings repeat, and take no room in the archive."""
    rng = np.random.default_rng(0)

    def draw(path: tuple[Any, ...], leaf: Parameter) -> jax.Array:
        names = [key.key for key in path]
        if names[-1] == "embedding":
            rows = rng.standard_normal((61, *leaf.shape[1:]), np.float32)
            return jnp.asarray(rows[np.arange(leaf.shape[0]) % len(rows)])
        noise = rng.standard_normal(leaf.shape, np.float32)
        if names[-1] == "kernel":
            stacked = any(name in ("transformer_blocks", "layers") for name in names)
            gain = 0.3 if names[-2] == "conv_out" else 1.0
            return jnp.asarray(gain * noise / math.sqrt(math.prod(leaf.shape[stacked:-1])))
        return jnp.asarray((1.0 if names[-1] == "position_embedding" else 0.1) * noise + (names[-1] == "scale"))

    return Model(MODEL, jax.tree_util.tree_map_with_path(draw, models.abstract(MODEL)))


def hashes(path: Path) -> dict[str, list[Any]]:
    """Tensor -> dtype, shape, hash of its bytes; of a .safetensors file, or of all those below a folder."""
    found = {}
    for file in sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]:
        part = f"{file.parent.relative_to(path).as_posix()}/" if path.is_dir() else ""
        for name, values in sorted(load_file(file).items()):
            digest = hashlib.blake2b(np.ascontiguousarray(values).tobytes(), digest_size=8).hexdigest()
            found[part + name] = [str(values.dtype), list(values.shape), digest]
    return found


def machine() -> dict[str, Any]:
    """What the last digits depend on."""
    processors = Path("/proc/cpuinfo")
    lines = processors.read_text().splitlines() if processors.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    cpu = names[0] if names else platform.processor()
    return {"cpu": cpu, "cores": os.cpu_count(), "jaxlib": metadata.version("jaxlib")}


def main(archive: Path) -> None:
    """In a folder of its own: paths that are saved with the run are relative to it."""
    import compiling

    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        write_images(Path("images"))
        sdxl_jax.convert(start_model(), "start", "orbax")
        Path("config.py").write_text("from make_run import config as get_config\n")
        program = [sys.executable, "-m", "sdxl_jax"]
        for arguments in (
            ["train", "config.py", "--run-dir", "run"],
            ["sample", "run", "--out", "sampled", *SAMPLE],
            *(["convert", "run", path, "--to", layout] for layout, path in LAYOUTS.items()),
        ):
            paths = [str(Path(__file__).parent), os.environ["PYTHONPATH"]]
            environment = compiling.environment(Path("compiled")) | {"PYTHONPATH": os.pathsep.join(paths)}
            subprocess.run([*program, *arguments], check=True, env=environment)
        weights = {layout: hashes(Path(path)) for layout, path in LAYOUTS.items()}
        Path("weights.json").write_text(json.dumps(weights))
        Path("machine.json").write_text(json.dumps(machine()))
        with Image.open("sampled/000000.png") as image:
            np.save("image.npy", np.asarray(image))
        with tarfile.open(archive, "w:xz", preset=9) as tar:
            for path in sorted(Path("run").rglob("*")):
                # Names of TensorBoard's files say which machine wrote them.
                if path.is_file() and "tensorboard" not in path.parts:
                    tar.add(path, path.as_posix(), filter=nobodys)
            for name in ("sampled/latents.npy", "image.npy", "weights.json", "machine.json"):
                tar.add(name, Path(name).name, filter=nobodys)


def nobodys(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without who wrote it, and when."""
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    return member


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
