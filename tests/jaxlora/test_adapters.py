"""Adapters through the public API, against PEFT: any kind, slot, neighbour and history."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy

import jaxlora
from jaxlora import LLM, LoRARequest, SamplingParams
from jaxlora.adapters.inspection import inspect_adapter
from tests.jaxlora.peft_models import KINDS, Reference, prompts

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def request(reference: Reference, name: str | None) -> LoRARequest | None:
    return None if name is None else LoRARequest(name, None, reference.paths[name])


def generate(
    llm: LLM, reference: Reference, texts: list[list[int]], names: list[str | None]
) -> list[list[int]]:
    requests = [request(reference, name) for name in names]
    outputs = llm.generate(texts, GREEDY, lora_request=requests, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize("name", [None, *KINDS])
def test_alone(llm: LLM, reference: Reference, name: str | None) -> None:
    for prompt in prompts(2):
        (got,) = generate(llm, reference, [prompt], [name])
        reference.check_greedy(prompt, got, name)


def test_adapters_change_what_is_generated(llm: LLM, reference: Reference) -> None:
    """The comparisons of this file would mean nothing if every adapter said the same."""
    (prompt,) = prompts(1)
    names = [None, *KINDS]
    got = generate(llm, reference, [prompt] * len(names), names)
    assert len({tuple(tokens) for tokens in got}) == len(names)


def test_every_row_another_adapter(llm: LLM, reference: Reference) -> None:
    """More adapters than slots, more rows than the batch, base rows between, chunked prompts."""
    names = [None, *KINDS] * 3
    texts = prompts(len(names))
    together = generate(llm, reference, texts, names)
    for prompt, name, got in zip(texts, names, together, strict=True):
        reference.check_greedy(prompt, got, name)
        assert generate(llm, reference, [prompt], [name]) == [got]


def test_in_every_slot_before_and_after_eviction(llm: LLM, reference: Reference) -> None:
    """Each round loads the adapters in another order, so each comes to lie in every slot."""
    (prompt,) = prompts(1, seed=5)
    names = list(KINDS)[:5]
    slots: dict[str, set[int]] = {name: set() for name in names}
    registry = llm.llm_engine.adapters
    first: dict[str, list[int]] = {}
    for turn in range(10):
        for name in np.roll(names, turn % 5).tolist() + names[: turn % 3]:
            (got,) = generate(llm, reference, [prompt], [name])
            assert got == first.setdefault(name, got)
            slots[name] |= {slot for slot, held in registry.residents().items() if held == name}
    assert all(held == {0, 1, 2, 3} for held in slots.values())
    assert llm.get_metrics()["jaxlora:adapter_evictions_total"] > 0
    for name, got in first.items():
        reference.check_greedy(prompt, got, name)


def test_a_hundred_adapters_through_four_slots(
    llm: LLM, reference: Reference, tmp_path: Path
) -> None:
    """Mixed ranks, skewed and repeated use; nothing compiles; every answer is PEFT's."""
    targets = (["q_proj", "v_proj"], ["down_proj"], ["o_proj", "up_proj"])
    requests = []
    for i in range(100):
        rank, modules = (1, 5, 8, 13, 16)[i % 5], targets[i % 3]
        requests.append(reference.add(f"many-{i}", tmp_path, r=rank, target_modules=modules))
        # All at once would make PEFT slow.
        reference.delete(requests[-1].lora_name)
    skewed = np.random.default_rng(0).zipf(1.3, 60).clip(1, 100) - 1
    order = [*requests, *(requests[i] for i in skewed)]
    texts = prompts(len(order), seed=3)
    before = llm.get_metrics()["jaxlora:compilations_total"]
    outputs = llm.generate(texts, GREEDY, lora_request=order, use_tqdm=False)
    assert llm.get_metrics()["jaxlora:compilations_total"] == before
    said = list(zip(texts, order, outputs, strict=True))
    for request in requests:
        name = request.lora_name
        reference.load(request)
        for prompt, asked, output in said:
            if asked is request:
                reference.check_greedy(prompt, output.outputs[0].token_ids, name)
        reference.delete(name)


