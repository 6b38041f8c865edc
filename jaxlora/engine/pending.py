"""What a step that was dispatched will yield."""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np

from jaxlora.engine.batch import ScoredChunk
from jaxlora.engine.logprobs import LogprobArrays


class PendingTokens(NamedTuple):
    """Arrays on their way to the host; reading them waits for the device."""

    tokens: jax.Array
    logprobs: LogprobArrays | None
    chunks: list[ScoredChunk]
    scores: list[LogprobArrays]
    """Of the chunks' tokens, one chunk after another, padded at the end."""

    def start_copying(self) -> PendingTokens:
        """Asks for all of it to be brought to the host."""
        for leaf in jax.tree.leaves((self.tokens, self.logprobs, self.scores)):
            leaf.copy_to_host_async()
        return self

    def read(self) -> list[int]:
        """One token for each row of the plan (padding rows after them)."""
        return np.asarray(self.tokens).tolist()

    def read_logprobs(self) -> LogprobArrays | None:
        """Of the tokens, in numpy, if any row wants them."""
        return (
            None if self.logprobs is None else LogprobArrays._make(map(np.asarray, self.logprobs))
        )

    def read_prompt_logprobs(self) -> list[tuple[ScoredChunk, LogprobArrays]]:
        """Of the prompt tokens the step read, in numpy, where they are wanted."""
        whole = [np.concatenate(parts) for parts in zip(*self.scores, strict=True)]
        told = []
        at = 0
        for chunk in self.chunks:
            end = at + len(chunk.positions)
            told.append((chunk, LogprobArrays._make(leaf[at:end] for leaf in whole)))
            at = end
        return told
