"""Who runs in the next step, and on which pages and slots. Host only: no arrays, no device.

Policy, in this order:

1. Every running sequence that decodes gets its one token, always (unless the host has yet to work
   out what a constraint allows). If the page pool is empty the
   last running sequence is preempted: its pages go back, it waits in its place in the queue and is
   computed again later, tokens it already has included.
2. Waiting sequences are admitted while the largest compiled step has room for more than all that
   run, and while a row, pages for all their tokens and, where they name an adapter, its staged
   weights and a slot are to be had. One that only lacks these is passed over, so that it holds up
   nobody who needs none or whose adapter is resident; for how long a slot may be lacking is bounded
   by :mod:`jaxlora.engine.turns`.
3. Sequences whose prompt is not yet read, those just admitted last, share what is left of the token
   budget, in chunks. The budget is the size of a compiled step, not always the largest: what would
   leave much of that empty is read in smaller ones (:func:`jaxlora.engine.buckets.step_size`), and
   who finds no room in the first of them runs from the next one on.

All of it goes by priority, lower values first, and by arrival among equals. Nobody is preempted to
admit another, whatever the priorities.

A sequence that is admitted begins after the pages that others computed for it
(:mod:`jaxlora.engine.prefix_cache`). While one ahead of it reads what it could begin with, it is
passed over.

A step in which a prompt is scored (``prompt_logprobs``) may have a smaller token budget, because
larger ones do not compute what that takes. A prompt to be scored for which there is no room in a
step is read from the next one on.

A plan is made while the previous step runs, before its tokens are known; a sequence that turns out
to have ended is in one step too many, and that token is dropped.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from array import array
from bisect import insort
from operator import attrgetter
from typing import Any, NamedTuple

from jaxlora.adapters.registry import AdapterRegistry
from jaxlora.engine.buckets import step_size
from jaxlora.engine.pages import PagePool
from jaxlora.engine.prefix_cache import PrefixCache
from jaxlora.engine.sequence import Sequence, Status
from jaxlora.engine.turns import SlotTurns
from jaxlora.engine.waiting import Round, WaitingQueue

_PLACE = attrgetter("place")


class PlannedRow(NamedTuple):
    """One sequence's part in a step."""

    sequence: Sequence
    start: int
    """Context before this step's tokens."""
    num_tokens: int
    samples: bool
    """The step reaches the sequence's last token, so it yields a new one."""

    @property
    def kv_len(self) -> int:
        """Context once the step has run."""
        return self.start + self.num_tokens


@dataclasses.dataclass(frozen=True)
class Plan:
    """One step: its rows, ordered by slot with the base model's last, and slots to fill first."""

    rows: list[PlannedRow]
    loads: list[tuple[int, Any]]
    """What was staged for each of them."""

    @property
    def num_tokens(self) -> int:
        """Tokens over all rows."""
        return sum(row.num_tokens for row in self.rows)


class _Lacks(enum.Enum):
    """What a waiting sequence needs and cannot have now."""

    NOTHING = enum.auto()
    ADAPTER = enum.auto()
    """The adapter, or a slot for it; so does whoever waits for the same one behind it."""
    PREFIX = enum.auto()
    """Pages that another is about to write."""
    PAGES = enum.auto()


class _Budget:
    """The tokens that are left of a step while it is planned."""

    def __init__(self, most: int, most_if_scored: int) -> None:
        self.left = most
        self._only_unscored = most - most_if_scored
        """How many of them go as soon as a prompt is scored."""

    def take(self, sequence: Sequence, wanted: int) -> int:
        """Takes as many as a sequence wants, or as there are for it; returns how many."""
        lost = self._only_unscored
        if lost and not sequence.scores_prompt(sequence.num_computed):
            lost = 0
        count = min(wanted, self.left - lost)
        if count <= 0:
            return 0
        self._only_unscored -= lost
        self.left -= lost + count
        return count


