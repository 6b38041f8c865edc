"""PEFT itself is the reference: what it saves has PEFT's own change of each weight, or no load."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from operator import methodcaller
from pathlib import Path
from typing import Any
from unittest import mock

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import peft
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft.tuners.lora import Embedding, Linear
from safetensors.numpy import load_file, save_file

from jaxlora.adapters import pieces
from jaxlora.adapters.adapter import (
    NO_LAYER,
    TARGETS,
    Adapter,
    LoraPair,
    Traits,
    in_order,
    target_shape,
)
from jaxlora.adapters.peft import adapter_from_tensors, load_adapter
from jaxlora.adapters.peft_layout import Limits
from jaxlora.config import ModelConfig
from jaxlora.errors import AdapterError, AdapterNotFoundError, AdapterRefusedError

SHORT = {f"{short}_proj": short for short in TARGETS}
ALL = list(SHORT)
OUTSIDE = {"embed_tokens": "embed", "lm_head": "lm_head"}
LAYER0_Q = "base_model.model.model.layers.0.self_attn.q_proj"

HF_CONFIG = transformers.LlamaConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    tie_word_embeddings=False,
    architectures=["LlamaForCausalLM"],
)
MODEL = ModelConfig.from_hf(HF_CONFIG.to_dict())
TIED = dataclasses.replace(MODEL, tie_word_embeddings=True)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences the reference, which warns of the odd things it is asked for here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def base_model() -> transformers.LlamaForCausalLM:
    # A copy, because layer_replication changes the configuration it is given.
    return transformers.LlamaForCausalLM(copy.deepcopy(HF_CONFIG))


@quiet()
def save(path: Path, *, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """Lets PEFT make and save an adapter in which every weight is random."""
    torch.manual_seed(0)
    model = peft.get_peft_model(base_model(), peft.LoraConfig(task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.normal_(std=0.3)
                parameter.data = parameter.data.to(dtype)
    model.save_pretrained(path)
    return path


LIMITS = {field.name for field in dataclasses.fields(Limits)}
COPIES: dict[str, Any] = {"limits": Limits(16), "is_base_copy": lambda target, array: True}


def limited(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of loading, some of them limits, in the place of those that are usual here."""
    limits = {name: options[name] for name in options.keys() & LIMITS}
    others = {name: options[name] for name in options.keys() - LIMITS}
    return {"limits": Limits(**{"max_rank": 16} | limits)} | others


def load(path: Path, name: str = "a", **options: Any) -> Adapter:
    adapter = load_adapter(name, path, MODEL, **COPIES | limited(options))
    # Headers tell what the pairs would, which nobody makes for that.
    assert adapter.traits == Traits.of(adapter.modules)
    assert list(adapter.modules) == in_order(adapter.modules)
    return adapter


@quiet()
def changes_by_peft(
    path: Path, base: transformers.LlamaForCausalLM | None = None
) -> dict[tuple[int, str], np.ndarray]:
    """What PEFT adds to each weight after it has loaded the folder, ``[d_out, d_in]``."""
    base = base or base_model()
    model = peft.PeftModel.from_pretrained(base, path, autocast_adapter_dtype=True)
    found = {}
    for key, layer in model.named_modules():
        if isinstance(layer, Linear | Embedding):
            module, change = key.rpartition(".")[2], layer.get_delta_weight("default")
            change = change.T if module == "embed_tokens" else change
            where = (NO_LAYER, OUTSIDE[module]) if module in OUTSIDE else None
            where = where or (int(key.split(".")[4]), SHORT[module])
            found[where] = change.float().numpy()
    return found


def changes(adapter: Adapter) -> dict[tuple[int, str], np.ndarray]:
    return {
        key: pair.scale * (pair.b.astype(np.float32) @ pair.a.astype(np.float32))
        for key, pair in adapter.modules.items()
    }


def assert_same_changes(
    got: Mapping[tuple[int, str], np.ndarray], want: Mapping[tuple[int, str], np.ndarray]
) -> None:
    assert got.keys() == want.keys()
    for key, change in want.items():
        np.testing.assert_allclose(got[key], change, atol=1e-6, rtol=1e-6, err_msg=str(key))
        assert np.abs(change).max() > 0


def edit_config(path: Path, /, **options: Any) -> Path:
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | options))
    return path


