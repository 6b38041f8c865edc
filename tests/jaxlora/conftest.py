"""References and engines that several test files share; each is built once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jaxtyping
import pytest
import torch
import transformers

import jaxlora
from examples.demo_model import model_path
from jaxlora.adapters.host_blocks import AdapterMemory
from jaxlora.engine import build_adapters
from jaxlora.engine_args import LORA_EXTRAS
from tests.jaxlora.lender import Lender
from tests.jaxlora.limits import OPTIONS
from tests.jaxlora.peft_models import (
    EXTRA_KINDS,
    SAVED_KINDS,
    TIED_KINDS,
    TIED_SAVED_KINDS,
    TIED_TOKEN_KINDS,
    TOKEN_KINDS,
    Reference,
)
from tests.jaxlora.small_pieces import in_small_pieces
from tests.jaxlora.tiny_tokenizer import add_tokenizer

if "PYTEST_XDIST_WORKER" in os.environ:
    # Where processes share cores, threads that wait for one another take most of a tiny model's
    # time.
    torch.set_num_threads(1)


@pytest.fixture
def without_types(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As outside of the tests, where nobody checks a caller's types but what is called."""
    jaxtyped = jaxtyping.jaxtyped

    def outer_only(*, typechecker: Any) -> Any:
        def decorate(made: Any) -> Any:
            return (
                made if "<locals>" in made.__qualname__ else jaxtyped(made, typechecker=typechecker)
            )

        return decorate

    # Inner functions are made at each call. What is imported meanwhile is checked in other tests.
    monkeypatch.setattr(jaxtyping, "jaxtyped", outer_only)
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(tmp_path_factory.mktemp("peft"))


@pytest.fixture(scope="session")
def tiny_model(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a tokenizer."""
    return add_tokenizer(Path(reference.base_path), tmp_path_factory.mktemp("server") / "model")


@pytest.fixture(scope="session")
def program_cache(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where compiled programs are kept, from one run of the suite to the next if pytest may."""
    cache = pytestconfig.cache
    return cache.mkdir("jax") if cache is not None else tmp_path_factory.mktemp("programs")


@pytest.fixture(scope="session")
def lender() -> Lender:
    """Lends the shared engine its memory for adapters, as one on a GPU has it lent."""
    return Lender(max_idle_bytes=1 << 20)


@pytest.fixture(scope="session")
def shared_llm(reference: Reference, lender: Lender) -> jaxlora.LLM:
    """Small limits, so that chunks, preemption, padding and eviction all happen."""
    lent = AdapterMemory(lender.blocks.take, "lent by the tests", lender.blocks.wait)
    with mock.patch.object(build_adapters, "choose_memory", return_value=lent):
        return jaxlora.LLM(
            reference.base_path,
            dtype="float32",
            **OPTIONS,
            max_logprobs=-1,
            skip_tokenizer_init=True,
            use_tqdm=False,
        )


@pytest.fixture(scope="session")
def extras_reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """With biases, which DoRA leaves alone."""
    folder = tmp_path_factory.mktemp("peft-extras")
    return Reference(folder, EXTRA_KINDS, attention_bias=True, mlp_bias=True)


@pytest.fixture(scope="session")
def tied_reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """An output head that is the embedding."""
    folder = tmp_path_factory.mktemp("peft-tied")
    return Reference(folder, TIED_KINDS, tie_word_embeddings=True)


@pytest.fixture(scope="session")
def saved_reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """The base of ``extras_reference`` with other adapters."""
    folder = tmp_path_factory.mktemp("peft-saved")
    return Reference(folder, SAVED_KINDS, attention_bias=True, mlp_bias=True)


@pytest.fixture(scope="session")
def tied_saved_reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """The base of ``tied_reference`` with other adapters."""
    folder = tmp_path_factory.mktemp("peft-tied-saved")
    return Reference(folder, TIED_SAVED_KINDS, tie_word_embeddings=True)


@pytest.fixture(scope="session")
def tokens_reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Another one with the base of ``extras_reference``."""
    folder = tmp_path_factory.mktemp("peft-tokens")
    return Reference(folder, TOKEN_KINDS, attention_bias=True, mlp_bias=True)


@pytest.fixture(scope="session")
def tied_tokens_reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Another one with the base of ``tied_reference``."""
    folder = tmp_path_factory.mktemp("peft-tied-tokens")
    return Reference(folder, TIED_TOKEN_KINDS, tie_word_embeddings=True)


@pytest.fixture(scope="session")
def extras_llm(extras_reference: Reference) -> jaxlora.LLM:
    """An engine for adapters of every kind. Steps with prompts are padded to 32 tokens or 128."""
    return engine_with_extras(
        extras_reference,
        max_num_seqs=4,
        max_num_batched_tokens=128,
        lora_extras=LORA_EXTRAS,
    )


@pytest.fixture(scope="session")
def tied_llm(tied_reference: Reference) -> jaxlora.LLM:
    return engine_with_extras(
        tied_reference,
        max_num_seqs=1,
        lora_extras=[extra for extra in LORA_EXTRAS if extra != "bias"],
        lora_target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
    )


def engine_with_extras(
    reference: Reference, *, max_num_batched_tokens: int = 32, **options: Any
) -> jaxlora.LLM:
    with in_small_pieces():
        return jaxlora.LLM(
            reference.base_path,
            dtype="float32",
            enable_lora=True,
            max_loras=3,
            max_num_batched_tokens=max_num_batched_tokens,
            num_gpu_blocks_override=24,
            skip_tokenizer_init=True,
            use_tqdm=False,
            **options,
        )


@pytest.fixture(scope="session")
def smollm2_path() -> str:
    return model_path()


@pytest.fixture(scope="session")
def smollm2_reference(smollm2_path: str) -> transformers.PreTrainedModel:
    """The demo model as transformers loads it, in float32."""
    folder, _, file = smollm2_path.rpartition("/")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, dtype=torch.float32
    )
    return model.eval()


@pytest.fixture(scope="session")
def smollm2(smollm2_path: str) -> jaxlora.LLM:
    """One size of steps with prompts, so that there is less to compile."""
    return jaxlora.LLM(
        smollm2_path,
        dtype="float32",
        enable_lora=True,
        max_loras=3,
        max_model_len=512,
        max_num_seqs=8,
        max_num_batched_tokens=32,
        use_tqdm=False,
    )


@pytest.fixture
def llm(shared_llm: jaxlora.LLM, lender: Lender) -> Iterator[jaxlora.LLM]:
    """The shared engine without adapters; whatever a test added is removed, and nothing leaks."""
    yield shared_llm
    engine = shared_llm.llm_engine
    for lora_int_id in shared_llm.list_loras():
        shared_llm.remove_lora(lora_int_id)
    # Also for what is read and nobody waits for any more.
    while engine.has_work():
        engine.step()
    metrics = shared_llm.get_metrics()
    assert metrics["jaxlora:adapters_resident"] == 0
    assert metrics["vllm:kv_cache_usage_perc"] == 0
    lender.check_lent(0)
