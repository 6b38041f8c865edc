"""DoRA's gains are PEFT's, and a copy of the base's matrices is known from anything else."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from peft.tuners.lora import Embedding, Linear

from jaxlora.adapters import base_weights
from jaxlora.adapters.adapter import NO_LAYER, TARGETS, Adapter, LoraPair
from jaxlora.adapters.base_weights import BaseWeights
from jaxlora.adapters.peft import load_adapter
from jaxlora.adapters.peft_layout import Limits
from jaxlora.config import ModelConfig
from jaxlora.errors import AdapterRefusedError
from jaxlora.models.weights import load_weights
from jaxlora.parallel import Devices

SHORT = {f"{short}_proj": short for short in TARGETS} | {"embed_tokens": "embed"}


class Case:
    """A PEFT model with DoRA on everything, its folder, and its base's weights on the device."""

    def __init__(self, folder: Path, *, tied: bool) -> None:
        hf_config = transformers.LlamaConfig(
            vocab_size=96,
            hidden_size=64,
            intermediate_size=80,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
            architectures=["LlamaForCausalLM"],
        )
        torch.manual_seed(0)
        base = transformers.LlamaForCausalLM(hf_config)
        tensors = {key: tensor.numpy().copy() for key, tensor in base.state_dict().items()}
        self.config = ModelConfig.from_hf(hf_config.to_dict())
        devices = Devices.first(1)
        _, state = load_weights(self.config, iter(tensors.items()), jnp.dtype(jnp.float32), devices)
        targets = (*TARGETS, "embed", "lm_head")
        self.weights = BaseWeights(self.config, devices, state, max_rank=16, dora_targets=targets)
        programs = self.weights.programs().items()
        self.weights.use_programs({name: jax.jit(function) for name, (function, _) in programs})
        lora = peft.LoraConfig(
            r=5,
            lora_alpha=9,
            target_modules=["embed_tokens", "lm_head", *(f"{t}_proj" for t in TARGETS)],
            use_dora=True,
            init_lora_weights=False,
        )
        self.model = peft.get_peft_model(base, lora)
        with torch.no_grad():
            for key, parameter in self.model.named_parameters():
                if "lora_magnitude_vector" in key:
                    parameter.mul_(0.5 + torch.rand_like(parameter))
        self.model.save_pretrained(folder)
        self.folder = folder
        self.tensors = tensors

    def load(self) -> Adapter:
        is_copy = self.weights.is_copy
        return load_adapter("a", self.folder, self.config, Limits(16), is_base_copy=is_copy)


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def case(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    # Blocks that do not divide the number of rows.
    monkeypatch.setattr(base_weights, "_BLOCK_ROWS", 36)
    return Case(tmp_path, tied=request.param)


@pytest.mark.filterwarnings("ignore")
def test_gains_are_those_of_peft(case: Case) -> None:
    saved = case.load()
    adapter = case.weights.with_gains(saved)
    gains = [pair.gain for pair in adapter.modules.values() if pair.gain is not None]
    assert adapter.num_bytes == saved.num_bytes + sum(gain.nbytes for gain in gains)
    found = 0
    for key, layer in case.model.named_modules():
        if not isinstance(layer, Linear | Embedding):
            continue
        found += 1
        short = key.rpartition(".")[2]
        is_layer = "layers" in key
        at = (int(key.split(".")[4]) if is_layer else NO_LAYER, SHORT.get(short, short))
        weight = layer.get_base_layer().weight.detach() + layer.get_delta_weight("default").detach()
        norms = torch.linalg.norm(weight.T if short == "embed_tokens" else weight, dim=1)
        gain = layer.lora_magnitude_vector["default"].weight.detach() / norms
        pair = adapter.modules[at]
        assert pair.gain is not None
        np.testing.assert_allclose(pair.gain, gain.numpy(), rtol=2e-6, err_msg=key)
        scaled = pair.b.astype(np.float32) * np.float32(pair.scale) * pair.gain[:, None]
        np.testing.assert_allclose(pair.scaled_b(), scaled, rtol=1e-6)
    assert found == 2 * len(TARGETS) + 2


@pytest.mark.filterwarnings("ignore")
def test_a_copy_is_known_from_a_change_in_any_row(case: Case) -> None:
    for target, key in (("embed", "model.embed_tokens.weight"), ("lm_head", "lm_head.weight")):
        array = case.tensors[key]
        assert case.weights.is_copy(target, array)
        for row in range(0, 96, 5):
            other = array.copy()
            other[row, row % 64] += 1e-3
            assert not case.weights.is_copy(target, other)


@pytest.mark.filterwarnings("ignore")
def test_a_norm_of_zero_is_refused(case: Case) -> None:
    width = case.config.hidden_size
    weight = case.tensors["model.layers.0.self_attn.o_proj.weight"]
    a, b = np.zeros((1, width), np.float32), np.zeros((width, 1), np.float32)
    a[0], b[3] = -weight[3], 1.0
    magnitude = np.ones(width, np.float32)
    adapter = Adapter.of("a", {(0, "o"): LoraPair(a=a, b=b, scale=1.0, magnitude=magnitude)})
    with pytest.raises(AdapterRefusedError, match=r"zero or too large for 1 outputs of layer 0, o"):
        case.weights.with_gains(adapter)
    # Nor may B, of which the gain is a factor, leave float32.
    b[3], magnitude[5] = 0.0, 3e38
    b[5] = 1e3
    adapter = Adapter.of("a", {(0, "o"): LoraPair(a=a, b=b, scale=1e3, magnitude=magnitude)})
    with pytest.raises(AdapterRefusedError, match=r"for 1 outputs of layer 0, o, or the magnitude"):
        case.weights.with_gains(adapter)