def edit_tensors(path: Path, edit: Callable[[dict[str, np.ndarray]], object]) -> Path:
    """Changes the saved tensors in place; contiguous, because safetensors writes raw memory."""
    file = path / "adapter_model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file({key: np.ascontiguousarray(tensor) for key, tensor in tensors.items()}, file)
    return path


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("plain"), r=8, lora_alpha=16, target_modules=ALL)


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged, of an adapter with every module."""
    return shutil.copytree(saved, tmp_path / "adapter")


KINDS: dict[str, dict[str, Any]] = {
    "rank 1": {"r": 1, "lora_alpha": 2, "target_modules": ALL},
    "rank 8": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    "rank 13": {"r": 13, "lora_alpha": 13, "target_modules": ["gate_proj", "up_proj", "down_proj"]},
    "rank 16": {"r": 16, "lora_alpha": 3.5, "target_modules": ["k_proj", "o_proj"]},
    "one module": {"r": 4, "target_modules": ["model.layers.1.mlp.down_proj"]},
    "rsLoRA": {"r": 13, "lora_alpha": 8, "use_rslora": True, "target_modules": ALL},
    "all-linear": {"r": 4, "target_modules": "all-linear"},
    "regex": {"r": 4, "target_modules": r".*\.(0\.self_attn|1\.mlp)\.(q|k|up)_proj"},
    "patterns": {
        "r": 8,
        "lora_alpha": 16,
        "target_modules": ALL,
        "use_rslora": True,
        "rank_pattern": {"q_proj": 3, r"layers\.1\.mlp\.(gate|up)_proj": 16},
        "alpha_pattern": {"^model.layers.0.self_attn.[kv]_proj": 5, "down_proj": 1.5},
    },
    # PEFT sorts what it saves, so that after loading another alpha is first for q_proj: 9, not 3.
    "patterns that several match": {
        "r": 8,
        "target_modules": ["q_proj", "k_proj"],
        "rank_pattern": {
            r".*v_proj": 6,
            "k_proj": 7,
            "proj": 2,
            "q_proj": 5,
            "self_attn.q_proj": 4,
        },
        "alpha_pattern": {"q_proj": 3, r"\d.self_attn.q_proj": 9, "k_pro": 11},
    },
    "layers_to_transform": {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": [1]},
    "one layer": {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": 0},
    "layers_pattern": {
        "r": 4,
        "target_modules": ["q_proj", "model.layers.0.mlp.up_proj"],
        "layers_to_transform": [1],
        "layers_pattern": ["blocks", "layers"],
    },
    "exclude_modules": {
        "r": 4,
        "target_modules": ALL,
        "exclude_modules": ["0.mlp.up_proj", "q_proj"],
    },
    "exclude_modules regex": {
        "r": 4,
        "target_modules": "all-linear",
        "exclude_modules": r".*\.(q|k|v|o)_proj",
    },
    "embed_tokens": {"r": 4, "target_modules": ["embed_tokens", "q_proj"]},
    "lm_head": {"r": 4, "target_modules": ["lm_head", "q_proj"], "use_rslora": True},
    "embedding and head alone": {
        "r": 4,
        "target_modules": ["lm_head", "model.embed_tokens"],
        "rank_pattern": {"lm_head": 7, "embed_tokens": 2},
        "alpha_pattern": {"model.embed_tokens": 3},
    },
    "lora_bias": {"r": 4, "target_modules": ["lm_head", "o_proj"], "lora_bias": True},
    "DoRA": {"r": 4, "target_modules": ["lm_head", "embed_tokens", "o_proj"], "use_dora": True},
    "bfloat16": {"r": 8, "target_modules": ALL, "dtype": torch.bfloat16},
    "float16": {"r": 8, "target_modules": ALL, "dtype": torch.float16},
} | {
    f"init {init}": {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": init}
    for init in (False, "gaussian", "eva", "orthogonal", "mica")
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_peft_saves_changes_the_weights_as_in_peft(kind: str, tmp_path: Path) -> None:
    path = save(tmp_path, **KINDS[kind])
    adapter = load(path)
    assert_same_changes(changes(adapter), changes_by_peft(path))
    assert adapter.num_bytes == dataclasses.replace(adapter, blocks=()).num_bytes
    for (_, target), pair in adapter.modules.items():
        d_in, d_out = target_shape(MODEL, target)
        assert pair.a.shape == (pair.rank, d_in)
        assert pair.b.shape == (d_out, pair.rank)
        assert str(pair.a.dtype) == str(KINDS[kind].get("dtype", torch.float32)).split(".")[1]


def test_a_converted_pissa_adapter_is_plain_lora(tmp_path: Path) -> None:
    with quiet():
        config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa")
        model = peft.get_peft_model(base_model(), config)
        model.save_pretrained(tmp_path / "initial")
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_" in key:
                    parameter.add_(torch.randn_like(parameter))
        model.save_pretrained(
            tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
        )
    assert_same_changes(changes(load(tmp_path / "plain")), changes_by_peft(tmp_path / "plain"))


def test_properties_of_an_adapter(saved: Path) -> None:
    adapter = load(saved, "somebody")
    assert adapter.name == "somebody"
    assert adapter.rank == 8
    assert adapter.targets == set(TARGETS)
    assert list(adapter.modules) == [(layer, target) for layer in (0, 1) for target in TARGETS]
    assert adapter.num_bytes == sum(t.nbytes for t in tensors_of(saved).values())
    with pytest.raises(ValueError, match="read-only"):
        adapter.modules[0, "q"].a[0, 0] = 1


def test_loading_an_adapter_makes_no_pairs(saved: Path) -> None:
    """Hundreds take milliseconds to make and to let go of, for which steps would wait."""
    load(saved)
    with mock.patch.object(
        LoraPair, "__init__", autospec=True, side_effect=LoraPair.__init__
    ) as made:
        adapter = load_adapter("a", saved, MODEL, **COPIES)
    assert (adapter.rank, len(adapter.modules)) == (8, 2 * len(TARGETS))
    # Who checks types in tests looks at the first.
    assert made.call_count < len(adapter.modules) / 2


def test_adapters_are_alike_if_they_differ_in_numbers_only(saved: Path, tmp_path: Path) -> None:
    tensors, config = tensors_of(saved), config_of(saved)

    def like(**changed: Any) -> Adapter:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        path.mkdir()
        (path / "adapter_config.json").write_text(json.dumps(config | changed))
        doubled = {key: 2 * array for key, array in tensors.items()}
        save_file(doubled, path / "adapter_model.safetensors", metadata={"format": "pt"})
        return load(path)

    one, other = load(saved), like()
    assert one.alike is other.alike is not None
    assert one.version != other.version
    assert like(lora_alpha=99).alike is not one.alike
    assert from_tensors(tensors, config).alike is not one.alike


def test_the_largest_true_rank_counts(tmp_path: Path) -> None:
    options = {"r": 64, "target_modules": ["q_proj", "k_proj"]}
    path = save(tmp_path, **options, rank_pattern={"q_proj": 5, "k_proj": 7})
    assert load(path, max_rank=7).rank == 7
    with pytest.raises(AdapterRefusedError) as error:
        load(path, max_rank=6)
    assert str(error.value) == "LoRA rank 7 is greater than max_lora_rank 6."


# In memory, and under other names


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    return load_file(path / "adapter_model.safetensors")


def config_of(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((path / "adapter_config.json").read_text())
    return config


def from_tensors(tensors: Mapping[str, Any], config: Mapping[str, Any], **options: Any) -> Adapter:
    return adapter_from_tensors("a", tensors, config, MODEL, **limited(options))


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: key.removeprefix("base_model.model."),
        lambda key: key.replace(".weight", ".default.weight"),
        lambda key: key.removeprefix("base_model.model.").replace(".weight", ".sql.weight"),
    ],
    ids=["no prefix", "adapter's name", "state dict"],
)
def test_other_spellings_of_the_same_tensors(saved: Path, rename: Callable[[str], str]) -> None:
    tensors = {rename(key): tensor for key, tensor in tensors_of(saved).items()}
    assert from_tensors(tensors, config_of(saved)).version == load(saved).version


@pytest.mark.parametrize("second", ["q_proj", "v_proj"])
def test_tensors_of_several_adapters_are_not_one(second: str) -> None:
    """As in the state of a model that has several, each on modules of its own or on the same."""
    with quiet():
        model = peft.get_peft_model(
            base_model(), peft.LoraConfig(r=4, target_modules=["q_proj"]), adapter_name="policy"
        )
        model.add_adapter("reward", peft.LoraConfig(r=4, target_modules=[second]))
    state = {key: tensor.numpy() for key, tensor in model.state_dict().items() if "lora_" in key}
    with pytest.raises(AdapterRefusedError, match=r"of several adapters.*: policy, reward$"):
        from_tensors(state, {"r": 4})
    some = {key: tensor for key, tensor in state.items() if "reward" in key}
    short = second.removesuffix("_proj")
    assert from_tensors(some, {"r": 4}).modules.keys() == {(0, short), (1, short)}


def test_a_live_model_gives_the_same_adapter_as_its_folder(tmp_path: Path) -> None:
    path = save(tmp_path, r=4, target_modules=["q_proj"], rank_pattern={"0.self_attn.q_proj": 2})
    with quiet():
        model = peft.PeftModel.from_pretrained(base_model(), path)
    tensors = {key: t.numpy() for key, t in peft.get_peft_model_state_dict(model).items()}
    config = model.peft_config["default"].to_dict()
    assert from_tensors(tensors, config).version == load(path).version


@pytest.mark.parametrize("given", [torch.ones(2, 64), [[1.0] * 64] * 2], ids=["torch", "list"])
@pytest.mark.usefixtures("without_types")
def test_what_is_no_array_is_refused(given: object) -> None:
    name = "model.layers.0.self_attn.q_proj.lora_A.weight"
    kind = re.escape(f"{type(given).__module__}.{type(given).__qualname__}")
    with pytest.raises(AdapterRefusedError, match=rf"{name} is a {kind}.*tensor.numpy\(\)"):
        from_tensors({name: given}, {"r": 2})


@pytest.mark.parametrize(
    ("dtype", "alpha", "b", "limit"),
    [
        ("float32", 3e38, 4.0, "3.4e[+]38"),
        ("bfloat16", -3e38, 4.0, "3.39e[+]38"),
        ("float16", 4.0, -4e4, "6.55e[+]04"),
    ],
)
def test_what_overflows_once_it_is_scaled_is_refused(
    dtype: str, alpha: float, b: float, limit: str
) -> None:
    tensors = {
        f"{LAYER0_Q}.lora_A.weight": np.ones((2, MODEL.hidden_size), np.float32),
        f"{LAYER0_Q}.lora_B.weight": np.full((MODEL.q_size, 2), b, np.float32),
    }
    message = rf"beyond {dtype}, which ends at {limit}: {LAYER0_Q}.lora_B.weight reaches"
    config = {"r": 2, "lora_alpha": alpha}
    with pytest.raises(AdapterRefusedError, match=message):
        from_tensors(tensors, config, dtype=dtype)
    # What is large is not B.
    tensors[f"{LAYER0_Q}.lora_A.weight"] *= np.float32(b)
    tensors[f"{LAYER0_Q}.lora_B.weight"] /= np.float32(4 * b)
    from_tensors(tensors, config, dtype=dtype)


def test_an_a_that_its_slot_cannot_hold_is_refused() -> None:
    tensors = {
        f"{LAYER0_Q}.lora_A.weight": np.full((2, MODEL.hidden_size), 7e4, np.float32),
        f"{LAYER0_Q}.lora_B.weight": np.ones((MODEL.q_size, 2), np.float32),
    }
    config = {"r": 2, "lora_alpha": 0.5}
    with pytest.raises(AdapterRefusedError, match=r"float16.*lora_A.weight reaches 7e\+04"):
        from_tensors(tensors, config, dtype="float16")
    from_tensors(tensors, config, dtype="bfloat16")


def test_arrays_in_memory_are_copied() -> None:
    a = np.ones((2, MODEL.hidden_size), np.float32)
    b = jnp.ones((MODEL.q_size, 2), jnp.bfloat16)
    tensors = {f"{LAYER0_Q}.lora_A.weight": a, f"{LAYER0_Q}.lora_B.weight": b}
    adapter = from_tensors(tensors, {"r": 2, "lora_alpha": 3})
    a[:] = 7
    pair = adapter.modules[0, "q"]
    assert pair.a.dtype == np.float32
    assert pair.b.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(pair.a, 1)
    assert pair.scale == 1.5
    assert adapter.num_bytes == a.nbytes + b.nbytes


def test_defaults_of_a_short_configuration_are_those_of_peft(saved: Path) -> None:
    config = peft.LoraConfig()
    pair = from_tensors(tensors_of(saved), {}).modules[0, "q"]
    assert pair.scale == config.lora_alpha / config.r


def test_fused_linears_are_split_exactly() -> None:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    widths = [target_shape(MODEL, target)[1] for target in TARGETS]
    q, k, v, _, gate, up, _ = widths
    prefix = "model.layers.1"
    tensors = {
        f"{prefix}.self_attn.qkv_proj.lora_A.weight": normal(3, 64),
        f"{prefix}.self_attn.qkv_proj.lora_B.weight": normal(q + k + v, 3),
        f"{prefix}.mlp.gate_up_proj.lora_A.weight": normal(4, 64),
        f"{prefix}.mlp.gate_up_proj.lora_B.weight": normal(gate + up, 4),
    }
    config = {"r": 3, "rank_pattern": {"gate_up_proj": 4}, "target_modules": "all-linear"}
    adapter = from_tensors(tensors, config)
    assert set(adapter.modules) == {(1, target) for target in ("q", "k", "v", "gate", "up")}
    for fused, targets in (("self_attn.qkv", ("q", "k", "v")), ("mlp.gate_up", ("gate", "up"))):
        a, b = (tensors[f"{prefix}.{fused}_proj.lora_{side}.weight"] for side in "AB")
        pairs = [adapter.modules[1, target] for target in targets]
        np.testing.assert_array_equal(np.concatenate([pair.b for pair in pairs]), b)
        assert [pair.b.shape[0] for pair in pairs] == [target_shape(MODEL, t)[1] for t in targets]
        for pair in pairs:
            np.testing.assert_array_equal(pair.a, a)
    assert adapter.num_bytes == sum(tensor.nbytes for tensor in tensors.values())
    # The same weights in separate linears are the same pairs.
    apart = {
        f"{prefix}.{linear}.lora_{side}.weight": getattr(adapter.modules[1, target], side.lower())
        for linear, target in (
            ("self_attn.q_proj", "q"),
            ("self_attn.k_proj", "k"),
            ("self_attn.v_proj", "v"),
            ("mlp.gate_proj", "gate"),
            ("mlp.up_proj", "up"),
        )
        for side in "AB"
    }
    ranks = {"r": 3, "rank_pattern": {"(gate|up)_proj": 4}, "target_modules": "all-linear"}
    for key, pair in from_tensors(apart, ranks).modules.items():
        np.testing.assert_array_equal(pair.a, adapter.modules[key].a)
        np.testing.assert_array_equal(pair.b, adapter.modules[key].b)


def test_patterns_in_another_order_are_another_configuration(tmp_path: Path) -> None:
    """The first that matches counts; files with the same header are judged once."""
    path = save(tmp_path / "a", r=4, target_modules=["q_proj", "v_proj"])
    narrow, wide = ("q_proj", 32), (".*_proj", 8)
    versions = set()
    for patterns in ((narrow, wide), (wide, narrow)):
        adapter = load(edit_config(path, alpha_pattern=dict(patterns)))
        assert_same_changes(changes(adapter), changes_by_peft(path))
        versions.add(adapter.version)
    assert len(versions) == 2


def test_the_version_is_the_content(folder: Path) -> None:
    version = load(folder).version
    assert load(folder, "other name").version == version
    # Bookkeeping is no content.
    edit_config(folder, base_model_name_or_path="elsewhere", lora_dropout=0.5, peft_version="0.1")
    assert load(folder).version == version
    # Scale is.
    assert load(edit_config(folder, lora_alpha=17)).version != version
    edit_config(folder, lora_alpha=16)
    assert load(folder).version == version

    def nudge(tensors: dict[str, np.ndarray]) -> None:
        tensors[f"{LAYER0_Q}.lora_B.weight"][0, 0] += 1e-3

    assert load(edit_tensors(folder, nudge)).version != version


# What PEFT can write and is not served

REFUSED_KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "bias all": ({"bias": "all"}, "Adapter bias is not supported."),
    "bias lora_only": ({"bias": "lora_only"}, "Adapter bias is not supported."),
    "modules_to_save": (
        {"modules_to_save": ["norm"]},
        r"Unsupported modules_to_save: \['norm'\]",
    ),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
    "pissa_niter": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4'"),
    "olora": ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
    "layer_replication": ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication="),
    "aLoRA": ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens="),
    "KaSA": ({"kasa_config": peft.tuners.lora.config.KasaConfig()}, "kasa_config="),
    "VeLoRA": ({"velora_config": peft.tuners.lora.config.VeloraConfig()}, "velora_config="),
    "BD-LoRA": (
        {"use_bdlora": peft.tuners.lora.config.BdLoraConfig(target_modules_bd_b=["q_proj"])},
        "use_bdlora=",
    ),
}


@pytest.mark.parametrize("kind", REFUSED_KINDS)
def test_what_peft_saves_and_is_not_served_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    options, message = REFUSED_KINDS[kind]
    path = save(tmp_path, **{"r": 4, "target_modules": ["q_proj"]} | options)
    with pytest.raises(AdapterRefusedError, match=message):
        load(path)


# What an engine is started for


EXTRA_KINDS: dict[str, tuple[dict[str, Any], set[str], str]] = {
    "embed_tokens": (
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"embed_tokens"},
        r"has LoRA on embed_tokens, .* lora_extras=\['bias', 'embed_tokens'\]",
    ),
    "lm_head": (
        {"target_modules": ["lm_head"]},
        {"lm_head"},
        r"has LoRA on lm_head, .* lora_extras=\['bias', 'lm_head'\]",
    ),
    "DoRA": (
        {"use_dora": True, "target_modules": ["lm_head", "q_proj"]},
        {"dora", "lm_head"},
        r"has LoRA on lm_head and DoRA \(use_dora\), .*\['bias', 'dora', 'lm_head'\]",
    ),
}


@pytest.mark.parametrize("kind", EXTRA_KINDS)
def test_extras_are_refused_by_an_engine_without_room_for_them(kind: str, tmp_path: Path) -> None:
    options, needed, message = EXTRA_KINDS[kind]
    path = save(tmp_path, **{"r": 4, "target_modules": ["q_proj"]} | options)
    adapter = load(path, extras=tuple(needed))
    assert adapter.extras == needed
    # Blocks hold the arrays and nothing else.
    assert adapter.num_bytes == dataclasses.replace(adapter, blocks=()).num_bytes
    with pytest.raises(AdapterRefusedError, match=message):
        load(path, extras=("bias",))


def test_lora_bias_is_refused_by_an_engine_without_room_for_it(tmp_path: Path) -> None:
    path = save(tmp_path, r=4, target_modules=["q_proj"], lora_bias=True)
    assert load(path, extras=("bias",)).extras == {"bias"}
    with pytest.raises(AdapterRefusedError, match=r"a bias on B \(lora_bias\), .*\['bias'\]"):
        load(path, extras=())


def test_biases_and_magnitudes_are_those_that_were_saved(tmp_path: Path) -> None:
    for option, side, tensor in (
        ("lora_bias", "bias", "lora_B.bias"),
        ("use_dora", "magnitude", "lora_magnitude_vector"),
    ):
        path = save(tmp_path / option, r=4, target_modules=["q_proj"], **{option: True})
        saved = tensors_of(path)[f"{LAYER0_Q}.{tensor}"]
        pair = load(path).modules[0, "q"]
        np.testing.assert_array_equal(pair.arrays()[side], saved)
        version = load(path).version

        def nudge(tensors: dict[str, np.ndarray], key: str = f"{LAYER0_Q}.{tensor}") -> None:
            tensors[key][0] += 1e-3

        assert load(edit_tensors(path, nudge)).version != version


def test_matrices_are_those_that_were_saved(tmp_path: Path) -> None:
    names = {"modules_to_save": ["lm_head", "embed_tokens"]}
    path = save(tmp_path, r=4, target_modules=["q_proj"], **names)
    adapter = load(path, is_base_copy=None)
    assert adapter.extras == {"saved_lm_head", "saved_embed_tokens"}
    tensors = tensors_of(path)
    for module, target in OUTSIDE.items():
        key = next(key for key in tensors if f"{module}.weight" in key)
        np.testing.assert_array_equal(adapter.matrices[target], tensors[key])

    def nudge(tensors: dict[str, np.ndarray]) -> None:
        tensors["base_model.model.lm_head.weight"][3, 3] += 1e-3

    assert load(edit_tensors(path, nudge)).version != adapter.version
    with pytest.raises(AdapterRefusedError, match=r"an output head of its own .*'saved_lm_head'"):
        load(path, extras=("saved_embed_tokens",))
    with pytest.raises(AdapterRefusedError, match=r"shape \[96, 63\], expected \[96, 64\]"):
        load(edit_tensors(path, put("base_model.model.lm_head.weight", np.ones((96, 63)))))
    with pytest.raises(AdapterRefusedError, match=r"NaN or Inf: \S*lm_head"):
        load(edit_tensors(path, put("base_model.model.lm_head.weight", np.full((96, 64), np.nan))))
    with pytest.raises(AdapterRefusedError, match="for which the adapter has no tensor: lm_head"):
        load(edit_tensors(path, drop("base_model.model.lm_head.weight")))


def test_rows_are_those_that_were_saved(tmp_path: Path) -> None:
    path = save(tmp_path, r=4, target_modules=["q_proj"], trainable_token_indices=[5, 2])
    adapter = load(path)
    assert adapter.extras == {"saved_embed_tokens"}
    ids, rows = adapter.rows["embed"]
    assert ids == (5, 2)
    key = next(key for key in tensors_of(path) if "trainable_tokens_delta" in key)
    np.testing.assert_array_equal(rows, tensors_of(path)[key])
    assert load(edit_config(path, trainable_token_indices=[2, 5])).version != adapter.version
    # A head that is the embedding changes with it.
    tied = adapter_from_tensors("a", tensors_of(path), config_of(path), TIED, Limits(16))
    assert tied.extras == {"saved_embed_tokens", "saved_lm_head"}
    assert tied.rows["lm_head"] == tied.rows["embed"]
    assert tied.num_bytes == adapter.num_bytes
    for indices, message in (
        ([5], r"shape \[2, 64\], expected \[1, 64\]"),
        ([5, 96], "beyond the vocabulary of 96: 96"),
        ({"lm_head": [5, 2]}, "do not agree on: lm_head, model.embed_tokens"),
    ):
        with pytest.raises(AdapterRefusedError, match=message):
            load(edit_config(path, trainable_token_indices=indices))
    edit_config(path, trainable_token_indices={"lm_head": [5, 2], "embed_tokens": [5, 2]})
    with pytest.raises(AdapterRefusedError, match="which are one matrix in this model"):
        adapter_from_tensors("a", tensors_of(path), config_of(path), TIED, Limits(16))
    edit_config(path, trainable_token_indices=[5, 2])
    with pytest.raises(AdapterRefusedError, match=r"NaN or Inf: \S*embed_tokens"):
        load(edit_tensors(path, put(key, np.full((2, 64), np.inf))))


def test_rows_that_a_tied_head_shares_may_be_there_twice(tmp_path: Path) -> None:
    """So they are in a live model's state, and where PEFT was told to save embeddings."""
    base = copy.deepcopy(HF_CONFIG)
    base.tie_word_embeddings = True
    with quiet():
        config = peft.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[5, 2])
        model = peft.get_peft_model(transformers.LlamaForCausalLM(base), config)
        model.save_pretrained(tmp_path, save_embedding_layers=True)
    tensors = tensors_of(tmp_path)
    adapter = adapter_from_tensors("a", tensors, config_of(tmp_path), TIED, **COPIES)
    key = "base_model.model.{}.token_adapter.trainable_tokens_delta".format
    for target, module in (("embed", "model.embed_tokens"), ("lm_head", "lm_head")):
        ids, rows = adapter.rows[target]
        assert ids == (5, 2)
        np.testing.assert_array_equal(rows, tensors[key(module)])
    tensors[key("lm_head")] = tensors[key("lm_head")] + 1
    with pytest.raises(AdapterRefusedError, match=r"trainable_token_indices=\[5, 2\].*differ"):
        adapter_from_tensors("a", tensors, config_of(tmp_path), TIED, **COPIES)


