"""Which tokens a constrained completion may go on with, worked out on threads of the host.

The mask for a completion's next token depends on the token before it, which the device may not have
chosen yet. So a step's forward pass is dispatched first; while it runs, the tokens of the step
before are read, the masks are made, and then the step's tokens are chosen. Masks take 0.1 ms as a
rule. One that is not there when the forward pass has ended holds up nobody else: its completion
sits the step out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from typing import NamedTuple

import numpy as np
from llguidance import LLMatcher

from jaxlora.engine.grammars import Grammar
from jaxlora.errors import ConstraintError, GenerationError
from jaxlora.types import SamplingParams

_POLL_S = 0.0005
_PATIENCE_S = 0.002
"""What a mask may take at least, however short the forward pass: far more than it does."""


class TokenMask(NamedTuple):
    """What may come next."""

    bits: np.ndarray
    """uint32 ``[ceil(V / 32)]``: token t may if bit t % 32 of word t // 32 is set."""
    ends: bool
    """Nothing may but what ends the completion, so min_tokens cannot hold it back."""


class Constraint:
    """One completion's place in its grammar.

    :meth:`start` and then :meth:`push` for each token ask for the next mask, which ``executor``
    makes; they are called by one thread and never wait.
    """

    def __init__(
        self,
        grammar: Grammar,
        executor: Executor,
        *,
        vocab_size: int,
        params: SamplingParams,
        bad_words: Sequence[Sequence[int]] = (),
        held_back_ids: Sequence[int] = (),
    ) -> None:
        self._grammar, self._executor = grammar, executor
        self._num_words = num_mask_words(vocab_size)
        self._bad_words = bad_words
        self._allowed: np.ndarray | None = None
        if params.allowed_token_ids is not None:
            self._allowed = self._bits(params.allowed_token_ids)
        self._held_back = self._bits(held_back_ids) if params.min_tokens else None
        self._matcher: LLMatcher | None = None
        self._tokens: list[int] = []
        self._next: Future[TokenMask] | None = None

    def start(self) -> None:
        """Asks for the first mask, unless that was done."""
        if self._next is None:
            self._next = self._executor.submit(self._mask)

    def push(self, token: int) -> None:
        """Asks for the mask after ``token``, which was chosen by the mask before."""
        self._next = self._executor.submit(self._advance, token)

    @property
    def is_pending(self) -> bool:
        """The next mask was asked for and is not there."""
        return self._next is not None and not self._next.done()

    @property
    def future(self) -> Future[TokenMask]:
        """The next mask, to wait for."""
        assert self._next is not None, "it was not started"
        return self._next

    @property
    def mask(self) -> TokenMask:
        """The next mask."""
        return self.future.result()

    @property
    def error(self) -> GenerationError | None:
        """Why there is no next mask: the grammar turned out too costly, or nothing may come."""
        error = self.future.exception()
        if error is None or isinstance(error, GenerationError):
            return error
        wrapped = GenerationError(f"structured_outputs: {error!r}")
        wrapped.__cause__ = error
        return wrapped

    # On one of the executor's threads from here on, a call at a time.

    def _advance(self, token: int) -> TokenMask:
        assert self._matcher is not None
        self._tokens.append(token)
        if not self._matcher.consume_token(token):
            raise ConstraintError(f"structured_outputs: {self._grammar.reason_of(self._matcher)}")
        return self._mask()

    def _mask(self) -> TokenMask:
        if self._matcher is None:
            self._matcher = self._grammar.matcher()
        bits = np.zeros(self._num_words, np.uint32)
        self._matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        if self._matcher.is_error():
            raise ConstraintError(f"structured_outputs: {self._grammar.reason_of(self._matcher)}")
        if self._allowed is not None:
            bits &= self._allowed
        if self._bad_words:
            bits &= ~self._bits([word[-1] for word in self._bad_words if self._is_begun(word)])
        if not bits.any():
            raise ConstraintError(
                "structured_outputs: of the tokens that may come next, allowed_token_ids and "
                "bad_words leave none"
            )
        ends = self._held_back is not None and not (bits & ~self._held_back).any()
        return TokenMask(bits, ends)

    def _is_begun(self, word: Sequence[int]) -> bool:
        begin = list(word[:-1])
        return self._tokens[len(self._tokens) - len(begin) :] == begin

    def _bits(self, ids: Sequence[int]) -> np.ndarray:
        flags = np.zeros(self._num_words * 32, np.uint8)
        flags[list(ids)] = 1
        return np.packbits(flags, bitorder="little").view(np.dtype("<u4"))


def num_mask_words(vocab_size: int) -> int:
    """Words of 32 bits in a mask."""
    return -(-vocab_size // 32)


def wait_for_masks(
    constraints: Sequence[Constraint], forward_is_done: Callable[[], bool], *, others_wait: bool
) -> None:
    """Returns when all masks are there, or when others would wait for those that are not.

    If nobody else has a part in the step it goes on with the first that are there.
    """
    masks = {constraint.future for constraint in constraints}
    if not others_wait:
        wait(masks, return_when=FIRST_COMPLETED)
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        _, masks = wait(masks, _POLL_S)
        if not masks or (time.monotonic() >= deadline and forward_is_done()):
            return
