"""The committed demo adapters, served by jaxlora in one batch, pass their own held-out checks."""

from __future__ import annotations

import evaluation
import pytest

from examples.demo_model import ADAPTERS
from jaxlora import LLM, LoRARequest, SamplingParams

# A share of the held-out prompts that a CPU completes in half a minute; examples/train_adapters.py
# scores all of them.
COUNTS = {"sql": 12, "json": 6, "pirate": 6}
AT_LEAST = {"sql": 0.6, "json": 0.95, "pirate": 0.95}


@pytest.fixture(scope="module")
def completions(smollm2: LLM) -> dict[str, list[tuple[str, str]]]:
    """(prompt, completion) by adapter; half of sql's prompts under the base model as "base"."""
    work: list[tuple[str, str | None, str]] = []
    for name, count in COUNTS.items():
        prompts = evaluation.prompts(name)
        chosen = prompts[:: len(prompts) // count][:count]
        work += [(name, name, prompt) for prompt in chosen]
        if name == "sql":
            work += [("base", None, prompt) for prompt in chosen[::2]]
    outputs = smollm2.generate(
        [prompt for _, _, prompt in work],
        SamplingParams(temperature=0.0, max_tokens=96),
        lora_request=[
            None if adapter is None else LoRARequest(adapter, None, str(ADAPTERS / adapter))
            for _, adapter, _ in work
        ],
        use_tqdm=False,
    )
    got: dict[str, list[tuple[str, str]]] = {}
    for (label, _, prompt), output in zip(work, outputs, strict=True):
        got.setdefault(label, []).append((prompt, output.outputs[0].text))
    return got


@pytest.mark.parametrize("name", COUNTS)
def test_an_adapter_passes_its_check(
    name: str, completions: dict[str, list[tuple[str, str]]]
) -> None:
    prompts, texts = zip(*completions[name], strict=True)
    score = evaluation.score(name, prompts, texts)
    assert score.share >= AT_LEAST[name], score.wrong


def test_the_base_model_cannot_write_the_queries(
    completions: dict[str, list[tuple[str, str]]],
) -> None:
    prompts, texts = zip(*completions["base"], strict=True)
    assert evaluation.score("sql", prompts, texts).share < 0.2


def test_the_adapters_are_small() -> None:
    size = sum(file.stat().st_size for file in ADAPTERS.rglob("*.safetensors"))
    assert size < 15e6
