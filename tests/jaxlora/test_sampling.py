"""Sampling parameters through the public API, step by step against transformers and numpy."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor
from transformers.generation.logits_process import SequenceBiasLogitsProcessor

from jaxlora import (
    LLM,
    CompletionOutput,
    GenerationError,
    Logprob,
    LoRARequest,
    RequestError,
    SamplingParams,
)
from jaxlora.engine.logprobs import TokenTexts
from tests.jaxlora.engine.simulator import PieceTokenizer
from tests.jaxlora.peft_models import NEAR_TIE, Reference, prompts

VOCAB = 97
PIECES = [chr(0x4E00 + i) for i in range(VOCAB)]

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 0.7},
    "encouraged": {"presence_penalty": -2.0, "frequency_penalty": -0.5},
    "repetition": {"repetition_penalty": 1.3},
    "all penalties": {
        "presence_penalty": 0.4,
        "frequency_penalty": 0.3,
        "repetition_penalty": 0.8,
    },
    "bias": {"logit_bias": {3: 4.0, 50: -100.0, 96: 2.5}},
    "allowed": {"allowed_token_ids": list(range(0, VOCAB, 5))},
    "allowed and biased": {"allowed_token_ids": [1, 2, 3, 4], "logit_bias": {2: 3.0, 9: 50.0}},
    "min_tokens": {"min_tokens": 10, "stop_token_ids": list(range(20, 50)), "ignore_eos": True},
    "logprobs": {"logprobs": 5},
    "everything": {
        "presence_penalty": 0.4,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.2,
        "logit_bias": {7: 1.0},
        "allowed_token_ids": list(range(60)),
        "bad_words": PIECES[:20],
        "logprobs": 3,
        "prompt_logprobs": 2,
    },
}


class Faulty(PieceTokenizer):
    """Has no text for one token, and says so by raising."""

    def __init__(self, bad: int) -> None:
        self._bad = bad

    def decode(self, ids: Any, skip_special_tokens: bool = True) -> str:
        if self._bad in ids:
            raise UnicodeError("no text")
        return "."


class Pieces(PieceTokenizer):
    """One character a token; a text may begin with a space, which is none."""

    def __init__(self) -> None:
        self.pieces = tuple(PIECES)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return super().encode(text.removeprefix(" "))

    def decode(self, ids: Any, skip_special_tokens: bool = True) -> str:
        return "".join(self.pieces[i] for i in ids)


@pytest.fixture
def spoken(llm: LLM) -> Iterator[LLM]:
    """The shared engine, with a tokenizer."""
    engine = llm.llm_engine
    engine._intake.tokenizer, engine._token_texts = Pieces(), TokenTexts(Pieces())
    yield llm
    engine._intake.tokenizer, engine._token_texts = None, TokenTexts(None)


def params_of(kind: str, **more: Any) -> SamplingParams:
    return SamplingParams(
        **({"temperature": 0.0, "max_tokens": 24, "ignore_eos": True} | KINDS[kind] | more)
    )


def shaped(
    logits: np.ndarray, prompt: Sequence[int], done: Sequence[int], params: SamplingParams
) -> np.ndarray:
    """What one token is chosen by, greedily."""
    ids = torch.tensor([[*prompt, *done]])
    processors = LogitsProcessorList()
    if params.logit_bias:
        bias = {(token,): value for token, value in params.logit_bias.items()}
        processors.append(SequenceBiasLogitsProcessor(bias))
    if params.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    scores = processors(ids, torch.tensor(logits[None])).numpy()[0].copy()
    counts = np.bincount(np.asarray(done, int), minlength=VOCAB)
    scores -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
    if params.allowed_token_ids is not None:
        scores[np.setdiff1d(np.arange(VOCAB), params.allowed_token_ids)] = -np.inf
    for word in params.bad_words or ():
        ids_of = [PIECES.index(character) for character in word]
        if list(done[len(done) - len(ids_of) + 1 :]) == ids_of[:-1]:
            scores[ids_of[-1]] = -np.inf
    if len(done) < params.min_tokens:
        scores[list(params.stop_token_ids or ())] = -np.inf
    return scores


def check(
    reference: Reference,
    prompt: list[int],
    completion: CompletionOutput,
    params: SamplingParams,
    adapter: str | None = None,
) -> None:
    """Asserts that each token is the best after those before it, by reference."""
    tokens = completion.token_ids
    logits = reference.logits([*prompt, *tokens], adapter)[len(prompt) - 1 : -1]
    for at, token in enumerate(tokens):
        scores = shaped(logits[at], prompt, tokens[:at], params)
        assert scores.max() - scores[token] <= NEAR_TIE, f"token {at}"
    if params.logprobs is not None:
        assert completion.logprobs is not None
        check_logprobs(logits, tokens, completion.logprobs, params.logprobs)
        assert completion.cumulative_logprob == pytest.approx(
            sum(
                told[token].logprob for told, token in zip(completion.logprobs, tokens, strict=True)
            )
        )


def check_logprobs(logits: np.ndarray, tokens: list[int], told: Any, count: int) -> None:
    expected = torch.log_softmax(torch.tensor(logits), -1).numpy()
    assert len(told) == len(tokens)
    for scores, token, entry in zip(expected, tokens, told, strict=True):
        assert next(iter(entry)) == token
        assert count <= len(entry) <= count + 1
        for other, logprob in entry.items():
            assert logprob.logprob == pytest.approx(scores[other], abs=1e-4)
            near = np.abs(scores - scores[other]) < 1e-4
            above = int((scores > scores[other]).sum())
            assert above - near.sum() < logprob.rank - 1 <= above + near.sum()
        assert set(range(1, count + 1)) <= {logprob.rank for logprob in entry.values()}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_alone(spoken: LLM, reference: Reference, kind: str) -> None:
    params = params_of(kind)
    for prompt in prompts(2, seed=1):
        (output,) = spoken.generate([prompt], params, use_tqdm=False)
        check(reference, prompt, output.outputs[0], params)
    plain = spoken.generate([prompt], params_of("plain"), use_tqdm=False)[0].outputs[0].token_ids
    changed = output.outputs[0].token_ids != plain
    assert changed is (kind not in ("plain", "logprobs"))


def test_every_kind_at_once_and_nothing_compiles(spoken: LLM, reference: Reference) -> None:
    """More requests than rows, chunked prompts, preemption, adapters between: equal tokens."""
    kinds = [*KINDS, *KINDS]
    params = [params_of(kind, max_tokens=40) for kind in kinds]
    params += [
        params_of(kind, temperature=1.0, seed=i, max_tokens=40) for i, kind in enumerate(KINDS)
    ]
    texts = prompts(len(params), seed=2)
    names = [("r8-qv", None, "r16-all")[i % 3] for i in range(len(texts))]
    loras = [name and LoRARequest(name, None, reference.paths[name]) for name in names]
    before = spoken.get_metrics()
    outputs = spoken.generate(texts, params, lora_request=loras, use_tqdm=False)
    after = spoken.get_metrics()
    assert after["jaxlora:compilations_total"] == before["jaxlora:compilations_total"]
    assert after["vllm:num_preemptions"] > before["vllm:num_preemptions"]
    for prompt, param, name, output in zip(texts, params, names, outputs, strict=True):
        if param.greedy:
            check(reference, prompt, output.outputs[0], param, name)
    for i in range(len(KINDS), len(texts), 2):
        (alone,) = spoken.generate([texts[i]], params[i], lora_request=loras[i], use_tqdm=False)
        got = outputs[i].outputs[0]
        assert alone.outputs[0].token_ids == got.token_ids
        assert [*map(list, alone.outputs[0].logprobs or ())] == [*map(list, got.logprobs or ())]


@pytest.mark.parametrize("length", [1, 2, 30, 64, 65, 66, 150])
def test_prompt_logprobs(spoken: LLM, reference: Reference, length: int) -> None:
    """Prompts of one chunk and several, and of one token in a chunk."""
    prompt = np.random.default_rng(length).integers(0, VOCAB, length).tolist()
    params = SamplingParams(temperature=0.0, max_tokens=2, prompt_logprobs=4, ignore_eos=True)
    others = [[5, 6, 7]] * 4
    outputs = spoken.generate([prompt, *others], params, use_tqdm=False)
    told = outputs[0].prompt_logprobs
    assert told is not None
    assert told[0] is None
    check_logprobs(reference.logits(prompt, None)[:-1], prompt[1:], told[1:], 4)
    assert outputs[0].outputs[0].logprobs is None
    assert len({repr(output.prompt_logprobs) for output in outputs[1:]}) == 1


def test_prompt_logprobs_a_token_at_a_time(reference: Reference) -> None:
    llm = LLM(
        reference.base_path,
        max_num_seqs=1,
        max_num_batched_tokens=1,
        num_gpu_blocks_override=16,
        skip_tokenizer_init=True,
        use_tqdm=False,
    )
    prompt = [5, 6, 7, 8]
    params = SamplingParams(temperature=0.0, max_tokens=2, prompt_logprobs=4, ignore_eos=True)
    (output,) = llm.generate([prompt], params, use_tqdm=False)
    assert output.prompt_logprobs is not None
    check_logprobs(reference.logits(prompt, None)[:-1], prompt[1:], output.prompt_logprobs[1:], 4)
    reference.check_greedy(prompt, output.outputs[0].token_ids, None)


def test_prompt_logprobs_under_an_adapter(spoken: LLM, reference: Reference) -> None:
    (prompt,) = prompts(1, seed=9)
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, logprobs=0)
    request = LoRARequest("r16-all", None, reference.paths["r16-all"])
    (output,) = spoken.generate([prompt], params, lora_request=request, use_tqdm=False)
    logits = reference.logits(prompt, "r16-all")
    assert output.prompt_logprobs is not None
    check_logprobs(logits[:-1], prompt[1:], output.prompt_logprobs[1:], 0)
    check_logprobs(logits[-1:], output.outputs[0].token_ids, output.outputs[0].logprobs, 0)


def test_a_prompt_whose_logprobs_cannot_be_told_ends_alone(
    spoken: LLM, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault in the tokenizer, in the middle of a prompt that takes several steps."""
    bad, prompt = 77, [*range(70), 77, *range(20)]
    monkeypatch.setattr(spoken.llm_engine, "_token_texts", TokenTexts(Faulty(bad)))
    params = SamplingParams(temperature=0.0, max_tokens=3, prompt_logprobs=0, ignore_eos=True)
    broken, fine = spoken.generate([prompt, prompt[:70]], params, use_tqdm=False)
    assert broken.outputs[0].finish_reason == "error"
    assert isinstance(broken.error, GenerationError)
    assert "a log-probability of the prompt could not be told" in str(broken.error)
    assert fine.prompt_logprobs is not None
    reference.check_greedy(prompt[:70], fine.outputs[0].token_ids, None)


