"""The tokenizer's interface, and detokenization that adds up however the ids are cut."""

from __future__ import annotations

import copy
import itertools
import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import tokenizers
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import normalizers, pre_tokenizers

import jaxlora
from jaxlora.engine.logprobs import TokenTexts
from jaxlora.errors import ModelLoadError, RequestError
from jaxlora.models.checkpoints import open_checkpoint
from jaxlora.models.gguf_tokenizer import build_gguf_tokenizer
from jaxlora.outputs import Logprob
from jaxlora.server.logprobs import LogprobsWriter
from jaxlora.tokenizer import Tokenizer, load_tokenizer
from jaxlora.types import SamplingParams
from tests.jaxlora.corpus import TEXTS
from tests.jaxlora.models.gguf_files import smollm2
from tests.jaxlora.models.gguf_vocabularies import (
    byte_level_metadata,
    sentencepiece_metadata,
)

MESSAGES = [{"role": "user", "content": "Say hi"}]
BYTE_LEVEL = Tokenizer(build_gguf_tokenizer(byte_level_metadata("gpt-2"), "file"))
SENTENCEPIECE = Tokenizer(build_gguf_tokenizer(sentencepiece_metadata(), "file"))
BOTH = pytest.mark.parametrize(
    "tokenizer", [BYTE_LEVEL, SENTENCEPIECE], ids=["byte-level", "sentencepiece"]
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with a tokenizer.json, a truncating one at that, and no weights."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = build_gguf_tokenizer(byte_level_metadata("gpt-2"), "file")
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=4)
    tokenizer.save_pretrained(path)
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return path


@BOTH
@given(st.text() | st.sampled_from(TEXTS))
def test_a_text_has_no_fewer_tokens_than_is_said_without_encoding_it(
    tokenizer: Tokenizer, text: str
) -> None:
    assert tokenizer.least_tokens(text) <= len(tokenizer.encode(text, add_special_tokens=False))
    most = 5 * max(map(len, tokenizer.hf.get_vocab()))
    assert tokenizer.least_tokens(text + "a" * most) > 0


@pytest.mark.parametrize(
    ("normalizer", "pre_tokenizer", "added", "known"),
    [
        (None, None, {}, True),
        (normalizers.Replace(" ", "\u2581"), None, {}, True),
        (normalizers.Replace("aa", "a"), None, {}, False),
        (normalizers.Replace(tokenizers.Regex("a+"), "aaaa"), None, {}, False),
        (normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.NFC()]), None, {}, False),
        (normalizers.Prepend("\u2581"), pre_tokenizers.Split("b", "isolated"), {}, True),
        (None, pre_tokenizers.Split("a", "removed"), {}, False),
        (None, pre_tokenizers.Whitespace(), {}, False),
        (None, None, {"rstrip": True}, False),
        (normalizers.Replace("a", "aaaaaaaa"), None, {"normalized": True}, True),
    ],
)
def test_a_tokenizer_that_drops_text_does_not_say_how_many_tokens_it_makes_of_it(
    normalizer: Any, pre_tokenizer: Any, added: dict[str, bool], known: bool
) -> None:
    vocabulary = [*(f"<0x{byte:02X}>" for byte in range(256)), "a", "b", "\u2581"]
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            {each: i for i, each in enumerate(vocabulary)}, [], byte_fallback=True
        )
    )
    if normalizer is not None:
        backend.normalizer = normalizer
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    backend.add_tokens([tokenizers.AddedToken("aaa", **{"normalized": False, **added})])
    tokenizer = Tokenizer(transformers.PreTrainedTokenizerFast(tokenizer_object=backend))
    assert (tokenizer.least_tokens("a" * 1000) > 0) is known
    for text in ("a" * 1000, "aaa" + " " * 1000 + "b", "e\u0301" * 100, *TEXTS):
        assert tokenizer.least_tokens(text) <= len(tokenizer.encode(text))


def test_a_directory(directory: Path) -> None:
    tokenizer = load_tokenizer(str(directory))
    assert tokenizer.eos_token_id == BYTE_LEVEL.eos_token_id
    assert tokenizer.bos_token_id == BYTE_LEVEL.bos_token_id
    assert tokenizer.vocab_size == BYTE_LEVEL.vocab_size == len(BYTE_LEVEL.hf)
    for text in TEXTS:
        # Neither cut off nor filled up, whatever the file asks for.
        assert tokenizer.encode(text) == BYTE_LEVEL.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.encode(text) == BYTE_LEVEL.hf.encode(text)


