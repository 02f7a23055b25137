"""`sdxl-jax evaluate side-by-side`: a blind page, and its votes; slow: the page in a browser, and two models."""

import base64
import io
import json
import math
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import Outcome, call
from PIL import Image
from tiny import MODEL, random_model

from sdxl_jax.errors import InputError
from sdxl_jax.evaluation import side_by_side, votes
from sdxl_jax.evaluation.side_by_side import Prompt, choose, make_pairs, read_prompts
from sdxl_jax.evaluation.votes import wilson
from sdxl_jax.sampling.contact_sheet import save_png
from sdxl_jax.weights.convert import Layout, convert

LINES = [
    *("Prompt\tCategory\tChallenge\tNote", 'a "cat" <b>\tAnimals\tBasic\tnone', "a dog\tAnimals\tQuantity\t"),
    *("a fish\tAnimals\tBasic\t", "a red car\tVehicles\tBasic\t", "a blue car\tVehicles\tQuantity\t"),
]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    (tmp_path / "prompts.tsv").write_text("\n".join(LINES) + "\n")
    return tmp_path / "prompts.tsv"


def write_images(folder: Path, level: int, count: int = 5, texts: list[str] | None = None) -> Path:
    """Images of one grey level each, which JPEG keeps: `level` plus their number."""
    folder.mkdir()
    for number in range(count):
        image = Image.new("RGB", (16, 8), (level + number,) * 3)
        save_png(image, folder / f"{number:06d}.png", {} if texts is None else {"prompt": texts[number]})
    Image.new("RGB", (64, 64)).save(folder / "contact_sheet.png")
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    return write_images(tmp_path / "one", 50), write_images(tmp_path / "two", 150)


def run(*arguments: Any) -> Outcome:
    return call("evaluate", "side-by-side", *arguments)


def shown(page: str) -> list[tuple[str, list[int]]]:
    """(prompt, grey levels of the images from left to right) of each pair."""
    found = []
    for section in re.findall(r"<section>(.*?)</section>", page):
        images = [base64.b64decode(data) for data in re.findall(r"base64,([^\"]+)\"", section)]
        levels = [int(np.asarray(Image.open(io.BytesIO(data)))[0, 0, 0]) for data in images]
        found.append((re.search(r"<p>(.*?)</p>", section)[1], levels))  # pyright: ignore[reportOptionalSubscript]
    return found


# The page


