"""Sets of images, their features through a small network, files of statistics: what is read, written and refused."""

import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from sdxl_jax.errors import InputError
from sdxl_jax.evaluation import features, image_sets, statistics
from sdxl_jax.evaluation.features import Network, Wanted
from sdxl_jax.evaluation.image_sets import ArrayImages
from sdxl_jax.evaluation.settings import ResizeMode
from sdxl_jax.evaluation.statistics import Gaussian, Statistics

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (11, 8, 8, 3), np.uint8)


def small_network() -> Network:
    """Six features: means of each channel, of the image and of its upper half."""

    def apply(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        upper = x[:, : x.shape[1] // 2].mean(axis=(1, 2))
        return params["scale"] * jnp.concatenate([x.mean(axis=(1, 2)), upper], axis=1), upper

    return Network("small", lambda image: image.astype(np.float32), jax.jit(apply), {"scale": jnp.ones(())})


def folder(path: Path, images: np.ndarray = IMAGES) -> Path:
    path.mkdir(parents=True)
    for number, image in enumerate(images):
        Image.fromarray(image).save(path / f"{number:03d}.png")
    return path


def expected(images: np.ndarray) -> np.ndarray:
    x = images.astype(np.float64)
    return np.concatenate([x.mean(axis=(1, 2)), x[:, :4].mean(axis=(1, 2))], axis=1)


def stored(**changed: Any) -> Statistics:
    rng = np.random.default_rng(1)
    pool, spatial = (Gaussian(rng.standard_normal(n), np.cov(rng.standard_normal((n, 9)))) for n in (6, 4))
    values = rng.standard_normal((9, 6)).astype(np.float32)
    whole = Statistics(pool, spatial, values, statistics.INCEPTION, ResizeMode.CLEAN, 9, "images of a test")
    return whole._replace(**changed)


# Features


@pytest.mark.parametrize("batch_size", [1, 4, 11, 64])
def test_features_do_not_depend_on_the_batch_size_and_padding_weighs_nothing(batch_size: int) -> None:
    images = image_sets.of_array(IMAGES, "the images")
    found = features.statistics_of(small_network(), images, ResizeMode.TF1, Wanted(True, True), batch_size)
    assert found.features is not None and found.spatial is not None
    assert found.features == pytest.approx(expected(IMAGES), rel=1e-5)
    assert found.pool.mean == pytest.approx(expected(IMAGES).mean(axis=0), rel=1e-6)
    assert found.pool.covariance == pytest.approx(np.cov(expected(IMAGES), rowvar=False), rel=1e-4)
    assert found.spatial.mean.shape == (3,)
    assert (found.images, found.resize, found.source) == (11, ResizeMode.TF1, "the images")


def test_features_of_a_folder_are_those_of_the_array_in_order_of_names(tmp_path: Path) -> None:
    from_folder = image_sets.open_images(folder(tmp_path / "images"), "the images")
    found = features.statistics_of(small_network(), from_folder, ResizeMode.TF1, Wanted(features=True), 4)
    assert found.features == pytest.approx(expected(IMAGES), rel=1e-5)
    np.savez(tmp_path / "images.npz", arr_0=IMAGES)
    from_file = image_sets.open_images(tmp_path / "images.npz", "the images")
    again = features.statistics_of(small_network(), from_file, ResizeMode.TF1, Wanted(features=True), 4)
    assert again.features is not None and found.features is not None
    assert np.array_equal(again.features, found.features)


def test_rows_stop_loading_when_nobody_wants_more() -> None:
    loaded = list[int]()

    def load(number: int) -> np.ndarray:
        loaded.append(number)
        return IMAGES[0].astype(np.float32)

    first = next(iter(features.rows(small_network(), load, range(10_000), 4, "test")))
    assert len(first[0]) == 4
    assert len(loaded) < 100, "no more than a few batches are prepared ahead"


def test_parts_of_processes_cover_all_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    numbers = []
    for index in range(3):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        numbers += features.own_part(11)
    assert numbers == list(range(11))


def test_rows_and_moments_of_all_processes_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exchange itself is jax's; here two processes take turns."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    halves = IMAGES[:5].reshape(5, -1)[:, :6], IMAGES[5:].reshape(6, -1)[:, :6]

    def exchange(sent: list[Any]) -> Any:
        return lambda value: np.stack([value, sent.pop(0)])

    own, other = (statistics.Moments(6) for _ in range(2))
    own.add(halves[0].astype(np.float32))
    other.add(halves[1].astype(np.float32))
    other._sum_up()
    parts = [np.array([other.count], np.float64), other._sum, other._products]
    sent = [part.view(np.uint32) for part in parts]
    monkeypatch.setattr(statistics.multihost_utils, "process_allgather", exchange(sent))
    joined = own.of_all_processes()
    assert joined.count == 11
    assert joined.mean == pytest.approx(np.concatenate(halves).mean(axis=0), rel=1e-12)
    assert joined.covariance == pytest.approx(np.cov(np.concatenate(halves), rowvar=False), rel=1e-9)

    monkeypatch.setattr(features.multihost_utils, "process_allgather", exchange([halves[1]]))
    assert np.array_equal(features.of_all_processes(halves[0], 11), np.concatenate(halves))


# Sets of images that are refused


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (IMAGES / 127.5 - 1, "float64, values -1 to 1.*uint8, 0 to 255: round and clip"),
        (IMAGES.astype(np.float32), "float32.*uint8"),
        (IMAGES.astype(np.int64), "int64"),
        ((IMAGES > 127).astype(np.uint8), "no value above 1.*multiply by 255"),
        (IMAGES[..., 0], "11 × 8 × 8. Expected images × height × width × 3"),
        (IMAGES.transpose(0, 3, 1, 2), "11 × 3 × 8 × 8. Expected"),
        (IMAGES[:1], "has 1 image. A covariance needs two"),
        (IMAGES[:0], "has 0 images"),
    ],
)
def test_arrays_of_another_range_or_shape_are_refused(images: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        image_sets.of_array(images, "the array")


def test_folders_are_refused_before_work_with_the_names_of_what_cannot_be_read(tmp_path: Path) -> None:
    path = folder(tmp_path / "images")
    (path / "broken.png").write_bytes((path / "003.png").read_bytes()[:20])
    (path / "text.jpg").write_text("no image")
    with pytest.raises(InputError, match=r"(?s)2 entries of .*images cannot be read.*broken\.png.*text\.jpg"):
        image_sets.open_images(path, "the images")
    with pytest.raises(InputError, match=r"does not exist"):
        image_sets.open_images(tmp_path / "nothing", "the images")
    one = folder(tmp_path / "one", IMAGES[:1])
    with pytest.raises(InputError, match=r"the images, .*one, has 1 image"):
        image_sets.open_images(one, "the images")
    with pytest.raises(InputError, match=r"is the file"):
        image_sets.open_images(one / "000.png", "the images")


def test_an_image_that_is_cut_short_is_named_while_it_is_read(tmp_path: Path) -> None:
    path = folder(tmp_path / "images", RNG.integers(0, 256, (3, 64, 64, 3), np.uint8))
    whole = (path / "001.png").read_bytes()
    (path / "001.png").write_bytes(whole[: len(whole) // 2])
    images = image_sets.open_images(path, "the images")
    with pytest.raises(InputError, match=r"001\.png cannot be read"):
        features.statistics_of(small_network(), images, ResizeMode.TF1)


def test_mixed_sizes_are_named() -> None:
    class Mixed(ArrayImages):
        @property
        def sizes(self) -> np.ndarray:
            return np.array([[8, 8]] * 10 + [[4, 8]])

    with pytest.raises(InputError, match=r"images of 2 sizes \(1 of 4×8, 10 of 8×8\).*--resize tf1, clean or pytorch"):
        image_sets.check_one_size(Mixed("x", IMAGES))
    image_sets.check_one_size(ArrayImages("x", IMAGES))


# Files


@pytest.mark.parametrize("changed", [{}, {"spatial": None}, {"features": None}, {"images": None, "features": None}])
def test_statistics_come_back_from_a_file_as_they_were(changed: dict[str, Any], tmp_path: Path) -> None:
    whole = stored(**changed)
    statistics.save(whole, tmp_path / "folder" / "file.npz")
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["file.npz"]
    again = statistics.load(tmp_path / "folder" / "file.npz")
    for one, other in zip(
        jax.tree.leaves(whole._replace(source="")), jax.tree.leaves(again._replace(source="")), strict=True
    ):
        assert np.array_equal(one, other)
    assert (again.resize, again.network, again.images) == (whole.resize, whole.network, whole.images)
    assert (again.spatial is None, again.features is None) == (whole.spatial is None, whole.features is None)


@pytest.mark.parametrize(
    ("name", "arrays", "said", "mode"),
    [
        ("VIRTUAL_imagenet256_labeled.npz", ("mu", "sigma", "mu_s", "sigma_s", "arr_0"), None, ResizeMode.TF1),
        ("cifar10-32x32.npz", ("mu", "sigma"), ResizeMode.TF1, ResizeMode.TF1),
        ("cifar10_clean_train_32.npz", ("mu", "sigma"), None, ResizeMode.CLEAN),
        ("mine_clean_custom_na.npz", ("mu", "sigma"), None, ResizeMode.CLEAN),
        ("cifar10_legacy_tensorflow_test_32.npz", ("mu", "sigma"), None, ResizeMode.TF1),
        ("ffhq_legacy_pytorch_trainval70k_1024.npz", ("mu", "sigma"), None, ResizeMode.PYTORCH),
        ("mine_clean_custom_na_kid.npz", ("feats",), None, ResizeMode.CLEAN),
    ],
)
def test_files_of_others_are_read(
    name: str, arrays: tuple[str, ...], said: ResizeMode | None, mode: ResizeMode, tmp_path: Path
) -> None:
    whole = stored()
    assert whole.spatial is not None and whole.features is not None
    values: dict[str, Any] = {
        "mu": whole.pool.mean,
        "sigma": whole.pool.covariance,
        "feats": whole.features,
        "arr_0": IMAGES,
    }
    values |= {"mu_s": whole.spatial.mean, "sigma_s": whole.spatial.covariance}
    np.savez(tmp_path / name, allow_pickle=False, **{each: values[each] for each in arrays})
    found = statistics.load(tmp_path / name, said)
    assert found.resize is mode
    assert (found.spatial is not None) == ("mu_s" in arrays)
    if "feats" in arrays:
        assert found.images == 9
        assert found.pool.covariance == pytest.approx(np.cov(whole.features, rowvar=False), rel=1e-6, abs=1e-9)
    else:
        assert found.images is None
        assert np.array_equal(found.pool.covariance, whole.pool.covariance)
    other = next(each for each in ResizeMode if each is not mode)
    if said is None:
        with pytest.raises(InputError, match=f"has the resize mode {mode.value}, and {other.value} is wanted"):
            statistics.load(tmp_path / name, other)


def test_a_file_that_does_not_say_its_mode_needs_it_said(tmp_path: Path) -> None:
    np.savez(tmp_path / "file.npz", mu=np.zeros(2), sigma=np.eye(2))
    with pytest.raises(InputError, match=r"does not say how its images were resized. Say it with --reference-resize"):
        statistics.load(tmp_path / "file.npz")


def test_pickles_are_refused_and_their_code_is_not_run(tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    (tmp_path / "edm2.pkl").write_bytes(pickle.dumps({"fid": Code()}))
    np.savez(tmp_path / "objects.npz", mu=np.array([Code()], object), sigma=np.eye(1))
    np.save(tmp_path / "object.npy", np.array([Code()], object))
    (tmp_path / "bare.npz").write_bytes(pickle.dumps(Code()))
    with pytest.raises(InputError, match=r"is a pickle, which is not read.*Give an .npz with mu and sigma"):
        statistics.load(tmp_path / "edm2.pkl")
    with pytest.raises(InputError, match=r"mu in .*objects.npz holds Python objects, which are not read"):
        statistics.load(tmp_path / "objects.npz", ResizeMode.TF1)
    for name in ("object.npy", "bare.npz"):
        with pytest.raises(InputError, match=r"cannot be read as .npz"):
            statistics.load(tmp_path / name)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"sigma": np.eye(2)}, "has no statistics|has no mu, only sigma"),
        ({"mu": np.zeros(2)}, "has no sigma, only mu"),
        ({"mu": np.zeros(3), "sigma": np.eye(2)}, "3 means and a covariance of 2 × 2"),
        ({"mu": np.array([np.nan, 0]), "sigma": np.eye(2)}, "mu in .* not an array of finite numbers"),
        ({"mu": np.zeros(2), "sigma": np.eye(2), "mu_s": np.zeros(2)}, "has no sigma_s"),
        ({"mu": np.zeros(2), "sigma": np.eye(2), "resize": "lanczos"}, "the resize mode 'lanczos'. Known: tf1, clean"),
        ({"feats": np.zeros(5)}, "feats in .* with 2 axes"),
    ],
)
def test_damaged_statistics_are_refused(arrays: dict[str, Any], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "file.npz", allow_pickle=False, **arrays)
    with pytest.raises(InputError, match=message):
        statistics.load(tmp_path / "file.npz", ResizeMode.TF1)


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    statistics.save(stored(), tmp_path / "file.npz")
    whole = (tmp_path / "file.npz").read_bytes()
    (tmp_path / "short.npz").write_bytes(whole[:200])
    with pytest.raises(InputError, match=r"cannot be read as .npz"):
        statistics.load(tmp_path / "short.npz")
    with zipfile.ZipFile(tmp_path / "file.npz") as file:
        offset = file.getinfo("sigma.npy").header_offset + 200
    (tmp_path / "flipped.npz").write_bytes(whole[:offset] + bytes([whole[offset] ^ 255]) + whole[offset + 1 :])
    with pytest.raises(InputError, match=r"sigma in .*flipped.npz is damaged"):
        statistics.load(tmp_path / "flipped.npz")