def test_a_hub_id(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(directory))
    assert load_tokenizer("org/name").encode("Hello") == BYTE_LEVEL.encode("Hello")


def test_a_gguf_file() -> None:
    tokenizer = load_tokenizer(open_checkpoint(str(smollm2())))
    assert tokenizer.eos_token_id == 2
    assert tokenizer.bos_token_id == 1
    assert tokenizer.vocab_size == 49152
    assert tokenizer.decode(tokenizer.encode("Hello, world!")) == "Hello, world!"


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ModelLoadError, match=r"has no tokenizer .*set skip_tokenizer_init"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelLoadError, match=r"the tokenizer in .* cannot be loaded"):
        load_tokenizer(str(tmp_path))


def broken(part: str) -> dict[str, Any]:
    """A tokenizer.json with something in the place of a part of its model."""
    backend = json.loads(BYTE_LEVEL.hf.backend_tokenizer.to_str())
    return backend | {"model": backend["model"] | {part: [["nowhere", "to be found"]]}}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", []),
        ("tokenizer.json", broken("vocab")),
        ("tokenizer.json", broken("merges")),
        ("tokenizer_config.json", [1]),
        ("tokenizer_config.json", {"bos_token": 3}),
        ("special_tokens_map.json", [3]),
    ],
)
def test_a_broken_tokenizer_is_refused(
    directory: Path, tmp_path: Path, name: str, content: Any
) -> None:
    """What tokenizers raises of a file it cannot read is an Exception and no more."""
    shutil.copytree(directory, tmp_path / "model")
    (tmp_path / "model" / name).write_text(json.dumps(content))
    with pytest.raises(ModelLoadError, match=r"the tokenizer in .* cannot be loaded .*again"):
        load_tokenizer(str(tmp_path / "model"))


def test_special_tokens_are_split_where_the_tokenizer_says_so(
    directory: Path, tmp_path: Path
) -> None:
    shutil.copytree(directory, tmp_path / "model")
    file = tmp_path / "model" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"split_special_tokens": True}))
    tokenizer = load_tokenizer(str(tmp_path / "model"))
    text = "a<|im_end|>b"
    assert tokenizer.encode(text) == tokenizer.hf(text)["input_ids"] != BYTE_LEVEL.encode(text)


def test_special_tokens_are_added_unless_told_not_to() -> None:
    ids = SENTENCEPIECE.encode("Hello")
    assert ids[0] == SENTENCEPIECE.bos_token_id
    assert SENTENCEPIECE.encode("Hello", add_special_tokens=False) == ids[1:]
    assert SENTENCEPIECE.decode(ids) == "Hello"
    assert SENTENCEPIECE.decode(ids, skip_special_tokens=False) == "<s> Hello"


@pytest.mark.parametrize("call", ["encode", "decode"])
def test_long_texts_let_other_threads_run(call: str) -> None:
    text = "hello world " * 40_000
    given = text if call == "encode" else BYTE_LEVEL.encode(text) * 4
    thread = threading.Thread(target=getattr(BYTE_LEVEL, call), args=(given,))
    num_turns = 0
    thread.start()
    while thread.is_alive():
        time.sleep(0.001)
        num_turns += 1
    # One with the thread's first step, one after its last, if it keeps Python's lock between them.
    assert num_turns > 5


def test_long_texts_are_as_short_ones() -> None:
    piece = "Grüße, world! "
    assert BYTE_LEVEL.encode(piece * 999) == BYTE_LEVEL.encode(piece) * 999
    assert BYTE_LEVEL.decode(BYTE_LEVEL.encode(piece) * 999) == piece * 999
    assert SENTENCEPIECE.encode("x" * 9999)[0] == SENTENCEPIECE.bos_token_id
    assert SENTENCEPIECE.encode("x" * 9999, add_special_tokens=False)[0] != (
        SENTENCEPIECE.bos_token_id
    )
    with pytest.raises(RequestError, match="UTF-8"):
        BYTE_LEVEL.encode("\ud800" * 9999)


def test_chat_template() -> None:
    text = "<|im_start|>user\nSay hi<|im_end|>\n"
    prompt = text + "<|im_start|>assistant\n"
    assert BYTE_LEVEL.apply_chat_template(MESSAGES, tokenize=False) == prompt
    assert BYTE_LEVEL.apply_chat_template(MESSAGES) == BYTE_LEVEL.encode(
        prompt, add_special_tokens=False
    )
    bare = BYTE_LEVEL.apply_chat_template(MESSAGES, add_generation_prompt=False, tokenize=False)
    assert bare == text
    other = BYTE_LEVEL.apply_chat_template(
        MESSAGES, tokenize=False, chat_template="{{ greeting }}", greeting="hello"
    )
    assert other == "hello"
    reference: Any = BYTE_LEVEL.hf.apply_chat_template(MESSAGES, add_generation_prompt=True)
    assert BYTE_LEVEL.apply_chat_template(MESSAGES) == list(reference["input_ids"])


