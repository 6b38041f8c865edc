"""Tokenizers from GGUF metadata, id for id against transformers' own."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from gguf import GGMLQuantizationType as Kind
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerBase

from jaxlora.errors import ModelLoadError
from jaxlora.models.gguf_checkpoint import GGUFCheckpoint
from jaxlora.models.gguf_tokenizer import _RULES, build_gguf_tokenizer
from tests.jaxlora.corpus import DECOMPOSED, TEXTS
from tests.jaxlora.models.gguf_files import metadata_of, smollm2, write_gguf
from tests.jaxlora.models.gguf_vocabularies import (
    CONTROL,
    USER_DEFINED,
    byte_level_metadata,
    sentencepiece_metadata,
)

MESSAGES = [{"role": "user", "content": "Say hi"}, {"role": "assistant", "content": "hi"}]
SPECIAL_TEXTS = (
    "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n",
    "a<|im_end|> b <|endoftext|>c",
    "  <think> a </think><think>",
    "<s>[INST] a [/INST] b</s> c <s>",
    "<|im_start <im_end|> <0x41>",
)


def write(path: Path, arch: str, metadata: dict[str, Any]) -> Path:
    rows = len(metadata["tokenizer.ggml.tokens"])
    embedding = {"token_embd.weight": (np.zeros((rows, 256), np.float32), Kind.F32)}
    return write_gguf(path, arch, metadata_of(arch) | metadata, embedding)


def load_both(path: Path) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
    """Ours, and transformers' conversion of the same file."""
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return build_gguf_tokenizer(GGUFCheckpoint(path).metadata, str(path)), theirs


def assert_same_ids(
    ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase, texts: tuple[str, ...]
) -> None:
    for text in texts:
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            expected = theirs.encode(text, add_special_tokens=special)
            assert ids == expected, text
            for skip in (True, False):
                assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(
                    expected, skip_special_tokens=skip
                )


@pytest.fixture(scope="module")
def smollm2_pair() -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
    return load_both(smollm2())


def test_smollm2_special_tokens_and_template(smollm2_pair: Any) -> None:
    ours, theirs = smollm2_pair
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert set(ours.all_special_ids) == set(theirs.all_special_ids)
    assert ours.added_tokens_decoder == theirs.added_tokens_decoder
    assert len(ours) == len(theirs) == 49152
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.chat_template == theirs.chat_template
    for prompt in (True, False):
        assert ours.apply_chat_template(
            MESSAGES, add_generation_prompt=prompt, tokenize=False
        ) == theirs.apply_chat_template(MESSAGES, add_generation_prompt=prompt, tokenize=False)


def test_smollm2_ids_are_transformers(smollm2_pair: Any) -> None:
    ours, theirs = smollm2_pair
    texts = (*TEXTS, *SPECIAL_TEXTS, DECOMPOSED)
    assert_same_ids(ours, theirs, tuple(text for text in texts if "½" not in text))


def test_smollm2_cuts_digits_off_before_spaces_are_grouped(smollm2_pair: Any) -> None:
    # SmolLM2's own tokenizer.json isolates digits first, so spaces before a number group as they
    # do before anything else. transformers' conversion takes GPT-2's rule for this file.
    ours, theirs = smollm2_pair
    texts = ("x  1", "\n\n1", "a\n    12", "  1  2  3", " ½")
    tokens = [ours.convert_ids_to_tokens(ours.encode(text)) for text in texts]
    assert tokens[:3] == [["x", "ĠĠ", "1"], ["ĊĊ", "1"], ["a", "ĊĠĠĠĠ", "1", "2"]]
    assert all(ours.encode(text) != theirs.encode(text) for text in texts)

    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    assert_same_ids(ours, theirs, texts + TEXTS)


@pytest.mark.parametrize(
    ("pre", "arch"),
    [("gpt-2", "llama"), ("llama-bpe", "llama"), ("tekken", "llama"), ("qwen2", "qwen2")],
)
def test_byte_level_ids_are_transformers(pre: str, arch: str, tmp_path: Path) -> None:
    metadata = byte_level_metadata(pre, _RULES[pre].split)
    ours, theirs = load_both(write(tmp_path / "m.gguf", arch, metadata))
    assert_same_ids(ours, theirs, TEXTS + SPECIAL_TEXTS)
    assert len(ours) == len(theirs)
    assert ours.special_tokens_map.items() <= theirs.special_tokens_map.items()


