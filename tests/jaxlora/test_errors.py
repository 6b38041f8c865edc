"""What an error keeps alive."""

from __future__ import annotations

import weakref
from typing import NoReturn

from jaxlora.errors import forget_frames


class Memory:
    """Something large."""


def fail_in(memory: list[weakref.ref[Memory]], error: Exception) -> NoReturn:
    at_hand = Memory()
    memory.append(weakref.ref(at_hand))
    raise error


def chained(memory: list[weakref.ref[Memory]]) -> RuntimeError:
    """An error with a cause that is another one than what it was raised amid."""
    try:
        try:
            fail_in(memory, OSError("the cause"))
        except OSError as error:
            cause = error
        try:
            fail_in(memory, ValueError("the context"))
        except ValueError:
            raise RuntimeError("both") from cause
    except RuntimeError as error:
        return error


def test_an_error_lets_go_of_the_frames_of_its_cause_and_its_context() -> None:
    memory: list[weakref.ref[Memory]] = []
    error = chained(memory)
    assert error.__cause__ is not error.__context__
    assert all(each() is not None for each in memory)
    forget_frames(error)
    assert [each() for each in memory] == [None, None]
    assert error.__cause__ is not None
