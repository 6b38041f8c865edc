"""Measured configurations: what a file must be like, and that the kernel takes them from it."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import pytest

from kernels_pallas import tuning
from kernels_pallas.dispatch import choose_lora_linear, choose_lora_matmul
from kernels_pallas.lora_linear import gpu
from kernels_pallas.lora_linear.gpu_config import (
    Case,
    Config,
    cases,
    check_config,
    heuristic,
    neighbours,
    tuned,
)
from kernels_pallas.lora_matmul import gpu as gpu_lora_matmul
from kernels_pallas.lora_matmul import gpu_config as prompts
from kernels_pallas.lora_matmul.op import max_blocks, max_cover
from tests.kernels_pallas import test_lora_matmul_gpu_lowering as lora_matmul
from tests.kernels_pallas.test_lora_linear import MORE_GROUPS, clusters_at_once, ending_of, lowered
from tests.kernels_pallas.test_lora_matmul_gpu_lowering import LLAMA_8B

CARD = "ACME G1 (80GB)"
D_IN, SPLITS = LLAMA_8B["qkv"]
BASE = Case(tokens=64, d_in=D_IN, splits=SPLITS, gated=False)
LORA = dataclasses.replace(BASE, rank=16, blocks=16, block_tokens=8)
FAST = dataclasses.replace(heuristic(**vars(LORA)), stages=5)


def entry(case: Case, config: Config, /, **changes: Any) -> dict[str, Any]:
    trials = [{"config": vars(config), "microseconds": {"8 of 8": [2.0, 3.0]}}]
    whole = {"kernel": "lora_linear", "case": vars(case), "config": vars(config), "trials": trials}
    return whole | changes


def write(*runs: list[dict[str, Any]], device: str = CARD) -> None:
    content = {"device": device, "runs": [{"date": "...", "entries": run} for run in runs]}
    tuning.path_of(CARD).write_text(json.dumps(content))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)


def test_a_file_is_named_after_the_device() -> None:
    assert tuning.path_of("NVIDIA H100 80GB HBM3").name == "nvidia_h100_80gb_hbm3.json"
    assert tuning.path_of(CARD).name == "acme_g1_80gb.json"


def test_a_device_without_a_file_has_nothing_tuned() -> None:
    assert tuned(CARD) == {}


def test_all_runs_of_a_file_count_and_other_kernels_do_not() -> None:
    other = {"kernel": "paged_attention", "case": {"rows": 8}, "config": {}, "trials": []}
    write([entry(LORA, FAST), other], [entry(BASE, FAST)])
    assert tuned(CARD) == {LORA: FAST, BASE: FAST}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"case": vars(LORA) | {"rows": 8}}, "Case needs .* 'rows'"),
        ({"config": {"stages": 5}}, "Config needs"),
        ({"config": vars(FAST) | {"stages": "5"}}, "of integers"),
        ({"config": vars(FAST) | {"stages": 16}}, "bytes of shared memory must be at most"),
        ({"config": vars(FAST) | {"stages": 1}}, "needs 2 stages"),
        ({"config": vars(FAST) | {"together": 5}}, "5 steps together need a stage more"),
        ({"config": vars(FAST) | {"together": 3}}, "of a cluster and of 3 steps"),
        ({"case": vars(BASE), "config": vars(FAST) | {"stages": 1}}, "needs 2 stages"),
        ({"config": vars(FAST) | {"cluster": 2}}, "run at once"),
        ({"config": vars(FAST) | {"cluster": 3}}, "clusters must be one of"),
        ({"config": vars(FAST) | {"consumers": 4}}, "may be 1 or 2"),
        ({"config": vars(FAST) | {"shrink_stages": 0}}, "positive"),
        ({"config": vars(FAST) | {"cluster": 0}}, "positive"),
        ({"config": vars(FAST) | {"shrinks": 3}}, "shrinks must cut d_in"),
        ({"case": vars(LORA) | {"tokens": 24}}, "tokens must be one of"),
        ({"case": vars(LORA) | {"blocks": 0}}, "go together"),
        ({"case": vars(LORA) | {"splits": [4096, 1024, 1000]}}, "multiple of 64"),
        ({"case": vars(LORA) | {"splits": [3072, 3072], "gated": True}}, "two parts"),
        ({"trials": [{"config": vars(FAST), "failed": "wrong"}]}, "no timings"),
        ({"trials": []}, "no timings"),
    ],
)
def test_what_could_not_run_or_was_not_measured_is_refused(
    change: dict[str, Any], said: str
) -> None:
    write([entry(LORA, FAST, **change)])
    with pytest.raises(ValueError, match=rf"acme_g1_80gb\.json: .*{said}"):
        tuned(CARD)


def test_a_case_has_one_entry() -> None:
    write([entry(LORA, FAST)], [entry(LORA, FAST)])
    with pytest.raises(ValueError, match="two entries"):
        tuned(CARD)


def test_another_devices_file_is_refused() -> None:
    write([], device="ACME G1 [80GB]")
    with pytest.raises(ValueError, match="not on"):
        tuned(CARD)


def test_what_is_shipped_is_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert tuning.FOLDER.is_dir()
    for path in tuning.FOLDER.glob("*.json"):
        device = json.loads(path.read_text())["device"]
        assert tuning.path_of(device) == path
        assert tuned(device) | prompts.tuned(device) | prompts.tuned(device, gated=True)


def text_of(case: Case, function: Callable[..., jax.Array], slots: int = 8) -> str:
    """The function, lowered for one of the 8B shape's cases."""
    (group,) = (name for name, shape in LLAMA_8B.items() if shape == (case.d_in, case.splits))
    slots = slots if case.rank else 0
    return lowered(
        *LLAMA_8B[group], ending_of(f"-{group}"), tokens=case.tokens, slots=slots, function=function
    )


