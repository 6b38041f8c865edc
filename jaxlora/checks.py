"""Checks of what a caller hands in; each ValueError names field, value and what it must be."""

from __future__ import annotations

import math
import numbers
import operator
import os
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_MOST_SHOWN = 400
"""Characters of a value in a message."""
_MOST_OF_A_NAME = 200
_abridging = reprlib.Repr()
_abridging.maxstring = _abridging.maxother = 120


def wrong(field: str, value: Any, expected: str) -> ValueError:
    """The error, with the beginning of the value."""
    try:
        shown = repr(value)
    except (ValueError, RecursionError):  # of too many digits, or too deep
        shown = f"a huge {type(value).__name__}"
    if len(shown) > _MOST_SHOWN:
        shown = f"{shown[:_MOST_SHOWN]}..."
    return ValueError(f"{field}={shown} must be {expected}")


def shown(name: str) -> str:
    """A stranger's name for something, as a terminal or a log may have it: on one line, without
    what moves the cursor, and not at length."""
    text = name if name.isprintable() else name.encode("unicode_escape").decode()
    return text if len(text) <= _MOST_OF_A_NAME else f"{text[:_MOST_OF_A_NAME]}..."


def abridged(value: Any) -> str:
    """A stranger's value, as Python would write it but not at length."""
    return _abridging.repr(value)


def some(names: Sequence[str]) -> str:
    """Up to five names, and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def require(field: str, value: Any, condition: bool, expected: str) -> None:
    """Raises unless the condition holds and the value is no NaN."""
    if isinstance(value, float) and math.isnan(value):
        condition = False
    if not condition:
        raise wrong(field, value, expected)


def convert(
    of: Any, check: Callable[[str, Any], Any], *fields: str, optional: bool = False
) -> None:
    """Puts what ``check`` makes of them in the place of a frozen object's fields; an ``optional``
    one may be None."""
    for field in fields:
        value = getattr(of, field)
        if value is not None or not optional:
            object.__setattr__(of, field, check(field, value))


def boolean(field: str, value: Any) -> bool:
    """True or False, numpy's too, and not what counts as one, as the text "false" does."""
    # By its type, numpy, which takes a while to import, would have to be there.
    is_numpys = str(getattr(value, "dtype", None)) == "bool" and value.shape == ()
    require(field, value, isinstance(value, bool) or is_numpys, "true or false")
    return bool(value)


def integer(field: str, value: Any) -> int:
    """The value as an int; numpy's are integers, floats are not."""
    try:
        return operator.index(value)
    except TypeError:
        raise wrong(field, value, "an integer") from None


def integers(field: str, values: Any) -> tuple[int, ...]:
    """Distinct integers, in their order."""
    return tuple(dict.fromkeys(integer(field, value) for value in _items(field, values)))


def number(field: str, value: Any) -> Any:
    """The value, if it is a real number of any type."""
    if not isinstance(value, numbers.Real):
        raise wrong(field, value, "a number")
    return value


def strings(field: str, values: Any) -> tuple[str, ...]:
    """Strings; one alone stands for itself."""
    given = (values,) if isinstance(values, str) else tuple(_items(field, values))
    for value in given:
        require(field, value, isinstance(value, str), "a string, or several")
    return given


def path(field: str, value: Any) -> str:
    """A text or a path, as a text."""
    require(field, value, isinstance(value, str | os.PathLike), "a path")
    return os.fspath(value)


def numbers_by_id(field: str, values: Any) -> dict[int, float]:
    """Numbers by token id, which JSON has as text."""
    require(field, values, isinstance(values, Mapping), "a mapping of token ids to numbers")
    found = {}
    for key, value in values.items():
        is_text = isinstance(key, str) and key.isdecimal() and key.isascii() and len(key) < 20
        try:
            found[int(key) if is_text else integer(field, key)] = float(number(field, value))
        except OverflowError:
            raise wrong(field, value, "a number that a float can hold") from None
    return found


def _items(field: str, values: Any) -> Any:
    try:
        return iter(values)
    except TypeError:
        raise wrong(field, values, "a list") from None
