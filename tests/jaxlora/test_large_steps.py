"""Steps of the largest size, whose last layer goes on with the rows alone, against PEFT.

What they compute is in tests/jaxlora/test_fused_linear.py, all kinds of adapters with extras are in
test_adapter_extras.py, several devices in test_tensor_parallel.py.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest

from jaxlora import LLM, BeamSearchParams, LoRARequest, SamplingParams
from jaxlora.engine.runner import Runner
from tests.jaxlora.peft_models import KINDS, Reference
from tests.jaxlora.test_sampling import check_logprobs

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
SMALL, LARGE = ("mixed 32", "mixed lora 32"), ("mixed 128", "mixed lora 128")


class Recorder(dict[str, Any]):
    """Programs that are counted when they are run."""

    def __init__(self, programs: dict[str, Any]) -> None:
        super().__init__(programs)
        self.runs: Counter[str] = Counter()

    def __getitem__(self, name: str) -> Any:
        self.runs[name] += 1
        return super().__getitem__(name)

    def take(self, names: tuple[str, ...]) -> int:
        """How often one of them was run since this was last asked for it."""
        return sum(self.runs.pop(name, 0) for name in names)


@pytest.fixture(scope="module")
def engine(reference: Reference) -> LLM:
    """Steps with prompts are padded to 32 tokens or to 128; those of 128 score no prompts.

    As if all took the same time, so that more than 32 tokens are always one of 128."""
    with mock.patch("jaxlora.engine.build.tokens_for_weights", return_value=10_000):
        return LLM(
            reference.base_path,
            dtype="float32",
            enable_lora=True,
            max_loras=3,
            max_num_seqs=4,
            max_num_batched_tokens=128,
            skip_tokenizer_init=True,
            use_tqdm=False,
        )


@pytest.fixture
def programs(engine: LLM, monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    """What the engine runs, of what it compiled at its start, and nothing else."""
    runner = engine.llm_engine._runner
    assert isinstance(runner, Runner)
    assert runner.max_scored_step == 32
    recorder = Recorder(runner._programs)
    monkeypatch.setattr(runner, "_programs", recorder)
    compiled = engine.get_metrics()["jaxlora:compilations_total"]
    engine.reset_prefix_cache()
    yield recorder
    assert engine.get_metrics()["jaxlora:compilations_total"] == compiled
    assert engine.get_metrics()["vllm:kv_cache_usage_perc"] == 0


def texts(*lengths: int) -> list[list[int]]:
    random = np.random.default_rng(sum(lengths))
    return [random.integers(0, 97, length).tolist() for length in lengths]


def lora(reference: Reference, name: str | None) -> LoRARequest | None:
    return None if name is None else LoRARequest(name, None, reference.paths[name])


def test_rows_of_every_kind(engine: LLM, reference: Reference, programs: Recorder) -> None:
    """Whole prompts, chunks that end theirs and chunks that do not, and rows that decode, with more
    adapters than slots; log-probabilities of what is chosen, and the same tokens alone."""
    names = [None, *KINDS, None]
    some = texts(50, 130, 1, 90, 240, 33, 64, 2, 128)
    params = [dataclasses.replace(GREEDY, logprobs=2 if i % 2 else None) for i in range(len(names))]
    loras = [lora(reference, name) for name in names]
    outputs = engine.generate(some, params, lora_request=loras, use_tqdm=False)
    assert programs.take(LARGE) > len(some) / 2
    for prompt, name, output in zip(some, names, outputs, strict=True):
        completion = output.outputs[0]
        reference.check_greedy(prompt, completion.token_ids, name)
        if completion.logprobs is not None:
            logits = reference.logits([*prompt, *completion.token_ids], name)
            check_logprobs(
                logits[len(prompt) - 1 : -1], completion.token_ids, completion.logprobs, 2
            )
    for i in (1, 3, 4):
        engine.reset_prefix_cache()
        (alone,) = engine.generate([some[i]], params[i], lora_request=loras[i], use_tqdm=False)
        assert alone.outputs[0].token_ids == outputs[i].outputs[0].token_ids


@pytest.mark.parametrize("name", [None, "r16-all"])
def test_prompts_are_scored_beside_others(
    engine: LLM, reference: Reference, programs: Recorder, name: str | None
) -> None:
    """Those are read in large steps, and what is scored in small ones."""
    scored = dataclasses.replace(GREEDY, prompt_logprobs=3)
    some = texts(100, 140, 90, 60, 1, 150)
    params = [GREEDY, scored, GREEDY, scored, scored, GREEDY]
    outputs = engine.generate(some, params, lora_request=lora(reference, name), use_tqdm=False)
    assert programs.take(LARGE) >= 3
    assert programs.take(SMALL) >= 7
    for prompt, each, output in zip(some, params, outputs, strict=True):
        reference.check_greedy(prompt, output.outputs[0].token_ids, name)
        assert (output.prompt_logprobs is None) == (each is GREEDY)
        if output.prompt_logprobs is not None:
            assert output.prompt_logprobs[0] is None
            logits = reference.logits(prompt, name)[:-1]
            check_logprobs(logits, prompt[1:], output.prompt_logprobs[1:], 3)


def test_what_goes_on_from_pages_that_are_there(
    engine: LLM, reference: Reference, programs: Recorder
) -> None:
    """The turns of a conversation, and several completions of one prompt."""
    first, more = texts(90, 60)
    request = lora(reference, "patterns")
    engine.generate([first], GREEDY, lora_request=request, use_tqdm=False)
    (output,) = engine.generate([[*first, *more]], GREEDY, lora_request=request, use_tqdm=False)
    assert output.num_cached_tokens == 80
    assert programs.take(LARGE) == 2
    reference.check_greedy([*first, *more], output.outputs[0].token_ids, "patterns")

    several = dataclasses.replace(GREEDY, n=3, temperature=1.0, seed=3, logprobs=0)
    (output,) = engine.generate([more], several, lora_request=request, use_tqdm=False)
    assert programs.take(LARGE) == 1
    assert len({tuple(each.token_ids) for each in output.outputs}) == 3
    for each in output.outputs:
        logits = reference.logits([*more, *each.token_ids], "patterns")[len(more) - 1 : -1]
        check_logprobs(logits, each.token_ids, each.logprobs, 0)


def test_beams(engine: LLM, reference: Reference, programs: Recorder) -> None:
    (prompt,) = texts(70)
    params = BeamSearchParams(beam_width=2, max_tokens=3, length_penalty=0.0)
    (output,) = engine.beam_search([prompt], params, lora_request=lora(reference, "r16-all"))
    assert programs.take(LARGE) == 1
    theirs = reference.beam_search(prompt, "r16-all", 2, 3)
    assert [beam.tokens for beam in output.sequences] == theirs.sequences.tolist()
