"""Messages about invalid input."""

import math

import pytest

from sdxl_jax.errors import InputError, check_ranges, out_of_memory


@pytest.mark.parametrize(
    ("value", "low", "high", "ends", "expected"),
    [
        (0, 1, math.inf, {}, "1 or more"),
        (math.nan, 0, math.inf, {}, "0 or more"),
        (-1, 0, 2**32 - 1, {}, "0 to 4294967295"),
        (1.5, 0, 1, {}, "0 to 1"),
        (math.nan, 0, 1, {}, "0 to 1"),
        (0.0, 1 / 3600, math.inf, {}, "0.000277778 or more"),
        (1.0, 0, 1, {"below_high": True}, "0 to below 1"),
        (math.inf, 0, math.inf, {"below_high": True}, "0 or more"),
        (0.0, 0, math.inf, {"above_low": True}, "more than 0"),
        (0.0, 0, 0.25, {"above_low": True}, "more than 0, up to 0.25"),
        (0.25, 0, 0.25, {"above_low": True, "below_high": True}, "more than 0, less than 0.25"),
    ],
)
def test_error_for_a_number_out_of_range_gives_the_range(
    value: float, low: float, high: float, ends: dict[str, bool], expected: str
) -> None:
    with pytest.raises(InputError) as raised:
        check_ranges([("first", low if not ends else None, low, high), ("a.name", value, low, high)], **ends)
    assert str(raised.value) == f"a.name={value} is out of range. Give {expected}"


def test_the_ends_of_a_range_and_none_are_inside() -> None:
    check_ranges([("low", 0, 0, 1), ("high", 1, 0, 1), ("far", math.inf, 0, math.inf), ("none", None, 0, 1)])
    check_ranges([("value", 0.5, 0, 1)], above_low=True, below_high=True)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "RESOURCE_EXHAUSTED: Out of memory allocating 12 bytes.\nmore",
            "RESOURCE_EXHAUSTED: Out of memory allocating 12",
        ),
        ("RESOURCE_EXHAUSTED: compile error.\nRan out: 20G of 16G hbm", "Ran out: 20G of 16G hbm"),
        ("INTERNAL: CUDA_ERROR: out of memory", "INTERNAL: CUDA_ERROR: out of memory"),
        ("INVALID_ARGUMENT: shapes differ", None),
        ("", None),
    ],
)
def test_out_of_memory_is_distinguished_from_other_errors(text: str, line: str | None) -> None:
    found = out_of_memory(RuntimeError(text))
    assert found is None if line is None else found is not None and found.startswith(line)