def test_the_compilation_count_notices_a_compilation(llm: LLM) -> None:
    before = llm.get_metrics()["jaxlora:compilations_total"]
    jax.jit(lambda x: x + 41.5)(np.ones(17, np.float32)).block_until_ready()
    assert llm.get_metrics()["jaxlora:compilations_total"] == before + 1


def test_removed_and_added_again_with_other_weights(llm: LLM, reference: Reference) -> None:
    (prompt,) = prompts(1)
    for name in ("r8-qv", "r16-all"):
        request = LoRARequest("changing", 7, reference.paths[name])
        assert llm.add_lora(request)
        assert not llm.add_lora(request)
        assert llm.list_loras() == {7}
        (output,) = llm.generate([prompt], GREEDY, lora_request=request, use_tqdm=False)
        reference.check_greedy(prompt, output.outputs[0].token_ids, name)
        assert output.lora_request == request
        assert llm.remove_lora(7)
        assert not llm.remove_lora(7)


def test_remove_lets_a_running_request_finish(llm: LLM, reference: Reference) -> None:
    (prompt,) = prompts(1)
    engine = llm.llm_engine
    engine.add_request("r", prompt, GREEDY, LoRARequest("gone", 3, reference.paths["r1-all"]))
    engine.step()
    assert engine.remove_lora(3)
    last = None
    while engine.has_unfinished_requests():
        last = next(iter(engine.step()), last)
    assert last is not None
    assert last.finished
    reference.check_greedy(prompt, last.outputs[0].token_ids, "r1-all")


def test_a_broken_adapter_costs_its_neighbours_nothing(
    llm: LLM, reference: Reference, tmp_path: Path
) -> None:
    (prompt,) = prompts(1)
    (expected,) = generate(llm, reference, [prompt], ["r8-qv"])
    good = Path(reference.paths["r8-qv"])
    tensors = safetensors.numpy.load_file(good / "adapter_model.safetensors")
    tensors[next(iter(tensors))][0, 0] = np.nan
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_text((good / "adapter_config.json").read_text())
    safetensors.numpy.save_file(tensors, broken / "adapter_model.safetensors")

    engine = llm.llm_engine
    engine.add_request("good", prompt, GREEDY, request(reference, "r8-qv"))
    engine.step()
    with pytest.raises(jaxlora.AdapterRefusedError, match="NaN"):
        engine.add_request("bad", prompt, GREEDY, LoRARequest("bad", None, str(broken)))
    with pytest.raises(jaxlora.AdapterNotFoundError, match="No adapter found for"):
        engine.add_request("no", prompt, GREEDY, LoRARequest("no", None, str(tmp_path / "no")))
    last = None
    while engine.has_unfinished_requests():
        last = next(iter(engine.step()), last)
    assert last is not None
    assert last.outputs[0].token_ids == expected
    assert len(llm.list_loras()) == 1


def test_an_adapter_that_overflows_ends_its_own_requests_alone(
    llm: LLM, reference: Reference, tmp_path: Path
) -> None:
    """Each of its numbers is finite; what they make of a prompt is not."""
    saved = shutil.copytree(reference.paths["r16-all"], tmp_path / "large")
    path = saved / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file({key: each * 1e25 for key, each in tensors.items()}, path)
    large = LoRARequest("large", None, str(saved))
    at_random = SamplingParams(seed=1, max_tokens=24, ignore_eos=True, logprobs=2)
    names = [None, "r8-qv", "r16-all"] * 2
    texts = prompts(len(names))
    alone = generate(llm, reference, texts, names)
    requests = [each for name in names for each in (large, request(reference, name))]
    outputs = llm.generate(
        [prompt for prompt in texts for _ in range(2)],
        [GREEDY, GREEDY, at_random, GREEDY] * 3,
        lora_request=requests,
        use_tqdm=False,
    )
    assert [output.outputs[0].token_ids for output in outputs[1::2]] == alone
    for output in outputs[::2]:
        assert (output.outputs[0].finish_reason, output.outputs[0].token_ids) == ("error", [])
        assert isinstance(output.error, jaxlora.GenerationError)
        assert "the arithmetic overflowed" in str(output.error)
        assert "adapter 'large'" in str(output.error)