def test_qwen2_ids_are_qwen2s_own(tmp_path: Path) -> None:
    # transformers' conversion of the file leaves out the normalization that Qwen2Tokenizer has.
    metadata = byte_level_metadata("qwen2", _RULES["qwen2"].split)
    ours = build_gguf_tokenizer(metadata, "file")
    tokens = metadata["tokenizer.ggml.tokens"]
    merges: Any = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    theirs = transformers.Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=merges,
        additional_special_tokens=list(CONTROL),
    )
    theirs.add_tokens(list(USER_DEFINED))
    for text in (*TEXTS, *SPECIAL_TEXTS, DECOMPOSED):
        assert ours.encode(text) == theirs.encode(text), text


def test_llama3_pieces_that_are_tokens_stay_whole() -> None:
    # No merge makes "zq zq" whole, yet it is in the vocabulary, as some of Llama 3's tokens are.
    metadata = byte_level_metadata("llama-bpe", _RULES["llama-bpe"].split)
    metadata["tokenizer.ggml.tokens"].insert(300, "zqzq")
    metadata["tokenizer.ggml.token_type"].insert(300, 1)
    assert build_gguf_tokenizer(metadata, "file").convert_ids_to_tokens([300]) == ["zqzq"]
    assert build_gguf_tokenizer(metadata, "file").encode("zqzq") == [300]
    as_gpt2 = metadata | {"tokenizer.ggml.pre": "gpt-2"}
    assert build_gguf_tokenizer(as_gpt2, "file").encode("zqzq") != [300]


def test_added_tokens_are_found_as_they_are_spelled() -> None:
    # Their text is not in the byte alphabet: real spaces, characters of several bytes.
    metadata = byte_level_metadata("gpt-2")
    for token, kind in (("    ", 4), ("<\uff5cUser\uff5c>", 3)):
        metadata["tokenizer.ggml.tokens"].append(token)
        metadata["tokenizer.ggml.token_type"].append(kind)
    tokenizer = build_gguf_tokenizer(metadata, "file")
    last = len(metadata["tokenizer.ggml.tokens"]) - 1
    assert len(tokenizer) == last + 1
    ids = tokenizer.encode("<\uff5cUser\uff5c>a    b")
    assert (ids[0], ids[2]) == (last, last - 1)
    assert tokenizer.decode(ids) == "<\uff5cUser\uff5c>a    b"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a    b"


@pytest.mark.parametrize(
    ("pre", "stated", "expected"),
    [
        ("llama-bpe", None, True),
        ("llama-bpe", False, False),
        ("qwen2", None, False),
        ("qwen2", True, True),
    ],
)
def test_bos_is_added_as_the_file_or_its_kind_says(
    pre: str, stated: bool | None, expected: bool
) -> None:
    metadata = byte_level_metadata(pre, _RULES[pre].split, add_bos_token=stated, add_eos_token=True)
    tokenizer = build_gguf_tokenizer(metadata, "file")
    ids = tokenizer.encode("Hello")
    assert (ids[0] == tokenizer.bos_token_id) == expected
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.encode("Hello", add_special_tokens=False) == ids[int(expected) : -1]


def sentencepiece_ids(text: str, metadata: dict[str, Any]) -> list[int]:
    """SentencePiece's BPE by its definition: join the neighbours of the best union, leftmost first.

    The one difference is transformers': a text that starts with a space gets no other before it.
    """
    tokens = metadata["tokenizer.ggml.tokens"]
    ids = {token: index for index, token in enumerate(tokens)}
    scores = metadata["tokenizer.ggml.scores"]
    symbols = list(text.replace(" ", "▁"))
    if symbols[0] != "▁":
        symbols.insert(0, "▁")
    while True:
        unions = [a + b for a, b in itertools.pairwise(symbols)]
        candidates = [(-scores[ids[u]], at) for at, u in enumerate(unions) if u in ids]
        if not candidates:
            break
        _, at = min(candidates)
        symbols[at : at + 2] = [unions[at]]
    return [
        index
        for symbol in symbols
        for index in (
            [ids[symbol]] if symbol in ids else [ids[f"<0x{b:02X}>"] for b in symbol.encode()]
        )
    ]