def test_statistics_of_two_modes_or_networks_are_never_compared() -> None:
    one = stored()
    assert statistics.fid(one, one) == pytest.approx(0, abs=1e-9)
    assert statistics.sfid(one, one) == pytest.approx(0, abs=1e-9)
    with pytest.raises(InputError, match=r"the resize mode clean, .* tf1. They cannot be compared"):
        statistics.fid(one, stored(resize=ResizeMode.TF1))
    with pytest.raises(InputError, match=r"the network inception-2015-12-05, .* clip"):
        statistics.sfid(one, stored(network="clip"))
    with pytest.raises(InputError, match=r"sfid needs the moments of spatial features"):
        statistics.sfid(one, stored(spatial=None))


@pytest.mark.slow
def test_features_are_the_same_on_several_devices(tmp_path: Path) -> None:
    """Batches of 3 become batches of 4; the last one is padded."""
    script = (
        "import jax, numpy as np\n"
        "from test_evaluation_files import IMAGES, small_network\n"
        "from sdxl_jax.evaluation import features, image_sets\n"
        "from sdxl_jax.evaluation.settings import ResizeMode\n"
        "images = image_sets.of_array(IMAGES, 'images')\n"
        "found = features.statistics_of(small_network(), images, ResizeMode.TF1, features.Wanted(features=True), 3)\n"
        "print(jax.device_count())\n"
        "np.save('features.npy', found.features)\n"
    )
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = str(Path(__file__).parent)
    ran = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == "4"
    assert np.load(tmp_path / "features.npy") == pytest.approx(expected(IMAGES), rel=1e-5)
