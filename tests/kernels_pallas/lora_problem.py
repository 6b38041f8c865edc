"""Inputs of the LoRA op with a known answer, and everything that must not matter set to NaN."""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np

Runs = tuple[tuple[int, int], ...]
"""(slot, tokens) in token order; slot -1 is tokens without an adapter."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """What a program is compiled for."""

    num_tokens: int
    num_slots: int
    rank: int
    """The bank's capacity."""
    d_in: int
    splits: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """One step: arrays in the shapes of :class:`Shape`, as numpy."""

    shape: Shape
    y: np.ndarray
    x: np.ndarray
    a: np.ndarray
    b: np.ndarray
    token_slots: np.ndarray
    ranks: np.ndarray

    def expected(self) -> np.ndarray:
        """The op's formula, token by token in float64."""
        y = self.y.astype(np.float64)
        for token, slot in self._served():
            for a, b, columns in self._members(slot):
                hidden = a.astype(np.float64) @ self.x[token].astype(np.float64)
                y[token, columns] += hidden @ b.astype(np.float64)
        return y

    def rounded(self) -> np.ndarray:
        """The same as a plain 16-bit model computes it: every result rounded to the dtype."""
        dtype, y = self.y.dtype, self.y.copy()
        for token, slot in self._served():
            for a, b, columns in self._members(slot):
                hidden = (a.astype(np.float32) @ self.x[token].astype(np.float32)).astype(dtype)
                delta = (hidden.astype(np.float32) @ b.astype(np.float32)).astype(dtype)
                y[token, columns] += delta
        return y

    def _served(self) -> list[tuple[int, int]]:
        return [(token, slot) for token, slot in enumerate(self.token_slots) if slot >= 0]

    def _members(self, slot: int) -> list[tuple[np.ndarray, np.ndarray, slice]]:
        members, start, rank = [], 0, self.ranks[slot]
        for m, width in enumerate(self.shape.splits):
            rows = slice(m * self.shape.rank, m * self.shape.rank + rank)
            columns = slice(start, start + width)
            members.append((self.a[slot, rows], self.b[slot, :rank, columns], columns))
            start += width
        return members


def make(
    shape: Shape, runs: Runs, ranks: dict[int, int], dtype: np.dtype, seed: int = 0
) -> Problem:
    """Random inputs of unit size for these runs; tokens after the last run are padding.

    ``ranks`` names the slots that hold an adapter. NaN fills x of tokens without an adapter, slots
    without one, slots that no token names and rank rows above the true rank.
    """
    rng = np.random.default_rng(seed)

    def normal(*sizes: int, scale: float = 1.0) -> np.ndarray:
        return (rng.standard_normal(sizes) * scale).astype(dtype)

    token_slots = np.full(shape.num_tokens, -1, np.int32)
    at = 0
    for slot, count in runs:
        token_slots[at : at + count] = slot
        at += count
    assert at <= shape.num_tokens
    d_out, members = sum(shape.splits), len(shape.splits)
    y, x = normal(shape.num_tokens, d_out), normal(shape.num_tokens, shape.d_in)
    y[:, ::7] = -0.0  # comes back as it is only if nothing, not even 0, was added
    x[token_slots < 0] = np.nan
    a = np.full((shape.num_slots, members * shape.rank, shape.d_in), np.nan, dtype)
    b = np.full((shape.num_slots, shape.rank, d_out), np.nan, dtype)
    true_ranks = np.zeros(shape.num_slots, np.int32)
    for slot, rank in ranks.items():
        true_ranks[slot] = rank
        if slot not in token_slots:
            continue
        for m in range(members):
            a[slot, m * shape.rank : m * shape.rank + rank] = normal(
                rank, shape.d_in, scale=shape.d_in**-0.5
            )
        b[slot, :rank] = normal(rank, d_out, scale=max(rank, 1) ** -0.5)
    return Problem(shape=shape, y=y, x=x, a=a, b=b, token_slots=token_slots, ranks=true_ranks)


def between_layers(array: np.ndarray) -> np.ndarray:
    """A layer's slots as the second of three, whose others hold NaN."""
    other = np.full_like(array, np.nan)
    return np.concatenate([other, array, other])


def bits(values: np.ndarray) -> np.ndarray:
    """The same bytes as integers, so that NaNs compare and -0 differs from 0."""
    return values.view(f"u{values.itemsize}")


def assert_exact(result: np.ndarray, problem: Problem) -> None:
    """What every implementation promises, for the dtype of the problem.

    Tokens without an adapter come back bit for bit. Float32 is within 1e-5; a 16-bit dtype errs at
    most twice as much as the plain computation in it.
    """
    base = problem.token_slots < 0
    np.testing.assert_array_equal(bits(result)[base], bits(problem.y)[base])
    expected = problem.expected()
    if result.dtype == np.float32:
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)
        return
    assert np.isfinite(result.astype(np.float32)).all()
    assert_as_good(result, problem.rounded(), expected)


def assert_as_good(result: np.ndarray, plain: np.ndarray, expected: np.ndarray) -> None:
    """A result errs at most twice as much as the plain computation in its dtype."""
    error = np.abs(result.astype(np.float64) - expected)
    plain_error = np.abs(plain.astype(np.float64) - expected)
    assert error.max() <= 2 * plain_error.max()
    assert np.linalg.norm(error) <= 2 * np.linalg.norm(plain_error)


def gated(z: np.ndarray) -> np.ndarray:
    """SiLU of the first half of the columns, times the second, every result rounded."""
    gate, up = np.split(z, 2, axis=1)
    one = np.ones((), z.dtype)
    with np.errstate(over="ignore"):  # Shut, then.
        return gate * (one / (one + np.exp(-gate))) * up


BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT32 = np.dtype(np.float32)
FLOAT16 = np.dtype(np.float16)
