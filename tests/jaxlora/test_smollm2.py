"""A real model end to end: SmolLM2-135M-Instruct from its GGUF file, against transformers."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

import jaxlora
from jaxlora import LLM, SamplingParams
from jaxlora.config import ModelConfig
from jaxlora.models.cache import make_cache
from jaxlora.models.checkpoints import open_checkpoint
from jaxlora.models.weights import load_weights
from jaxlora.parallel import Devices
from kernels_pallas.paged_attention.op import PagedBatch
from kernels_pallas.paged_attention.reference import WIDE_IMPLEMENTATION
from tests.jaxlora.peft_models import NEAR_TIE

QUESTIONS = (
    "What is the capital of France?",
    "Write a haiku about autumn.",
    "Explain photosynthesis to a child.",
    "List three uses of a paper clip.",
    "def fibonacci(n):",
    "Translate 'good morning' into Spanish.",
    "Why is the sky blue? Answer in one sentence.",
    "Tell me a story about a fox, a crow and 17 pieces of cheese.",
)
GREEDY = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)


def test_logits_of_every_token(
    smollm2_path: str, smollm2_reference: transformers.PreTrainedModel
) -> None:
    checkpoint = open_checkpoint(smollm2_path)
    config = ModelConfig.from_hf(checkpoint.hf_config())
    float32 = jnp.dtype("float32")
    model = nnx.merge(*load_weights(config, checkpoint.tensors(), float32, Devices.first(1)))
    token_ids = np.random.default_rng(0).integers(0, config.vocab_size, 48).astype(np.int32)
    batch = PagedBatch(
        cu_q_lens=jnp.array([0, 48], jnp.int32),
        kv_lens=jnp.array([48], jnp.int32),
        page_table=jnp.array([[2, 0, 1]], jnp.int32),
        num_rows=jnp.array([1], jnp.int32),
        max_q_len=48,
    )
    cache = make_cache(
        config, WIDE_IMPLEMENTATION, Devices.first(1), num_pages=3, page_size=16, dtype=float32
    )
    hidden, _ = model(jnp.array(token_ids), cache, batch, WIDE_IMPLEMENTATION, None)
    with torch.no_grad():
        logits = smollm2_reference(torch.tensor(token_ids[None].astype(np.int64))).logits
    np.testing.assert_allclose(model.logits(hidden), logits[0].numpy(), rtol=0, atol=3e-4)


def test_64_greedy_tokens_of_eight_prompts(
    smollm2: LLM, smollm2_reference: transformers.PreTrainedModel
) -> None:
    conversations = [[{"role": "user", "content": text}] for text in QUESTIONS]
    outputs = smollm2.chat(conversations, GREEDY, use_tqdm=False)
    for output in outputs:
        got = output.outputs[0].token_ids
        assert len(got) == 64
        prompt = output.prompt_token_ids
        with torch.no_grad():
            logits = smollm2_reference(torch.tensor([[*prompt, *got]])).logits[0].numpy()
        logits = logits[len(prompt) - 1 : -1]
        behind = logits.max(axis=-1) - logits[np.arange(len(got)), got]
        assert behind.max() <= NEAR_TIE


def test_text_is_the_tokens_decoded(smollm2: LLM) -> None:
    (output,) = smollm2.chat([{"role": "user", "content": QUESTIONS[0]}], GREEDY, use_tqdm=False)
    completion = output.outputs[0]
    assert completion.text == smollm2.get_tokenizer().decode(completion.token_ids)
    assert "Paris" in completion.text


def test_a_completion_ends_at_end_of_sequence(smollm2: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=64)
    (output,) = smollm2.chat([{"role": "user", "content": QUESTIONS[0]}], params, use_tqdm=False)
    completion = output.outputs[0]
    assert completion.finish_reason == "stop"
    assert completion.stop_reason is None
    assert completion.token_ids[-1] in smollm2.llm_engine.eos_token_ids
    assert not completion.text.endswith("<|im_end|>")


@pytest.mark.parametrize("include", [False, True])
def test_stop_strings(smollm2: LLM, include: bool) -> None:
    prompt = "One, two, three, four,"
    params = SamplingParams(
        temperature=0.0, max_tokens=32, stop=[" eight,"], include_stop_str_in_output=include
    )
    (output,) = smollm2.generate(prompt, params, use_tqdm=False)
    completion = output.outputs[0]
    assert completion.stop_reason == " eight,"
    assert completion.text == " five, six, seven," + (" eight," if include else "")


def test_min_tokens_hold_back_the_end(smollm2: LLM) -> None:
    conversation = [{"role": "user", "content": QUESTIONS[0]}]
    short = SamplingParams(temperature=0.0, max_tokens=64)
    long = SamplingParams(temperature=0.0, max_tokens=64, min_tokens=40)
    (first,) = smollm2.chat(conversation, short, use_tqdm=False)
    (second,) = smollm2.chat(conversation, long, use_tqdm=False)
    end = len(first.outputs[0].token_ids)
    assert end < 40 <= len(second.outputs[0].token_ids)
    before_end = first.outputs[0].token_ids[:-1]
    assert second.outputs[0].token_ids[: end - 1] == before_end


def test_a_seed_gives_the_same_tokens_in_any_batch(smollm2: LLM) -> None:
    prompt = "Once upon a time"
    params = SamplingParams(temperature=1.0, top_p=0.95, top_k=50, seed=11, max_tokens=24)
    others = SamplingParams(temperature=1.5, max_tokens=24)
    (alone,) = smollm2.generate(prompt, params, use_tqdm=False)
    crowd = smollm2.generate(
        ["Hello", "The sea", prompt, "A", prompt],
        [others, GREEDY, params, others, others],
        use_tqdm=False,
    )
    assert crowd[2].outputs[0].token_ids == alone.outputs[0].token_ids
    assert crowd[4].outputs[0].token_ids != alone.outputs[0].token_ids


def test_prompts_in_every_form(smollm2: LLM) -> None:
    text = "The capital of Italy is"
    ids = smollm2.get_tokenizer().encode(text)
    params = SamplingParams(temperature=0.0, max_tokens=4)
    forms = [text, {"prompt": text}, ids, {"prompt_token_ids": ids}]
    got = [smollm2.generate(form, params, use_tqdm=False) for form in forms]
    assert all(len(outputs) == 1 for outputs in got)
    together = smollm2.generate(forms, params, use_tqdm=False)
    texts = {outputs[0].outputs[0].text for outputs in got} | {o.outputs[0].text for o in together}
    assert len(texts) == 1
    assert together[0].prompt == text
    assert together[2].prompt is None
    assert together[2].prompt_token_ids == ids


def test_progress_shows_tokens_a_second(smollm2: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    smollm2.generate(["Hello"] * 3, SamplingParams(temperature=0.0, max_tokens=4))
    shown = capsys.readouterr().err
    assert "3/3" in shown
    assert "output tokens/s" in shown


def test_what_cannot_run_is_refused(smollm2: LLM) -> None:
    long = [1] * 2048
    with pytest.raises(jaxlora.RequestError, match=r"2048 tokens.*max_model_len=512"):
        smollm2.generate([long], GREEDY, use_tqdm=False)
    with pytest.raises(ValueError, match=r"The lengths of prompts \(2\) and lora_request \(1\)"):
        smollm2.generate(["a", "b"], GREEDY, lora_request=[None], use_tqdm=False)


def test_bad_words_and_logprobs_in_text(smollm2: LLM) -> None:
    """Words that the model would say, at the beginning of a text and after a space."""
    conversation = [{"role": "user", "content": "What is the capital of France?"}]
    params = SamplingParams(temperature=0.0, max_tokens=12, logprobs=2)
    (before,) = smollm2.chat(conversation, params, use_tqdm=False)
    completion = before.outputs[0]
    assert completion.logprobs is not None
    said = [told[i] for told, i in zip(completion.logprobs, completion.token_ids, strict=True)]
    assert "".join(one.decoded_token or "" for one in said).startswith(completion.text)
    assert [one.rank for one in said] == [1] * len(said)
    banned = ["The", "Paris", "capital of"]
    assert all(word in completion.text for word in banned)
    without = dataclasses.replace(params, bad_words=banned, logprobs=None)
    (after,) = smollm2.chat(conversation, without, use_tqdm=False)
    assert after.outputs[0].text
    assert not any(word in after.outputs[0].text for word in banned)
