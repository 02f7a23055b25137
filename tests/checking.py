"""jaxtyping's checks of annotations, as strict as its own and quicker: those took a third of the time of many tests.

`jaxtyping.jaxtyped` checks the parameters, calls the function, and checks the parameters a second time together with
the result. It compiles these checks for every function on import, and again each time that a function inside a function
is defined; and it binds every call's arguments to their names. Here checks are compiled at the first call, once for
each function in the source, and a result is checked alone. Functions whose annotations name an argument, as in
"{height} {width}", are left to jaxtyping, and so are the messages about parameters.

Linen, too, checks the shape of every parameter whenever a network is applied, and traces its initial value for that: a
third of the time of tracing. Here it is traced once for each initialiser and shape.
"""

import dataclasses
import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, get_type_hints

import jaxtyping
import numpy as np
from beartype.roar import BeartypeCallHintViolation
from flax.core import meta
from flax.core.scope import Scope

_jaxtyped: Any = jaxtyping.jaxtyped
_one_call = jaxtyping.jaxtyped("context")
"""Within it, an axis has one size."""
_EMPTY = inspect.Parameter.empty


def install() -> None:
    """Replaces `jaxtyping.jaxtyped`, with which its import hook decorates: call it before what is checked is
    imported. And `Scope.param`, Linen's."""
    jaxtyping.jaxtyped = _decorate
    Scope.param = _param  # pyright: ignore[reportAttributeAccessIssue]


def _decorate(given: Any = None, /, **options: Any) -> Any:
    """In place of `jaxtyping.jaxtyped`."""
    typechecker = options.get("typechecker")
    if given is None and typechecker is not None:
        return functools.partial(_decorate, typechecker=typechecker)
    if inspect.isfunction(given) and typechecker is not None:
        return _checked(given, typechecker)
    if not inspect.isclass(given) or typechecker is None:
        return _jaxtyped(*(() if given is None else (given,)), **options)
    if dataclasses.is_dataclass(given) and given.__init__ not in _made:
        setattr(given, "__init__", _checked(given.__init__, typechecker))  # noqa: B010
    return given


_shapes: dict[Any, tuple[int, ...]] = {}
"""Of parameters that Linen has accepted, by initialiser and its arguments."""
_linen_param: Any = Scope.param


def _param(self: Scope, name: str, init_fn: Any, *init_args: Any, unbox: bool = True, **init_kwargs: Any) -> Any:
    """In place of `Scope.param`."""
    key = init_fn, repr(init_args)  # shapes, as tuples or lists, and dtypes
    if self.has_variable("params", name) and unbox and not init_kwargs:
        value = meta.unbox(self.get_variable("params", name))
        if key in _shapes and np.shape(value) == _shapes[key]:
            self.reserve(name, "params")
            return value
        accepted = _linen_param(self, name, init_fn, *init_args)
        _shapes[key] = np.shape(accepted)
        return accepted
    return _linen_param(self, name, init_fn, *init_args, unbox=unbox, **init_kwargs)


class _Checks(NamedTuple):
    parameters: Callable[..., object]
    """Takes the function's arguments."""
    result: Callable[[Any], object]


_known: dict[Any, _Checks | None] = {}
_made = weakref.WeakSet[Any]()
"""The functions that are checked, so that an inherited `__init__` is not checked twice."""


def _checked(function: Any, typechecker: Any) -> Any:
    call = None

    @functools.wraps(function)
    def wrapper(*arguments: Any, **options: Any) -> Any:
        __tracebackhide__ = True
        nonlocal call
        if call is None:
            call = _with_checks(function, typechecker)
        return call(*arguments, **options)

    _made.add(wrapper)
    return wrapper


def _with_checks(function: Any, typechecker: Any) -> Callable[..., Any]:
    key = function.__code__, function.__module__, tuple(function.__annotations__.items())
    if key not in _known:
        _known[key] = _checks(function, typechecker)
    checks = _known[key]
    if checks is None:
        return _jaxtyped(function, typechecker=typechecker)
    parameters, result = checks

    def call(*arguments: Any, **options: Any) -> Any:
        __tracebackhide__ = True
        with _one_call:
            try:
                parameters(*arguments, **options)
            except (BeartypeCallHintViolation, TypeError):
                return _jaxtyped(function, typechecker=typechecker)(*arguments, **options)
            returned = function(*arguments, **options)
            try:
                result(returned)
            except BeartypeCallHintViolation as error:
                name = f"{function.__module__}.{function.__qualname__}"
                message = f"Type-check error whilst checking the return value of {name}: {error}"
                raise jaxtyping.TypeCheckError(message) from error
            return returned

    return call


def _checks(function: Any, typechecker: Any) -> _Checks | None:
    """None: left to jaxtyping."""
    try:
        hints = get_type_hints(function, include_extras=True)
    except Exception:  # names that are not imported; jaxtyping leaves these alone unchecked
        return None
    if any("{" in str(hint) for hint in hints.values()) or inspect.iscoroutinefunction(function):
        return None

    def result(value: Any) -> Any:
        return value

    result.__annotations__ = {"return": hints.pop("return")} if "return" in hints else {}
    signature = inspect.signature(function)
    bare = [
        each.replace(annotation=_EMPTY, default=_EMPTY if each.default is _EMPTY else None)
        for each in signature.parameters.values()
    ]
    scope: dict[str, Any] = {}
    exec(f"def parameters{signature.replace(parameters=bare, return_annotation=_EMPTY)}: pass", scope)
    parameters = scope["parameters"]
    parameters.__annotations__ = hints
    parameters.__defaults__, parameters.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    return _Checks(typechecker(parameters), typechecker(result))
