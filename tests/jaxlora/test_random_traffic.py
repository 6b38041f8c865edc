"""Random traffic: each request is answered as it is alone, whoever else runs, and nothing is left.

Prompts that begin alike, every kind of adapter under names whose content changes, parameters of all
sorts, priorities, salts and aborts, in an engine that is short of pages, rows and slots.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest

from jaxlora import LLM, LoRARequest, RequestOutput, RequestOutputKind, SamplingParams
from jaxlora import StructuredOutputsParams as Structured
from jaxlora.engine.engine import LLMEngine
from jaxlora.engine_args import LORA_EXTRAS
from jaxlora.outputs import TokenLogprobs
from jaxlora.types import TokensPrompt
from tests.jaxlora.peft_models import SIZES, Reference
from tests.jaxlora.tiny_tokenizer import add_tokenizer

NUM_REQUESTS = 20
NAMES = "abcde"
EVICTIONS = "jaxlora:adapter_evictions_total"
END = SIZES["vocab_size"] - 1

SOMETIMES: dict[str, list[Any]] = {
    "top_k": [1, 20],
    "top_p": [0.5, 0.95],
    "min_p": [0.1],
    "presence_penalty": [1.5],
    "frequency_penalty": [-1.0],
    "repetition_penalty": [0.5, 1.3],
    "bad_words": [["ab", "the"], ["x", "y", "z"]],
    "logit_bias": [{END: 4.0}, {5: -50.0, 6: 5.0}],
    "allowed_token_ids": [[*range(40, 90), END]],
    "logprobs": [0, 3],
    "prompt_logprobs": [0, 2],
    "min_tokens": [1],
    "stop": [["a", "b", "c"], ["</", "x y"]],
    "stop_token_ids": [[30, 31, 32]],
    "include_stop_str_in_output": [True],
    "ignore_eos": [True],
    "skip_special_tokens": [False],
    "structured_outputs": [
        Structured(choice=["yes", "no"]),
        Structured(regex="[a-c]{2,9}d?"),
        Structured(json={"type": "object", "properties": {"a": {"type": "integer"}}}),
    ],
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One request, with the kind of its adapter."""

    prompt: TokensPrompt
    params: SamplingParams
    kind: str | None
    priority: int


def cases(random: Random, kinds: Sequence[str]) -> list[Case]:
    begins = [random.choices(range(END), k=150) for _ in range(2)]
    made = []
    for _ in range(NUM_REQUESTS):
        end = random.choices(range(END), k=random.choice([1, 5, 40]))
        ids = random.choice(begins)[: random.choice([0, 70, 150])] + end
        prompt = TokensPrompt(prompt_token_ids=ids)
        if random.random() < 0.2:
            prompt["cache_salt"] = "s"
        options = {
            name: random.choice(of) for name, of in SOMETIMES.items() if random.random() < 0.2
        }
        if "structured_outputs" in options:
            # The two may leave nothing to choose.
            options.pop("allowed_token_ids", None)
        options["temperature"] = random.choice([0.0, 1.0])
        options["n"] = random.choice([1, 3]) if options["temperature"] else 1
        options["max_tokens"] = random.choice([1, 8, 60])
        params = SamplingParams(
            seed=random.getrandbits(32), output_kind=RequestOutputKind.DELTA, **options
        )
        kind = random.choice([None, *kinds])
        priority = random.choice([0, 0, 1])
        made.append(Case(prompt=prompt, params=params, kind=kind, priority=priority))
    return made


