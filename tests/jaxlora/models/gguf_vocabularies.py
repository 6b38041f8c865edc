"""Small vocabularies of the two kinds, trained on the corpus, as GGUF metadata."""

from __future__ import annotations

import collections
import functools
import json
from typing import Any

from gguf import TokenType
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from tests.jaxlora.corpus import TEXTS

CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
USER_DEFINED = ("<think>", "</think>")


@functools.cache
def _trained(split: str | None) -> tuple[dict[str, int], list[str]]:
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    tokenizer.pre_tokenizer = (
        byte_level
        if split is None
        else pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(split), behavior="isolated"), byte_level]
        )
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [" ".join(merge) for merge in model["merges"]]


def byte_level_metadata(pre: str, split: str | None = None, **changes: Any) -> dict[str, Any]:
    """A byte-level vocabulary whose merges were learned on pieces of ``split`` (None: GPT-2's).

    The control tokens and the user's come last, as Qwen2 has them.
    """
    vocabulary, merges = _trained(split)
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    kinds = [int(TokenType.NORMAL)] * len(tokens)
    kinds += [int(TokenType.CONTROL)] * len(CONTROL)
    kinds += [int(TokenType.USER_DEFINED)] * len(USER_DEFINED)
    metadata = {
        "model": "gpt2",
        "pre": pre,
        "tokens": [*tokens, *CONTROL, *USER_DEFINED],
        "token_type": kinds,
        "merges": merges,
        "bos_token_id": len(tokens),
        "eos_token_id": len(tokens) + 2,
        "padding_token_id": len(tokens),
        "add_bos_token": False,
        **changes,
    }
    return _named(metadata) | {"tokenizer.chat_template": CHATML}


def sentencepiece_metadata(**changes: Any) -> dict[str, Any]:
    """A vocabulary as Llama 2's: special tokens, 256 bytes, merged pieces, characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    counts = collections.Counter("".join(TEXTS).replace(" ", "\u2581"))
    # Of characters that are as frequent the trainer would take others in each process.
    alphabet = sorted(counts, key=lambda character: (-counts[character], character))[:90]
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
        min_frequency=1,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merged = list(dict.fromkeys("".join(merge) for merge in model["merges"]))
    characters = [token for token in model["vocab"] if len(token) == 1]
    groups = [
        (["<unk>"], TokenType.UNKNOWN),
        (["<s>", "</s>"], TokenType.CONTROL),
        ([f"<0x{byte:02X}>" for byte in range(256)], TokenType.BYTE),
        ([*merged, *characters], TokenType.NORMAL),
        (["<think>"], TokenType.USER_DEFINED),
    ]
    tokens = [token for group, _ in groups for token in group]
    num_plain = 259
    scores = [0.0] * num_plain + [-float(i) for i in range(len(tokens) - num_plain)]
    metadata = {
        "model": "llama",
        "pre": "default",
        "tokens": tokens,
        "scores": scores,
        "token_type": [int(kind) for group, kind in groups for _ in group],
        "unknown_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **changes,
    }
    return _named(metadata)


def _named(metadata: dict[str, Any]) -> dict[str, Any]:
    return {f"tokenizer.ggml.{key}": value for key, value in metadata.items() if value is not None}
