"""What there is room for: KV pages, adapters' slots, and steps of the size that is asked for."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jaxlora.config import ModelConfig
from jaxlora.engine.row_state import state_bytes
from jaxlora.errors import ConfigError
from jaxlora.models.cache import page_bytes
from jaxlora.parallel import shard
from kernels_pallas.paged_attention.op import Implementation

logger = logging.getLogger(__name__)

_CPU_CACHE_BYTES = 1 << 30
_MIB = 1 << 20
_GROUPS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    (
        "/sys/fs/cgroup/memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
)
"""Control groups of version 2, and of version 1: where a container's limit is, what it uses, and
how much of that are files that need not stay."""


def check_room(what: str, count: int, bytes_each: int, available: int, remedy: str) -> None:
    """Raises ConfigError if ``count`` of them are more than memory has room for: XLA would say so
    after minutes, and on a CPU the system would end the process without a word."""
    most = max(0, available) // bytes_each
    if count > most:
        raise ConfigError(
            f"{what} take {_mib(count * bytes_each)} of memory, and {_mib(max(0, available))} are "
            f"available, enough for {most}: {remedy}"
        )


def check_step(
    config: ModelConfig,
    dtype: jnp.dtype,
    devices: Sequence[Any],
    *,
    max_num_seqs: int,
    max_num_batched_tokens: int,
) -> None:
    """Raises ConfigError if no step of this size could be worked on, whatever else there is."""
    available = available_bytes(devices)
    for name, count, unit, bytes_each in (
        ("max_num_seqs", max_num_seqs, "rows", _row_bytes(config)),
        ("max_num_batched_tokens", max_num_batched_tokens, "tokens", _token_bytes(config, dtype)),
    ):
        what = f"steps of {name}={count} {unit}"
        check_room(what, count, bytes_each, available, f"lower {name}")


def available_bytes(devices: Sequence[Any]) -> int:
    """Memory that is free now on the fullest of the devices; those of a CPU share the host's."""
    return _free_and_limit(devices)[0]