class Traffic:
    """Requests into an engine, and the news of each put together."""

    def __init__(self, engine: LLMEngine, paths: dict[str, str]) -> None:
        self._engine, self._paths = engine, paths
        self.told: dict[str, RequestOutput] = {}

    def add(self, request_id: str, case: Case, name: str) -> None:
        lora = None
        if case.kind is not None:
            lora = LoRARequest(name, None, self._paths[case.kind], load_inplace=True)
        self._engine.add_request(request_id, case.prompt, case.params, lora, priority=case.priority)

    def take(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            before = self.told.get(output.request_id)
            assert before is None or not before.finished
            joined = output if before is None else before.followed_by(output)
            self.told[output.request_id] = joined

    def step(self) -> None:
        self.take(self._engine.step())

    def drain(self) -> dict[str, RequestOutput]:
        while self._engine.has_unfinished_requests():
            self.step()
        return self.told


@pytest.fixture(scope="module")
def llm(extras_reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """As ``extras_llm``, with a tokenizer."""
    model = tmp_path_factory.mktemp("traffic") / "model"
    return LLM(
        str(add_tokenizer(Path(extras_reference.base_path), model)),
        dtype="float32",
        enable_lora=True,
        max_loras=3,
        max_num_seqs=4,
        max_num_batched_tokens=128,
        num_gpu_blocks_override=24,
        lora_extras=LORA_EXTRAS,
        use_tqdm=False,
    )


@pytest.mark.usefixtures("without_types")
def test_each_is_answered_as_it_is_alone(
    llm: LLM, extras_reference: Reference, saved_reference: Reference
) -> None:
    paths = extras_reference.paths | saved_reference.paths
    before = llm.get_metrics()
    for seed in range(3):
        check_traffic(Random(seed), llm.llm_engine, paths)
        for lora_int_id in llm.list_loras():
            llm.remove_lora(lora_int_id)
        while llm.llm_engine.has_work():
            llm.llm_engine.step()
    after = llm.get_metrics()
    for event in ("vllm:num_preemptions", "vllm:prefix_cache_hits", EVICTIONS):
        assert after[event] > before[event]
    assert after["jaxlora:compilations_total"] == before["jaxlora:compilations_total"]
    assert after["jaxlora:adapters_resident"] == after["vllm:kv_cache_usage_perc"] == 0


def check_traffic(random: Random, engine: LLMEngine, paths: dict[str, str]) -> None:
    some = cases(random, random.sample(list(paths), 4))
    alone = [told_alone(engine, paths, case) for case in some]
    engine.reset_prefix_cache()
    traffic, aborted = Traffic(engine, paths), set()
    for i, case in enumerate(some):
        traffic.add(str(i), case, random.choice(NAMES))
        while random.random() < 0.5:
            traffic.step()
        if random.random() < 0.1:
            left = str(random.randint(0, i))
            aborted.add(left)
            traffic.take(engine.abort_request(left))
    told = traffic.drain()
    for i, expected in enumerate(alone):
        check(told[str(i)], expected, is_part=str(i) in aborted)


def told_alone(engine: LLMEngine, paths: dict[str, str], case: Case) -> RequestOutput:
    engine.reset_prefix_cache()
    traffic = Traffic(engine, paths)
    traffic.add("alone", case, "alone")
    return traffic.drain()["alone"]


def check(got: RequestOutput, alone: RequestOutput, *, is_part: bool) -> None:
    """Asserts that they are the same, or that what was aborted is the beginning of it."""
    expected = {completion.index: completion for completion in alone.outputs}
    assert got.error is alone.error is None
    for completion in got.outputs:
        other = expected[completion.index]
        count = len(completion.token_ids)
        assert completion.token_ids == other.token_ids[:count]
        assert other.text.startswith(completion.text)
        check_logprobs(completion.logprobs, (other.logprobs or [])[:count])
        if completion.finish_reason != "abort":
            assert count == len(other.token_ids)
            assert completion == dataclasses.replace(
                other,
                lora_request=completion.lora_request,
                logprobs=completion.logprobs,
                cumulative_logprob=completion.cumulative_logprob,
            )
    if not is_part:
        assert len(got.outputs) == len(alone.outputs)
        assert (got.prompt_logprobs is None) is (alone.prompt_logprobs is None)
    if got.prompt_logprobs is not None:
        check_logprobs(got.prompt_logprobs[1:], (alone.prompt_logprobs or [])[1:])


def check_logprobs(
    got: Sequence[TokenLogprobs | None] | None, expected: Sequence[TokenLogprobs | None]
) -> None:
    for mine, other in zip(got or (), expected, strict=True):
        assert mine is not None
        assert other is not None
        assert next(iter(mine)) == next(iter(other))
        for token in mine.keys() & other.keys():
            assert mine[token].logprob == pytest.approx(other[token].logprob, abs=1e-3)
