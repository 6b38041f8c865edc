"""Synthetic text-to-SQL: table schemas, questions with their SQL, and rows to run the SQL on.

Every example is a function of its seed. The held-out ones share neither tables nor columns with the
training ones, their values are made of other words, and half of them are phrased in ways in which
training never phrases a question.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from sql_questions import INTENTS, LOOKUP, Intent
from sql_vocabulary import HELD_OUT, TRAINING, Vocabulary

PROMPT = (
    "[user] Write a SQL query to answer the question based on the table schema.\n\n"
    " context: {context}\n\n question: {question} [/user] [assistant]"
)
HELD_OUT_SEED = 20_000_000
NUM_ROWS = 14

Value = str | int


@dataclass(frozen=True, kw_only=True)
class SqlExample:
    """A question about one table, its SQL, and what is needed to fill the table.

    ``columns`` maps each column to the values its rows are made of (text) or its range (numbers).
    ``witness`` holds the values the question names, so that some row has all of them.
    """

    context: str
    question: str
    sql: str
    columns: dict[str, tuple[str, ...] | tuple[int, int]]
    witness: dict[str, tuple[Value, ...]]
    unseen_phrasing: bool
    seed: int

    @property
    def prompt(self) -> str:
        """The whole prompt; the completion is a space and the SQL."""
        return PROMPT.format(context=self.context, question=self.question)

    def rows(self, filling: int) -> list[tuple[Value, ...]]:
        """``NUM_ROWS`` rows of values, one of infinitely many fillings of the table.

        Text repeats, so that grouping and counting have something to do; the numbers of a column
        are all different, so that the order of rows by them is one order.
        """
        rng = random.Random(f"{self.seed}/{filling}")
        table: list[list[Value]] = []
        for column, domain in self.columns.items():
            named = list(self.witness.get(column, ()))
            values: list[Value] = []
            if isinstance(domain[0], int):
                low, high = int(domain[0]), int(domain[1])
                others = [k for k in rng.sample(range(low, high + 1), NUM_ROWS) if k not in named]
                values = (named + others)[:NUM_ROWS]
            else:
                values = (named + list(domain) + rng.choices(domain, k=NUM_ROWS))[:NUM_ROWS]
            # The first row keeps each column's first named value: it satisfies all equalities.
            head, tail = values[0], values[1:]
            rng.shuffle(tail)
            table.append([head, *tail])
        rows = list(zip(*table, strict=True))
        rng.shuffle(rows)
        return rows


def quote(value: Value) -> str:
    """The value as an SQL literal."""
    return str(value) if isinstance(value, int) else "'" + value.replace("'", "''") + "'"


def training_example(seed: int) -> SqlExample:
    """One training example; a seed below ``HELD_OUT_SEED``."""
    if not 0 <= seed < HELD_OUT_SEED:
        raise ValueError(f"training seeds lie in [0, {HELD_OUT_SEED}), got {seed}")
    return _example(TRAINING, seed, unseen_phrasing=False)


def held_out_examples(count: int = 300) -> list[SqlExample]:
    """The first ``count`` held-out examples, half of them in unseen phrasing; no prompt twice."""
    examples: dict[str, SqlExample] = {}
    seed = HELD_OUT_SEED
    while len(examples) < count:
        example = _example(HELD_OUT, seed, unseen_phrasing=len(examples) % 2 == 1)
        seed += 1
        # Of a table without a name of its own, "How many rows are there?" is in training too.
        if not re.fullmatch(r"SELECT COUNT\(\*\) FROM table_\w+", example.sql):
            examples.setdefault(example.prompt, example)
    return list(examples.values())


def _example(words: Vocabulary, seed: int, *, unseen_phrasing: bool) -> SqlExample:
    rng = random.Random(seed)
    lookup = rng.random() < 0.05
    intent = LOOKUP if lookup else rng.choices(INTENTS, [i.weight for i in INTENTS])[0]
    template = rng.choice(intent.unseen if unseen_phrasing else intent.phrasings)
    table, columns = _schema(words, rng, text_only=lookup)
    domains = {column: _domain(words, column, rng) for column in columns}
    names, literals, witness = _fill(intent, domains, rng)

    readable = table.replace("_", " ")
    rows = "rows" if any(c.isdigit() for c in table) else readable
    spoken = {key: _spoken(column, rng) for key, column in names.items()}
    shown = {key: str(value) for key, value in literals.items()}
    question = template.format(rows=rows, **spoken, **shown)
    question = re.sub(r"\ba (?=[aeiou])", "an ", question)
    sql = intent.sql.format(t=table, **names, **{k: quote(v) for k, v in literals.items()})
    kinds = {c: "INTEGER" if isinstance(d[0], int) else "VARCHAR" for c, d in domains.items()}
    context = f"CREATE TABLE {table} ({', '.join(f'{c} {kind}' for c, kind in kinds.items())})"
    return SqlExample(
        context=context,
        question=_noise(question, rng, held_out=words is HELD_OUT),
        sql=sql,
        columns=domains,
        witness=witness,
        unseen_phrasing=unseen_phrasing,
        seed=seed,
    )


def _schema(words: Vocabulary, rng: random.Random, *, text_only: bool) -> tuple[str, list[str]]:
    """A table's name and its columns, in the order of the schema."""
    table = rng.choice(list(words.tables))
    known = words.tables[table] or (*words.text_columns, *words.number_columns)
    text = [c for c in known if c in words.text_columns]
    number = [c for c in known if c in words.number_columns]
    if text_only:
        columns = rng.sample(text, 2)
    elif words.tables[table]:
        columns = [*text, *number]
    else:
        columns = [*rng.sample(text, rng.randint(3, 4)), *rng.sample(number, rng.randint(1, 3))]
    rng.shuffle(columns)
    if rng.random() < 0.5:
        n = rng.randint(*words.numbered_tables)
        table = rng.choice([f"table_name_{n}", f"table_{rng.randint(10**6, 10**8)}_{n}"])
    return table, columns


