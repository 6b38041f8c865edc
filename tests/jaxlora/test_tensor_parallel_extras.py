"""Adapters with extras over several devices: what they say is what PEFT says."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax  # noqa: F401  # what a skip asks
import numpy as np
import pytest
import torch

from jaxlora.engine_args import LORA_EXTRAS
from tests.jaxlora import tensor_parallel_extras_run
from tests.jaxlora.peft_models import (
    EXTRA_KINDS,
    SAVED_KINDS,
    TIED_KINDS,
    TIED_SAVED_KINDS,
    TIED_TOKEN_KINDS,
    TOKEN_KINDS,
    Reference,
)
from tests.jaxlora.tensor_parallel_extras_run import (
    CHANGED_ROWS,
    REPLACED,
    VOCAB_SIZE,
)
from tests.jaxlora.tensor_parallel_run import workload
from tests.jaxlora.virtual_devices import run_on_virtual_devices

SIZES = {"vocab_size": VOCAB_SIZE, "num_attention_heads": 8, "num_key_value_heads": 4}
NUM_LAYERS = 2
BASES: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    # Biases everywhere, of which a sum over devices must hold one.
    "untied": (
        [EXTRA_KINDS, SAVED_KINDS, TOKEN_KINDS],
        {"attention_bias": True, "mlp_bias": True},
    ),
    "tied": (
        [TIED_KINDS, TIED_SAVED_KINDS, TIED_TOKEN_KINDS],
        {"tie_word_embeddings": True},
    ),
}
"""What adapters are on each base, those of one PEFT model together, and what the base is."""
OPTIONS: dict[str, dict[str, Any]] = {
    "untied": {"lora_extras": LORA_EXTRAS},
    "tied": {
        "lora_extras": [extra for extra in LORA_EXTRAS if extra != "bias"],
        "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    },
}


class Case:
    """What an engine over several devices said, and for each adapter the PEFT model that has it."""

    def __init__(
        self,
        base: str,
        size: int,
        factory: pytest.TempPathFactory,
        run: Callable[[dict[str, Any]], Any],
    ) -> None:
        kinds, config = BASES[base]
        models = [
            Reference(factory.mktemp(f"{base}-extras"), kind, **config, **SIZES) for kind in kinds
        ]
        self.references: dict[str | None, Reference] = {None: models[0]}
        self.references |= {name: model for model in models for name in model.kinds}
        self.adapters = {name: model.paths[name] for model in models for name in model.kinds}
        asked = {"base": models[0].base_path, "adapters": self.adapters, "size": size}
        self.results = run(asked | {"options": OPTIONS[base]})

    def check(self, prompt: list[int], name: str | None, got: dict[str, Any]) -> None:
        """Asserts that tokens and log-probabilities are PEFT's."""
        logits = self.references[name].check_greedy(prompt, got["tokens"], name)
        logprobs = torch.log_softmax(torch.tensor(logits), dim=-1).numpy()
        following = [*prompt, *got["tokens"]][1:]
        expected = logprobs[np.arange(len(following)), following]
        told = [*got["prompt_logprobs"], *got["logprobs"]]
        assert len(told) in (len(got["tokens"]), len(expected))
        np.testing.assert_allclose(told, expected[-len(told) :], rtol=0, atol=1e-3)


@pytest.fixture(
    scope="module",
    params=[("untied", 2), ("tied", 4)],
    ids=lambda param: f"{param[0]}-{param[1]}",
)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    run = partial(run_on_virtual_devices, "tensor_parallel_extras_run")
    base, size = request.param
    return Case(base, size, tmp_path_factory, run)


def test_every_kind_beside_others_and_the_base(case: Case) -> None:
    texts, names = workload(list(case.adapters), VOCAB_SIZE)
    for prompt, name, got in zip(texts, names, case.results["together"], strict=True):
        case.check(prompt, name, got)
    assert any(got["prompt_logprobs"] for got in case.results["together"])


def test_one_adapter_after_another_under_one_name(case: Case) -> None:
    texts, _ = workload(list(case.adapters), VOCAB_SIZE)
    for name, got in zip(REPLACED, case.results["replaced"], strict=True):
        case.check(texts[0], name, got)
    for other, got in zip((None, "plain"), case.results["after"], strict=True):
        case.check(texts[0], other, got)


def test_a_changed_copy_of_the_base_is_refused_wherever_it_differs(case: Case) -> None:
    assert len(case.results["refused"]) == len(CHANGED_ROWS)
    for said in case.results["refused"]:
        assert "embed_tokens" in said


def test_nothing_compiles_after_start(case: Case) -> None:
    assert case.results["compilations"] == 0


def test_extras_add_no_sum_over_devices(case: Case) -> None:
    """Nor does what threads run while steps do: devices that wait for one another must be given
    their programs in one order."""
    programs = case.results["collectives"]
    forward = [name for name in programs if " extras " in f"{name} "]
    assert len(forward) > 4
    for name, found in programs.items():
        if name.startswith(("decode", "mixed")):
            assert found == ["all-gather"] * 2 + ["all-reduce"] * (2 * NUM_LAYERS + 1)
        elif name.startswith(("adapter", "base")):
            assert not found


def test_every_device_has_its_part(case: Case) -> None:
    assert set(case.results["bytes"]) == {case.results["reported_bytes"]}


@pytest.mark.gpu
@pytest.mark.skipif("len(jax.devices()) < 2", reason="no accelerator: needs two GPUs")
def test_two_gpus(tmp_path_factory: pytest.TempPathFactory) -> None:
    def run(asked: dict[str, Any]) -> dict[str, Any]:
        return tensor_parallel_extras_run.run(**asked)

    case = Case("untied", 2, tmp_path_factory, run)
    test_every_kind_beside_others_and_the_base(case)
    test_one_adapter_after_another_under_one_name(case)
    test_a_changed_copy_of_the_base_is_refused_wherever_it_differs(case)
    test_nothing_compiles_after_start(case)
