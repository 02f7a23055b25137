"""The promises of checking.py: what jaxtyping refuses is refused, however often a function is defined or called."""

import dataclasses
from collections.abc import Callable
from typing import Any

import beartype
import checking
import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Float, TypeCheckError

checked: Any = checking._decorate(typechecker=beartype.beartype)


def outer(width: int) -> Callable[..., Any]:
    """Defines its function again at each call."""

    @checked
    def inner(
        x: Float[np.ndarray, "batch n"], y: Float[np.ndarray, "batch m"], *, first: bool = True
    ) -> Float[np.ndarray, "batch"]:
        return x[:, 0] if first else y[0, :width]

    return inner


def test_what_fits_is_let_through() -> None:
    for _ in range(2):
        np.testing.assert_array_equal(outer(3)(np.ones((2, 3)), y=np.ones((2, 4))), np.ones(2))
        np.testing.assert_array_equal(outer(2)(np.ones((2, 3)), np.ones((2, 4)), first=False), np.ones(2))


@pytest.mark.parametrize("call", range(2))
def test_parameters_and_results_are_refused_at_every_definition(call: int) -> None:
    del call
    with pytest.raises(TypeCheckError, match="parameter"):
        outer(3)(np.ones((2, 3)), np.ones((3, 4)))
    with pytest.raises(TypeCheckError, match="parameter"):
        outer(3)(np.ones((2, 3), int), np.ones((2, 4)))
    with pytest.raises(TypeCheckError, match=r"return value of test_checking\.outer"):
        outer(3)(np.ones((2, 3)), np.ones((2, 4)), first=False)
    with pytest.raises(TypeCheckError, match="parameter"):
        outer(3)(np.ones((2, 3)), np.ones((2, 4)), first="yes")


def test_an_axis_has_a_size_of_its_own_in_each_call() -> None:
    inner = outer(3)
    for batch in (2, 3):
        assert len(inner(np.ones((batch, 3)), np.ones((batch, 4)))) == batch


def test_wrong_arguments_are_the_usual_type_error() -> None:
    with pytest.raises(TypeError, match="missing a required argument: 'y'"):
        outer(3)(np.ones((2, 3)))


def test_axes_named_after_arguments_are_checked() -> None:
    @checked
    def zeros(height: int, wrong: int = 0) -> Float[np.ndarray, "{height} 2"]:
        return np.zeros((height + wrong, 2))

    assert zeros(3).shape == (3, 2)
    with pytest.raises(TypeCheckError, match="return value"):
        zeros(3, wrong=1)


@pytest.mark.parametrize("call", range(2))
def test_parameters_of_another_shape_are_refused_by_linen(call: int) -> None:
    del call
    dense, x = nn.Dense(3), jnp.ones((2, 4))
    params: Any = dense.init(jax.random.key(0), x)["params"]
    assert dense.apply({"params": params}, x).shape == (2, 3)  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(flax.errors.ScopeParamShapeError):
        dense.apply({"params": params | {"kernel": jnp.ones((4, 5))}}, x)
    with pytest.raises(flax.errors.ScopeParamShapeError):
        dense.apply({"params": params}, jnp.ones((2, 5)))


def test_fields_of_a_dataclass_are_checked_once() -> None:
    @checked
    @dataclasses.dataclass
    class Base:
        x: int

    @checked
    class Derived(Base):
        pass

    assert Derived.__init__ is Base.__init__
    with pytest.raises(TypeCheckError, match="parameter"):
        Derived("one")  # pyright: ignore[reportArgumentType]
