"""What requests become before they are queued, with a real tokenizer."""

from __future__ import annotations

import pytest

from jaxlora.engine.intake import Intake
from jaxlora.models.checkpoints import open_checkpoint
from jaxlora.tokenizer import Tokenizer, load_tokenizer
from jaxlora.types import SamplingParams
from tests.jaxlora.models.gguf_files import smollm2


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(open_checkpoint(str(smollm2())))


def test_bad_words_begin_a_text_or_follow_a_space(tokenizer: Tokenizer) -> None:
    intake = Intake(
        tokenizer=tokenizer,
        vocab_size=tokenizer.vocab_size,
        max_model_len=100,
        eos_token_ids=frozenset(tokenizer.eos_token_ids),
        seed=0,
    )
    params = SamplingParams(bad_words=["Paris", " the capital of", "  "])
    request = intake.request("r", "What is the capital of France?", params, None)
    (sequence,) = request.sequences
    texts = [tokenizer.decode(word) for word in sequence.bad_words]
    assert texts == ["Paris", " Paris", "the capital of", " the capital of", " "]
    # In the tokens that a text has them in.
    for text, word in zip(texts, sequence.bad_words, strict=True):
        written = tuple(tokenizer.encode("It is" + text if text.startswith(" ") else text))
        assert written[-len(word) :] == word