def test_the_page_shows_pairs_of_every_category_and_the_key_says_whose_they_are(
    prompts: Path, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    arguments = [*folders, "--prompts", prompts, "--out", tmp_path / "out", "--per-category", "None"]
    outcome = run(*arguments)
    assert outcome.code == 0, outcome
    page = (tmp_path / "out" / "page.html").read_text()
    key = json.loads((tmp_path / "out" / "key.json").read_text())
    assert re.findall("<h2>(.*?)</h2>", page) == ["Animals", "Vehicles"]
    texts = [line.split("\t")[0] for line in LINES[1:]]
    for (text, levels), pair in zip(shown(page), key["pairs"], strict=True):
        number = texts.index(pair["prompt"])
        assert text == pair["prompt"].replace('"', "&quot;").replace("<b>", "&lt;b&gt;")
        assert levels == [50 + number, 150 + number][:: 1 if pair["left"] == "a" else -1]
    assert {pair["left"] for pair in key["pairs"]} == {"a", "b"}
    before = (tmp_path / "out" / "page.html").read_bytes()
    assert run(*arguments).code == 0
    assert (tmp_path / "out" / "page.html").read_bytes() == before
    outcome = run(*arguments, "--shuffle-seed", 1)
    assert outcome.code == 2
    assert "is the key of another page" in outcome.err


def test_the_page_does_not_name_the_models_and_loads_nothing(
    prompts: Path, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    assert run(*folders, "--prompts", prompts, "--out", tmp_path / "out", "--per-category", 2).code == 0
    page = (tmp_path / "out" / "page.html").read_text()
    page = re.sub(r"base64,[^\"]+", "", page)
    assert not re.search(r"\b(one|two)\b|https?:|shuffle|seed", page)
    assert not re.search(r"(src|href)=\"(?!data:image/jpeg;)", page)


def test_sides_are_balanced_and_follow_from_the_seed() -> None:
    prompts = [Prompt(number, str(number), "ab"[number % 2], "") for number in range(50)]
    pairs = make_pairs(prompts, 2, 0)
    assert Counter(pair.a_is_left for pair in pairs) == {True: 50, False: 50}
    assert sorted((pair.prompt, pair.image) for pair in pairs) == [(each, k) for each in prompts for k in range(2)]
    assert [pair.prompt.category for pair in pairs] == ["a"] * 50 + ["b"] * 50
    assert make_pairs(prompts, 2, 0) == pairs != make_pairs(prompts, 2, 1)


def test_so_many_prompts_of_each_category_are_chosen(prompts: Path) -> None:
    every = read_prompts(prompts)
    chosen = choose(every, 2, 0)
    assert Counter(prompt.category for prompt in chosen) == {"Animals": 2, "Vehicles": 2}
    assert chosen == sorted(chosen)
    assert len({tuple(choose(every, 2, seed)) for seed in range(20)}) > 1
    with pytest.raises(InputError, match="per_category=3: the category Vehicles has 2 prompts"):
        choose(every, 3, 0)


def test_a_folder_of_all_prompts_gives_the_images_of_the_chosen_ones(prompts: Path, folders: tuple[Path, Path]) -> None:
    every = read_prompts(prompts)
    chosen = [every[1], every[4]]
    assert side_by_side.open_folder(folders[0], every, chosen, 1).names == ["000001.png", "000004.png"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "has no column prompt and no column category"),
        ("Prompt\tKind\na\tb", "has no column category"),
        ("Prompt\tCategory\n", "has no prompts"),
        ("Prompt\tCategory\na cat\t\n", "prompt 1 has no text or no category"),
        ("Prompt\tCategory\na cat\n", "prompt 1 has no text or no category"),
    ],
)
def test_files_of_prompts_in_another_layout_are_refused(text: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.tsv").write_text(text)
    with pytest.raises(InputError, match=expected):
        read_prompts(tmp_path / "prompts.tsv")


def test_folders_of_other_images_are_refused(prompts: Path, tmp_path: Path) -> None:
    given = ["--prompts", prompts, "--out", tmp_path / "out", "--per-category", "None"]
    texts = ["a dog" for _ in range(5)]
    other = write_images(tmp_path / "other", 0, texts=texts)
    outcome = run(other, other, *given)
    assert outcome.code == 2
    assert """is an image of the prompt 'a dog', expected one of 'a "cat" <b>'""" in outcome.err
    few = write_images(tmp_path / "few", 0, count=3)
    outcome = run(few, few, *given)
    assert outcome.code == 2
    assert "has 3 images. Expected 5, 1 of each of the 5 prompts that were chosen, or 5, of all" in outcome.err
    (few / "000002.png").write_bytes(b"no image")
    outcome = run(few, few, *given[:-1], 1, "--num-images", 2)
    assert "Expected 4, 2 of each of the 2 prompts" in outcome.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["A", "--prompts", "P"], "needs two models or folders of images, and --prompts FILE"),
        (["A", "B"], "needs two models or folders of images, and --prompts FILE"),
        (["A", "B", "--prompts", "P", "--votes", "V"], "Leave out the models and --prompts"),
        (["A", "B", "--prompts", "P", "--plot", "x.png"], "--plot has no effect without --votes"),
        (["--votes", "V"], "Give the --out folder in which the page was written"),
        (["A", "B", "--prompts", "P", "--per-category", "0"], "per_category=0 is out of range"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    arguments: list[str], expected: str, prompts: Path, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    named = {"A": folders[0], "B": folders[1], "P": prompts, "V": tmp_path / "votes.json"}
    outcome = run(*(named.get(word, word) for word in arguments), "--out", tmp_path / "out")
    assert outcome.code == 2
    assert expected in outcome.err


# The votes


def test_wilsons_interval_is_that_of_the_textbook() -> None:
    """Newcombe 1998, Statistics in Medicine 17, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    published = {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0.0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }
    for (successes, trials), expected in published.items():
        assert wilson(successes, trials) == pytest.approx(expected, abs=5e-5)
        low, high = wilson(trials - successes, trials)
        assert (1 - high, 1 - low) == pytest.approx(expected, abs=5e-5)
    assert wilson(0, 0) == (0, 1)


KEY = {
    "page": "p",
    "a": "one",
    "b": "two",
    "pairs": [
        {"category": "Animals", "challenge": "Basic", "left": "a"},
        {"category": "Animals", "challenge": "Quantity", "left": "b"},
        {"category": "Vehicles", "challenge": "", "left": "b"},
    ],
}


def save(path: Path, choices: dict[str, str], page: str = "p", voter: str = "") -> Path:
    path.write_text(json.dumps({"page": page, "ballot": f"of {voter}", "voter": voter, "votes": choices}))
    return path


def test_votes_are_counted_for_whose_image_it_was(tmp_path: Path) -> None:
    first = save(tmp_path / "first.json", {"0": "left", "1": "left", "2": "same"})
    second = save(tmp_path / "second.json", {"0": "left", "2": "right"}, voter="B")
    counts = votes.count(KEY, votes.read_votes(KEY, [first, second]))
    assert [tuple(each) for each in counts["all"]] == [("all", 3, 1, 1)]
    assert [tuple(each) for each in counts["category"]] == [("Animals", 2, 1, 0), ("Vehicles", 1, 0, 1)]
    assert [tuple(each) for each in counts["challenge"]] == [("Basic", 2, 0, 0), ("Quantity", 0, 1, 0)]
    text = votes.table(KEY, counts)
    assert "A is one, B is two." in text
    assert "| category | Animals | 66.7 % | 20.8 to 93.9 % | 2 | 1 | 0 |" in text
    undecided = votes.table(KEY, {"all": [votes.Count("all", 0, 0, 4)]})
    assert "| all | – | 0.0 to 100.0 % | 0 | 0 | 4 |" in undecided
    assert math.isnan(votes.Count("all", 0, 0, 4).share)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("no", "is not JSON"),
        ("[]", "is not a JSON object"),
        ({"page": "other", "votes": {"0": "left"}}, "has the votes of page other, the key is that of page p"),
        ({"page": "p", "votes": {}}, "has no votes"),
        ({"page": "p", "votes": {"3": "left"}}, "has the vote 3: left. Expected the number of a pair, 0 to 2"),
        ({"page": "p", "votes": {"0": "a"}}, "has the vote 0: a"),
    ],
)
def test_files_that_the_page_has_not_saved_are_refused(content: Any, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "votes.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InputError, match=expected):
        votes.read_votes(KEY, [path])


def test_votes_that_are_given_twice_are_refused(tmp_path: Path) -> None:
    """Also where the voter went on between the two."""
    first = save(tmp_path / "first.json", {"0": "left"}, voter="A")
    later = save(tmp_path / "later.json", {"0": "left", "1": "same"}, voter="A")
    with pytest.raises(InputError, match=r"later.json and .*first.json are of the same voter"):
        votes.read_votes(KEY, [first, later])


def test_counting_writes_a_table_and_a_plot(prompts: Path, folders: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(*folders, "--prompts", prompts, "--out", out, "--per-category", "None").code == 0
    key = json.loads((out / "key.json").read_text())
    given = save(tmp_path / "votes.json", {str(n): "left" for n in range(5)}, page=key["page"])
    outcome = run("--votes", given, "--out", out, "--plot", tmp_path / "votes.png")
    assert outcome.code == 0, outcome
    a = sum(pair["left"] == "a" for pair in key["pairs"])
    assert f"| {a} | {5 - a} | 0 |" in outcome.out.splitlines()[4]
    assert (out / "votes.md").read_text() == outcome.out
    with Image.open(tmp_path / "votes.png") as image:
        assert min(image.size) > 200


# Slow


@pytest.mark.slow
def test_models_are_sampled_and_the_same_command_resumes(prompts: Path, tmp_path: Path) -> None:
    models = [tmp_path / "first", tmp_path / "second"]
    for number, path in enumerate(models):
        convert(random_model(MODEL, number), path, Layout.ORBAX, progress=False)
    size = ["--height", 16, "--width", 24, "--steps", 2, "--num-images", 2, "--per-category", 2]
    arguments = [*models, "--prompts", prompts, "--out", tmp_path / "out", *size]
    outcome = run(*arguments)
    assert outcome.code == 0, outcome
    assert "8 pairs in" in outcome.out
    assert all(len(list((tmp_path / "out" / name).glob("*.png"))) == 8 for name in ("a", "b"))
    before = (tmp_path / "out" / "page.html").read_bytes()
    assert len(re.findall(b"<section>", before)) == 8
    (tmp_path / "out" / "b" / "000003.png").unlink()
    assert run(*arguments).code == 0
    # One image of another batch: sums in another order, which JPEG may show.
    assert (tmp_path / "out" / "b" / "000003.png").exists()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")
def test_votes_are_saved_in_a_browser_and_survive_a_reload(
    prompts: Path, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    out = tmp_path / "out"
    assert run(*folders, "--prompts", prompts, "--out", out, "--per-category", "None").code == 0
    key = json.loads((out / "key.json").read_text())
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch_persistent_context(
            tmp_path / "profile", executable_path=CHROMIUM, args=["--no-sandbox"], headless=True, accept_downloads=True
        )
        page = browser.new_page()
        page.goto(f"file://{out / 'page.html'}")
        for number, pair in enumerate(key["pairs"]):
            choice = "same" if number == 2 else "left" if pair["left"] == "a" else "right"
            page.locator(f"input[name=pair-{number}][value={choice}]").check()
        page.reload()
        assert page.locator("#count").inner_text() == "5 of 5"
        assert page.locator("input:checked").count() == 5
        page.get_by_placeholder("Your name").fill("Ann Other")
        page.screenshot(path=tmp_path / "page.png", full_page=True)
        with page.expect_download() as download:
            page.get_by_role("button", name="Save votes").click()
        saved = Path(download.value.path())
        assert download.value.suggested_filename == f"votes-{key['page']}-Ann_Other.json"
        counts = votes.count(key, votes.read_votes(key, [saved]))
        browser.close()
    assert [tuple(each) for each in counts["all"]] == [("all", 4, 0, 1)]