def test_messages_are_taken_as_openai_s_api_has_them() -> None:
    """What templates of models that call tools do with them, and what clients send back."""
    template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}"
        "{% if 'tool_calls' in m %}{% for c in m.tool_calls %}"
        "{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}{% endif %}"
        "{% if 'refusal' in m %}refused{% endif %};{% endfor %}"
    )
    calls = [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": [1]}'}},
        {"id": "2", "type": "function", "function": {"name": "g", "arguments": ""}},
        {"id": "3", "type": "function", "function": {"name": "h", "arguments": {"b": 2}}},
    ]
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "text", "text": "x"}, "y"]},
        {"role": "assistant", "content": None, "refusal": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "1", "content": "7"},
        {"role": "assistant", "content": "z", "tool_calls": []},
        {"role": "assistant", "content": "", "tool_calls": None},
    ]
    text = BYTE_LEVEL.apply_chat_template(messages, tokenize=False, chat_template=template)
    assert text == 'user:x\ny;assistant:f{"a": [1]}g{}h{"b": 2};tool:7;assistant:z;assistant:;'
    assert calls[0]["function"]["arguments"] == '{"a": [1]}'  # type: ignore[index]
    for content, reason in (
        ([{"type": "image_url"}], "a part of type 'image_url'; only text is served"),
        ([["x"]], "a part of type None"),
        ([{"type": "text", "text": 5}], "a text part whose text is 5"),
    ):
        with pytest.raises(RequestError, match=reason):
            BYTE_LEVEL.apply_chat_template([{"role": "user", "content": content}])


@pytest.mark.parametrize("given", ["hello", [5], 5])
@pytest.mark.usefixtures("without_types")
def test_what_are_no_messages_is_refused(given: Any) -> None:
    with pytest.raises(RequestError, match="messages must be objects with role and content"):
        BYTE_LEVEL.apply_chat_template(given)


def test_what_a_tokenizer_lacks_is_hugging_face_s() -> None:
    """As scripts for vLLM ask for it, which hand in what end-of-turn tokens are called."""
    tokenizer: Any = BYTE_LEVEL
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == tokenizer.eos_token_id
    assert tokenizer("Say hi")["input_ids"] == tokenizer.encode("Say hi")
    assert len(tokenizer) == tokenizer.vocab_size
    assert copy.copy(tokenizer).encode("Say hi") == tokenizer.encode("Say hi")
    with pytest.raises(AttributeError, match="nonsense"):
        _ = tokenizer.nonsense


@pytest.mark.parametrize(
    "options", [{"truncation": True, "max_length": 2}, {"padding": "max_length", "max_length": 40}]
)
def test_what_hugging_face_s_is_asked_changes_nothing_later(options: dict[str, Any]) -> None:
    tokenizer = Tokenizer(build_gguf_tokenizer(byte_level_metadata("gpt-2"), "file"))
    ids = BYTE_LEVEL.encode("Say hi to them")
    assert tokenizer("Say hi to them", **options)["input_ids"] != ids
    assert tokenizer.encode("Say hi to them") == ids
    assert tokenizer.apply_chat_template(MESSAGES) == BYTE_LEVEL.apply_chat_template(MESSAGES)


def test_a_single_id_is_decoded() -> None:
    (token,) = BYTE_LEVEL.encode("hi", add_special_tokens=False)[:1]
    assert BYTE_LEVEL.decode(token) == BYTE_LEVEL.decode([token]) != ""


def test_chat_template_refusals_are_request_errors() -> None:
    with pytest.raises(RequestError, match="no chat template: pass chat_template="):
        SENTENCEPIECE.apply_chat_template(MESSAGES)
    with pytest.raises(RequestError, match="refuses these messages: roles must alternate"):
        BYTE_LEVEL.apply_chat_template(
            MESSAGES, chat_template="{{ raise_exception('roles must alternate') }}"
        )


