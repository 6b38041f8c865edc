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
from jaxlora.adapters.base_weights import BaseWeights
from jaxlora.config import ModelConfig
from jaxlora.engine.lowering import Program, lower
from jaxlora.engine.runner import Runner
from jaxlora.engine_args import LORA_EXTRAS
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
SIZES = ("shape", "chip", "devices", "slots", "extras")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """An engine's sizes, and what it is to run on."""

    shape: str
    """One of :data:`benchmarks.workloads.SHAPES`."""
    chip: str
    num_devices: int
    slots: int
    extras: bool = False
    """Whether for adapters with extras, of every kind."""
    rank: int = 16
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    max_model_len: int = 2048
    num_pages: int = 128

    WITHOUT_SLOTS: ClassVar = ("decode", "mixed", "sample")
    """Kinds of programs that know nothing of slots."""

    @property
    def largest(self) -> dict[str, str]:
        """The largest program of each kind that a step runs, and the adapter write; with extras
        what there is for them alone."""
        tokens, rows = self.max_num_batched_tokens, self.max_num_seqs
        if self.extras:
            return {
                "decode extras": f"decode lora extras {rows}",
                "mixed extras": f"mixed lora extras {tokens}",
                "write extras": "adapter extras write",
                "write matrix": "adapter matrix write",
                "write rows": "adapter rows write",
                "norms": "base lm_head",
                "norms of columns": "base embed",
                "comparison": "base copy",
            }
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
            extras=LORA_EXTRAS if target.extras else (),
        )
        graph, weights = weight_shapes(config, BFLOAT16, self.devices)
        base = None
        if target.extras:
            base = BaseWeights(
                config,
                self.devices,
                weights,
                max_rank=bank.max_rank,
                dora_targets=(*MODULES, "embed", "lm_head"),
            )
        self.token_bytes = page_bytes(local, attention, page_size, BFLOAT16) // page_size
        """Of a token's keys and values, on each device."""
        self.cache_bytes = self.token_bytes * page_size * target.num_pages
        self.cache = make_cache(
            local,
            attention,
            self.devices,
            num_pages=target.num_pages,
            page_size=page_size,
            dtype=BFLOAT16,
        )
        runner = Runner(
            config,
            (graph, weights),
            self.cache,
            devices=self.devices,
            bank=bank,
            attention=attention,
            base=base,
            max_num_seqs=target.max_num_seqs,
            max_num_batched_tokens=target.max_num_batched_tokens,
            pages_per_row=-(-target.max_model_len // page_size),
        )
        self.programs: dict[str, Program] = runner.programs()
        sampling = self.programs[f"sample {target.max_num_seqs}"].arguments[3]
        extras = None if bank.extras is None else bank.extras.arrays
        self.resident = jax.tree.leaves((weights, bank.arrays, extras, sampling))
        """What lies on each device all the time, beside the KV cache."""

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
        target, name = self.target, self.target.largest[kind]
        row: dict[str, Any] = {
            "shape": target.shape,
            "chip": target.chip,
            "devices": target.num_devices,
            "slots": target.slots,
            "extras": target.extras,
            "program": name,
        }
        began = time.perf_counter()
        try:
            memory = self.compile(name).memory_analysis()
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
        read = set(map(id, jax.tree.leaves(self.programs[name].arguments)))
        needed += bytes_on_each([leaf for leaf in self.resident if id(leaf) not in read])
        if id(self.cache[0]) in read:
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
        engines.setdefault(tuple(row.get(key) for key in SIZES), []).append(row)
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