def test_rows_that_something_else_changes_too_are_refused(tmp_path: Path) -> None:
    for number, options in enumerate(
        ({"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]})
    ):
        path = save(
            tmp_path / str(number),
            **{"r": 4, "target_modules": ["q_proj"], "trainable_token_indices": [5]} | options,
        )
        assert load(path).rows.keys() == {"embed"}
        with pytest.raises(AdapterRefusedError, match=r"together with .* on: lm_head"):
            adapter_from_tensors("a", tensors_of(path), config_of(path), TIED, **COPIES)


def test_lora_on_a_matrix_that_is_saved_too_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, r=4, target_modules=["lm_head"])
    edit_tensors(path, put("base_model.model.lm_head.weight", np.ones((96, 64))))
    with pytest.raises(AdapterRefusedError, match="both LoRA and modules_to_save on: lm_head"):
        load(edit_config(path, modules_to_save=["lm_head"]))


@pytest.mark.parametrize(
    ("option", "tensor"), [("use_dora", "lora_magnitude_vector"), ("lora_bias", "lora_B.bias")]
)
def test_tensors_and_their_option_must_agree(option: str, tensor: str, tmp_path: Path) -> None:
    path = save(tmp_path, r=4, target_modules=["q_proj"], **{option: True})
    with pytest.raises(
        AdapterRefusedError, match=f"{option}=False, but the adapter has a {tensor} in: .*q_proj"
    ):
        load(edit_config(path, **{option: False}))
    edit_config(path, **{option: True})
    with pytest.raises(AdapterRefusedError, match=f"has no {tensor} in: model.layers.0.*q_proj"):
        load(edit_tensors(path, drop(f"{LAYER0_Q}.{tensor}")))


def test_copies_of_the_base_are_ignored_and_anything_else_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, r=4, target_modules=["lm_head", "embed_tokens"])
    asked: dict[str, np.ndarray] = {}

    def is_base_copy(target: str, array: np.ndarray) -> bool:
        asked[target] = array
        return target == "embed"

    with pytest.raises(AdapterRefusedError, match=r"another matrix than the base's: \S*lm_head"):
        load(path, is_base_copy=is_base_copy)
    for module, target in OUTSIDE.items():
        key = next(key for key in tensors_of(path) if f"{module}.base_layer.weight" in key)
        np.testing.assert_array_equal(asked[target], tensors_of(path)[key])
    with pytest.raises(AdapterRefusedError, match="without lora_extras does not compare"):
        load(path, is_base_copy=None)


