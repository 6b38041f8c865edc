"""Steps in which the tokens of some rows are constrained."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, wait

from jaxlora.engine.constraint import Constraint, TokenMask, wait_for_masks
from jaxlora.engine.in_flight import StepInFlight
from jaxlora.engine.parts import StepRunner
from jaxlora.engine.scheduler import Plan, Scheduler
from jaxlora.engine.sequence import Sequence
from jaxlora.errors import GenerationError

Stuck = list[tuple[Sequence, GenerationError]]
"""Sequences that cannot go on, and why."""


def has_constraints(plan: Plan) -> bool:
    """Whether any row samples a token that must be one of some."""
    return bool(_constraints(plan))


def run_constrained(
    plan: Plan, done: StepInFlight | None, runner: StepRunner, scheduler: Scheduler
) -> tuple[StepInFlight, Stuck]:
    """Dispatches a step with constraints; ``done`` is the step before it.

    What may come next depends on the token before, so while the forward pass runs, the tokens of
    the step before are read and the masks made. Rows that are late or stuck sample nothing.
    """
    constraints = _constraints(plan)
    for constraint in constraints.values():
        constraint.start()
    forward = runner.forward(plan)
    if done is not None:
        done.read()
    others_wait = len(constraints) < len(plan.rows)
    wait_for_masks(list(constraints.values()), forward.is_done, others_wait=others_wait)
    rows = list(plan.rows)
    masks: dict[int, TokenMask] = {}
    stuck: Stuck = []
    for i, constraint in constraints.items():
        sequence = rows[i].sequence
        if constraint.is_pending:
            scheduler.postpone(sequence)
        elif (error := constraint.error) is not None:
            stuck.append((sequence, error))
        else:
            masks[i] = constraint.mask
            continue
        rows[i] = rows[i]._replace(samples=False)
    plan = dataclasses.replace(plan, rows=rows)
    return StepInFlight(plan, runner.sample(forward, plan, masks)), stuck


def wait_for_a_mask(sequences: Iterable[Sequence], timeout: float) -> None:
    """Waits until one of the sequences that wait for their mask has it, ``timeout`` s at most."""
    constraints = [s.constraint for s in sequences if s.constraint is not None]
    wait([each.future for each in constraints if each.is_pending], timeout, FIRST_COMPLETED)


def _constraints(plan: Plan) -> dict[int, Constraint]:
    """By the row's place in the plan."""
    return {
        i: row.sequence.constraint
        for i, row in enumerate(plan.rows)
        if row.samples and row.sequence.constraint is not None
    }
