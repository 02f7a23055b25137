"""Votes of a blind comparison (`side_by_side`), counted: who was preferred how often, over all pairs, by category and
by challenge, as figures 10 to 12 of Podell et al. (arXiv:2307.01952).

The share is that of the votes with a preference. Its interval is Wilson's (1927, JASA 22, 209–212), at 95 %, of votes
that are independent: several people's votes on the same pairs, or several images of a prompt, are less so, and the true
interval is wider.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sdxl_jax.errors import InputError, fault
from sdxl_jax.evaluation.side_by_side import KEY
from sdxl_jax.files import atomic
from sdxl_jax.files.text import read_text

_QUANTILE = 1.959963984540054
"""Of the standard normal distribution, at 97.5 %."""
_CHOICES = ("left", "right", "same")


class Count(NamedTuple):
    """Votes of a group of pairs."""

    group: str
    a: int
    b: int
    same: int
    """No preference."""

    @property
    def share(self) -> float:
        """Of A among the votes with a preference; NaN where there are none."""
        return self.a / (self.a + self.b) if self.a + self.b else math.nan


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % interval of a share, (0, 1) where there are no trials."""
    if not trials:
        return 0.0, 1.0
    share, z2 = successes / trials, _QUANTILE**2
    middle = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = _QUANTILE / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def read_key(folder: Path) -> dict[str, Any]:
    """The key of the page in a folder. Raises InputError where there is none."""
    path = folder / KEY
    if not path.is_file():
        raise InputError(f"There is no {path}. Give the --out folder in which the page was written")
    key = _read_json(path)
    if missing := [name for name in ("page", "a", "b", "pairs") if name not in key]:
        raise InputError(f"{path} has no {missing[0]}. Give the key that was written with the page")
    return key


def read_votes(key: Mapping[str, Any], paths: Sequence[Path]) -> list[tuple[int, str]]:
    """(number of a pair, "a", "b" or "same") for each vote in files that the page has saved.

    Raises InputError for files of another page, for votes that the page cannot give, for a file without votes, and for
    two that one browser has saved.
    """
    found, seen = list[tuple[int, str]](), dict[Any, Path]()
    for path in paths:
        content = _read_json(path)
        if content.get("page") != key["page"]:
            raise InputError(
                f"{path} has the votes of page {content.get('page')}, the key is that of page {key['page']}. Give the "
                "folder of that page with --out"
            )
        votes = content.get("votes")
        if not isinstance(votes, dict) or not votes:
            raise InputError(f"{path} has no votes. Vote on the page, save the votes, and give that file")
        if (other := seen.setdefault(content.get("ballot", path), path)) is not path:
            raise InputError(
                f"{path} and {other} are of the same voter: one browser has saved both, and its later file has all of "
                "its votes. Give the later one alone"
            )
        for number, choice in votes.items():
            if not number.isdecimal() or int(number) >= len(key["pairs"]) or choice not in _CHOICES:
                raise InputError(
                    f"{path} has the vote {number}: {choice}. Expected the number of a pair, 0 to "
                    f"{len(key['pairs']) - 1}, and one of {', '.join(_CHOICES)}"
                )
            left = key["pairs"][int(number)]["left"]
            found.append((int(number), "same" if choice == "same" else _of_side(left, choice)))
    return found


def _of_side(left: str, choice: str) -> str:
    other = "b" if left == "a" else "a"
    return left if choice == "left" else other


def count(key: Mapping[str, Any], votes: Sequence[tuple[int, str]]) -> dict[str, list[Count]]:
    """The counts of all pairs, of each category, and of each challenge, if there are any; by what they are of."""
    pairs = key["pairs"]

    def by(name: str, group: Callable[[Mapping[str, Any]], str]) -> Iterator[tuple[str, list[Count]]]:
        counters: dict[str, Counter[str]] = {}
        for number, whose in votes:
            counters.setdefault(group(pairs[number]), Counter())[whose] += 1
        counters.pop("", None)  # pairs without a challenge
        if counters:
            yield (
                name,
                [Count(each, *(counters[each][whose] for whose in ("a", "b", "same"))) for each in sorted(counters)],
            )

    return {
        **dict(by("all", lambda pair: "all")),
        **dict(by("category", lambda pair: pair["category"])),
        **dict(by("challenge", lambda pair: pair["challenge"])),
    }


def table(key: Mapping[str, Any], counts: Mapping[str, Sequence[Count]]) -> str:
    """A Markdown table: a line per group."""
    lines = [
        f"A is {key['a']}, B is {key['b']}.",
        "",
        "| | prompts | A preferred | 95 % interval | votes for A | for B | no preference |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, groups in counts.items():
        for each in groups:
            low, high = wilson(each.a, each.a + each.b)
            share = "–" if math.isnan(each.share) else f"{100 * each.share:.1f} %"
            interval = f"{100 * low:.1f} to {100 * high:.1f} %"
            cells = ("" if name == "all" else name, each.group, share, interval, each.a, each.b, each.same)
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def plot(key: Mapping[str, Any], counts: Mapping[str, Sequence[Count]], path: Path) -> None:
    """Writes a panel each for categories and challenges: A's share with its interval; atomically. Needs matplotlib."""
    from matplotlib.figure import Figure

    panels = [(name, list(reversed(groups))) for name, groups in counts.items() if name != "all"]
    heights = [len(groups) + 1.5 for _, groups in panels]
    figure = Figure(figsize=(7, 1 + 0.32 * sum(heights)))
    axes: Any = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": heights})
    for axis, (name, groups) in zip(axes[:, 0], panels, strict=True):
        decided = [each for each in groups if each.a + each.b]
        shares = [100 * each.share for each in decided]
        bounds = [[100 * bound for bound in wilson(each.a, each.a + each.b)] for each in decided]
        errors = [
            [share - low for share, (low, _) in zip(shares, bounds, strict=True)],
            [high - share for share, (_, high) in zip(shares, bounds, strict=True)],
        ]
        axis.barh([each.group for each in decided], shares, xerr=errors, color="#8fb3d9", capsize=2)
        axis.axvline(50, color="black", linewidth=0.8)
        axis.set_xlim(0, 100)
        axis.set_ylabel(name)
    axes[-1, 0].set_xlabel(f"{key['a']} preferred to {key['b']}, % of votes with a preference", parse_math=False)
    figure.tight_layout()
    with atomic.replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=150)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_text(path))
    except ValueError as problem:
        raise fault(problem)(f"{path} is not JSON ({problem}). Give a file that the page has saved") from problem
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a JSON object. Give a file that the page has saved")
    return content