def test_embeddings_saved_beside_rows_of_them_are_copies_too(tmp_path: Path) -> None:
    with quiet():
        config = peft.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[3])
        model = peft.get_peft_model(base_model(), config)
        model.save_pretrained(tmp_path, save_embedding_layers=True)
    name = "base_model.model.model.embed_tokens.token_adapter.base_layer.weight"
    assert name in tensors_of(tmp_path)
    assert load(tmp_path).rows["embed"][0] == (3,)
    with pytest.raises(AdapterRefusedError, match=rf"another matrix than the base's: .*{name}"):
        load(tmp_path, is_base_copy=lambda target, array: False)


def test_originals_of_saved_matrices_are_copies_too(tmp_path: Path) -> None:
    path = save(tmp_path, r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    name = "base_model.model.lm_head.original_module.weight"
    edit_tensors(path, put(name, np.ones((96, 64))))
    assert load(path).extras == {"saved_lm_head"}
    with pytest.raises(AdapterRefusedError, match=f"another matrix than the base's: {name}"):
        load(path, is_base_copy=lambda target, array: False)


def test_a_saved_matrix_that_is_there_twice_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with quiet():
        config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
        model = peft.get_peft_model(base_model(), config)
        model.save_pretrained(tmp_path, save_embedding_layers=True)
    message = r"modules_to_save .* twice.*save_embedding_layers=False: base_model.model.lm_head"
    with pytest.raises(AdapterRefusedError, match=message):
        load(tmp_path)


def test_embeddings_saved_on_request_are_copies_too(tmp_path: Path) -> None:
    with quiet():
        config = peft.LoraConfig(r=4, target_modules=["q_proj"])
        model = peft.get_peft_model(base_model(), config)
        model.save_pretrained(tmp_path, save_embedding_layers=True)
    keys = [key.removeprefix("base_model.model.") for key in tensors_of(tmp_path)]
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(keys)
    assert load(tmp_path).targets == {"q"}
    with pytest.raises(AdapterRefusedError, match="another matrix than the base's"):
        load(tmp_path, is_base_copy=lambda target, array: False)


def tied_model() -> transformers.LlamaForCausalLM:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**HF_CONFIG.to_dict() | {"tie_word_embeddings": True})
    )