def plan_pages(
    config: ModelConfig,
    attention: Implementation,
    devices: Sequence[Any],
    *,
    dtype: jnp.dtype,
    page_size: int,
    max_model_len: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    utilization: float,
    claimed: bool,
    override: int | None,
    weight_bytes: int = 0,
    bank_bytes: int = 0,
    staging_bytes: int = 0,
) -> int:
    """Number of KV pages, once the bank is on the devices, each of which has its part of every
    page.

    On an accelerator: ``utilization`` of its memory (all that JAX has where it was ``claimed``, see
    :func:`jaxlora.engine.client.ask_for_client`), less what is in use (on the fullest), of which
    ``bank_bytes`` are this engine's bank, ``weight_bytes`` on each for weights that will be, what a
    step works with and ``staging_bytes`` for adapters on their way to a slot. On a CPU, whose
    memory is shared: 1 GiB, less if no step can use it or there is less. Raises ConfigError if one
    sequence of ``max_model_len`` would not fit, or there is no memory for the ``override``, or for
    the weights.
    """
    per_page = page_bytes(shard(config, len(devices)), attention, page_size, dtype)
    needed = -(-max_model_len // page_size)
    remedy = "or max_loras and max_lora_rank, or raise gpu_memory_utilization"
    free, limit = _free_and_limit(devices)
    room = free - weight_bytes
    on_cpu = devices[0].platform == "cpu"
    if on_cpu and room < 0:
        # An accelerator's plan, below, says so beside what else is in use there.
        raise ConfigError(
            f"the model's weights take {_mib(weight_bytes)} of memory, and {_mib(free)} are "
            "available: use a smaller model, or a dtype of fewer bytes (dtype='bfloat16')"
        )
    if override is not None:
        num_pages, how = override, "num_gpu_blocks_override"
    elif on_cpu:
        # A CPU allocates lazily but zeroes what it hands out: no more than all rows can fill.
        usual = min(_CPU_CACHE_BYTES // len(devices), room) // per_page
        num_pages = max(needed, min(usual, max_num_seqs * needed))
        how = (
            "the CPU default of 1 GiB" if usual >= needed else f"for max_model_len={max_model_len}"
        )
    elif limit is None:
        raise ConfigError(
            "JAX's allocator does not say how much memory there is (XLA_PYTHON_CLIENT_ALLOCATOR"
            "=platform), so num_gpu_blocks_override must: set it, or leave the allocator alone"
        )
    else:
        others = limit - free - bank_bytes
        reserve = _working_bytes(config, dtype, max_num_seqs, max_num_batched_tokens)
        whole = claimed and devices[0].platform == "gpu"
        usable = limit if whole else int(limit * utilization)
        own = weight_bytes + bank_bytes
        available = usable - own - others - reserve - staging_bytes
        num_pages = max(0, available // per_page)
        how = (
            f"{usable // _MIB} MiB by gpu_memory_utilization={utilization}"
            f"{'' if whole else f' of the {limit // _MIB} MiB that JAX has'}, less "
            f"{own // _MIB} MiB of this engine's weights and bank, {others // _MIB} MiB that this "
            f"process has in use besides, {staging_bytes // _MIB} MiB for adapters on their way to "
            f"the bank and {reserve // _MIB} MiB of working memory"
        )
        if others >= _MIB:
            remedy += (
                ", or free what this process has in use besides (another LLM has its own until "
                "nothing refers to it)"
            )
    if num_pages < needed:
        if override is not None:
            remedy = f"or raise num_gpu_blocks_override to {needed}"
        raise ConfigError(
            f"{num_pages} KV pages of {page_size} tokens ({how}) cannot hold one sequence of "
            f"max_model_len={max_model_len}: lower max_model_len, {remedy}"
        )
    what = f"{num_pages} KV pages of {page_size} tokens ({how})"
    remedy = "lower max_model_len or block_size"
    if override is not None:
        remedy = "lower num_gpu_blocks_override, or leave it out"
    check_room(what, num_pages, per_page, room, remedy)
    logger.info(
        "KV cache: %d pages of %d tokens, %d tokens in all, %d MiB (%s)",
        num_pages,
        page_size,
        num_pages * page_size,
        num_pages * per_page // _MIB,
        how,
    )
    return num_pages


def _working_bytes(
    config: ModelConfig, dtype: jnp.dtype, max_num_seqs: int, max_num_batched_tokens: int
) -> int:
    """A step's, and what sampling keeps for a row that is none."""
    tokens = max_num_batched_tokens * _token_bytes(config, dtype)
    rows = max_num_seqs * _row_bytes(config)
    return tokens + rows + state_bytes(0, config.vocab_size) + 256 * _MIB


def _token_bytes(config: ModelConfig, dtype: jnp.dtype) -> int:
    """A step's largest activations (gated MLP in and out, in float32 too), twice."""
    widest = 2 * config.intermediate_size + config.q_size + 2 * config.kv_size
    return 2 * widest * (jnp.dtype(dtype).itemsize + 4)


def _row_bytes(config: ModelConfig) -> int:
    """Three times its logits, twice, and what sampling keeps."""
    return 2 * 3 * config.vocab_size * 4 + state_bytes(0, config.vocab_size)


def _free_and_limit(devices: Sequence[Any]) -> tuple[int, int | None]:
    """:func:`available_bytes`, and what JAX has there in all, None where it does not say."""
    if devices[0].platform == "cpu":
        return _host_bytes() // len(devices), None
    every = [device.memory_stats() for device in devices]
    # XLA's "platform" allocator keeps no account.
    if None in every:
        return sys.maxsize, None
    return min((each["bytes_limit"] - each["bytes_in_use"], each["bytes_limit"]) for each in every)


def _host_bytes() -> int:
    """Memory of this machine that can be had without swapping, or of the container's share of it
    what is left."""
    # Another system, no container, or one without a limit.
    nothing_said = contextlib.suppress(OSError, ValueError, KeyError)
    found = []
    with nothing_said:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    for folder, limit, usage, cache in _GROUPS:
        with nothing_said:
            stat = dict(
                line.split() for line in Path(folder, "memory.stat").read_text().splitlines()
            )
            used = int(Path(folder, usage).read_text()) - int(stat[cache])
            found.append(int(Path(folder, limit).read_text()) - used)
    return min(found, default=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def _mib(num_bytes: int) -> str:
    return f"{num_bytes // _MIB:,} MiB"
