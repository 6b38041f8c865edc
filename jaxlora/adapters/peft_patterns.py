"""Patterns of module names in an adapter_config.json, matched as PEFT matches them.

Adapters come from strangers, and a pattern can take time exponential in the name it is matched
with. ``regex`` reads the syntax of ``re``, gives up after a time and lets other threads run.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Collection, Mapping
from typing import Any, Final, TypeVar

import regex  # type: ignore[import-untyped]

from jaxlora.checks import abridged
from jaxlora.errors import AdapterRefusedError

_MATCH_SECONDS: Final = 5.0
_MAX_PATTERN_LEN: Final = 10_000
_MAX_WRITTEN_OUT: Final = 20_000
"""Characters with all counts multiplied out, as `regex` compiles them: in one call, with Python's
lock held, a million of them for seconds."""
_SET_COUNT_OR_OTHER: Final = re.compile(r"\[\^?\]?[^\]]*\]|\{0*(\d*),?\d*\}|.", re.DOTALL)
# In these a parenthesis need not begin or end a group.
_COMMENTS: Final = re.compile(r"\(\?#|\(\?[A-Za-z-]*x")
# To `re` these are the characters themselves; to `regex` a brace may ask for a match with errors,
# and [:alpha:] within a set is a class.
_READ_OTHERWISE: Final = re.compile(r"\{(?!\d*+,?\d*+\})|\[:")
# These `re` does not have, so with PEFT they are errors.
_GROUP_OF_REGEX: Final = re.compile(r"\(\?(?![:=!>#(]|P[<=]|<[=!]|[aiLmsux-]+[:)]).?")
_ESCAPE_OF_REGEX: Final = re.compile(r"\\[A-Za-z](?<![AbBdDsSwWZafnrtvxuUN])")
_ESCAPED: Final = re.compile(r"\\.", re.DOTALL)
_T = TypeVar("_T")


class ModuleMatcher:
    """PEFT's rules for module names, under one limit of time for the whole configuration."""

    def __init__(self) -> None:
        self._deadline = time.monotonic() + _MATCH_SECONDS
        self._compiled: dict[str, Any] = {}

    def lookup(self, patterns: Mapping[str, _T], module: str, default: _T) -> _T:
        """The value of the first pattern that matches the module's name or a dotted end of it."""
        matches = (
            value for key, value in patterns.items() if self._match(rf"(.*\.)?({key})$", module)
        )
        return next(matches, default)

    def names(self, names: str | Collection[str], module: str) -> bool:
        """A string must match the whole name; of a list, one must be the name or its end."""
        if isinstance(names, str):
            return self._match(names, module, whole=True) is not None
        parts = module.split(".")
        return any(".".join(parts[start:]) in names for start in range(len(parts)))

    def layer(self, patterns: Collection[str], module: str) -> int | None:
        """The number that follows the first pattern to match."""
        matches = (self._match(rf"(?:^|.*?\.){p}\.(?P<idx>\d+)\.", module) for p in patterns)
        match = next(filter(None, matches), None)
        return int(match["idx"]) if match and match["idx"] else None

    def _match(self, pattern: str, module: str, *, whole: bool = False) -> Any:
        try:
            if pattern not in self._compiled:
                if len(pattern) > _MAX_PATTERN_LEN:
                    raise AdapterRefusedError(
                        f"The pattern {abridged(pattern)} has {len(pattern)} characters; at most "
                        f"{_MAX_PATTERN_LEN} are accepted."
                    )
                _check_syntax(pattern)
                # regex would keep the last 500 patterns, of whichever adapter.
                self._compiled[pattern] = regex.compile(pattern, cache_pattern=False)
            seconds = self._deadline - time.monotonic()
            if seconds <= 0:
                raise TimeoutError
            compiled = self._compiled[pattern]
            match = compiled.fullmatch if whole else compiled.match
            return match(module, timeout=seconds, concurrent=True)
        except TimeoutError:
            raise AdapterRefusedError(
                f"The pattern {abridged(pattern)} takes too long to match: matching the patterns "
                f"of an adapter may take {_MATCH_SECONDS} s in all."
            ) from None
        except (regex.error, RecursionError, OverflowError) as error:
            raise AdapterRefusedError(
                f"The pattern {abridged(pattern)} is not a regular expression: {error}"
            ) from error


def _check_syntax(pattern: str) -> None:
    """Raises AdapterRefusedError for what `regex` reads otherwise than `re`."""
    unescaped = _ESCAPED.sub("_", pattern)
    foreign = list(filter(_ESCAPE_OF_REGEX.fullmatch, _ESCAPED.findall(pattern)))
    foreign += _GROUP_OF_REGEX.findall(unescaped)
    if foreign:
        raise AdapterRefusedError(
            f"The pattern {abridged(pattern)} is not a regular expression as PEFT reads them: it "
            f"has {foreign[0]}"
        )
    if _READ_OTHERWISE.search(unescaped):
        raise AdapterRefusedError(
            f"The pattern {abridged(pattern)} has a brace that begins no count, or [:, which "
            "PEFT takes for the characters themselves: write \\{ or \\[."
        )
    if _written_out(unescaped) > _MAX_WRITTEN_OUT:
        raise AdapterRefusedError(
            f"The pattern {abridged(pattern)} is too long: its characters times the counts around "
            f"them are more than the {_MAX_WRITTEN_OUT} that are accepted."
        )


def _written_out(unescaped: str) -> int:
    """At least the characters of a pattern with its counts multiplied out."""
    parts = [(part[0], part[1]) for part in _SET_COUNT_OR_OTHER.finditer(unescaped)]
    # Nine digits are too many wherever they stand.
    counts = [None if digits is None else int(digits[:9] or 1) for _, digits in parts]
    if _COMMENTS.search(unescaped):
        return math.prod(filter(None, counts), start=len(unescaped))
    sizes, last = [0], 1  # Of the groups that are open, and of what a count would be about.
    for (text, _), count in zip(parts, counts, strict=True):
        if count is not None:
            sizes[-1] += last * (count - 1)
            last *= count
        elif text == "(":
            sizes.append(1)
        elif text == ")" and len(sizes) > 1:
            last = sizes.pop() + 1
            sizes[-1] += last
        else:
            last = len(text)
            sizes[-1] += last
    return sum(sizes)