def test_the_engine_takes_what_was_measured_on_its_card_and_says_so() -> None:
    write([entry(LORA, FAST)])
    chosen, reason = choose_lora_linear(
        "hopper",
        "bfloat16",
        shapes=[(D_IN, SPLITS, False)],
        num_slots=8,
        rank=16,
        device_kind=CARD,
    )
    assert chosen is not None
    assert f"of its 11 cases 1 are tuned on {CARD}, the others cut by heuristic" in reason
    # Six numbers of tokens, all with adapters and all but a single one without.
    # A bank of other slots is another case. Lowered text names lines of the caller.
    with mock.patch.object(gpu, "lora_linear", wraps=gpu.lora_linear) as called:
        for case, slots, expected in ((LORA, 8, FAST), (BASE, 8, None), (LORA, 4, None)):
            assert "@mosaic_gpu" in text_of(case, chosen.function, slots=slots)
            assert called.call_args.kwargs["config"] == expected


@pytest.mark.parametrize("group", MORE_GROUPS)
def test_heuristic_and_tuner_keep_within_the_bounds(group: str) -> None:
    d_in, splits = MORE_GROUPS[group]
    gated = ending_of(group) == "gated"
    for case in cases(d_in, splits, gated=gated, rank=16, slots=64):
        first = heuristic(**vars(case))
        check_config(first, case)
        near = neighbours(first, case)
        assert first not in near
        assert len(set(near)) == len(near)
        if group.startswith("llama-8b"):
            assert near
        for config in near:
            check_config(config, case)
            tile = 64 * config.consumers * (1 if gated else config.parts)
            clusters = sum(splits) // (2 if gated else 1) // tile
            assert clusters <= clusters_at_once(config.cluster)


@pytest.mark.parametrize("group", LLAMA_8B)
@pytest.mark.parametrize("tokens", [8, 128])
def test_what_the_tuner_tries_lowers_for_cuda(group: str, tokens: int) -> None:
    d_in, splits = LLAMA_8B[group]
    every = cases(d_in, splits, gated=group == "gate_up", rank=16, slots=8)
    (case,) = (case for case in every if case.tokens == tokens and case.rank)
    # Those that differ in how W is cut come last, and cost most to get wrong.
    for config in neighbours(heuristic(**vars(case)), case)[-2:]:
        text = text_of(case, functools.partial(gpu.lora_linear, config=config))
        assert "@mosaic_gpu" in text


