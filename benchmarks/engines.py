"""Engines with random weights, and what every benchmark says of its memory."""

from __future__ import annotations

import contextlib
import json
import resource
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import safetensors.numpy
import tokenizers

from benchmarks.workloads import SHAPES
from jaxlora import LLM, LoRARequest


@contextlib.contextmanager
def dummy_engine(
    shape: str, *, slots: int, rank: int, max_num_seqs: int, **options: Any
) -> Iterator[tuple[LLM, Path]]:
    """An engine with random weights, and a random adapter's folder to load under many names;
    ``options`` are further ones of the engine's. At the end its memory is free for the next one."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SHAPES[shape]))
        adapter = random_adapter(Path(folder), SHAPES[shape], rank)
        llm = LLM(
            folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            enable_lora=True,
            max_loras=slots,
            max_lora_rank=rank,
            max_model_len=2048,
            max_num_seqs=max_num_seqs,
            **options,
        )
        try:
            yield llm, adapter
        finally:
            # Who asked for it may still have the LLM in a variable.
            del llm.llm_engine


def lora_requests(chosen: Sequence[int | None], adapter: Path) -> list[LoRARequest | None]:
    """Who asks for which, None for the base: the one adapter, under a name for each number."""
    return [
        None if number is None else LoRARequest(f"adapter-{number}", None, str(adapter))
        for number in chosen
    ]


def random_adapter(folder: Path, shape: dict[str, Any], rank: int) -> Path:
    """A random PEFT adapter on all seven linears; its B is small, so that nothing overflows."""
    path = folder / "adapter"
    path.mkdir()
    hidden, mlp = shape["hidden_size"], shape["intermediate_size"]
    kv = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    widths = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden, kv),
        "self_attn.v_proj": (hidden, kv),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (hidden, mlp),
        "mlp.up_proj": (hidden, mlp),
        "mlp.down_proj": (mlp, hidden),
    }
    random = np.random.default_rng(0)
    tensors = {}
    for layer in range(shape["num_hidden_layers"]):
        for module, (d_in, d_out) in widths.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            a = random.normal(0, 0.02, (rank, d_in)).astype(ml_dtypes.bfloat16)
            b = random.normal(0, 0.001, (d_out, rank)).astype(ml_dtypes.bfloat16)
            tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = a, b
    safetensors.numpy.save_file(tensors, path / "adapter_model.safetensors")
    modules = [module.rsplit(".", 1)[1] for module in widths]
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": modules}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def random_tokenizer(folder: Path, vocab_size: int) -> None:
    """A tokenizer beside a model with random weights, whose every token is a word."""
    vocabulary = {f"\u0120{i:x}": i for i in range(vocab_size)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def memory() -> dict[str, float]:
    """Most memory this process has held, on the host and on an accelerator, in MiB."""
    peak = {"peak host MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    stats = jax.devices()[0].memory_stats()
    if stats:
        peak["peak device MiB"] = stats["peak_bytes_in_use"] / 2**20
    return peak
