"""Checks of what a caller hands in; each ValueError names field, value and what it must be."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable, Mapping
from typing import Any

_MOST_SHOWN = 400
"""Characters of a value in a message."""


def require(field: str, value: Any, condition: bool, expected: str) -> None:
    """Raises unless the condition holds and the value is no NaN."""
    if isinstance(value, float) and math.isnan(value):
        condition = False
    if not condition:
        shown = repr(value)
        if len(shown) > _MOST_SHOWN:
            shown = f"{shown[:_MOST_SHOWN]}..."
        raise ValueError(f"{field}={shown} must be {expected}")


def convert(
    of: Any, check: Callable[[str, Any], Any], *fields: str, optional: bool = False
) -> None:
    """Puts what ``check`` makes of them in the place of a frozen object's fields; an ``optional``
    one may be None."""
    for field in fields:
        value = getattr(of, field)
        if value is not None or not optional:
            object.__setattr__(of, field, check(field, value))


def integer(field: str, value: Any) -> int:
    """The value as an int; numpy's are integers, floats are not."""
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{field}={value!r} must be an integer") from None


def integers(field: str, values: Any) -> tuple[int, ...]:
    """Distinct integers, in their order."""
    return tuple(dict.fromkeys(integer(field, value) for value in _items(field, values)))


def number(field: str, value: Any) -> Any:
    """The value, if it is a real number of any type."""
    if not isinstance(value, numbers.Real):
        raise ValueError(f"{field}={value!r} must be a number")
    return value


def strings(field: str, values: Any) -> tuple[str, ...]:
    """Strings; one alone stands for itself."""
    given = (values,) if isinstance(values, str) else tuple(_items(field, values))
    for value in given:
        require(field, value, isinstance(value, str), "a string, or several")
    return given


def numbers_by_id(field: str, values: Any) -> dict[int, float]:
    """Numbers by token id, which JSON has as text."""
    require(field, values, isinstance(values, Mapping), "a mapping of token ids to numbers")
    found = {}
    for key, value in values.items():
        is_text = isinstance(key, str) and key.isdecimal() and key.isascii()
        found[int(key) if is_text else integer(field, key)] = float(number(field, value))
    return found


def _items(field: str, values: Any) -> Any:
    try:
        return iter(values)
    except TypeError:
        raise ValueError(f"{field}={values!r} must be a list") from None
