"""Writes the goldens beside this file: adapters that PEFT saved, and what PEFT answers with them.

    python -m tests.jaxlora.goldens.generate

Run it when PEFT has learned to save something new; tests/jaxlora/test_goldens.py reads them without
PEFT or torch. One folder for each base model; in it the model, an adapter for each kind, and
goldens.json.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers

from tests.jaxlora.peft_models import (
    EXTRA_KINDS,
    KINDS,
    SAVED_KINDS,
    TIED_KINDS,
    TIED_SAVED_KINDS,
    TIED_TOKEN_KINDS,
    TOKEN_KINDS,
    Reference,
)

HERE = Path(__file__).parent
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.4,
}
UNTIED = {"attention_bias": True, "mlp_bias": True}
BASES: dict[str, list[tuple[dict[str, dict[str, Any]], dict[str, Any]]]] = {
    "untied": [(KINDS | EXTRA_KINDS, UNTIED), (SAVED_KINDS, UNTIED), (TOKEN_KINDS, UNTIED)],
    "tied": [
        (kinds, {"tie_word_embeddings": True})
        for kinds in (TIED_KINDS, TIED_SAVED_KINDS, TIED_TOKEN_KINDS)
    ],
}
"""Base -> kinds of adapters, as many sets as PEFT needs models, and options of the base."""
NUM_TOKENS = 8
MIN_GAP = 0.02
"""Between the two best logits, so that no rounding turns a choice."""


def answer(reference: Reference, name: str | None) -> dict[str, Any]:
    """A prompt whose greedy continuation is clear, that, and its log-probabilities."""
    for seed in range(1000):
        prompt = np.random.default_rng(seed).integers(0, 97, 6 + seed % 9).tolist()
        tokens = reference.greedy(prompt, NUM_TOKENS, name)
        scores = reference.logits([*prompt, *tokens], name)[len(prompt) - 1 : -1]
        best = np.sort(scores, axis=-1)
        if (best[:, -1] - best[:, -2]).min() > MIN_GAP:
            chosen = torch.log_softmax(torch.from_numpy(scores), -1).numpy()
            logprobs = chosen[np.arange(NUM_TOKENS), tokens]
            return {
                "prompt": prompt,
                "tokens": tokens,
                "logprobs": [round(float(value), 6) for value in logprobs],
            }
    raise RuntimeError(f"no clear answer of {name}")


def main() -> None:
    """Writes every folder anew."""
    versions = {each.__name__: each.__version__ for each in (peft, torch, transformers)}
    for base, sets in BASES.items():
        shutil.rmtree(HERE / base, ignore_errors=True)
        answers: dict[str, Any] = {}
        for kinds, options in sets:
            with tempfile.TemporaryDirectory() as folder:
                reference = Reference(Path(folder), kinds, **SIZES, **options)
                shutil.copytree(reference.base_path, HERE / base / "base", dirs_exist_ok=True)
                answers.setdefault("base", answer(reference, None))
                for name, path in reference.paths.items():
                    answers[name] = answer(reference, name)
                    (HERE / base / name).mkdir()
                    for file in ("adapter_config.json", "adapter_model.safetensors"):
                        shutil.copy(Path(path) / file, HERE / base / name / file)
                    config = HERE / base / name / "adapter_config.json"
                    saved = json.loads(config.read_text()) | {"base_model_name_or_path": None}
                    config.write_text(json.dumps(saved, indent=1) + "\n")
        (HERE / base / "base" / "generation_config.json").unlink()
        record = {"versions": versions, "answers": answers}
        (HERE / base / "goldens.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
