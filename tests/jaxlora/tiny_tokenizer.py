"""A tokenizer for the tiny model: one token a printable character, two special ones, a template."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import tokenizers

CHARACTERS = [chr(code) for code in range(32, 127)]
SPECIAL = ["<s>", "</s>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
).replace("\n", " ")


def encode(text: str) -> list[int]:
    """The ids of a text without special tokens."""
    return [CHARACTERS.index(character) for character in text]


def add_tokenizer(base: Path, to: Path, *, vocab_size: int = len(CHARACTERS + SPECIAL)) -> Path:
    """Copies the tiny model and gives it a tokenizer; a small vocabulary lacks the last ones."""
    shutil.copytree(base, to)
    characters = CHARACTERS[: vocab_size - len(SPECIAL)]
    # Of bytes, as most tokenizers are now, in which a space is written so.
    tokens = ["\u0120" if character == " " else character for character in characters]
    vocabulary = {token: i for i, token in enumerate([*tokens, *SPECIAL])}
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab=vocabulary, merges=[], unk_token=None)
    )
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.save(str(to / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    (to / "tokenizer_config.json").write_text(json.dumps(config))
    return to
