"""Models of many layers, which a CPU compiles a few of, with adapters of every kind against PEFT.

Their other steps are in test_smollm2.py and test_demo_adapters.py.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from jaxlora import LLM, LoRARequest, SamplingParams
from jaxlora.engine.fingerprint import described, described_arguments
from jaxlora.engine.layered import LEAST_LAYERS
from jaxlora.engine.runner import Runner
from jaxlora.engine_args import LORA_EXTRAS
from tests.jaxlora.conftest import engine_with_extras
from tests.jaxlora.peft_models import EXTRA_KINDS, Reference
from tests.jaxlora.test_sampling import check_logprobs

NUM_LAYERS = LEAST_LAYERS + 4
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    folder = tmp_path_factory.mktemp("peft-deep")
    options = {"attention_bias": True, "mlp_bias": True, "num_hidden_layers": NUM_LAYERS}
    return Reference(folder, EXTRA_KINDS, **options)


@pytest.fixture(scope="module")
def engine(deep: Reference) -> LLM:
    """Steps with prompts are padded to 32 tokens or to 128; those of 128 score no prompts."""
    return engine_with_extras(
        deep, max_num_seqs=4, max_num_batched_tokens=128, lora_extras=LORA_EXTRAS
    )


@pytest.fixture(scope="module")
def runner(engine: LLM) -> Runner:
    runner = engine.llm_engine._runner
    assert isinstance(runner, Runner)
    return runner


@pytest.mark.parametrize("names", [[None], ["plain"], [None, *EXTRA_KINDS]], ids=str)
def test_every_layer_has_its_own_weights_adapters_and_pages(
    engine: LLM, deep: Reference, names: list[str | None]
) -> None:
    """Prompts in steps of both sizes, one of them scored; each row another adapter, and the same
    tokens when it comes again alone, to pages that are there."""
    random = np.random.default_rng(len(names))
    texts = [random.integers(0, 97, length).tolist() for length in (70, 30, *[60] * 20)]
    texts = texts[: max(2, len(names))]
    names = names * (len(texts) // len(names))
    loras = [name and LoRARequest(name, None, deep.paths[name]) for name in names]
    scored = dataclasses.replace(GREEDY, prompt_logprobs=2)
    params = [GREEDY] * (len(texts) - 1) + [scored]
    compiled = engine.get_metrics()["jaxlora:compilations_total"]
    outputs = engine.generate(texts, params, lora_request=loras, use_tqdm=False)
    for text, name, lora, output in zip(texts, names, loras, outputs, strict=True):
        tokens = output.outputs[0].token_ids
        deep.check_greedy(text, tokens, name)
        (again,) = engine.generate([text], GREEDY, lora_request=lora, use_tqdm=False)
        assert again.outputs[0].token_ids == tokens
    assert outputs[-1].prompt_logprobs is not None
    logits = deep.logits(texts[-1], names[-1])[:-1]
    check_logprobs(logits, texts[-1][1:], outputs[-1].prompt_logprobs[1:], 2)
    assert engine.get_metrics()["jaxlora:compilations_total"] == compiled


def test_layers_share_what_is_compiled(runner: Runner) -> None:
    """A layer has four linears, two products of attention and two of norms."""
    programs = runner._programs.items()
    texts = [each.as_text() for name, each in programs if name.startswith("decode 4, ")]
    assert len(texts) == 3
    assert 0 < sum(text.count(" dot(") for text in texts) < 4 * NUM_LAYERS


def test_what_is_compiled_can_be_found_on_disk(runner: Runner) -> None:
    for function, arguments, *rest in runner.programs().values():
        described((function, rest))
        described_arguments(arguments)
