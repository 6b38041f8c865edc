"""The comparison: Hugging Face PEFT's mixed-adapter generate on the same model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import peft
import torch
import transformers


class PeftEngine:
    """A model with adapters under PEFT, in float32, on a GPU where torch sees one."""

    def __init__(self, model: str, adapters: Mapping[str, Path]) -> None:
        folder, _, file = model.rpartition("/")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        base = transformers.AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=file, dtype=torch.float32
        )
        (first, path), *others = adapters.items()
        self.model = peft.PeftModel.from_pretrained(base, str(path), adapter_name=first)
        for name, path in others:
            self.model.load_adapter(str(path), adapter_name=name)
        self.model = self.model.eval().to(device)

    def generate(self, items: Sequence[tuple[list[int], int, str | None]]) -> None:
        """Completes (prompt ids, number of tokens, adapter or None) in one padded batch; rows that
        ask for fewer tokens go along to the end, as in any static batch."""
        longest = max(len(prompt) for prompt, _, _ in items)
        padded = [[0] * (longest - len(prompt)) + prompt for prompt, _, _ in items]
        mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt, _, _ in items]
        new = max(count for _, count, _ in items)
        with torch.inference_mode():
            self.model.generate(
                input_ids=torch.tensor(padded, device=self.model.device),
                attention_mask=torch.tensor(mask, device=self.model.device),
                adapter_names=[name or "__base__" for _, _, name in items],
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
            )
