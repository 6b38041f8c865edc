"""References and engines that several test files share; each is built once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import jaxlora
from examples.demo_model import model_path
from tests.jaxlora.peft_models import Reference


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(tmp_path_factory.mktemp("peft"))


@pytest.fixture(scope="session")
def shared_llm(reference: Reference) -> jaxlora.LLM:
    """Small limits, so that chunks, preemption, padding and eviction all happen."""
    return jaxlora.LLM(
        reference.base_path,
        dtype="float32",
        enable_lora=True,
        max_loras=4,
        max_num_seqs=6,
        max_num_batched_tokens=64,
        num_gpu_blocks_override=24,
        skip_tokenizer_init=True,
        use_tqdm=False,
    )


@pytest.fixture(scope="session")
def smollm2_path() -> str:
    return model_path()


@pytest.fixture(scope="session")
def smollm2(smollm2_path: str) -> jaxlora.LLM:
    return jaxlora.LLM(
        smollm2_path,
        dtype="float32",
        enable_lora=True,
        max_loras=3,
        max_model_len=512,
        max_num_seqs=8,
        max_num_batched_tokens=128,
        use_tqdm=False,
    )


@pytest.fixture
def llm(shared_llm: jaxlora.LLM) -> Iterator[jaxlora.LLM]:
    """The shared engine without adapters; whatever a test added is removed, and nothing leaks."""
    yield shared_llm
    engine = shared_llm.llm_engine
    for lora_int_id in shared_llm.list_loras():
        shared_llm.remove_lora(lora_int_id)
    while engine.has_unfinished_requests():
        engine.step()
    metrics = shared_llm.get_metrics()
    assert metrics["jaxlora:adapters_resident"] == 0
    assert metrics["vllm:kv_cache_usage_perc"] == 0
