"""What a start makes of a model's config."""

from __future__ import annotations

import json
import re
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers

from jaxlora import LLM, ConfigError, RequestError, SamplingParams
from jaxlora.adapters.bank import AdapterBank
from jaxlora.adapters.host_blocks import AdapterMemory, ordinary_memory
from jaxlora.adapters.host_cache import default_max_bytes
from jaxlora.engine import build, build_adapters
from jaxlora.engine.runner import Runner
from kernels_pallas.dispatch import choose_paged_attention
from tests.jaxlora.models.test_llama import YARN, tiny_model
from tests.jaxlora.peft_models import Reference
from tests.jaxlora.tiny_config import TINY
from tests.jaxlora.tiny_tokenizer import CHARACTERS, SPECIAL, add_tokenizer

VOCAB_SIZE = len(CHARACTERS + SPECIAL)
EOS = CHARACTERS.index("~") + 2  # Of the tiny tokenizer.


def greedy(model: transformers.PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    config = transformers.GenerationConfig(max_new_tokens=count, do_sample=False, eos_token_id=None)
    with torch.no_grad():
        return model.generate(torch.tensor([prompt]), config)[0, len(prompt) :].tolist()


@pytest.mark.parametrize(("max_model_len", "window"), [(24, None), (25, 24)])
def test_a_window_that_no_context_exceeds_is_none(
    tmp_path: Path, max_model_len: int, window: int | None
) -> None:
    """Not every kernel of attention has windows."""
    model = tiny_model("mistral window")
    model.save_pretrained(tmp_path)
    with mock.patch.object(
        build, "choose_paged_attention", side_effect=choose_paged_attention
    ) as choice:
        llm = LLM(
            str(tmp_path),
            max_model_len=max_model_len,
            max_num_seqs=1,
            max_num_batched_tokens=32,
            skip_tokenizer_init=True,
            use_tqdm=False,
        )
    assert choice.call_args.kwargs["sliding_window"] == window
    prompt, count = [5, 9, 33, 7], max_model_len - 4
    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    (output,) = llm.generate([prompt], params, use_tqdm=False)
    assert output.outputs[0].token_ids == greedy(model, prompt, count)


def test_a_window_of_some_layers_is_served_where_it_hides_nothing(tmp_path: Path) -> None:
    tiny_model("qwen2").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    window = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}
    hf = json.loads(file.read_text()) | window
    del hf["layer_types"]  # As older versions saved it.
    file.write_text(json.dumps(hf))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert set(model.config.layer_types) == {"full_attention", "sliding_attention"}

    options = {"max_num_seqs": 1, "max_num_batched_tokens": 32, "skip_tokenizer_init": True}
    llm = LLM(str(tmp_path), max_model_len=24, **options, use_tqdm=False)
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    (output,) = llm.generate([[5, 9, 33, 7]], params, use_tqdm=False)
    assert output.outputs[0].token_ids == greedy(model, [5, 9, 33, 7], 20)

    with pytest.raises(ConfigError, match=r"sliding_window=24 on some layers .*max_model_len=25"):
        LLM(str(tmp_path), max_model_len=25, **options, use_tqdm=False)


def test_what_overrides_a_config_is_computed_and_kept_apart(tmp_path: Path) -> None:
    """As model cards have YaRN turned on; what was compiled without it is not taken for it."""
    plain = tiny_model("llama")
    plain.save_pretrained(tmp_path / "model")
    config = transformers.LlamaConfig.from_dict(plain.config.to_dict() | {"rope_parameters": YARN})
    config._attn_implementation = "eager"
    stretched = type(plain)(config).eval()
    stretched.load_state_dict(plain.state_dict())
    prompt, count = [5, 9, 33, 7] * 40, 30
    told = []
    file = tmp_path / "model" / "config.json"
    stored = json.loads(file.read_text())
    for own, overrides, model in (
        ({}, None, plain),
        ({}, {"rope_scaling": YARN}, stretched),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, {"rope_parameters": YARN}, stretched),
    ):
        file.write_text(json.dumps(stored | own))
        llm = LLM(
            str(tmp_path / "model"),
            hf_overrides=overrides,
            max_num_seqs=1,
            max_num_batched_tokens=32,
            skip_tokenizer_init=True,
            compilation_cache_dir=str(tmp_path / "cache"),
            use_tqdm=False,
        )
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        (output,) = llm.generate([prompt], params, use_tqdm=False)
        told.append(output.outputs[0].token_ids)
        assert told[-1] == greedy(model, prompt, count)
    assert told[0] != told[1] == told[2]
    # Four times what it was trained for.
    with pytest.raises(RequestError, match="256"):
        llm.generate([[5] * 257], use_tqdm=False)


def model_ending_with(tmp_path: Path, config_id: Any, generation_id: Any) -> str:
    """A tiny model with a tokenizer, whose two files have these ids of ends; its folder."""
    base = tmp_path / "base"
    base.mkdir()
    hf = TINY | {"vocab_size": VOCAB_SIZE, "eos_token_id": config_id}
    (base / "config.json").write_text(json.dumps(hf))
    generation = json.dumps({"eos_token_id": generation_id})
    (base / "generation_config.json").write_text(generation)
    return str(add_tokenizer(base, tmp_path / "model"))


