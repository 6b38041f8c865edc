"""The tokenizer that a GGUF file's metadata describes.

A GGUF file has no tokenizer.json. It lists the vocabulary, the merges or scores, the kind of each
token and the *name* of the rule that cuts text before merging (``tokenizer.ggml.pre``); the rule
itself is known to the reader. Each one here is the model's own, from its tokenizer.json, which
can differ from what other GGUF readers do: a name not listed is refused, not approximated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gguf import TokenType
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from jaxlora.errors import ModelLoadError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Rule:
    """How a byte-level vocabulary wants its text prepared."""

    split: str | None = None
    """The regular expression of the pieces; None: GPT-2's, which ``ByteLevel`` has built in."""
    single_digits: bool = False
    """Digits are cut off one by one before ``split``."""
    ignore_merges: bool = False
    """A piece that is a token is that token, whatever the merges would make of it."""
    nfc: bool = False
    add_bos: bool = False
    """When the file does not say (``tokenizer.ggml.add_bos_token``)."""


_RULES = {
    "gpt-2": _Rule(),
    "smollm": _Rule(single_digits=True),
    "starcoder": _Rule(single_digits=True),
    "refact": _Rule(single_digits=True),
    "llama-bpe": _Rule(split=_LLAMA3, ignore_merges=True, add_bos=True),
    "llama3": _Rule(split=_LLAMA3, ignore_merges=True, add_bos=True),
    "llama-v3": _Rule(split=_LLAMA3, ignore_merges=True, add_bos=True),
    "tekken": _Rule(split=_TEKKEN, ignore_merges=True, add_bos=True),
    "qwen2": _Rule(split=_QWEN2, nfc=True),
}
# Keys that change how text is cut, at the only value that is served.
_ONLY_VALUES: dict[str, Any] = {
    "tokenizer.ggml.precompiled_charsmap": None,
    "tokenizer.ggml.remove_extra_whitespaces": False,
    "tokenizer.ggml.add_sep_token": False,
}
_REMEDY = "give the model's own tokenizer (a directory or a hub id) as `tokenizer`"


def build_gguf_tokenizer(metadata: Mapping[str, Any], source: str) -> PreTrainedTokenizerFast:
    """Builds the tokenizer with its special tokens and chat template.

    ``metadata`` is a GGUF file's, arrays as lists; ``source`` names the file in messages.
    Raises ModelLoadError for a kind of vocabulary or a pre-tokenizer that is not known, and for
    a vocabulary that is incomplete or contradicts itself.
    """
    from transformers import PreTrainedTokenizerFast

    for key, value in _ONLY_VALUES.items():
        if metadata.get(key) not in (None, value, []):
            raise ModelLoadError(f"{source} has {key}, which is not served: {_REMEDY}")
    tokens = _vocabulary(metadata, source)
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        backend, add_bos = _byte_level(metadata, tokens, source)
    elif kind == "llama":
        backend, add_bos = _sentencepiece(metadata, tokens, source)
    else:
        raise ModelLoadError(
            f"{source} has tokenizer.ggml.model={kind!r}; served are 'gpt2' and 'llama': {_REMEDY}"
        )
    special = {name: _special(metadata, key, tokens, source) for name, key in _SPECIAL.items()}
    _add_whole_tokens(backend, metadata, tokens, special)
    _add_template(backend, metadata, special, add_bos, source)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        chat_template=_chat_template(metadata),
        **special,
    )


_SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


def _vocabulary(metadata: Mapping[str, Any], source: str) -> dict[str, int]:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not tokens:
        raise ModelLoadError(f"{source} has no tokenizer.ggml.tokens: {_REMEDY}")
    for key in ("tokenizer.ggml.token_type", "tokenizer.ggml.scores"):
        if (values := metadata.get(key)) and len(values) != len(tokens):
            raise ModelLoadError(
                f"{source} has {len(values)} values in {key}, but {len(tokens)} tokens"
            )
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        index = next(i for i, token in enumerate(tokens) if vocabulary[token] != i)
        raise ModelLoadError(
            f"{source} has the token {tokens[index]!r} as {index} and {vocabulary[tokens[index]]}: "
            f"{_REMEDY}"
        )
    return vocabulary


def _byte_level(
    metadata: Mapping[str, Any], vocabulary: dict[str, int], source: str
) -> tuple[Tokenizer, bool]:
    """Byte pair encoding over GPT-2's byte alphabet; also whether BOS is added by default."""
    name = metadata.get("tokenizer.ggml.pre")
    rule = _RULES.get(str(name))
    if rule is None:
        raise ModelLoadError(
            f"{source} has tokenizer.ggml.pre={name!r}, whose pre-tokenizer is not known (known: "
            f"{', '.join(_RULES)}): {_REMEDY}"
        )
    merges = [tuple(merge.split(" ")) for merge in metadata.get("tokenizer.ggml.merges", [])]
    known = vocabulary.keys()
    if bad := [m for m in merges if len(m) != 2 or not {*m, "".join(m)} <= known]:
        raise ModelLoadError(
            f"{source} has the merge {' '.join(bad[0])!r}, which makes no token of two: {_REMEDY}"
        )
    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, ignore_merges=rule.ignore_merges)
    )
    if rule.nfc:
        backend.normalizer = normalizers.NFC()
    steps: list[pre_tokenizers.PreTokenizer] = []
    if rule.single_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if rule.split is not None:
        steps.append(pre_tokenizers.Split(Regex(rule.split), behavior="isolated"))
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", False))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=rule.split is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    return backend, rule.add_bos