def test_values_that_32_bits_do_not_hold_mean_what_they_say(spoken: LLM) -> None:
    """They came to the device's arrays, and ended the engine or meant something else."""
    (prompt,) = prompts(1, seed=3)
    all_kept, same, one, greedy = spoken.generate(
        [prompt] * 4,
        [
            SamplingParams(seed=1, max_tokens=12, ignore_eos=True),
            SamplingParams(seed=1, top_k=2**40, max_tokens=12, ignore_eos=True, min_p=1e-300),
            SamplingParams(seed=1, top_p=1e-300, max_tokens=12, ignore_eos=True),
            SamplingParams(temperature=0, max_tokens=12, ignore_eos=True),
        ],
        use_tqdm=False,
    )
    assert all_kept.outputs[0].token_ids == same.outputs[0].token_ids
    assert one.outputs[0].token_ids == greedy.outputs[0].token_ids


def test_logprobs_of_the_whole_vocabulary(spoken: LLM, reference: Reference) -> None:
    (prompt,) = prompts(1, seed=12)
    params = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
    everything = dataclasses.replace(params, logprobs=-1, prompt_logprobs=-1)
    some = dataclasses.replace(params, logprobs=30)
    output, beside = spoken.generate([prompt, prompt], [everything, some], use_tqdm=False)
    tokens = output.outputs[0].token_ids
    logits = reference.logits([*prompt, *tokens], None)[:-1]
    check_logprobs(logits[len(prompt) - 1 :], tokens, output.outputs[0].logprobs, VOCAB)
    assert output.prompt_logprobs is not None
    check_logprobs(logits[: len(prompt) - 1], prompt[1:], output.prompt_logprobs[1:], VOCAB)
    assert {len(entry) for entry in output.outputs[0].logprobs or ()} == {VOCAB}
    check_logprobs(logits[len(prompt) - 1 :], tokens, beside.outputs[0].logprobs, 30)


