"""Finds a kernel's fastest configurations on the card at hand, and writes them with all timings.

For each case it begins with the heuristic's choice and what was found there before, and tries what
differs from the best so far in one thing, for some rounds. Programs are compiled in threads, and
nothing is timed meanwhile. What has been found is written after every round: a search may be ended
at any time.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import jax

from benchmarks.record import circumstances
from kernels_pallas.tuning import path_of

Times = dict[str, list[float]]
"""Microseconds a call, several times for each mix."""
GAIN = 1.01
"""How much faster than the heuristic's choice another must be to be taken."""


class Subject(Protocol):
    """A kernel in one case. Cases and configurations are frozen dataclasses."""

    @property
    def kernel(self) -> str:
        """Its name."""

    @property
    def case(self) -> Any:
        """What the configuration is looked up by."""

    def first(self) -> Any:
        """The heuristic's choice."""

    def neighbours(self, config: Any) -> list[Any]:
        """Configurations that can run and differ from one in one thing."""

    def prepare(self, config: Any) -> Callable[[], Times]:
        """Compiles a configuration, in a thread of the tuner's; what is returned takes its times.

        Raises an exception if it cannot be compiled or its results are wrong.
        """


@dataclasses.dataclass
class Search:
    """What has been tried in one case."""

    subject: Subject
    known: Any = None
    """What an earlier search found."""
    times: dict[Any, Times] = dataclasses.field(default_factory=dict)
    failures: dict[Any, str] = dataclasses.field(default_factory=dict)
    prepared: dict[Any, Callable[[], Times]] = dataclasses.field(default_factory=dict)
    """What may be timed again."""

    def time(self, config: Any) -> None:
        """Takes the times of what is prepared, beside those taken before."""
        times = self.times.setdefault(config, {})
        with must_end(f"{config} in {self.subject.case}"):
            for mix, raw in self.prepared[config]().items():
                times.setdefault(mix, []).extend(raw)

    def compare_again(self) -> None:
        """Of many that are timed once, the fastest may be so by chance: it is timed again, right
        after the heuristic's choice, and should it lose, the next."""
        first, compared = self.subject.first(), set()
        for _ in range(3):
            best = self.best()
            if best == first or best in compared or not {first, best} <= self.prepared.keys():
                break
            self.time(first)
            self.time(best)
            compared.add(best)
        kept = {first, self.best()} & self.prepared.keys()
        self.prepared = {config: self.prepared[config] for config in kept}

    def untried(self) -> list[Any]:
        """What to try in the next round."""
        first = self.subject.first()
        if not self.times:
            known = self.known or first
            found = list(dict.fromkeys([first, known, *self.subject.neighbours(known)]))
        else:
            found = self.subject.neighbours(self.best())
        return [c for c in found if c not in self.times and c not in self.failures]

    def best(self) -> Any:
        """The heuristic's choice, unless another was faster."""
        first, best = self.subject.first(), min(self.times, key=self._typical)
        if first in self.times and self._typical(best) * GAIN > self._typical(first):
            return first
        return best

    def entry(self) -> dict[str, Any]:
        """As in the file."""
        trials = [{"config": vars(c), "microseconds": times} for c, times in self.times.items()]
        trials += [{"config": vars(c), "failed": why} for c, why in self.failures.items()]
        return {
            "kernel": self.subject.kernel,
            "case": vars(self.subject.case),
            "config": vars(self.best()),
            "trials": trials,
        }

    def __str__(self) -> str:
        if not self.times:
            return f"{self.subject.case}: nothing could be timed"
        first, best = self.subject.first(), self.best()
        was = f"{self._typical(first):.2f}" if first in self.times else "none"
        differs = {k: v for k, v in vars(best).items() if v != vars(first)[k]}
        return (
            f"{self.subject.kernel} {vars(self.subject.case)}: {was} -> "
            f"{self._typical(best):.2f} us with {differs or 'the choice of the heuristic'}, "
            f"{len(self.times)} timed, {len(self.failures)} failed"
        )

    def _typical(self, config: Any) -> float:
        """Microseconds in the geometric mean over the mixes."""
        medians = [statistics.median(raw) for raw in self.times[config].values()]
        return math.exp(statistics.fmean(map(math.log, medians)))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What a kernel's benchmark is told to tune by."""
    parser.add_argument(
        "--tune", action="store_true", help="try configurations; writes kernels_pallas/tuned"
    )
    parser.add_argument("--budget", type=float, default=400, help="seconds that tuning may take")
    parser.add_argument("--rounds", type=int, default=2, help="of neighbours that tuning tries")