def _sentencepiece(
    metadata: Mapping[str, Any], vocabulary: dict[str, int], source: str
) -> tuple[Tokenizer, bool]:
    """SentencePiece's byte pair encoding with byte fallback, as Llama 2 and Mistral have it.

    Where implementations differ this is transformers 5: a space is put before a text that does
    not start with one, and not after a special token.
    """
    name = metadata.get("tokenizer.ggml.pre")
    if name not in (None, "default"):
        raise ModelLoadError(
            f"{source} has tokenizer.ggml.pre={name!r} on a SentencePiece vocabulary: {_REMEDY}"
        )
    if not metadata.get("tokenizer.ggml.scores"):
        raise ModelLoadError(f"{source} has no tokenizer.ggml.scores: {_REMEDY}")
    unknown = _special(metadata, "unknown_token_id", vocabulary, source)
    backend = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=_merges_of_scores(metadata, vocabulary),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement="▁", prepend_scheme="first" if prefix else "never", split=False
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(
        [*steps, decoders.Strip(content=" ", left=1)] if prefix else steps
    )
    return backend, True


def _merges_of_scores(
    metadata: Mapping[str, Any], vocabulary: Mapping[str, int]
) -> list[tuple[str, str]]:
    """Every way to make a normal token of two tokens, the best score first, then the longest left.

    SentencePiece merges the neighbouring pair whose union has the highest score, the leftmost of
    several: a list of merges in that order does the same, and it is the order of transformers'
    conversion. Control and byte tokens are no results of merging.
    """
    kinds = metadata.get("tokenizer.ggml.token_type") or [TokenType.NORMAL] * len(vocabulary)
    found: list[tuple[float, str, str]] = []
    for token, index in vocabulary.items():
        if kinds[index] not in (TokenType.NORMAL, TokenType.USER_DEFINED):
            continue
        score = metadata["tokenizer.ggml.scores"][index]
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                found.append((score, left, right))
    found.sort(key=lambda merge: (-merge[0], -len(merge[1]), -len(merge[2])))
    return [(left, right) for _, left, right in found]


def _special(
    metadata: Mapping[str, Any], key: str, vocabulary: Mapping[str, int], source: str
) -> str | None:
    """The token of a special id."""
    index = metadata.get(f"tokenizer.ggml.{key}")
    if index is None:
        return None
    tokens = metadata["tokenizer.ggml.tokens"]
    if not 0 <= index < len(vocabulary):
        raise ModelLoadError(
            f"{source} has tokenizer.ggml.{key}={index}, but only {len(vocabulary)} tokens"
        )
    return str(tokens[index])


def _add_whole_tokens(
    backend: Tokenizer,
    metadata: Mapping[str, Any],
    vocabulary: Mapping[str, int],
    special: Mapping[str, str | None],
) -> None:
    """Control and user-defined tokens are found whole in a text; only control ones are special."""
    kinds: Sequence[int] = metadata.get("tokenizer.ggml.token_type") or [0] * len(vocabulary)
    named = set(special.values())
    control, plain = [], []
    for token, index in vocabulary.items():
        if kinds[index] == TokenType.CONTROL or token in named:
            control.append(AddedToken(token, special=True, normalized=False))
        elif kinds[index] == TokenType.USER_DEFINED:
            plain.append(AddedToken(token, special=False, normalized=False))
    backend.add_special_tokens(control)
    backend.add_tokens(plain)


def _add_template(
    backend: Tokenizer,
    metadata: Mapping[str, Any],
    special: Mapping[str, str | None],
    add_bos: bool,
    source: str,
) -> None:
    """BOS before and EOS after a text, as the file wants it."""
    template, pieces = ["$A"], []
    if metadata.get("tokenizer.ggml.add_bos_token", add_bos):
        template.insert(0, "bos_token")
    if metadata.get("tokenizer.ggml.add_eos_token", False):
        template.append("eos_token")
    for position, name in enumerate(template):
        if name == "$A":
            continue
        token = special[name]
        if token is None:
            raise ModelLoadError(f"{source} adds {name}, but has no tokenizer.ggml.{name}_id")
        template[position] = token
        pieces.append((token, metadata[f"tokenizer.ggml.{name}_id"]))
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=pieces)


def _chat_template(metadata: Mapping[str, Any]) -> str | dict[str, str] | None:
    """The template, or the templates by name if there are several."""
    default = metadata.get("tokenizer.chat_template")
    names = metadata.get("tokenizer.chat_templates") or []
    if not names:
        return default
    named = {name: metadata[f"tokenizer.chat_template.{name}"] for name in names}
    return named if default is None else {"default": default, **named}
