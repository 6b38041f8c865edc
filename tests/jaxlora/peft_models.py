"""A tiny random Llama with PEFT adapters of many kinds: the reference, and its folders for us."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers

from jaxlora import LoRARequest

KINDS: dict[str, dict[str, Any]] = {
    "r8-qv": {"r": 8, "target_modules": ["q_proj", "v_proj"]},
    "r1-all": {"r": 1, "target_modules": "all-linear"},
    "r13-rslora": {"r": 13, "target_modules": ["gate_proj", "down_proj"], "use_rslora": True},
    "r16-all": {"r": 16, "target_modules": "all-linear", "lora_alpha": 8},
    "r4-kou": {"r": 4, "target_modules": ["k_proj", "o_proj", "up_proj"]},
    "patterns": {
        "r": 8,
        "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 3, r"layers\.1\.mlp\.up_proj": 16},
        "alpha_pattern": {"down_proj": 32, r"layers\.0\.self_attn\..*": 4},
    },
    "one-layer": {"r": 8, "target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
}
"""LoraConfig keywords by adapter name."""

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
EXTRA_KINDS: dict[str, dict[str, Any]] = {
    "plain": {"r": 8, "target_modules": ["q_proj", "v_proj"]},
    "embed": {"r": 8, "target_modules": ["embed_tokens", "q_proj"]},
    "embed-r1": {"r": 1, "target_modules": ["embed_tokens"]},
    "head": {"r": 16, "target_modules": ["lm_head", "o_proj"]},
    "vocabulary-rslora": {
        "r": 5,
        "target_modules": ["embed_tokens", "lm_head"],
        "rank_pattern": {"lm_head": 3},
        "use_rslora": True,
    },
    "bias": {
        "r": 8,
        "target_modules": ["q_proj", "k_proj", "o_proj", "up_proj", "down_proj", "lm_head"],
        "lora_bias": True,
    },
    "dora": {"r": 8, "target_modules": "all-linear", "use_dora": True},
    "dora-some": {"r": 4, "target_modules": ["k_proj", "gate_proj", "down_proj"]}
    | {"use_dora": True, "layers_to_transform": [1]},
    "dora-vocabulary": {"r": 13, "target_modules": ["embed_tokens", "lm_head", "v_proj"]}
    | {"use_dora": True},
}
"""Kinds for an engine that was started with every one of lora_extras."""

TIED_KINDS: dict[str, dict[str, Any]] = {
    # First, because PEFT ties nothing where another adapter is on the head already.
    "one-for-both": {"r": 6, "target_modules": ["embed_tokens", "k_proj"]}
    | {"ensure_weight_tying": True},
} | {
    name: EXTRA_KINDS[name]
    for name in ("plain", "embed", "head", "vocabulary-rslora", "dora-vocabulary")
}
"""Kinds that depend on whether embedding and output head are one matrix."""

SAVED_KINDS: dict[str, dict[str, Any]] = {
    "saved-embed": {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "saved-head": {"r": 1, "target_modules": ["o_proj"], "modules_to_save": ["lm_head"]},
    "saved-both-dora": {"r": 8, "target_modules": ["k_proj"], "use_dora": True}
    | {"modules_to_save": ["lm_head", "embed_tokens"]},
}
"""Kinds that bring matrices; PEFT cannot have them in one model with LoRA on the same modules."""

TIED_SAVED_KINDS: dict[str, dict[str, Any]] = {
    "saved-as-one": {"r": 4, "target_modules": ["q_proj"], "ensure_weight_tying": True}
    | {"modules_to_save": ["embed_tokens"]},
} | {name: SAVED_KINDS[name] for name in ("saved-embed", "saved-head")}

_MOST_IDS = list(range(96, 0, -1))[:70]
TOKEN_KINDS: dict[str, dict[str, Any]] = {
    "tokens": {"r": 4, "target_modules": ["q_proj"]}
    | {"trainable_token_indices": {"lm_head": [7, 3, 50], "embed_tokens": _MOST_IDS}},
}
"""Kinds that bring rows of the embedding or the output head."""

TIED_TOKEN_KINDS: dict[str, dict[str, Any]] = {
    "tokens": {"r": 4, "target_modules": ["v_proj"], "trainable_token_indices": _MOST_IDS},
}

NEAR_TIE = 1e-3
"""Greedy choices may differ where the reference's two best logits are closer than this."""