def tune(batches: Sequence[Sequence[Subject]], arguments: argparse.Namespace) -> None:
    """Searches, batch by batch, until about ``--budget`` seconds are over.

    Writes ``--out``, or the file of the device at hand in the package.
    """
    device_kind = jax.devices()[0].device_kind
    path = Path(arguments.out) if arguments.out else path_of(device_kind)
    search(batches, path, device_kind, budget=arguments.budget, rounds=arguments.rounds)


def search(
    batches: Sequence[Sequence[Subject]],
    path: Path,
    device_kind: str,
    *,
    budget: float,
    rounds: int,
) -> None:
    """Searches on the device of this kind, and writes ``path``."""
    deadline = time.monotonic() + budget
    here, before = circumstances(), _read(path, device_kind)
    all_searches: list[Search] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for batch in batches:
            current = [Search(subject, _known(before, subject)) for subject in batch]
            all_searches += current
            for _ in range(rounds):
                _round(current, pool, deadline)
                found = [search.entry() for search in all_searches if search.times]
                path.write_text(_text(device_kind, [*before, {**here, "entries": found}]))
                if time.monotonic() > deadline:
                    print(f"wrote {path}: {budget:.0f} s are over")
                    return
            for search in current:
                print(search, flush=True)
    print(f"wrote {path}")


def _round(searches: Sequence[Search], pool: ThreadPoolExecutor, deadline: float) -> None:
    def prepare(subject: Subject, config: Any) -> Callable[[], Times] | None:
        return subject.prepare(config) if time.monotonic() < deadline else None

    pending: list[tuple[Search, Any, Future[Callable[[], Times] | None]]] = []
    lists = [search.untried() for search in searches]
    # The first of every case first, so that each has something to compare with.
    for i in range(max(map(len, lists))):
        for search, configs in zip(searches, lists, strict=True):
            if i < len(configs):
                future = pool.submit(prepare, search.subject, configs[i])
                pending.append((search, configs[i], future))
    for search, config, future in pending:
        if error := future.exception():
            search.failures[config] = f"{type(error).__name__}: {str(error)[:300]}"
            failure = search.failures[config]
            print(f"{config} in {search.subject.case} failed: {failure}", flush=True)
    for search, config, future in pending:
        if future.exception() is None and (prepared := future.result()):
            search.prepared[config] = prepared
            search.time(config)
    for search in searches:
        if search.times:
            search.compare_again()


@contextlib.contextmanager
def must_end(what: str, seconds: float = 60) -> Iterator[None]:
    """Ends the process if the device has not answered by then: thread blocks that wait for each
    other for ever do not stop by any other means."""

    def give_up() -> None:
        print(f"{what} does not end; what was found before is written", flush=True)
        os._exit(3)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _read(path: Path, device_kind: str) -> list[dict[str, Any]]:
    """The runs of an earlier file."""
    if not path.exists():
        return []
    content = json.loads(path.read_text())
    if content["device"] != device_kind:
        raise ValueError(f'{path} is of "{content["device"]}", not of "{device_kind}"')
    return content["runs"]


def _known(runs: Sequence[dict[str, Any]], subject: Subject) -> Any:
    """What these found for a case, None if nothing."""
    case = json.loads(json.dumps(vars(subject.case)))
    for entry in [entry for run in runs for entry in run["entries"]]:
        if (entry["kernel"], entry["case"]) == (subject.kernel, case):
            return dataclasses.replace(subject.first(), **entry["config"])
    return None


def _text(device_kind: str, runs: list[dict[str, Any]]) -> str:
    """A file with a line for each trial; of two entries for a case the later one stays."""
    runs, seen = json.loads(json.dumps(runs)), []
    for run in reversed(runs):
        kept = []
        for entry in run["entries"]:
            case = entry["kernel"], entry["case"]
            if case not in seen:
                seen.append(case)
                kept.append(entry)
        run["entries"] = kept
    texts = []
    for run in runs:
        head = {key: value for key, value in run.items() if key != "entries"}
        entries = ",\n".join(map(_entry_text, run["entries"]))
        if entries:
            texts.append(f'  {json.dumps(head)[:-1]},\n   "entries": [\n{entries}]}}')
    all_runs = ",\n".join(texts)
    return f'{{"device": {json.dumps(device_kind)},\n "runs": [\n{all_runs}]}}\n'


def _entry_text(entry: dict[str, Any]) -> str:
    head = {key: value for key, value in entry.items() if key != "trials"}
    trials = ",\n".join(f"     {json.dumps(trial)}" for trial in entry["trials"])
    return f'    {json.dumps(head)[:-1]},\n     "trials": [\n{trials}]}}'
