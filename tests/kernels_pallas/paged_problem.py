"""Inputs of paged attention with a known answer, and everything that must not matter set to NaN."""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np

from kernels_pallas.paged_attention.op import PagedBatch
from tests.kernels_pallas.lora_problem import bits

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT32 = np.dtype(np.float32)

Rows = tuple[tuple[int, int], ...]
"""(new tokens, context including them) of each row, in order."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """What a program is compiled for."""

    num_tokens: int
    num_rows: int
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    page_size: int = 4
    pages_per_row: int = 16
    num_pages: int = 80
    decode: bool = False
    sliding_window: int | None = None

    @property
    def scale(self) -> float:
        """Usual factor on the scores."""
        return self.head_dim**-0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """One step in the arrays of :class:`Shape`, as numpy; ``contexts`` holds every row's K and V
    (``[kv_len, KV, D]``, new tokens included)."""

    shape: Shape
    rows: Rows
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    pages: np.ndarray
    batch: PagedBatch
    contexts: tuple[tuple[np.ndarray, np.ndarray], ...]

    def expected(self) -> tuple[np.ndarray, np.ndarray]:
        """The op's formula, token by token and head by head in float64; and the same with every
        value's magnitude, which is what rounding errors are in proportion to."""
        shape = self.shape
        out = np.zeros(self.q.shape)
        magnitude = np.zeros(self.q.shape)
        group = shape.num_heads // shape.num_kv_heads
        token = 0
        for (count, kv_len), (keys, values) in zip(self.rows, self.contexts, strict=True):
            for position in range(kv_len - count, kv_len):
                first = 0
                if shape.sliding_window is not None:
                    first = max(0, position + 1 - shape.sliding_window)
                for head in range(shape.num_heads):
                    seen = slice(first, position + 1), head // group
                    scores = shape.scale * keys[seen] @ self.q[token, head].astype(np.float64)
                    weights = np.exp(scores - scores.max())
                    weights /= weights.sum()
                    out[token, head] = weights @ values[seen]
                    magnitude[token, head] = weights @ np.abs(values[seen])
                token += 1
        return out, magnitude

    def expected_pages(self) -> np.ndarray:
        """The pool with the new tokens' keys and values in their places, all else as it was."""
        pages, token = self.pages.copy(), 0
        for row, (count, kv_len) in enumerate(self.rows):
            for position in range(kv_len - count, kv_len):
                page = self.batch.page_table[row, position // self.shape.page_size]
                place = pages[page, position % self.shape.page_size]
                place[0::2], place[1::2] = self.k[token], self.v[token]
                token += 1
        return pages


def make(shape: Shape, rows: Rows, dtype: np.dtype, seed: int = 0) -> Problem:
    """Random inputs of unit size for these rows; rows and tokens after them are padding.

    NaN fills q, k and v of padding tokens, pages of no row, the places of a row's pages that no
    query of this step sees, and those where the step's own keys and values belong. Entries of the
    page table past a row's context name any page.
    """
    rng = np.random.default_rng(seed)

    def normal(*sizes: int) -> np.ndarray:
        return rng.standard_normal(sizes).astype(dtype)

    num_tokens = sum(count for count, _ in rows)
    assert num_tokens <= shape.num_tokens
    assert len(rows) <= shape.num_rows
    token_shape = (shape.num_tokens, shape.num_kv_heads, shape.head_dim)
    q = np.full((shape.num_tokens, shape.num_heads, shape.head_dim), np.nan, dtype)
    k, v = np.full(token_shape, np.nan, dtype), np.full(token_shape, np.nan, dtype)
    q[:num_tokens] = normal(num_tokens, *q.shape[1:])

    pages = np.full(
        (shape.num_pages, shape.page_size, 2 * shape.num_kv_heads, shape.head_dim), np.nan, dtype
    )
    free = rng.permutation(shape.num_pages).tolist()
    table_shape = (shape.num_rows, shape.pages_per_row)
    page_table = rng.integers(0, shape.num_pages, table_shape).astype(np.int32)
    cu_q_lens = np.full(shape.num_rows + 1, num_tokens, np.int32)
    kv_lens = np.zeros(shape.num_rows, np.int32)
    contexts, token = [], 0
    for row, (count, kv_len) in enumerate(rows):
        cu_q_lens[row], kv_lens[row] = token, kv_len
        for i in range(-(-kv_len // shape.page_size)):
            page_table[row, i] = free.pop()
        keys = normal(kv_len, shape.num_kv_heads, shape.head_dim)
        values = normal(kv_len, shape.num_kv_heads, shape.head_dim)
        start = kv_len - count
        k[token : token + count], v[token : token + count] = keys[start:], values[start:]
        first = 0 if shape.sliding_window is None else max(0, start + 1 - shape.sliding_window)
        for position in range(first, start):
            place = pages[page_table[row, position // shape.page_size], position % shape.page_size]
            place[0::2], place[1::2] = keys[position], values[position]
        contexts.append((keys.astype(np.float64), values.astype(np.float64)))
        token += count
    batch = PagedBatch(
        cu_q_lens=cu_q_lens,
        kv_lens=kv_lens,
        page_table=page_table,
        num_rows=np.asarray([len(rows)], np.int32),
        max_q_len=1 if shape.decode else shape.num_tokens,
    )
    return Problem(
        shape=shape,
        rows=rows,
        q=q,
        k=k,
        v=v,
        pages=pages,
        batch=batch,
        contexts=tuple(contexts),
    )


def assert_exact(out: np.ndarray, pages: np.ndarray, problem: Problem) -> None:
    """What every implementation promises, for the dtype of the problem.

    The pool holds the new keys and values and is otherwise the same bit for bit; padding tokens
    come back as zeros. Float32 is within 1e-5. In bfloat16 each softmax weight and the output may
    be rounded once, by 2^-8 of itself.
    """
    np.testing.assert_array_equal(bits(pages), bits(problem.expected_pages()))
    expected, magnitude = problem.expected()
    assert out.dtype == problem.q.dtype
    error = np.abs(out.astype(np.float64) - expected)
    allowed = 1e-5 if out.dtype == np.float32 else 1.02 * 2**-7
    # A bound of 0 where nothing is seen: padding is exactly zero.
    assert (error <= allowed * magnitude).all(), f"off by {(error / magnitude).max()} of values"