@quiet()
def save_tied(path: Path, **options: Any) -> Path:
    config = peft.LoraConfig(
        **{"r": 4, "target_modules": ["embed_tokens"]} | options,
        ensure_weight_tying=True,
        init_lora_weights=False,
    )
    peft.get_peft_model(tied_model(), config).save_pretrained(path)
    return path


def test_lora_that_embedding_and_head_share(tmp_path: Path) -> None:
    path = save_tied(tmp_path)
    config, tensors = config_of(path), tensors_of(path)
    adapter = adapter_from_tensors("a", tensors, config, TIED, **COPIES)
    assert adapter.targets == {"embed", "lm_head"}
    lonely = {key: tensor for key, tensor in tensors.items() if "embed_tokens" in key}
    with pytest.raises(AdapterRefusedError, match=r"ensure_weight_tying.* no tensors for lm_head"):
        adapter_from_tensors("a", lonely, config, TIED, **COPIES)
    key = next(key for key in tensors if "lm_head.lora_A" in key)
    other = tensors | {key: tensors[key] + 1}
    with pytest.raises(AdapterRefusedError, match=r"ensure_weight_tying.* are not the transposed"):
        adapter_from_tensors("a", other, config, TIED, **COPIES)


@pytest.mark.parametrize("module", OUTSIDE)
@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_head_s_lora_has_the_embedding_s_rank_and_its_own_scale(
    module: str, use_rslora: bool, tmp_path: Path
) -> None:
    path = save_tied(tmp_path, rank_pattern={module: 2}, use_rslora=use_rslora)
    adapter = adapter_from_tensors("a", tensors_of(path), config_of(path), TIED, **COPIES)
    expected, got = changes_by_peft(path, tied_model()), changes(adapter)
    assert got.keys() == expected.keys()
    for where, change in expected.items():
        np.testing.assert_allclose(got[where], change, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modules_to_save": ["lm_head"]}, "brings matrices of the base.*lm_head"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices and .* agree on: .*embed_tok"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_tensors_are_refused_by_name_whatever_the_configuration_says(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = save(tmp_path, r=4, target_modules=["q_proj"], **options)
    with pytest.raises(AdapterRefusedError, match=message):
        load(edit_config(path, **dict.fromkeys(options)), is_base_copy=None)


@pytest.mark.parametrize(
    "config",
    [
        peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
        peft.LoHaConfig(target_modules=["q_proj"]),
        peft.LoKrConfig(target_modules=["q_proj"]),
        peft.VeraConfig(target_modules=["q_proj"]),
        peft.OFTConfig(target_modules=["q_proj"], oft_block_size=8, r=0),
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_other_methods_are_refused_by_name(config: peft.PeftConfig, tmp_path: Path) -> None:
    with quiet():
        peft.get_peft_model(base_model(), config).save_pretrained(tmp_path)
    name = peft.PeftType(config.peft_type).value
    with pytest.raises(AdapterRefusedError, match=f"^peft_type='{name}' is not served: only LORA"):
        load(tmp_path)


def test_a_changed_vocabulary_is_refused_with_the_sizes(tmp_path: Path) -> None:
    with quiet():
        base = base_model()
        base.resize_token_embeddings(100)
        config = peft.LoraConfig(r=4, target_modules=["q_proj"])
        peft.get_peft_model(base, config).save_pretrained(tmp_path, save_embedding_layers=True)
    with pytest.raises(AdapterRefusedError, match=r"96 tokens.*embed_tokens.* shape \[100, 64\]"):
        load(tmp_path)


def test_names_of_any_length_are_refused_at_once(folder: Path) -> None:
    """As long as the header may be; what took the square of that would run for hours."""
    long = "lm_head." * 500_000
    edit_tensors(folder, lambda tensors: tensors.update({long: np.ones((3, 4), np.float32)}))
    with pytest.raises(AdapterRefusedError, match=r"nothing in the model has this name: lm_head\."):
        load(folder)


def test_a_larger_tokenizer_is_refused_with_the_sizes(folder: Path) -> None:
    (folder / "added_tokens.json").write_text('{"<new>": 95}')
    load(folder)
    (folder / "added_tokens.json").write_text('{"<new>": 96}')
    with pytest.raises(AdapterRefusedError, match="needs 97 tokens, the model has 96"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "content", "refused"),
    [
        ("added_tokens.json", {"<new>": 95}, True),
        ("added_tokens.json", {"<s>": 1}, False),
        ("added_tokens.json", {"<s>": 2}, True),
        ("tokenizer.json", {"added_tokens": [{"id": 95, "content": "<new>"}]}, True),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"95": {"content": "<new>"}}, "pad_token": "<new>"},
            False,
        ),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"95": {"content": "<new>"}}, "pad_token": "<s>"},
            True,
        ),
    ],
)
def test_tokens_that_the_model_s_tokenizer_lacks_are_refused(
    folder: Path, name: str, content: Any, refused: bool
) -> None:
    """Also where the model's table has room for them."""
    (folder / name).write_text(json.dumps(content))
    load(folder)
    if not refused:
        load(folder, token_of={1: "<s>"}.get)
        return
    message = r"has tokens that the engine's has not.* adapter's folder: (95 <new>|2 <s>)$"
    with pytest.raises(AdapterRefusedError, match=message):
        load(folder, token_of={1: "<s>"}.get)