def _domain(
    words: Vocabulary, column: str, rng: random.Random
) -> tuple[str, ...] | tuple[int, int]:
    """The values of a text column, or the range of a number column."""
    if column in words.number_columns:
        return words.number_columns[column]
    kind = words.text_columns[column]
    values: dict[str, None] = {}
    while len(values) < 5:
        values[_text(words, kind, rng)] = None
    return tuple(values)


def _text(words: Vocabulary, kind: str, rng: random.Random) -> str:
    def pick(names: tuple[str, ...]) -> str:
        return rng.choice(names)

    if kind == "person":
        return f"{pick(words.first_names)} {pick(words.last_names)}"
    if kind == "place":
        return pick(words.places) + pick(words.place_suffixes)
    if kind == "thing":
        return f"{pick(words.adjectives)} {pick(words.nouns)}"
    if kind == "title":
        middle = pick(words.nouns) + rng.choice(["", "'s " + pick(words.adjectives)])
        return f"{rng.choice(['The', 'My', 'A'])} {pick(words.adjectives)} {middle}"
    if kind == "code":
        letters = "".join(rng.choices("ABCDEFGHJKLMNPRSTUVWXYZ", k=rng.randint(1, 3)))
        return f"{letters}{rng.choice(['', '-', ' '])}{rng.randint(1, 9999)}"
    if kind == "date":
        month = rng.choice("January March April June July August October December".split())
        return f"{month} {rng.randint(1, 30)}, {rng.randint(1850, 2023)}"
    if kind == "word":
        return pick(words.words)
    raise ValueError(f"no way to make a value of kind {kind!r}")


def _fill(
    intent: Intent, domains: dict[str, tuple[str, ...] | tuple[int, int]], rng: random.Random
) -> tuple[dict[str, str], dict[str, Value], dict[str, tuple[Value, ...]]]:
    """Choose the columns and values of an intent's placeholders."""
    numbers = [c for c in domains if isinstance(domains[c][0], int)]
    texts = [c for c in domains if c not in numbers]
    rng.shuffle(texts)
    names: dict[str, str] = {}
    if "{n}" in intent.sql:
        names["n"] = rng.choice(numbers)
    for key in "abc":
        if f"{{{key}}}" in intent.sql:
            names[key] = texts.pop()
    # Now and then an equality that stands alone is on a number column.
    spare = [c for c in numbers if c not in names.values()]
    if intent.sql.endswith("{b} = {v}") and spare and rng.random() < 0.2:
        names["b"] = rng.choice(spare)

    literals: dict[str, Value] = {}
    witness: dict[str, tuple[Value, ...]] = {}
    value_of = {"v": "b", "w": "c" if "{c}" in intent.sql else "b"}
    for key, column_key in value_of.items():
        if f"{{{key}}}" in intent.sql:
            column = names[column_key]
            domain = domains[column]
            taken = witness.get(column, ())
            if isinstance(domain[0], int):
                literals[key] = rng.randint(int(domain[0]), int(domain[1]))
            else:
                literals[key] = rng.choice([v for v in domain if v not in taken])
            witness[column] = (*taken, literals[key])
    if "LIMIT {k}" in intent.sql:
        literals["k"] = rng.randint(2, 6)
    elif "{k}" in intent.sql:
        low, high = (int(bound) for bound in domains[names["n"]])
        span = high - low
        literals["k"] = rng.randint(low + span // 4, low + span // 2)
        witness[names["n"]] = (literals["k"],)
        if "{m}" in intent.sql:
            literals["m"] = rng.randint(low + span * 5 // 8, high - span // 8)
            witness[names["n"]] = (literals["k"], literals["m"])
    return names, literals, witness


def _spoken(column: str, rng: random.Random) -> str:
    """The column as a question says it."""
    if rng.random() < 0.08:
        return column
    readable = column.replace("_", " ")
    if rng.random() < 0.05:
        return readable.upper() if len(readable) < 6 else readable.title()
    return readable


def _noise(question: str, rng: random.Random, *, held_out: bool) -> str:
    """Some people start a question in lower case or leave out its mark; held-out ones do not."""
    if held_out:
        return question
    if rng.random() < 0.1:
        question = question[0].lower() + question[1:]
    if rng.random() < 0.1:
        question = question.rstrip("?.")
    return question
