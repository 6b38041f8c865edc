"""Prompts that begin alike share the pages of their beginning.

The key of a full page is a SHA-256 over the key of the page before it and its own tokens, and the
first page's over the adapter's version and the request's salt: so a key stands for every token up
to the page's end, and for the weights its keys and values were computed under. A page of the base
model has another key than any adapter's, and an adapter that was replaced has another version.

Pages get their keys once the host knows their tokens and the step that writes them was planned;
steps run in order, so whoever finds a page in a later plan reads it after it was written. Who could
go on with the page that another is about to write waits for it instead of computing the same.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable

from jaxlora.engine.pages import PagePool
from jaxlora.engine.sequence import Sequence


class PrefixCache:
    """Finds pages of earlier sequences for later ones; when not ``enabled`` it never does."""

    def __init__(self, pool: PagePool, *, enabled: bool) -> None:
        self.enabled = enabled
        self.num_queried_tokens = 0
        """Prompt tokens of sequences that looked for pages, each sequence counted once."""
        self.num_hit_tokens = 0
        """Those of them that were found."""
        self._pool = pool
        self._num_resets = 0
        self._begun: dict[bytes, tuple[int, int]] = {}
        """Keys of the pages that those who read their prompts write next, and the reader's place:
        of several the first."""

    def begin_step(self, reading: Iterable[Sequence]) -> None:
        """Takes note of the sequences that read their prompts before any other is admitted."""
        self._begun.clear()
        for sequence in reading:
            self.begin(sequence)

    def begin(self, sequence: Sequence) -> None:
        """Takes note of one more that reads its prompt."""
        index = sequence.num_pages_with_key
        if self.enabled and index < len(sequence.token_ids) // self._pool.page_size:
            key = self._key(sequence, index)
            self._begun[key] = min(sequence.place, self._begun.get(key, sequence.place))

    def find(self, sequence: Sequence) -> list[int] | None:
        """Pages that hold the longest known beginning of a waiting sequence without its last token,
        which is computed always: its logits are wanted. None if one ahead of it is about to write
        the page that follows them."""
        pages: list[int] = []
        root = self._root(sequence)
        if sequence.page_keys[:1] != [root]:
            # It waits for the first time, or there was a reset meanwhile.
            sequence.page_keys = [root]
        if self._applies_to(sequence):
            for index in range((len(sequence.token_ids) - 1) // self._pool.page_size):
                key = self._key(sequence, index)
                page = self._pool.find(key)
                if page is None:
                    is_begun = self._begun.get(key, sequence.place) < sequence.place
                    return None if is_begun else pages
                pages.append(page)
        return pages

    def count(self, sequence: Sequence, num_cached_tokens: int) -> None:
        """Takes note of what was found for a sequence when it is first admitted."""
        if self._applies_to(sequence):
            self.num_queried_tokens += len(sequence.prompt_token_ids)
            self.num_hit_tokens += num_cached_tokens

    def remember(self, sequence: Sequence) -> None:
        """Lets a running sequence's full pages be found, as far as the host knows their tokens."""
        size = self._pool.page_size
        if not self.enabled or len(sequence.token_ids) // size <= sequence.num_pages_with_key:
            return
        # The last token of a constrained sequence may be computed again, in a page of its own.
        computed = sequence.num_computed - (sequence.constraint is not None)
        known = min(computed, len(sequence.token_ids)) // size
        for index in range(sequence.num_pages_with_key, known):
            self._pool.set_key(sequence.pages[index], self._key(sequence, index))
        sequence.num_pages_with_key = max(sequence.num_pages_with_key, known)

    def reset(self) -> None:
        """Nothing computed so far is found any more, nor what running sequences add to it."""
        self._num_resets += 1
        self._pool.forget_keys()

    def _applies_to(self, sequence: Sequence) -> bool:
        # What is not computed has no logits, and so no log-probabilities.
        return self.enabled and not sequence.misses_prompt_logprobs

    def _key(self, sequence: Sequence, index: int) -> bytes:
        keys, size = sequence.page_keys, self._pool.page_size
        while len(keys) <= index + 1:
            tokens = sequence.token_ids[(len(keys) - 1) * size : len(keys) * size]
            keys.append(hashlib.sha256(keys[-1] + array("q", tokens).tobytes()).digest())
        return keys[index + 1]

    def _root(self, sequence: Sequence) -> bytes:
        version = "" if sequence.adapter is None else sequence.adapter.version
        # It may be no Unicode text.
        salt = sequence.cache_salt.encode("utf-8", "surrogatepass")
        return hashlib.sha256(f"{self._num_resets} {version} ".encode() + salt).digest()