def test_a_whole_model_is_told_from_an_adapter(llm: LLM, tiny_model: Path, tmp_path: Path) -> None:
    why = f"No adapter found for {tmp_path}: the folder has no adapter_config.json"
    with pytest.raises(jaxlora.AdapterNotFoundError) as empty:
        llm.add_lora(LoRARequest("x", None, str(tmp_path)))
    assert str(empty.value) == why
    with pytest.raises(jaxlora.AdapterNotFoundError) as whole:
        llm.add_lora(LoRARequest("x", None, str(tiny_model)))
    assert "no adapter_config.json, but a config.json, so it looks like a whole model" in str(
        whole.value
    )


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (
            {"fine_tune_type": "lora", "lora_parameters": {"rank": 8, "scale": 20.0}},
            "fine_tune_type and lora_parameters",
        ),
        # As its first versions wrote it.
        ({"lora_layers": 16, "lora_parameters": {"rank": 8}}, "lora_parameters"),
        ({"fine_tune_type": "full"}, "fine_tune_type"),
    ],
)
def test_what_mlx_lm_wrote_is_refused_by_that_name(
    llm: LLM, tmp_path: Path, config: dict[str, Any], named: str
) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"model": "base"} | config))
    (tmp_path / "adapters.safetensors").write_bytes(b"")
    with pytest.raises(jaxlora.AdapterRefusedError) as error:
        llm.add_lora(LoRARequest("x", None, str(tmp_path)))
    assert f"mlx-lm wrote this adapter: its adapter_config.json has {named} " in str(error.value)
    assert "Fuse it with its model (mlx_lm.fuse, dequantized)" in str(error.value)
    with pytest.raises(jaxlora.AdapterRefusedError, match="mlx-lm wrote this adapter"):
        inspect_adapter(tmp_path)


@pytest.mark.parametrize(
    "path",
    ["/nul\0byte", "~no-such-user-here/x", "/half\ud800", "/" + "x" * 5000],
    ids=["nul", "user", "surrogate", "long"],
)
def test_a_path_that_cannot_be_one_is_not_found(llm: LLM, path: str) -> None:
    with pytest.raises(jaxlora.AdapterNotFoundError, match="No adapter found for"):
        llm.add_lora(LoRARequest("x", None, path))
    with pytest.raises(jaxlora.AdapterNotFoundError, match="No adapter found for"):
        llm.generate([1, 2], GREEDY, lora_request=LoRARequest("x", None, path), use_tqdm=False)


def test_slots_that_no_device_has_room_for_are_refused(reference: Reference) -> None:
    with pytest.raises(
        jaxlora.ConfigError, match=r"max_loras=1000000000000 slots .*: lower either"
    ):
        jaxlora.LLM(
            reference.base_path,
            enable_lora=True,
            max_loras=10**12,
            skip_tokenizer_init=True,
            use_tqdm=False,
        )


def test_a_name_that_nobody_has_is_not_found(llm: LLM) -> None:
    with pytest.raises(jaxlora.AdapterNotFoundError, match="No adapter found for 'nobody': the"):
        llm.generate([1, 2], GREEDY, lora_request=LoRARequest("nobody"), use_tqdm=False)


def test_more_rank_than_the_bank_has_is_refused(
    llm: LLM, reference: Reference, tmp_path: Path
) -> None:
    request = reference.add("rank17", tmp_path, r=17, target_modules=["q_proj"])
    reference.delete("rank17")
    with pytest.raises(
        jaxlora.AdapterRefusedError, match=r"LoRA rank 17 is greater than max_lora_rank 16\."
    ):
        llm.add_lora(request)
    assert llm.list_loras() == set()