class Reference:
    """The tiny model under PEFT, and where it and its adapters are saved."""

    def __init__(
        self, folder: Path, kinds: dict[str, dict[str, Any]] = KINDS, **config_options: Any
    ) -> None:
        config = transformers.LlamaConfig(
            **(SIZES | config_options), eos_token_id=None, bos_token_id=None
        )
        torch.manual_seed(0)
        base = transformers.LlamaForCausalLM(config).eval().float()
        with torch.no_grad():
            for key, parameter in base.named_parameters():
                if key.endswith(".bias"):
                    parameter.normal_(std=0.2)
        self.base_path = str(folder / "base")
        base.save_pretrained(self.base_path)
        self.model: Any = None
        self.kinds = kinds
        with warnings.catch_warnings():
            # PEFT says that such adapters can hardly be merged, and that it saves base weights too.
            warnings.simplefilter("ignore")
            for name, options in kinds.items():
                lora = peft.LoraConfig(**({"lora_alpha": 16} | options), init_lora_weights=False)
                if self.model is None:
                    self.model = peft.get_peft_model(base, lora, adapter_name=name)
                else:
                    self.model.add_adapter(name, lora)
            self.model.eval()
            self._randomize_copies()
            self.model.save_pretrained(folder)
        self.paths = {name: str(folder / name) for name in kinds}

    def add(self, name: str, folder: Path, **options: Any) -> LoRARequest:
        """Adds a random adapter and saves it; :meth:`delete` it when done."""
        options = {"lora_alpha": 16, "init_lora_weights": False} | options
        self.model.add_adapter(name, peft.LoraConfig(**options))
        self.model.eval()
        self.model.save_pretrained(folder, selected_adapters=[name])
        return LoRARequest(name, None, str(folder / name))

    def load(self, request: LoRARequest) -> None:
        """Adds one that was saved; :meth:`delete` it when done."""
        self.model.load_adapter(request.lora_path, request.lora_name)
        self.model.eval()

    def _randomize_copies(self) -> None:
        """PEFT starts magnitudes at the norms and matrices as the base's: nothing would change."""
        with torch.no_grad():
            for key, parameter in self.model.named_parameters():
                if "lora_magnitude_vector" in key:
                    parameter.mul_(0.5 + torch.rand_like(parameter))
                elif "modules_to_save" in key or "trainable_tokens_delta" in key:
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)

    def delete(self, name: str) -> None:
        """Forgets an adapter that was added."""
        self.model.set_adapter(next(iter(self.kinds)))
        self.model.delete_adapter(name)

    def logits(self, token_ids: Sequence[int], adapter: str | None) -> np.ndarray:
        """Scores after every token, ``[T, V]``."""
        with torch.no_grad():
            ids = torch.tensor([list(token_ids)])
            if adapter is None:
                with self.model.disable_adapter():
                    return self.model(ids).logits[0].float().numpy()
            self.model.set_adapter(adapter)
            return self.model(ids).logits[0].float().numpy()

    def greedy(self, prompt: Sequence[int], count: int, adapter: str | None) -> list[int]:
        """The reference's own best tokens, in whatever dtype the model is in."""
        tokens: list[int] = []
        for _ in range(count):
            tokens.append(int(self.logits([*prompt, *tokens], adapter)[-1].argmax()))
        return tokens

    def beam_search(
        self, prompt: Sequence[int], adapter: str | None, width: int, count: int
    ) -> Any:
        """transformers' own: without an end, and ranked by log-probability."""
        disabled = self.model.disable_adapter() if adapter is None else contextlib.nullcontext()
        with torch.no_grad(), disabled:
            if adapter is not None:
                self.model.set_adapter(adapter)
            return self.model.generate(
                input_ids=torch.tensor([list(prompt)]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                num_beams=width,
                num_return_sequences=width,
                max_new_tokens=count,
                length_penalty=0.0,
                do_sample=False,
                pad_token_id=0,
                return_dict_in_generate=True,
                output_scores=True,
            )

    def check_greedy(
        self, prompt: Sequence[int], got: Sequence[int], adapter: str | None
    ) -> np.ndarray:
        """Asserts that every token of ``got`` is the reference's best choice after those before
        it, near-ties excepted; returns the reference's scores after every token, the prompt's
        too."""
        every = self.logits([*prompt, *got], adapter)
        logits = every[len(prompt) - 1 : -1]
        chosen = logits[np.arange(len(got)), got]
        behind = logits.max(axis=-1) - chosen
        at = int(behind.argmax())
        assert behind[at] <= NEAR_TIE, f"token {at} under {adapter} is {behind[at]} from the best"
        return every


def prompts(count: int, vocab_size: int = 97, seed: int = 0) -> list[list[int]]:
    """Random prompts of 3 to 80 tokens."""
    random = np.random.default_rng(seed)
    lengths = random.integers(3, 80, count)
    return [random.integers(0, vocab_size, length).tolist() for length in lengths]