# Tensors that do not fit


def drop(key: str) -> Callable[[dict[str, np.ndarray]], object]:
    return lambda tensors: tensors.pop(key)


def put(key: str, value: Any) -> Callable[[dict[str, np.ndarray]], object]:
    return lambda tensors: tensors.update({key: np.asarray(value, np.float32)})


def move(old: str, new: str) -> Callable[[dict[str, np.ndarray]], object]:
    def edit(tensors: dict[str, np.ndarray]) -> None:
        for key in [key for key in tensors if old in key]:
            tensors[key.replace(old, new)] = tensors.pop(key)

    return edit


def poison(key: str, value: float, dtype: Any) -> Callable[[dict[str, np.ndarray]], object]:
    def edit(tensors: dict[str, np.ndarray]) -> None:
        tensors[key] = tensors[key].astype(dtype)
        tensors[key][1, 1] = value

    return edit


Q_A, Q_B = (f"{LAYER0_Q}.lora_{side}.weight" for side in "AB")

DAMAGE: dict[str, tuple[Callable[[dict[str, np.ndarray]], object], str]] = {
    "no B": (drop(Q_B), rf"without lora_B.*: {Q_A}$"),
    "no A": (drop(Q_A), rf"without lora_A: {Q_B}$"),
    "no tensors": (dict.clear, "has no tensors"),
    "a layer too many": (
        move("layers.1.", "layers.2."),
        r"14 of the adapter's 28 tensors: nothing in the model.*layers\.2\..* and 9 more$",
    ),
    "no model": (move("model.model.layers", "model.layers"), "nothing in the model has this name"),
    "padded layer": (move("layers.1.", "layers.01."), "nothing in the model has this name"),
    "unknown linear": (move("q_proj", "qq_proj"), "nothing in the model has this name"),
    "stray tensor": (put("stray", 1), "1 of the adapter's 29 tensors.*: stray$"),
    "bias": (put(f"{LAYER0_Q}.bias", [1]), "Adapter bias is not supported.*q_proj.bias"),
    "twice": (
        put("model.layers.0.self_attn.q_proj.lora_A.weight", np.ones((8, 64))),
        "several tensors for the same weights: .*q_proj.lora_A.weight",
    ),
    "fused and apart": (
        put("model.layers.0.self_attn.qkv_proj.lora_A.weight", np.ones((8, 64))),
        "several tensors for the same weights: .*(q|k|v|qkv)_proj",
    ),
    "rank of A": (put(Q_A, np.ones((9, 64))), rf"{Q_A} has shape \[9, 64\], expected \[8, 64\]"),
    "width of A": (put(Q_A, np.ones((8, 63))), rf"{Q_A} has shape \[8, 63\], expected \[8, 64\]"),
    "width of B": (put(Q_B, np.ones((64, 8))), rf"{Q_B} has shape \[64, 8\], expected \[48, 8\]"),
    "no matrix": (put(Q_B, np.ones(8)), rf"{Q_B} has shape \[8\], expected \[48, 8\]"),
    "empty": (put(Q_B, np.ones((48, 0))), rf"{Q_B} has shape \[48, 0\], expected \[48, 8\]"),
    "NaN": (poison(Q_A, np.nan, np.float32), f"NaN or Inf: {Q_A}$"),
    "Inf in float16": (poison(Q_B, np.inf, np.float16), f"NaN or Inf: {Q_B}$"),
    "-Inf in bfloat16": (poison(Q_B, -np.inf, ml_dtypes.bfloat16), f"NaN or Inf: {Q_B}$"),
    "float64": (poison(Q_B, 1, np.float64), f"float32, float16, bfloat16: {Q_B} is F64$"),
    "int8": (poison(Q_B, 1, np.int8), f"float32, float16, bfloat16: {Q_B} is I8$"),
    "float8": (poison(Q_B, 1, ml_dtypes.float8_e4m3fn), f"{Q_B} is F8_E4M3$"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_tensors_that_do_not_fit_are_refused_by_name(damage: str, folder: Path) -> None:
    edit, message = DAMAGE[damage]
    with pytest.raises(AdapterRefusedError, match=message):
        load(edit_tensors(folder, edit))


def test_what_is_not_finite_is_named_in_whatever_piece_it_lies(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 256)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    version = load(folder).version
    good = tensors_of(folder)
    names = list(good)
    assert from_tensors(good, config_of(folder)).version == version
    for odd in (names[:1], names[-1:], names[5:8], names):
        bad = copy.deepcopy(good)
        for name in odd:
            bad[name].reshape(-1)[-1] = np.nan
        first = ", ".join(sorted(odd)[:5])
        with pytest.raises(AdapterRefusedError, match=f"NaN or Inf: {first}( and 23 more)?$"):
            load(edit_tensors(folder, methodcaller("update", bad)))
        with pytest.raises(AdapterRefusedError, match=f"NaN or Inf: {first}( and 23 more)?$"):
            from_tensors(bad, config_of(folder))


def test_big_endian_arrays_are_refused(saved: Path) -> None:
    tensors = tensors_of(saved)
    tensors[Q_A] = tensors[Q_A].astype(">f4")
    with pytest.raises(AdapterRefusedError, match=f"{Q_A} is >f4"):
        from_tensors(tensors, config_of(saved))


def test_a_folder_that_sorting_broke_is_refused_as_in_peft(tmp_path: Path) -> None:
    # Trained with rank 5; in the saved, sorted order the pattern with rank 6 comes first.
    ranks = {"q_proj": 5, r".*_proj": 6}
    path = save(tmp_path, target_modules=["q_proj"], rank_pattern=ranks)
    with pytest.raises(RuntimeError, match="size mismatch"):
        changes_by_peft(path)
    with pytest.raises(AdapterRefusedError, match=r"has shape \[5, 64\], expected \[6, 64\]"):
        load(path)


def test_a_rank_that_is_not_the_configured_one_is_refused(folder: Path) -> None:
    with pytest.raises(AdapterRefusedError, match=r"has shape \[8, 64\], expected \[4, 64\]"):
        load(edit_config(folder, rank_pattern={"0.self_attn.k_proj": 4}))


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["k_proj"]},
        {"target_modules": r".*\.k_proj"},
        {"exclude_modules": ["q_proj"]},
        {"exclude_modules": r".*0\.self_attn\.q_proj"},
        {"layers_to_transform": [1]},
        {"layers_to_transform": [0, 1], "layers_pattern": "blocks"},
    ],
    ids=str,
)
def test_tensors_that_peft_would_ignore_are_refused(options: dict[str, Any], folder: Path) -> None:
    option = next(iter(options))
    with pytest.raises(AdapterRefusedError, match=rf"{option} leaves .*: model\.layers\.0\."):
        load(edit_config(folder, **options))