def test_logprobs_say_what_they_are_of(spoken: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=1)
    (output,) = spoken.generate([[1, 2]], params, use_tqdm=False)
    completion = output.outputs[0]
    assert completion.logprobs is not None
    ((token, told),) = completion.logprobs[0].items()
    assert told == Logprob(completion.cumulative_logprob, 1, PIECES[token])
    silent = dataclasses.replace(params, detokenize=False)
    (output,) = spoken.generate([[1, 2]], silent, use_tqdm=False)
    completion = output.outputs[0]
    assert completion.logprobs is not None
    assert completion.logprobs[0][token].decoded_token is None


def test_bad_words_of_several_tokens(spoken: LLM, reference: Reference) -> None:
    (prompt,) = prompts(1, seed=4)
    words: list[str] = []
    seen: set[tuple[int, ...]] = set()
    for size in (2, 3, 1, 16):
        params = params_of("plain", bad_words=words, repetition_penalty=1.01)
        (output,) = spoken.generate([prompt], params, use_tqdm=False)
        check(reference, prompt, output.outputs[0], params)
        assert not any(word in output.outputs[0].text for word in words)
        tokens = tuple(output.outputs[0].token_ids)
        assert tokens not in seen
        seen.add(tokens)
        words = [*words, output.outputs[0].text[4 : 4 + size]]


