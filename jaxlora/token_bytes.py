"""How many bytes of a text a vocabulary's tokens stand for."""

from __future__ import annotations

import functools
import json
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend


class TokenBytes(NamedTuple):
    """How much text the tokens of a vocabulary over bytes stand for."""

    most: int
    """Most bytes of one token."""
    dropped: bytes
    """Bytes that are of no token, and not encoded."""

    @classmethod
    def of(cls, backend: Backend) -> TokenBytes | None:
        """None if a token may stand for any number of bytes, as of spaces that are stripped."""
        from tokenizers.models import BPE

        model, added = backend.model, backend.get_added_tokens_decoder().values()
        if not isinstance(model, BPE) or any(token.lstrip or token.rstrip for token in added):
            return None
        steps = [*_steps(backend.normalizer), *_steps(backend.pre_tokenizer)]
        if any(step.get("behavior") == "Removed" for step in steps):
            return None
        tokens = backend.get_vocab(with_added_tokens=False)
        kinds = [step["type"] for step in steps]
        if kinds.count("ByteLevel") == 1 and _SPLITTING.issuperset({*kinds} - {"ByteLevel"}):
            most = max(map(len, tokens), default=0)
            letters = bytes_by_letter().items()
            dropped = bytes(byte for letter, byte in letters if letter not in tokens)
        elif (
            model.byte_fallback
            and all(f"<0x{byte:02X}>" in tokens for byte in range(256))
            and all(map(_keeps_length, steps))
        ):
            most, dropped = max(len(token.encode()) for token in tokens), b""
        else:
            return None
        texts = [token.content for token in added]
        if backend.normalizer is not None:
            # An added token may be looked for in what the normalizer leaves.
            texts += [backend.normalizer.normalize_str(text) for text in texts]
        return cls(max(most, *(len(text.encode()) for text in texts), 1), dropped)

    def least_tokens(self, text: str) -> int:
        """How many tokens a text has at least."""
        kept = text.encode("utf-8", "replace").translate(None, self.dropped)
        return -(-len(kept) // self.most)


_SPLITTING = frozenset(("Digits", "Punctuation", "Split"))
"""Steps before the model that leave a text as it is."""


def _keeps_length(step: dict[str, Any]) -> bool:
    """Whether a step before the model leaves a text at least as long as it was."""
    if step["type"] == "Replace":
        replaced = step["pattern"].get("String")
        return replaced is not None and len(replaced.encode()) <= len(step["content"].encode())
    return step["type"] in _SPLITTING | {"Prepend", "Metaspace"}


def _steps(part: Any) -> list[dict[str, Any]]:
    """The settings of a normalizer or a pre-tokenizer, each of a sequence's for itself."""
    settings = {} if part is None else json.loads(part.__getstate__())
    steps = settings.get("normalizers", settings.get("pretokenizers", [settings]))
    return [step for step in steps if step]


@functools.cache
def bytes_by_letter() -> dict[str, int]:
    """How GPT-2's vocabulary, and byte-level ones since, write bytes."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters: dict[int, str] = bytes_to_unicode()  # type: ignore[no-untyped-call]
    return {letter: byte for byte, letter in letters.items()}