def started(model: str, cache: Path, **options: Any) -> LLM:
    return LLM(
        model,
        load_format="dummy",
        max_num_seqs=1,
        max_num_batched_tokens=32,
        compilation_cache_dir=str(cache),
        use_tqdm=False,
        **options,
    )


def test_a_sequence_ends_as_any_file_of_the_model_says(tmp_path: Path, program_cache: Path) -> None:
    """With another's tokenizer, or with none, too."""
    model = model_ending_with(tmp_path, 2, [3, 4])
    for options, ends in (
        ({}, {2, 3, 4, EOS}),
        ({"tokenizer": str(tmp_path / "model")}, {2, 3, 4, EOS}),
        ({"skip_tokenizer_init": True}, {2, 3, 4}),
    ):
        assert started(model, program_cache, **options).llm_engine.eos_token_ids == ends


def test_ids_that_the_model_does_not_have_end_nothing(tmp_path: Path, program_cache: Path) -> None:
    """Some configs have -1 for none."""
    model = model_ending_with(tmp_path, -1, [3, VOCAB_SIZE])
    llm = started(model, program_cache)
    assert llm.llm_engine.eos_token_ids == {3, EOS}
    last = VOCAB_SIZE - 1
    params = SamplingParams(temperature=0, max_tokens=2, min_tokens=2, ignore_eos=True)
    params.logit_bias = {last: 100.0}
    llm = started(model, program_cache, skip_tokenizer_init=True)
    (output,) = llm.generate([[5, 6]], params, use_tqdm=False)
    assert output.outputs[0].token_ids == [last, last]


@pytest.mark.parametrize("ends", ["3", [3, None], 3.0, True])
def test_an_end_that_is_no_id_is_refused_before_anything_is_compiled(
    tmp_path: Path, ends: Any
) -> None:
    model = model_ending_with(tmp_path, 2, ends)
    with (
        mock.patch.object(build, "Runner", side_effect=AssertionError),
        pytest.raises(
            ConfigError, match=rf"generation_config\.json has {re.escape(f'eos_token_id={ends!r}')}"
        ),
    ):
        started(model, tmp_path)


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (["mlp.up_proj"], "lora_target_modules has ['mlp.up_proj']; known: q_proj, k_proj"),
        ([], "lora_target_modules=[] leaves adapters nothing to change: name some of q_proj"),
    ],
)
def test_modules_that_adapters_cannot_change_are_refused(
    reference: Reference, modules: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        LLM(
            reference.base_path,
            enable_lora=True,
            lora_target_modules=modules,
            skip_tokenizer_init=True,
            use_tqdm=False,
        )


def test_memory_is_kept_free_for_writes_of_what_comes_in_pieces(reference: Reference) -> None:
    class PlannedError(Exception):
        pass

    banks: list[AdapterBank] = []

    def make(*args: Any, **kwargs: Any) -> AdapterBank:
        banks.append(AdapterBank(*args, piece_bytes=1000, **kwargs))
        return banks[-1]

    with (
        mock.patch.object(build_adapters, "AdapterBank", make),
        mock.patch.object(build, "plan_pages", side_effect=PlannedError) as plan,
        pytest.raises(PlannedError),
    ):
        LLM(reference.base_path, enable_lora=True, skip_tokenizer_init=True, use_tqdm=False)
    assert plan.call_args.kwargs["staging_bytes"] == banks[-1].reserved_bytes
    assert banks[-1].reserved_bytes > banks[-1].staging_bytes


@pytest.mark.parametrize(
    ("limits", "max_adapters", "max_bytes"),
    [({"max_cpu_loras": 3, "max_cpu_lora_gb": 0.5}, 3, 1 << 29), ({}, None, None)],
)
def test_adapters_memory_is_ready_before_kernels_are_timed(
    reference: Reference,
    limits: dict[str, Any],
    max_adapters: int | None,
    max_bytes: int | None,
) -> None:
    """And so before anything is served. Only the engine knows how much that is."""

    class CompiledError(Exception):
        pass

    done: list[str] = []

    def compile_programs(runner: Runner, *, after: Future[Any], **options: Any) -> None:
        after.result()
        done.append("loaded")
        assert runner.bank is not None
        assert choose.call_args.kwargs["adapter_bytes"] == runner.bank.packed_bytes > 0
        raise CompiledError

    memory = AdapterMemory(ordinary_memory, "of the tests", lambda: done.append("ready"))
    with (
        mock.patch.object(build_adapters, "choose_memory", return_value=memory) as choose,
        mock.patch.object(Runner, "compile", compile_programs),
        pytest.raises(CompiledError),
    ):
        LLM(
            reference.base_path,
            enable_lora=True,
            skip_tokenizer_init=True,
            use_tqdm=False,
            **limits,
        )
    assert done == ["ready", "loaded"]
    assert choose.call_args.kwargs["max_adapters"] == max_adapters
    assert choose.call_args.kwargs["max_bytes"] == (max_bytes or default_max_bytes())