def test_completions_of_one_prompt(spoken: LLM) -> None:
    params = SamplingParams(n=3, seed=4, max_tokens=12, presence_penalty=1.0, ignore_eos=True)
    (output,) = spoken.generate([[1, 2, 3]], params, use_tqdm=False)
    assert len({tuple(each.token_ids) for each in output.outputs}) == 3
    for i, each in enumerate(output.outputs):
        one = dataclasses.replace(params, n=1, seed=4 + i)
        (alone,) = spoken.generate([[1, 2, 3]], one, use_tqdm=False)
        assert alone.outputs[0].token_ids == each.token_ids


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"logit_bias": {VOCAB: 1.0}}, "logit_bias 97 is outside the vocabulary of 97 ids"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids -1 is outside the vocabulary of 97"),
        (
            {"allowed_token_ids": [2, 3], "stop_token_ids": [2, 3], "min_tokens": 1},
            "allowed_token_ids may leave nothing to choose",
        ),
        (
            {"allowed_token_ids": [2], "bad_words": [PIECES[5] + PIECES[2]]},
            "allowed_token_ids may leave nothing to choose",
        ),
        ({"bad_words": [PIECES[0] * 17]}, "bad_words come to 1 token sequences of up to 17 tokens"),
        ({"bad_words": PIECES[:65]}, "bad_words has 65 words .* the limits are 64 and 4096"),
    ],
)
def test_what_cannot_be_served_is_refused(
    spoken: LLM, params: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        spoken.generate([[1]], SamplingParams(**params), use_tqdm=False)


def test_bad_words_need_a_tokenizer(llm: LLM) -> None:
    with pytest.raises(RequestError, match="bad_words need a tokenizer"):
        llm.generate([[1]], SamplingParams(bad_words=["a"]), use_tqdm=False)


@pytest.mark.parametrize("which", ["extras_reference", "saved_reference"])
def test_prompt_logprobs_under_adapters_of_the_head(
    extras_llm: LLM, which: str, request: pytest.FixtureRequest
) -> None:
    """LoRA on it, or a whole one of the adapter's own."""
    reference: Reference = request.getfixturevalue(which)
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1)
    names = [None, *reference.kinds]
    texts = prompts(len(names), seed=6)
    loras = [name and LoRARequest(name, None, reference.paths[name]) for name in names]
    outputs = extras_llm.generate(texts, params, lora_request=loras, use_tqdm=False)
    for prompt, name, output in zip(texts, names, outputs, strict=True):
        told = output.prompt_logprobs
        assert told is not None
        check_logprobs(reference.logits(prompt, name)[:-1], prompt[1:], told[1:], 1)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_preempted_and_resumed(spoken: LLM, kind: str, temperature: float) -> None:
    """Twice, once within the prompt; the row is another sequence's in between."""
    engine = spoken.llm_engine
    prompt = np.random.default_rng(3).integers(0, VOCAB, 100).tolist()
    params = params_of(kind, temperature=temperature, seed=3)
    (expected,) = spoken.generate([prompt], params, use_tqdm=False)
    engine.reset_prefix_cache()
    engine.add_request("r", prompt, params)
    (sequence,) = engine._requests["r"].sequences
    last = None
    for step in range(60):
        if step in (1, 9) and sequence in engine.scheduler.running:
            row = sequence.row
            engine.scheduler._preempt(sequence)
            engine.scheduler.waiting.remove(sequence)
            other = params_of("everything", temperature=1.0, max_tokens=3)
            engine.add_request(f"other {step}", [5, 6], other)
            # As the scheduler does, a step passes before it may run again.
            for output in engine.step():
                last = output if output.request_id == "r" else last
            engine.scheduler.waiting.add(sequence)
            engine.reset_prefix_cache()
            assert engine._requests[f"other {step}"].sequences[0].row == row
        for output in engine.step():
            last = output if output.request_id == "r" else last
        if not engine.has_unfinished_requests():
            break
    assert sequence.num_at_admission > len(prompt)
    assert last is not None
    assert last.outputs[0].token_ids == expected.outputs[0].token_ids
    told = [output.outputs[0].logprobs for output in (last, expected)]
    assert [*map(list, told[0] or ())] == [*map(list, told[1] or ())]
    if params.prompt_logprobs is not None:
        assert last.prompt_logprobs is not None
        assert len(last.prompt_logprobs) == 100