def prompt_case(group: str, tokens: int, *, gated: bool = False) -> prompts.Case:
    """Of a bank of 8 slots."""
    d_in, splits = lora_matmul.GROUPS[group]
    size = prompts.block_tokens_of(tokens)
    blocks = (max_cover if gated else max_blocks)(tokens, 8, size)
    return prompts.Case(d_in=d_in, splits=splits, rank=16, block_tokens=size, blocks=blocks)


def test_prompts_take_what_was_measured_and_say_so() -> None:
    group = lora_matmul.GROUPS["llama-8b-o"]
    case = prompt_case("llama-8b-o", 2048)
    config = dataclasses.replace(prompts.heuristic(**vars(case)), warpgroups=2, stages_k=2)
    write([entry(BASE, FAST), entry(case, config, kernel="lora_matmul")])
    chosen, reason = choose_lora_matmul("hopper", "bfloat16", device_kind=CARD)
    assert f"1 cases are tuned on {CARD}" in reason
    kernel = gpu_lora_matmul.lora_matmul
    # Lowered text names lines of the caller.
    with mock.patch.object(gpu_lora_matmul, "lora_matmul", wraps=kernel) as called:
        for tokens, expected in ((2048, config), (512, None)):
            text = lora_matmul.lowered(*group, tokens=tokens, function=chosen.function)
            assert "@mosaic_gpu" in text
            assert called.call_args.kwargs["config"] == expected


def test_gates_take_what_was_measured_of_them() -> None:
    group = lora_matmul.GROUPS["llama-8b-gate_up"]
    case = prompt_case("llama-8b-gate_up", 2048, gated=True)
    config = dataclasses.replace(prompts.heuristic(**vars(case), gated=True), stages_n=2)
    write([entry(case, config, kernel="gated_lora_matmul")])
    chosen, reason = choose_lora_matmul("hopper", "bfloat16", device_kind=CARD)
    assert chosen.gated is not None
    assert f"1 cases are tuned on {CARD}" in reason
    kernel = gpu_lora_matmul.gated_lora_matmul
    with mock.patch.object(gpu_lora_matmul, "gated_lora_matmul", wraps=kernel) as called:
        for tokens, expected in ((2048, config), (512, None)):
            text = lora_matmul.lowered(*group, tokens=tokens, function=chosen.gated)
            assert "@mosaic_gpu" in text
            assert called.call_args.kwargs["config"] == expected


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"cluster": 3}, "1, 2, 4 or 8"),
        ({"warpgroups": 5}, "1 to 4"),
        ({"tile_k": 96}, "multiples of 64"),
        ({"tile_n": 192}, "every split"),
        ({"stages_n": 0}, "positive"),
        ({"tile_k": 256, "stages_k": 8}, "shared memory"),
    ],
)
def test_a_configuration_for_prompts_that_could_not_run_is_refused(
    change: dict[str, int], said: str
) -> None:
    case = prompt_case("llama-8b-qkv", 2048)
    config = vars(prompts.heuristic(**vars(case))) | change
    write([entry(case, FAST, kernel="lora_matmul", config=config)])
    with pytest.raises(ValueError, match=said):
        prompts.tuned(CARD)


@pytest.mark.parametrize("group", lora_matmul.GROUPS)
def test_what_the_tuner_tries_for_prompts_can_run(group: str) -> None:
    for tokens in (1, 64, 128, 512, 2048):
        case = prompt_case(group, tokens)
        first = prompts.heuristic(**vars(case))
        for config in (first, *prompts.neighbours(first, case)):
            prompts.check_config(config, case)
    gated = group.endswith("gate_up")
    if gated:
        for tokens in (256, 2048):
            case = prompt_case(group, tokens, gated=True)
            first = prompts.heuristic(**vars(case), gated=True)
            for config in (first, *prompts.neighbours(first, case, gated=True)):
                prompts.check_config(config, case, gated=True)
    last = prompts.neighbours(first, case, gated=gated)[-1]
    function = gpu_lora_matmul.gated_lora_matmul if gated else gpu_lora_matmul.lora_matmul
    assert "@mosaic_gpu" in lora_matmul.lowered(
        *lora_matmul.GROUPS[group], tokens=2048, function=function, config=last
    )
