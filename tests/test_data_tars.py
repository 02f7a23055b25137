"""sdxl_jax.data.build.tars: a tar is streamed, with a few images in memory, and damage is reported."""

import io
import tarfile

import pytest
from image_sources import captions, encoded, everything, split, write_parquet, write_tar

from sdxl_jax.data.build import tars
from sdxl_jax.data.build.records import Record, read, units
from sdxl_jax.data.sources import Refused


def test_a_folder_of_tars_is_read_in_order_and_img2dataset_parquet_beside_is_ignored(tmp_path):
    for name in ("b/1.tar", "a.tar"):
        write_tar(tmp_path / name, {"./x/0.jpg": encoded(), "./x/0.txt": name.encode()})
    write_tar(tmp_path / "c.tgz", {"0.webp": encoded("WEBP"), "0.json": b'{"caption": "c"}'}, "w:gz")
    write_parquet(tmp_path / "a.parquet", {"caption": ["a"], "width": [12]})
    assert captions(tmp_path) == {"a.tar/x/0.jpg": ("a.tar",), "b/1.tar/x/0.jpg": ("b/1.tar",), "c.tgz/0.webp": ("c",)}
    assert [unit.name for unit in units(tmp_path)] == ["a.tar", "b/1.tar", "c.tgz"]


def test_members_that_lead_out_of_the_tar_are_refused_by_name_and_nothing_is_written(tmp_path):
    files = {
        "../evil.jpg": encoded(),
        "/abs.jpg": encoded(),
        "a/../../b.txt": b"x",
        "ok.jpg": encoded(),
        "ok.txt": b"a",
    }
    good, bad = split(write_tar(tmp_path / "t" / "a.tar", files))
    assert list(good) == ["a.tar/ok.jpg"]
    assert list(bad) == ["a.tar/../evil.jpg", "a.tar//abs.jpg", "a.tar/a/../../b.txt"]
    assert set(bad.values()) == {"its path leads out of the tar: absolute, or with .."}
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.tar", "t"]


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_tar_cut_off_gives_the_images_before_the_cut_and_reports_it(tmp_path, mode):
    files = {f"{n}.{kind}": encoded(seed=n) if kind == "jpg" else b"x" for n in range(6) for kind in ("jpg", "txt")}
    whole = write_tar(tmp_path / "whole.tar", files, mode).read_bytes()
    lengths = {len(whole) * share // 8 for share in range(8)} if mode == "w:gz" else range(0, 6 * 2560, 256)
    counts = set()
    for length in lengths:
        (tmp_path / "a.tar").write_bytes(whole[:length])
        *before, cut = everything(tmp_path / "a.tar")
        assert isinstance(cut, Refused) and cut.file == "a.tar"
        assert "cut off or damaged after" in cut.reason and "what follows is lost" in cut.reason
        assert [record.image for record in before if isinstance(record, Record)] == [
            encoded(seed=n) for n in range(len(before))
        ]
        counts.add(len(before))
    assert counts == set(range(7)) if mode == "w" else len(counts) > 2
    assert len(everything(tmp_path / "whole.tar")) == 6


def test_a_tar_damaged_in_the_middle_is_reported(tmp_path):
    path = write_tar(tmp_path / "a.tar", {f"{n}.{kind}": b"x" for n in range(4) for kind in ("jpg", "txt")})
    data = bytearray(path.read_bytes())
    data[4096 : 4096 + 512] = b"\xff" * 512  # the third image's header
    path.write_bytes(data)
    *_, last = everything(path)
    assert isinstance(last, Refused)
    assert last.reason.startswith("cut off or damaged after 1.txt")


def test_a_tar_without_images_is_reported(tmp_path):
    assert everything(write_tar(tmp_path / "a.tar", {"a.cls": b"1", "b.npy": b"2"})) == [
        Refused("a.tar", "no image (.jpg, .png, .webp, .avif, .gif, .tiff, .bmp, …) among its 2 members")
    ]


def test_a_long_tar_is_read_a_few_images_at_a_time(tmp_path, monkeypatch):
    def members():
        for number in range(300):
            yield f"{number}.bmp", bytes(100_000)
            yield f"{number}.txt", b"x"

    path = write_tar(tmp_path / "a.tar", members())
    held = 0

    class Counted(tars._Stem):
        def __init__(self) -> None:
            nonlocal held
            super().__init__()
            held += 1

        def close(self, used, caption_lines):
            nonlocal held
            held -= 1
            return super().close(used, caption_lines)

    monkeypatch.setattr(tars, "_Stem", Counted)
    most = 0
    for _ in read(units(path)[0], verify=False):
        most = max(most, held)
    assert held == 0 and most <= tars._OPEN_STEMS


def test_members_that_cannot_be_used_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "BYTES_LIMIT", 10_000)
    with tarfile.open(tmp_path / "a.tar", "w") as archive:

        def add(name, data=b"", **fields):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            for key, value in fields.items():
                setattr(member, key, value)
            archive.addfile(member, io.BytesIO(data))

        add("a", type=tarfile.DIRTYPE)
        add("a.jpg", encoded())
        add("a.cls", b"7")
        add("a.seg.png", encoded("PNG"))
        add("a.txt", b"a")
        add("a.png", encoded("PNG"))
        add("link.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add("link.txt", b"x")
        add("large.jpg", b"x" * 10_001)
        add("large.txt", b"x")
        add("alone.txt", b"x")
        add("alone.json", b"{}")
        add("._a.jpg", b"x")
        for _ in range(2):
            add("twice.jpg", encoded())
            add("twice.txt", b"t")
            for number in range(4):
                add(f"{_}{number}.jpg", encoded())
                add(f"{_}{number}.txt", b"t")
    good, bad = split(tmp_path / "a.tar")
    assert [record.captions for record in good.values()] == [("a",)] + [("t",)] * 9
    first, *_ = good
    assert first == "a.tar/a.jpg"
    assert bad == {
        "a.tar/a.png": "a second image of the same stem; a.jpg is used",
        "a.tar/link.jpg": "a link or a device, not a file",
        "a.tar/large.jpg": "10001 bytes, the limit is 10000",
        "a.tar/a.seg.png": "image without a caption: no .txt or .json of the same name, close to it in the tar "
        "(`tar --sort=name` writes them so)",
        "a.tar/alone.txt": "caption without an image of the same name close to it in the tar",
        "a.tar/twice.jpg": "a second image of this name; the first is used",
    }
