"""What requests become before they are queued, with a real tokenizer."""

from __future__ import annotations

from typing import Any

import pytest

from jaxlora.engine.intake import Intake
from jaxlora.errors import RequestError
from jaxlora.models.checkpoints import open_checkpoint
from jaxlora.models.gguf_tokenizer import build_gguf_tokenizer
from jaxlora.tokenizer import Tokenizer, load_tokenizer
from jaxlora.types import SamplingParams
from tests.jaxlora.models.gguf_files import smollm2
from tests.jaxlora.models.gguf_vocabularies import sentencepiece_metadata


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(open_checkpoint(str(smollm2())))


@pytest.fixture(scope="module")
def intake(tokenizer: Tokenizer) -> Intake:
    return intake_of(tokenizer)


def intake_of(tokenizer: Tokenizer) -> Intake:
    return Intake(
        tokenizer=tokenizer,
        vocab_size=tokenizer.vocab_size,
        max_model_len=100,
        eos_token_ids=frozenset([tokenizer.hf.eos_token_id]),
        seed=0,
    )


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"stop": ["x"] * 257}, "stop has 257 strings of up to 1 characters; the limits are 256"),
        ({"stop": "x" * 10**7}, "stop has 1 strings of up to 10000000 characters; .* and 4096"),
        (
            {"stop_token_ids": [*range(100, 132), 100], "min_tokens": 1},
            "min_tokens can hold back 32 ids.*with stop_token_ids there are 33",
        ),
        (
            {"bad_words": ["x"] * (3 * 10**5)},
            "bad_words has 300000 words of up to 1 char.* are 64 and",
        ),
        ({"bad_words": ["x" * 10**7]}, "bad_words has 1 words of up to 10000000 char.* and 4096"),
    ],
)
def test_what_is_too_much_is_refused_at_once(
    intake: Intake, monkeypatch: pytest.MonkeyPatch, params: dict[str, Any], message: str
) -> None:
    # What would take long.
    monkeypatch.setattr(Tokenizer, "encode", None)
    with pytest.raises(RequestError, match=message):
        intake.request("r", [5], SamplingParams(**params), None)


def test_min_tokens_holds_back_each_id_once(intake: Intake, tokenizer: Tokenizer) -> None:
    eos = tokenizer.eos_token_id
    assert eos is not None
    for params in (
        SamplingParams(stop_token_ids=range(100, 132), min_tokens=1, ignore_eos=True),
        SamplingParams(stop_token_ids=[*range(100, 131), eos], min_tokens=1),
    ):
        (sequence,) = intake.request("r", [5], params, None).sequences
        assert len(sequence.held_back_ids) == 32


def test_bad_words_begin_a_text_or_follow_a_space(intake: Intake, tokenizer: Tokenizer) -> None:
    params = SamplingParams(bad_words=["Paris", " the capital of", "\n", "  "])
    request = intake.request("r", "What is the capital of France?", params, None)
    (sequence,) = request.sequences
    texts = [tokenizer.decode(word) for word in sequence.bad_words]
    capital = ["the capital of", " the capital of"]
    assert texts == ["Paris", " Paris", *capital, "\n", " \n", "  ", "   "]
    # In the tokens that a text has them in.
    for text, word in zip(texts, sequence.bad_words, strict=True):
        written = tuple(tokenizer.encode("It is" + text if text.startswith(" ") else text))
        assert written[-len(word) :] == word


@pytest.mark.parametrize(
    "text", ["hello", "I hello", "(hello)", "\nhello", "hello\n", "a\nb", "a b"]
)
@pytest.mark.parametrize("word", ["hello", "\n"])
def test_bad_words_are_kept_out_where_a_text_is_given_a_space_at_its_beginning(
    text: str, word: str
) -> None:
    """As Llama 2's and Mistral's are."""
    tokenizer = Tokenizer(build_gguf_tokenizer(sentencepiece_metadata(), "file"))
    params = SamplingParams(bad_words=[word])
    (sequence,) = intake_of(tokenizer).request("r", [5], params, None).sequences
    ids = tuple(tokenizer.encode(text))
    found = (ids[at : at + len(bad)] == bad for bad in sequence.bad_words for at in range(len(ids)))
    assert any(found) == (word in text)
