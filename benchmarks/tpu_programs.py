"""The engine's own programs as a TPU would run them, from shapes alone: nothing is allocated."""

from __future__ import annotations

import dataclasses
import time
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from benchmarks.tpu_topologies import CHIPS, compile_for, devices
from benchmarks.workloads import SHAPES
from jaxlora.adapters.bank import AdapterBank
from jaxlora.config import ModelConfig
from jaxlora.engine.lowering import Program, lower
from jaxlora.engine.runner import Runner
from jaxlora.models.cache import make_cache, page_bytes
from jaxlora.models.lora import MODULES
from jaxlora.models.weights import weight_shapes
from jaxlora.parallel import ShapesOnly, bytes_on_each, shard
from kernels_pallas.dispatch import (
    choose_lora_matmul,
    choose_paged_attention,
    default_page_size,
)

BFLOAT16 = jnp.dtype("bfloat16")
GIB = 1 << 30
TAKEN = {
    "decode": ("weights",),
    "mixed": ("weights",),
    "decode lora": ("weights", "bank"),
    "mixed lora": ("weights", "bank"),
    "sample": ("sampling",),
    "write": ("bank",),
}
"""What a program of each kind has among its arguments; forward programs also have the cache."""
SIZES = ("shape", "chip", "devices", "slots")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """An engine's sizes, and what it is to run on."""

    shape: str
    """One of :data:`benchmarks.workloads.SHAPES`."""
    chip: str
    num_devices: int
    slots: int
    rank: int = 16
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    max_model_len: int = 2048
    num_pages: int = 128

    PER_SLOTS: ClassVar = ("decode lora", "mixed lora", "write")
    """Kinds of programs that depend on the number of slots."""

    @property
    def largest(self) -> dict[str, str]:
        """The largest program of each kind that a step runs, and the adapter write."""
        tokens, rows = self.max_num_batched_tokens, self.max_num_seqs
        return {
            "decode": f"decode {rows}",
            "mixed": f"mixed {tokens}",
            "decode lora": f"decode lora {rows}",
            "mixed lora": f"mixed lora {tokens}",
            "sample": f"sample {rows}",
            "write": f"adapter write, rank {self.rank} bfloat16",
        }


class Engine:
    """The programs of a target's engine, chosen and assembled as at a start."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.devices = ShapesOnly.of(devices(target.chip)[: target.num_devices])
        config = ModelConfig.from_hf(SHAPES[target.shape])
        local = shard(config, self.devices.count)
        page_size = default_page_size("tpu", target.max_model_len)
        attention, _ = choose_paged_attention(
            "tpu",
            BFLOAT16,
            num_heads=local.num_heads,
            num_kv_heads=local.num_kv_heads,
            head_dim=local.head_dim,
            page_size=page_size,
            sliding_window=config.sliding_window,
        )
        kernel, _ = choose_lora_matmul("tpu", BFLOAT16, device_kind="TPU")
        bank = AdapterBank(
            config,
            self.devices,
            kernel=kernel,
            num_slots=target.slots,
            max_rank=target.rank,
            dtype=BFLOAT16,
            modules=MODULES,
        )
        self.token_bytes = page_bytes(local, attention, page_size, BFLOAT16) // page_size
        """Of a token's keys and values, on each device."""
        self.cache_bytes = self.token_bytes * page_size * target.num_pages
        runner = Runner(
            config,
            weight_shapes(config, BFLOAT16, self.devices),
            make_cache(
                local,
                attention,
                self.devices,
                num_pages=target.num_pages,
                page_size=page_size,
                dtype=BFLOAT16,
            ),
            devices=self.devices,
            bank=bank,
            attention=attention,
            max_num_seqs=target.max_num_seqs,
            max_num_batched_tokens=target.max_num_batched_tokens,
            pages_per_row=-(-target.max_model_len // page_size),
        )
        self.programs: dict[str, Program] = runner.programs()
        largest = {kind: self.programs[name].arguments for kind, name in target.largest.items()}
        weights, sampling = largest["decode"][0], largest["sample"][3]
        self.resident = {
            "weights": bytes_on_each(weights),
            "bank": bank.num_bytes,
            "sampling": bytes_on_each(sampling),
        }
        """Bytes of what lies on each device all the time, beside the KV cache."""

    def compile(self, name: str) -> jax.stages.Compiled:
        """One of its programs."""
        return compile_for(lower(self.programs[name], self.devices))

    def report(self, kind: str) -> dict[str, Any]:
        """Compiles the largest program of a kind and says what each device needs while it runs.

        ``fits`` is what the compiler says of the program by itself. ``GiB`` is all that lies there
        but the KV cache, also what this program does not read; ``KV tokens`` is how many fit beside
        it into nine tenths of the memory. The compiler's own count of bytes is left out: what it
        fetches ahead it counts twice, and what attention reads not at all.
        """
        target = self.target
        row: dict[str, Any] = {
            "shape": target.shape,
            "chip": target.chip,
            "devices": target.num_devices,
            "slots": target.slots,
            "program": target.largest[kind],
        }
        began = time.perf_counter()
        try:
            memory = self.compile(target.largest[kind]).memory_analysis()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            row |= {"compile s": time.perf_counter() - began, "fits": False}
            return row | dict.fromkeys(("GiB", "temporary GiB", "KV tokens"))
        assert memory is not None
        needed = (
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
            + memory.temp_size_in_bytes
        )
        taken = TAKEN[kind]
        needed += sum(size for name, size in self.resident.items() if name not in taken)
        if "weights" in taken:
            needed -= self.cache_bytes
        left = int(0.9 * CHIPS[target.chip].hbm_gib * GIB) - needed
        return row | {
            "compile s": time.perf_counter() - began,
            "fits": True,
            "GiB": needed / GIB,
            "temporary GiB": memory.temp_size_in_bytes / GIB,
            "KV tokens": max(0, left // self.token_bytes),
        }


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What fits: for each engine among the rows of :meth:`Engine.report`, the programs together."""
    engines: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        engines.setdefault(tuple(row[key] for key in SIZES), []).append(row)
    return [
        {
            **dict(zip(SIZES, sizes, strict=True)),
            "programs": len(programs),
            "compile s": sum(row["compile s"] for row in programs),
            "fits": fits,
            "GiB": max(row["GiB"] for row in programs) if fits else None,
            "KV tokens": min(row["KV tokens"] for row in programs) if fits else None,
        }
        for sizes, programs in engines.items()
        for fits in [all(row["fits"] and row["KV tokens"] for row in programs)]
    ]
