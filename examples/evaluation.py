"""The held-out check of each demo adapter, for completions of any engine.

``prompts(name)`` gives the held-out prompts as strings, ``score(name, prompts, completions)`` says
how many completions pass the adapter's check:

- ``sql``: the query runs in sqlite and returns what the reference query returns, on three fillings
  of the table (in any order of rows, unless the question asks for one).
- ``json``: the whole completion is one JSON object with exactly the keys ``topic`` and ``answer``,
  both non-empty strings.
- ``pirate``: at least two different words of a pirate's speech are in it.
"""

from __future__ import annotations

import functools
import re
import sqlite3
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from chat_data import held_out_prompts, is_json, is_pirate
from sql_data import SqlExample, Value, held_out_examples

ADAPTERS = ("sql", "json", "pirate")
MAX_NEW_TOKENS = {"sql": 96, "json": 96, "pirate": 96}
"""Enough for every completion the adapters were trained on."""

END_OF_TURN = "<|im_end|>"
"""The model's end-of-sequence token."""

CHAT_TEMPLATE = (
    "<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
)
"""What the chat template of SmolLM2-135M-Instruct makes of one user message."""

_FILLINGS = 3
_MAX_FILLINGS = 8
_MAX_SQLITE_STEPS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Score:
    """How many of ``total`` completions passed, and the prompts and completions that did not."""

    name: str
    right: int
    total: int
    wrong: tuple[tuple[str, str], ...]

    @property
    def share(self) -> float:
        """Between 0 and 1."""
        return self.right / self.total


def prompts(name: str) -> list[str]:
    """The held-out prompts of an adapter: 300 questions for ``sql``, else 140 chat prompts."""
    if name == "sql":
        return list(_sql_by_prompt())
    _check(name)
    return [CHAT_TEMPLATE.format(text=prompt.text) for prompt in held_out_prompts()]


def score(name: str, prompts: Sequence[str], completions: Sequence[str]) -> Score:
    """Check each completion against its prompt; ``prompts`` are any of ``prompts(name)``."""
    if len(prompts) != len(completions) or not prompts:
        raise ValueError(
            f"as many prompts as completions are needed, and at least one; got {len(prompts)} "
            f"prompts and {len(completions)} completions"
        )
    check = _check(name)
    wrong = tuple(
        (prompt, completion)
        for prompt, completion in zip(prompts, completions, strict=True)
        if not check(prompt, completion)
    )
    return Score(name=name, right=len(prompts) - len(wrong), total=len(prompts), wrong=wrong)


def extract_sql(completion: str) -> str:
    """The query in a completion: from SELECT or WITH ... AS to a semicolon, fence or empty line.

    Prose around a query does no harm, so that a model that explains its query is not counted wrong.
    """
    match = re.search(
        r"\b(?:SELECT\b|WITH\s+\w+\s+AS\b).*?(?=;|```|\n\s*\n|$)", completion, re.I | re.S
    )
    return match.group().strip() if match else ""


def _check(name: str) -> Callable[[str, str], bool]:
    if name == "sql":
        return lambda prompt, completion: _sql_is_right(_sql_by_prompt()[prompt], completion)
    if name == "json":
        return lambda _, completion: is_json(completion)
    if name == "pirate":
        return lambda _, completion: is_pirate(completion)
    raise ValueError(f"no adapter {name!r}; there are {', '.join(ADAPTERS)}")


@functools.cache
def _sql_by_prompt() -> dict[str, SqlExample]:
    return {example.prompt: example for example in held_out_examples()}


def _sql_is_right(example: SqlExample, completion: str) -> bool:
    query = extract_sql(completion)
    if not query:
        return False
    in_order = "ORDER BY" in example.sql
    for rows, expected in _fillings(example):
        try:
            found = _run(example.context, rows, query)
        except sqlite3.Error:
            return False
        same = found == expected if in_order else Counter(found) == Counter(expected)
        if not same:
            return False
    return True


def _fillings(
    example: SqlExample,
) -> list[tuple[list[tuple[Value, ...]], list[tuple[object, ...]]]]:
    """Rows, and what the reference query returns on them: something, or it would say too little."""
    tried = [example.rows(filling) for filling in range(_MAX_FILLINGS)]
    results = [(rows, _run(example.context, rows, example.sql)) for rows in tried]
    telling = [(rows, expected) for rows, expected in results if expected][:_FILLINGS]
    if len(telling) < _FILLINGS:
        raise ValueError(f"{example.sql!r} returns nothing on nearly every filling of its table")
    return telling


def _run(context: str, rows: list[tuple[Value, ...]], query: str) -> list[tuple[object, ...]]:
    """Run one query on a fresh table in memory; a query that writes or does not end raises."""
    connection = sqlite3.connect(":memory:")
    try:
        connection.execute(context)
        table = context.split()[2]
        marks = ", ".join("?" * len(rows[0]))
        connection.executemany(f"INSERT INTO {table} VALUES ({marks})", rows)
        connection.commit()
        connection.execute("PRAGMA query_only = ON")
        # A true return value interrupts the query.
        connection.set_progress_handler(lambda: True, _MAX_SQLITE_STEPS)
        return connection.execute(query).fetchall()
    finally:
        connection.close()