def test_sentencepiece_ids_are_transformers_and_the_definitions(tmp_path: Path) -> None:
    metadata = sentencepiece_metadata()
    ours, theirs = load_both(write(tmp_path / "m.gguf", "llama", metadata))
    assert_same_ids(ours, theirs, TEXTS + SPECIAL_TEXTS + (DECOMPOSED,))
    for text in TEXTS[1:]:
        ids = ours.encode(text, add_special_tokens=False)
        assert ids == sentencepiece_ids(text, metadata), text
        assert ours.encode(text) == [1, *ids]
        assert ours.decode(ids) == text.removeprefix(" ")


def test_sentencepiece_without_a_space_prefix() -> None:
    tokenizer = build_gguf_tokenizer(sentencepiece_metadata(add_space_prefix=False), "file")
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text
    assert not tokenizer.tokenize("Hello")[0].startswith("▁")


def test_several_chat_templates_keep_their_names() -> None:
    metadata = byte_level_metadata("gpt-2") | {
        "tokenizer.chat_templates": ["tool_use"],
        "tokenizer.chat_template.tool_use": "tools: {{ tools | length }}",
    }
    tokenizer = build_gguf_tokenizer(metadata, "file")
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    assert tokenizer.apply_chat_template(MESSAGES, tools=tools, tokenize=False) == "tools: 1"
    plain = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    assert str(plain).startswith("<|im_start|>user\nSay hi<|im_end|>")
    del metadata["tokenizer.chat_template"], metadata["tokenizer.chat_templates"]
    assert build_gguf_tokenizer(metadata, "file").chat_template is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre": "deepseek-v3"}, "pre='deepseek-v3', whose pre-tokenizer is not known"),
        ({"pre": "default"}, "pre='default', whose pre-tokenizer is not known"),
        ({"pre": None}, "pre=None, whose pre-tokenizer is not known"),
        ({"model": "bert"}, "model='bert'; served are"),
        ({"tokens": None}, r"no tokenizer\.ggml\.tokens"),
        ({"token_type": [1, 1]}, r"2 values in tokenizer\.ggml\.token_type, but"),
        ({"merges": ["a b c"]}, "the merge 'a b c', which makes no token"),
        ({"merges": ["a \u0120\u0120\u0120\u0120\u0120"]}, "which makes no token"),
        ({"bos_token_id": 100_000}, "bos_token_id=100000, but only"),
        ({"bos_token_id": None, "add_bos_token": True}, "adds bos_token, but has no"),
        ({"precompiled_charsmap": [1, 2]}, "precompiled_charsmap, which is not served"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces, which is not served"),
    ],
)
def test_what_is_not_known_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        build_gguf_tokenizer(byte_level_metadata(**{"pre": "gpt-2", **changes}), "file")


def test_vocabularies_that_contradict_themselves_are_refused() -> None:
    metadata = byte_level_metadata("gpt-2")
    metadata["tokenizer.ggml.tokens"][7] = metadata["tokenizer.ggml.tokens"][9]
    with pytest.raises(ModelLoadError, match="as 7 and 9"):
        build_gguf_tokenizer(metadata, "file")
    metadata = byte_level_metadata("gpt-2")
    tokens, merge = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.merges"][0]
    tokens[tokens.index(merge.split()[0])] = "unused"
    with pytest.raises(ModelLoadError, match=f"the merge '{merge}', which makes no token of two"):
        build_gguf_tokenizer(metadata, "file")
    with pytest.raises(ModelLoadError, match=r"no tokenizer\.ggml\.scores"):
        build_gguf_tokenizer(sentencepiece_metadata(scores=None), "file")
    with pytest.raises(ModelLoadError, match="pre='llama-bpe' on a SentencePiece"):
        build_gguf_tokenizer(sentencepiece_metadata(pre="llama-bpe"), "file")