def stream_of(
    tokenizer: Tokenizer,
    ids: list[int],
    *,
    prompt: list[int] | None = None,
    skip: bool = True,
    size: int = 1,
) -> list[str]:
    """The pieces of a stream that is given ``size`` ids at a time, the flushed one last."""
    stream = tokenizer.stream(skip_special_tokens=skip, prompt_ids=prompt or [])
    return [stream.push(ids[i : i + size]) for i in range(0, len(ids), size)] + [stream.flush()]


@BOTH
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_pieces_add_up_to_the_text(tokenizer: Tokenizer, skip: bool, size: int) -> None:
    for text in TEXTS:
        ids = tokenizer.encode(text)
        pieces = stream_of(tokenizer, ids, skip=skip, size=size)
        assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip)


@BOTH
def test_every_token_gives_its_text_at_once(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("The quick brown fox", add_special_tokens=False)
    assert stream_of(tokenizer, ids)[-1] == ""
    pieces = stream_of(tokenizer, ids)[:-1]
    assert all(pieces[1:])  # the first may be SentencePiece's bare leading space


@BOTH
def test_an_unfinished_character_is_kept_back(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("x\U0001d54f", add_special_tokens=False)
    *whole, last = stream_of(tokenizer, ids)
    assert "".join(whole) == "x\U0001d54f"
    assert whole[-1] == "\U0001d54f"
    assert last == ""

    *pieces, last = stream_of(tokenizer, ids[:-1])
    assert "".join(pieces) == "x"
    assert set(last) == {"\ufffd"}
    assert "".join(pieces) + last == tokenizer.decode(ids[:-1])


@BOTH
@pytest.mark.parametrize("skip", [True, False])
def test_a_stream_continues_its_prompt(tokenizer: Tokenizer, skip: bool) -> None:
    for first, second in itertools.product(
        ("Hello", "", "日本語", "a b", "x  ", "𝕏"),  # noqa: RUF001
        (" world", "world", " ", "  y", "😀"),
    ):
        ids = tokenizer.encode(first + second, add_special_tokens=False)
        for cut in range(len(ids) + 1):
            prompt, output = ids[:cut], ids[cut:]
            before = tokenizer.decode(prompt, skip_special_tokens=skip)
            if before.endswith("\ufffd"):
                continue
            pieces = stream_of(tokenizer, output, prompt=prompt, skip=skip)
            assert before + "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip)


def test_the_space_after_a_prompt_is_kept_and_a_leading_one_is_not() -> None:
    hello, world = (SENTENCEPIECE.encode(t, add_special_tokens=False) for t in ("Hello", "world"))
    assert "".join(stream_of(SENTENCEPIECE, world)) == "world"
    assert "".join(stream_of(SENTENCEPIECE, world, prompt=[1])) == "world"
    assert "".join(stream_of(SENTENCEPIECE, world, prompt=[1, *hello])) == " world"
    # However many special tokens come between.
    assert "".join(stream_of(SENTENCEPIECE, world, prompt=[*hello, *[2] * 50])) == " world"


@BOTH
def test_a_prompt_that_ends_within_a_character(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("abc\U0001d54fd", add_special_tokens=False)
    text = tokenizer.decode(ids)
    cuts = [c for c in range(len(ids)) if tokenizer.decode(ids[:c]).endswith("\ufffd")]
    assert cuts
    for cut in cuts:
        pieces = stream_of(tokenizer, ids[cut:], prompt=ids[:cut])
        assert "".join(pieces) == text[3:]
        assert stream_of(tokenizer, [], prompt=ids[:cut]) == [""]


def test_a_prompt_of_many_byte_tokens_is_not_cut_within_a_character() -> None:
    prompt = SENTENCEPIECE.encode("\U0001d54f" * 9, add_special_tokens=False)
    output = SENTENCEPIECE.encode("\U0001d54e", add_special_tokens=False)[-4:]
    pieces = stream_of(SENTENCEPIECE, output, prompt=prompt)
    assert "".join(pieces) == "\U0001d54e"


@BOTH
@given(data=st.data())
def test_streams_survive_any_ids(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = st.lists(st.integers(0, tokenizer.vocab_size + 50), max_size=40)
    prompt, output = data.draw(ids), data.draw(ids)
    skip = data.draw(st.booleans())
    text = "".join(
        stream_of(tokenizer, output, prompt=prompt, skip=skip, size=data.draw(st.integers(1, 5)))
    )
    if tokenizer is BYTE_LEVEL and not prompt and "\ufffd" * 5 not in text:
        # Bytes are mended from left to right, so even broken text adds up.
        assert text == tokenizer.decode(output, skip_special_tokens=skip)


@BOTH
@given(text=st.text(max_size=60), cut=st.integers(0, 60))
def test_streams_of_any_text_add_up(tokenizer: Tokenizer, text: str, cut: int) -> None:
    ids = tokenizer.encode(text)
    assert "".join(stream_of(tokenizer, ids)) == tokenizer.decode(ids)
    before = tokenizer.decode(ids[:cut])
    if not before.endswith("\ufffd"):
        pieces = stream_of(tokenizer, ids[cut:], prompt=ids[:cut])
        assert before + "".join(pieces) == tokenizer.decode(ids)


def test_endless_broken_text_is_not_held_for_ever() -> None:
    broken = BYTE_LEVEL.hf.convert_tokens_to_ids("ÿ")  # the byte 0xff, which no UTF-8 text has
    stream = BYTE_LEVEL.stream()
    pieces = [stream.push([broken]) for _ in range(200)]
    assert sum(map(len, pieces)) > 150
    assert "".join(pieces) + stream.flush() == "\ufffd" * 200


@BOTH
@pytest.mark.parametrize("text", TEXTS)
def test_parts_of_a_character_are_told_as_bytes(tokenizer: Tokenizer, text: str) -> None:
    """As OpenAI's clients join them."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    places = [{each: Logprob(-1.0, 1, tokenizer.text_of(each))} for each in ids]
    told = LogprobsWriter(tokenizer, as_ids=False).chat(ids, places, 0)["content"]
    joined = b"".join(bytes(entry["bytes"]) for entry in told).decode()
    # SentencePiece puts a space before a text.
    assert joined.removeprefix(" ") == text.removeprefix(" ")


@BOTH
def test_the_log_probabilities_of_tokens_tell_where_they_are_in_a_text(
    tokenizer: Tokenizer,
) -> None:
    text = "a hello world, hello"
    ids = tokenizer.encode(text, add_special_tokens=False)
    text_of = TokenTexts(tokenizer).of(SamplingParams())
    places = [{each: Logprob(-1.0, 1, text_of(each))} for each in ids]
    writer = LogprobsWriter(tokenizer, as_ids=False)
    *offsets, end = writer.offsets(ids, places, 0)
    told = writer.completion(ids, places, 0, offsets)
    written = "".join(told["tokens"])
    assert written.removeprefix(" ") == text
    assert end == len(written)
    for offset, token in zip(told["text_offset"], told["tokens"], strict=True):
        assert written.startswith(token, offset)
    # What the engine has not told, as of a prompt's first token, reads alike.
    nothing = [None] * len(ids)
    assert writer.offsets(ids, nothing, 0) == [*offsets, end]
    untold = writer.completion(ids, nothing, 0, offsets)
    assert untold["tokens"] == told["tokens"]


@BOTH
def test_unknown_and_skipped_ids_have_no_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("Hello world", add_special_tokens=False)
    unknown = tokenizer.vocab_size + 1000
    mixed = [i for token in ids for i in (tokenizer.hf.eos_token_id, token, unknown)]
    assert "".join(stream_of(tokenizer, mixed)) == "Hello world"
    assert tokenizer.decode(mixed) == "Hello world"


def test_no_torch_is_needed(directory: Path) -> None:
    code = """
import sys
sys.modules["torch"] = None  # importing it fails, and looking for it finds nothing
from jaxlora.tokenizer import load_tokenizer
for source in sys.argv[1:]:
    tokenizer = load_tokenizer(source)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
    stream = tokenizer.stream()
    print(stream.push(tokenizer.encode("Hello")) + stream.flush(), len(ids) > 5)
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, directory, smollm2()],
        cwd=Path(jaxlora.__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["Hello", "True"] * 2


def test_special_tokens_may_be_joined() -> None:
    words = {"[A]": 0, "[B]": 1, "one": 2, "two": 3}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="one"))
    backend.add_special_tokens(["[A]", "[B]"])
    spaced = Tokenizer(transformers.PreTrainedTokenizerFast(tokenizer_object=backend))

    def text(ids: list[int], *, skip: bool, spaces: bool) -> str:
        stream = spaced.stream(skip_special_tokens=skip, spaces_between_special_tokens=spaces)
        return "".join(map(stream.push, ([i] for i in ids))) + stream.flush()

    ids = [2, 0, 1, 0, 3, 1, 2, 3, 0, 0]
    assert text(ids, skip=False, spaces=True) == "one [A] [B] [A] two [B] one two [A] [A]"
    assert text(ids, skip=False, spaces=False) == "one [A][B][A] two [B] one two [A][A]"
    assert text(ids, skip=True, spaces=False) == "one two one two"