def test_modules_the_engine_disabled_are_refused_by_name(saved: Path) -> None:
    everything = ("q", "k", "v", "o", "gate", "up", "down")
    load(saved, target_modules=everything)
    with pytest.raises(AdapterRefusedError, match=r"\(q, k, v\) leaves out: down_proj, .*, o_proj"):
        load(saved, target_modules=("q", "k", "v"))


# Files that are not what they say


def test_a_missing_adapter_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(AdapterNotFoundError) as error:
        load(tmp_path / "nowhere")
    assert str(error.value) == f"No adapter found for {tmp_path / 'nowhere'}"


@pytest.mark.parametrize("length", [0, 7, 8, 100, 4000, -1])
def test_a_truncated_file_is_refused(length: int, folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(AdapterRefusedError, match="is truncated or damaged"):
        load(folder)


@pytest.mark.parametrize(
    "lie",
    [
        lambda header: header[Q_A].update(shape=[8, 128]),
        lambda header: header[Q_A].update(shape=[2**40, 2**40]),
        lambda header: header[Q_A].update(data_offsets=[0, 2**62]),
        lambda header: header[Q_A].update(data_offsets=header[Q_B]["data_offsets"]),
        lambda header: header[Q_A].update(dtype="F16"),
        lambda header: header[Q_A].pop("shape"),
    ],
    ids=["wider", "overflow", "beyond the end", "overlap", "dtype", "no shape"],
)
def test_a_header_that_lies_is_refused(lie: Callable[[Any], object], folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    lie(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[start:])
    with pytest.raises(AdapterRefusedError, match="is truncated or damaged"):
        load(folder)


# Whatever is in the files, the worst that happens is a refusal


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("small"), r=1, target_modules=["q_proj"])


FUZZ = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def load_or_refuse(path: Path) -> None:
    with contextlib.suppress(AdapterError):
        adapter = load(path)
        assert all(np.isfinite(pair.a).all() for pair in adapter.modules.values())


@FUZZ
@given(data=st.data())
def test_damaged_files_load_or_are_refused(
    small: Path, tmp_path: Path, data: st.DataObject
) -> None:
    path = shutil.copytree(small, tmp_path / "adapter", dirs_exist_ok=True)
    name = data.draw(st.sampled_from(["adapter_model.safetensors", "adapter_config.json"]))
    content = bytearray((small / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        # Most damage goes where it can do most: the header.
        position = data.draw(st.integers(0, min(len(content), 900) - 1))
        content[position] = data.draw(st.integers(0, 255))
    length = data.draw(st.just(len(content)) | st.integers(0, len(content)))
    (path / name).write_bytes(content[:length])
    load_or_refuse(path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=5,
)


@FUZZ
@given(data=st.data())
def test_odd_configurations_load_or_are_refused(
    small: Path, tmp_path: Path, data: st.DataObject
) -> None:
    path = shutil.copytree(small, tmp_path / "adapter", dirs_exist_ok=True)
    keys = st.sampled_from(sorted(config_of(small))) | st.text(max_size=8)
    edit_config(path, **data.draw(st.dictionaries(keys, json_values, max_size=3)))
    load_or_refuse(path)
