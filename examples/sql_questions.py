"""The ways a question is asked: one template a line, each with the SQL it means.

Placeholders: ``{a}``, ``{b}``, ``{c}`` columns as words, ``{v}``, ``{w}`` their values (quoted by
the SQL, not by the question), ``{n}`` a number column, ``{k}``, ``{m}`` numbers with k < m,
``{rows}`` what the rows are called. In the SQL the same names stand for identifiers and literals,
``{t}`` for the table.
Phrasings in ``unseen`` are asked only in the held-out questions.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Intent:
    """One kind of question; ``weight`` is its share of the training questions."""

    sql: str
    phrasings: tuple[str, ...]
    unseen: tuple[str, ...]
    weight: int = 1


def _where(column: str, value: str) -> tuple[str, ...]:
    """Phrases that say column = value."""
    return tuple(
        phrase.format(column=f"{{{column}}}", value=f"{{{value}}}")
        for phrase in ("a {column} of {value}", "the {column} {value}", "{value} as the {column}")
    )


_GREATER = ("greater than", "more than", "over", "above", "larger than", "bigger than")
_LESS = ("less than", "below", "under", "smaller than", "fewer than")


def _compare(operator: str, words: tuple[str, ...], unseen: str, weight: int) -> tuple[Intent, ...]:
    """Rows whose number compares to k: selected, counted, and with a second condition."""
    select = (
        "Which {{a}} has a {{n}} {0} {{k}}?",
        "What is the {{a}} with a {{n}} {0} {{k}}?",
        "List the {{a}} where the {{n}} is {0} {{k}}.",
        "Name the {{a}} for {{n}} {0} {{k}}",
    )
    count = (
        "How many {{rows}} have a {{n}} {0} {{k}}?",
        "How many {{rows}} are there with {{n}} {0} {{k}}?",
        "What is the number of {{rows}} whose {{n}} is {0} {{k}}?",
    )
    both = (
        "Which {{a}} has a {{b}} of {{v}} and a {{n}} {0} {{k}}?",
        "What is the {{a}} with {{b}} {{v}} and {{n}} {0} {{k}}?",
        "When the {{n}} is {0} {{k}} and the {{b}} is {{v}}, what is the {{a}}?",
    )

    def fill(templates: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(template.format(word) for template in templates for word in words)

    return (
        Intent(
            sql=f"SELECT {{a}} FROM {{t}} WHERE {{n}} {operator} {{k}}",
            phrasings=fill(select),
            unseen=(
                f"Show me each {{a}} that has {unseen} {{k}} {{n}}.",
                f"Find the {{a}} having {{n}} {words[0]} {{k}}",
            ),
            weight=weight,
        ),
        Intent(
            sql=f"SELECT COUNT(*) FROM {{t}} WHERE {{n}} {operator} {{k}}",
            phrasings=fill(count),
            unseen=(f"Count the {{rows}} with {{n}} {words[0]} {{k}}.",),
            weight=weight,
        ),
        Intent(
            sql=f"SELECT {{a}} FROM {{t}} WHERE {{b}} = {{v}} AND {{n}} {operator} {{k}}",
            phrasings=fill(both),
            unseen=(f"For the {{b}} {{v}} with a {{n}} {words[0]} {{k}}, name the {{a}}.",),
            weight=weight,
        ),
    )


def _aggregate(function: str, words: tuple[str, ...], weight: int) -> tuple[Intent, ...]:
    """MAX, MIN, AVG or SUM of a number column: of all rows, of some rows, of each group."""
    every = (
        "What is the {0} {{n}}?",
        "Find the {0} {{n}}.",
        "What was the {0} {{n}} of all {{rows}}?",
    )
    some = (
        "What is the {0} {{n}} when the {{b}} is {{v}}?",
        "What is the {0} {{n}} with a {{b}} of {{v}}?",
        "Name the {0} {{n}} for {{b}} {{v}}",
        "Which {0} {{n}} has {{v}} as {{b}}?",
    )
    each = (
        "What is the {0} {{n}} for each {{a}}?",
        "Show every {{a}} and its {0} {{n}}.",
        "For each {{a}}, find the {0} {{n}}.",
    )

    def fill(templates: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(template.format(word) for template in templates for word in words)

    return (
        Intent(
            sql=f"SELECT {function}({{n}}) FROM {{t}}",
            phrasings=fill(every),
            unseen=(f"Tell me the {words[0]} {{n}}.",),
            weight=weight,
        ),
        Intent(
            sql=f"SELECT {function}({{n}}) FROM {{t}} WHERE {{b}} = {{v}}",
            phrasings=fill(some),
            unseen=(f"Where the {{b}} is {{v}}, what is the {words[0]} {{n}}?",),
            weight=weight,
        ),
        Intent(
            sql=f"SELECT {{a}}, {function}({{n}}) FROM {{t}} GROUP BY {{a}}",
            phrasings=fill(each),
            unseen=(f"Per {{a}}, what is the {words[0]} {{n}}?",),
            weight=weight,
        ),
    )


def _superlative(order: str, words: tuple[str, ...]) -> tuple[Intent, ...]:
    """The row, or the k rows, at one end of a number column."""
    one = (
        "Which {{a}} has the {0} {{n}}?",
        "What is the {{a}} with the {0} {{n}}?",
        "Name the {{a}} that has the {0} {{n}}",
        "Find the {{a}} of the {{rows}} with the {0} {{n}}.",
    )
    top = (
        "List the {{a}} of the {{k}} {{rows}} with the {0} {{n}}.",
        "Which {{k}} {{a}} have the {0} {{n}}?",
        "Show the {{k}} {{a}} with the {0} {{n}}.",
    )

    def fill(templates: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(template.format(word) for template in templates for word in words)

    return (
        Intent(
            sql=f"SELECT {{a}} FROM {{t}} ORDER BY {{n}} {order} LIMIT 1",
            phrasings=fill(one),
            unseen=(
                f"Whose {{n}} is the {words[0]}? Give the {{a}}.",
                f"Tell me which {{a}} got the {words[0]} {{n}}",
            ),
            weight=4,
        ),
        Intent(
            sql=f"SELECT {{a}} FROM {{t}} ORDER BY {{n}} {order} LIMIT {{k}}",
            phrasings=fill(top),
            unseen=(f"Give me the {{k}} {{a}} whose {{n}} is {words[0]}.",),
            weight=3,
        ),
    )


_CONDITIONS = tuple(
    f"{first} and {second}"
    for first, second in zip(_where("b", "v"), _where("c", "w"), strict=True)
)

INTENTS: tuple[Intent, ...] = (
    Intent(
        sql="SELECT {a} FROM {t} WHERE {b} = {v}",
        phrasings=(
            "What is the {a} when the {b} is {v}?",
            "What {a} has a {b} of {v}?",
            "Which {a} has {v} as {b}?",
            "Name the {a} with {b} {v}",
            "Name the {a} for {v} {b}",
            "When {v} was the {b} what is under {a}?",
            "Show the {a} where the {b} is {v}.",
            "For {b} {v}, what is the {a}?",
            "Find the {a} whose {b} equals {v}.",
            "What was the {a} for the {b} {v}?",
            "Give me the {a} that has a {b} of {v}.",
            "If the {b} is {v}, what is the {a}?",
            "What are the {a} of {rows} whose {b} is {v}?",
        ),
        unseen=(
            "Can you tell me which {a} goes with the {b} {v}?",
            "I am looking for the {a} that has {v} as its {b}.",
            "With {v} being the {b}, what is the {a}?",
        ),
        weight=14,
    ),
    Intent(
        sql="SELECT {a} FROM {t} WHERE {b} = {v} AND {c} = {w}",
        phrasings=(
            *(f"What {{a}} has {pair}?" for pair in _CONDITIONS),
            *(f"Which {{a}} has {pair}?" for pair in _CONDITIONS),
            "What is the {a} when the {b} is {v} and the {c} is {w}?",
            "Name the {a} with {b} {v} and {c} {w}",
            "What is the {a} of the {b} {v} when the {c} is {w}?",
            "Show the {a} where the {b} is {v} and the {c} equals {w}.",
        ),
        unseen=(
            "For {b} {v} and {c} {w}, tell me the {a}.",
            "Give the {a} that goes with the {b} {v} and the {c} {w}.",
        ),
        weight=9,
    ),
    Intent(
        sql="SELECT {a} FROM {t} WHERE {b} = {v} OR {b} = {w}",
        phrasings=(
            "What is the {a} when the {b} is {v} or {w}?",
            "Which {a} has a {b} of {v} or {w}?",
            "Name the {a} with {b} {v} or {w}",
            "List the {a} whose {b} is either {v} or {w}.",
        ),
        unseen=("Show me each {a} with {v} or {w} as its {b}.",),
        weight=3,
    ),
    Intent(
        sql="SELECT {a} FROM {t} WHERE {b} <> {v}",
        phrasings=(
            "Which {a} has a {b} other than {v}?",
            "What is the {a} when the {b} is not {v}?",
            "List the {a} whose {b} is not {v}.",
            "Name the {a} with a {b} that is not {v}",
        ),
        unseen=("Show every {a} where the {b} is anything but {v}.",),
        weight=3,
    ),
    Intent(
        sql="SELECT {a}, {b} FROM {t}",
        phrasings=(
            "List the {a} and {b} of all {rows}.",
            "What are the {a} and {b} of each row?",
            "Show the {a} and the {b} for all {rows}.",
            "Find every {a} and {b}.",
        ),
        unseen=("Give me the {a} together with the {b} of all {rows}.",),
        weight=2,
    ),
    Intent(
        sql="SELECT {a}, {b} FROM {t} WHERE {c} = {w}",
        phrasings=(
            "What are the {a} and {b} when the {c} is {w}?",
            "List the {a} and {b} with a {c} of {w}.",
            "Name the {a} and {b} for {c} {w}",
            "Show the {a} and the {b} where the {c} is {w}.",
        ),
        unseen=("For the {c} {w}, give both the {a} and the {b}.",),
        weight=3,
    ),
    Intent(
        sql="SELECT DISTINCT {a} FROM {t}",
        phrasings=(
            "What are the different {a}?",
            "List the distinct {a} of all {rows}.",
            "Show all the different {a}.",
            "What are the distinct {a} values?",
        ),
        unseen=("Find the different {a} of the {rows}.",),
        weight=2,
    ),
    Intent(
        sql="SELECT COUNT(DISTINCT {a}) FROM {t}",
        phrasings=(
            "How many different {a} are there?",
            "What is the number of distinct {a}?",
            "Count the different {a}.",
            "How many distinct {a} do the {rows} have?",
        ),
        unseen=("Find how many different {a} there are.",),
        weight=2,
    ),
    Intent(
        sql="SELECT COUNT(*) FROM {t}",
        phrasings=(
            "How many {rows} are there?",
            "What is the total number of {rows}?",
            "Count all the {rows}.",
        ),
        unseen=("Find the number of {rows}.",),
    ),
    Intent(
        sql="SELECT COUNT(*) FROM {t} WHERE {b} = {v}",
        phrasings=(
            "How many {rows} have a {b} of {v}?",
            "How many {rows} have {v} as {b}?",
            "What is the number of {rows} when the {b} is {v}?",
            "How many {rows} are there with {b} {v}?",
            "Count the {rows} whose {b} is {v}.",
        ),
        unseen=(
            "Find how many {rows} have the {b} {v}.",
            "With {b} {v}, how many {rows} are there?",
        ),
        weight=5,
    ),
    Intent(
        sql="SELECT {a}, COUNT(*) FROM {t} GROUP BY {a}",
        phrasings=(
            "How many {rows} are there for each {a}?",
            "Show each {a} and the number of {rows}.",
            "For each {a}, how many {rows} are there?",
            "Count the {rows} of each {a}.",
        ),
        unseen=("Per {a}, how many {rows} are there?",),
        weight=3,
    ),
    Intent(
        sql="SELECT {a} FROM {t} GROUP BY {a} ORDER BY COUNT(*) DESC LIMIT 1",
        phrasings=(
            "Which {a} has the most {rows}?",
            "What is the most common {a}?",
            "Which {a} occurs most often?",
            "Find the most frequent {a}.",
        ),
        unseen=("Name the {a} that is most common.",),
        weight=2,
    ),
    Intent(
        sql="SELECT {a} FROM {t} ORDER BY {n} ASC",
        phrasings=(
            "List the {a} from the lowest to the highest {n}.",
            "Show the {a} in ascending order of {n}.",
            "Sort the {a} by {n}, lowest first.",
        ),
        unseen=("Give me the {a} ordered by {n}, lowest first.",),
        weight=2,
    ),
    Intent(
        sql="SELECT {a} FROM {t} ORDER BY {n} DESC",
        phrasings=(
            "List the {a} from the highest to the lowest {n}.",
            "Show the {a} in descending order of {n}.",
            "Sort the {a} by {n}, highest first.",
        ),
        unseen=("Give me the {a} ordered by {n}, highest first.",),
        weight=2,
    ),
    Intent(
        sql="SELECT {a} FROM {t} WHERE {n} BETWEEN {k} AND {m}",
        phrasings=(
            "Which {a} has a {n} between {k} and {m}?",
            "List the {a} with {n} between {k} and {m}.",
            "What is the {a} when the {n} is between {k} and {m}?",
        ),
        unseen=("Show each {a} whose {n} lies between {k} and {m}.",),
        weight=2,
    ),
    *_compare(">", _GREATER, "higher than", 3),
    *_compare("<", _LESS, "lower than", 3),
    *_compare(">=", ("at least",), "at least", 1),
    *_compare("<=", ("at most",), "at most", 1),
    *_aggregate("MAX", ("highest", "largest", "maximum", "greatest"), 3),
    *_aggregate("MIN", ("lowest", "smallest", "minimum", "least"), 3),
    *_aggregate("AVG", ("average", "mean"), 2),
    *_aggregate("SUM", ("total", "sum of the", "combined"), 2),
    *_superlative("DESC", ("highest", "largest", "most", "greatest")),
    *_superlative("ASC", ("lowest", "smallest", "least")),
)

# Two text columns and a bare value: the column it belongs to is the one that was not asked for.
LOOKUP = Intent(
    sql="SELECT {a} FROM {t} WHERE {b} = {v}",
    phrasings=(
        "Name the {a} for {v}",
        "What is the {a} of {v}?",
        "What {a} does {v} have?",
        "What is the {a} for {v}?",
        "Which {a} belongs to {v}?",
        "{v} has what {a}?",
    ),
    unseen=("Tell me the {a} of {v}.", "I need the {a} for {v}."),
)
