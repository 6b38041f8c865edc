"""The tests. ``check`` is their run-time type checker: beartype, an int passing for a float."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype

_CHECK = beartype(conf=BeartypeConf(is_pep484_tower=True))
_checkers: dict[Any, Callable[..., Any]] = {}


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """Of equal functions the one that was checked first. jaxtyping hands over stand-ins: of a
    function's parameters and types but not of what it does. Those of an inner function are equal
    whenever the outer one is called, and to make a checker takes longer than most such calls."""
    defaults = function.__defaults__, function.__kwdefaults__
    types = tuple(function.__annotations__.items())
    key = function.__module__, function.__qualname__, function.__code__, types, str(defaults)
    try:
        hash(key)
    except TypeError:  # a type may be one that cannot be a key
        return _CHECK(function)
    if key not in _checkers:
        _checkers[key] = _CHECK(function)
    return _checkers[key]