class Scheduler:
    """Plans steps over one page pool, one registry of adapters and ``max_num_seqs`` rows.

    ``step_sizes`` are those that steps are compiled for, ascending.
    """

    def __init__(
        self,
        *,
        pool: PagePool,
        registry: AdapterRegistry | None,
        max_num_seqs: int,
        step_sizes: tuple[int, ...],
        tokens_for_weights: int = 1,
        max_scored_step: int | None = None,
        enable_prefix_caching: bool = True,
        turns: SlotTurns | None = None,
    ) -> None:
        self.pool = pool
        self.prefix_cache = PrefixCache(pool, enabled=enable_prefix_caching)
        self.registry = registry
        self.max_num_seqs = max_num_seqs
        self._step_sizes = step_sizes
        self._tokens_for_weights = tokens_for_weights
        self.max_scored_step = max_scored_step or step_sizes[-1]
        self.turns = turns or SlotTurns()
        self.waiting = WaitingQueue()
        self.running: list[Sequence] = []
        """By place: priority, then arrival."""
        self.num_preemptions = 0
        self._num_arrivals = 0
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))

    @property
    def has_work(self) -> bool:
        """Sequences wait or run."""
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence, behind those of its priority."""
        sequence.arrival = self._num_arrivals
        self._num_arrivals += 1
        self.waiting.add(sequence)
        if sequence.adapter is not None and self.registry is not None:
            self.registry.hold(sequence.adapter, sequence.place)

    def schedule(self) -> Plan:
        """The next step; its tokens count as computed, its samples as in flight, from now on."""
        preemptions = self.num_preemptions
        self.turns.begin_step(self.running)
        for sequence in self.running:
            # Tokens that were read since the last plan may have completed pages.
            self.prefix_cache.remember(sequence)
        decoding = list[Sequence]()
        for sequence in list(self.running):
            # Others before it may have preempted it.
            if sequence.status is not Status.RUNNING or not sequence.decodes:
                continue
            if self._give_page(sequence):
                decoding.append(sequence)
        reading = [sequence for sequence in self.running if sequence.num_to_compute > 1]
        loads = [] if self.registry is None else list(self.registry.place_pinned())
        # What was preempted just now may have a token in flight, which the host could not send.
        if preemptions == self.num_preemptions:
            reading += self._admit_waiting(len(decoding), reading, loads)
        budget = self._budget(len(decoding), _num_to_compute(reading))
        planned = [self._plan(sequence, budget) for sequence in (*decoding, *reading)]
        rows = [row for row in planned if row is not None]
        rows.sort(key=lambda row: row.sequence.slot if row.sequence.slot >= 0 else 1 << 30)
        return Plan(rows, loads)

    def postpone(self, sequence: Sequence) -> None:
        """Takes back that a planned step samples for a sequence: a later one computes its last
        token again, which is written where it was."""
        sequence.num_computed -= 1
        sequence.num_in_flight -= 1

    def finish(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is; what it held goes back."""
        if sequence.status is Status.WAITING:
            self._leave_queue(sequence)
        elif sequence.status is Status.RUNNING:
            self.running.remove(sequence)
            self._give_back(sequence)
        if sequence.adapter is not None and self.registry is not None:
            self.registry.let_go(sequence.adapter)
        sequence.status = Status.FINISHED

    def _budget(self, num_decoding: int, num_prompt: int) -> _Budget:
        """The next step's, by how many decode and how many tokens of prompts are to be read."""
        size = step_size(
            self._step_sizes, num_decoding, num_prompt, weights=self._tokens_for_weights
        )
        return _Budget(size, min(size, self.max_scored_step))

    def _plan(self, sequence: Sequence, budget: _Budget) -> PlannedRow | None:
        """All its tokens, or as many as there is room for; None if there is none."""
        wanted = sequence.num_to_compute
        num_tokens = budget.take(sequence, wanted)
        if not num_tokens:
            return None
        samples = num_tokens == wanted
        row = PlannedRow(sequence, sequence.num_computed, num_tokens, samples)
        sequence.num_computed += num_tokens
        sequence.num_in_flight += samples
        return row

    def _give_page(self, sequence: Sequence) -> bool:
        """Makes room for one more token, if need be at the expense of the last; False if that is
        the sequence itself, which then waits again."""
        while sequence.num_computed >= len(sequence.pages) * self.pool.page_size:
            page = self.pool.allocate(1)
            if page is not None:
                sequence.pages.extend(page)
                break
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._give_back(sequence)
        sequence.status = Status.WAITING
        self.waiting.add(sequence)
        self.num_preemptions += 1

    def _admit_waiting(
        self, num_decoding: int, reading: list[Sequence], loads: list[tuple[int, Any]]
    ) -> list[Sequence]:
        """Admits who can be, in turn, beside those who run; returns them."""
        registry, admitted = self.registry, list[Sequence]()
        room = self._step_sizes[-1] - num_decoding - _num_to_compute(reading)
        self.prefix_cache.begin_step(reading)
        slots = registry is not None and registry.slots.has_room
        waiting = Round(self.waiting, with_slotless=slots)
        reached: tuple[float, int] = (-math.inf, 0)
        """The place up to which the queue was gone through."""
        while room > 0 and self._free_rows:
            head = waiting.next()
            if head is None:
                reached = (math.inf, 0)
                break
            place, at, line = head
            sequence = line[at]
            reached = place
            lacks = self._admit(sequence, loads)
            if lacks is _Lacks.PAGES:
                break
            if lacks is _Lacks.NOTHING:
                admitted.append(sequence)
                room -= sequence.num_to_compute
                waiting.push(line, at)
            elif lacks is _Lacks.PREFIX:
                waiting.push(line, at + 1)
            if slots and registry is not None and not registry.slots.has_room:
                slots = False
                waiting.leave_out_slotless()
        if registry is not None and not slots:
            for entry, line in self.waiting.lines.items():
                lacks_slot = entry is not None and entry.slot is None and line[0].place < reached
                if lacks_slot and entry is not None and registry.tier(entry) != "source":
                    self.turns.pass_over(line[0])
        return admitted

    def _leave_queue(self, sequence: Sequence) -> None:
        self.waiting.remove(sequence)
        if sequence.adapter is not None and sequence.adapter not in self.waiting.lines:
            self.turns.forget(sequence.adapter)

    def _admit(self, sequence: Sequence, loads: list[tuple[int, Any]]) -> _Lacks:
        """Lets a sequence run, unless it lacks something."""
        adapter, registry = sequence.adapter, self.registry
        # Asked before pages: what lacks both must not hold up others for the pages.
        if adapter is not None and registry is not None:
            if self.turns.holds_back(sequence) or not registry.has_slot_for(adapter):
                if registry.tier(adapter) != "source":
                    self.turns.pass_over(sequence)
                return _Lacks.ADAPTER
            if not registry.is_ready(adapter):
                return _Lacks.ADAPTER
        found = self.prefix_cache.find(sequence)
        if found is None:
            return _Lacks.PREFIX
        # One more than its tokens, so that it is not preempted as soon as it decodes.
        needed = self.pool.pages_for(sequence.num_known + 1) - len(found)
        pages = self.pool.allocate(needed, found)
        if pages is None:
            return _Lacks.PAGES
        sequence.pages, sequence.num_pages_with_key = array("i", pages), len(found)
        sequence.num_computed = len(found) * self.pool.page_size
        self.prefix_cache.begin(sequence)
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = sequence.num_computed
            self.prefix_cache.count(sequence, sequence.num_computed)
        if adapter is not None and registry is not None:
            sequence.slot, staged = registry.acquire(adapter)
            if staged is not None:
                loads.append((sequence.slot, staged))
            self.turns.admit(sequence, loaded=staged is not None)
        sequence.row = self._free_rows.pop()
        sequence.num_at_admission = sequence.num_known
        sequence.status = Status.RUNNING
        self._leave_queue(sequence)
        insort(self.running, sequence, key=_PLACE)
        return _Lacks.NOTHING

    def _give_back(self, sequence: Sequence) -> None:
        # Steps run in the order they were dispatched, so a step still under way reads and writes
        # these pages, this row and this slot before any later one can.
        self.prefix_cache.remember(sequence)
        self.pool.free(sequence.pages)
        self._free_rows.append(sequence.row)
        if sequence.adapter is not None and self.registry is not None:
            self.registry.release(sequence.adapter)
        sequence.pages, sequence.row, sequence.slot = array("i"), -1, -1
        sequence.num_pages_with_key = sequence.num_computed = 0


def _num_to_compute(sequences: list[Sequence]) -> int:
    return sum(sequence.num_to_compute for sequence in sequences)
