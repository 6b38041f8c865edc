"""How many KV pages fit: what the device has, less weights, bank and working memory."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax._src import xla_bridge  # nothing public says whether JAX has started

from jaxlora.config import ModelConfig
from jaxlora.engine.row_state import state_bytes
from jaxlora.errors import ConfigError
from jaxlora.models.cache import page_bytes
from jaxlora.parallel import shard
from kernels_pallas.paged_attention.op import Implementation

logger = logging.getLogger(__name__)

_CPU_CACHE_BYTES = 1 << 30
_MIB = 1 << 20


def claim_memory(utilization: float) -> bool:
    """Has JAX take this part of a GPU's memory when it starts, instead of the 75% that are its
    default; False if it has started already and keeps what it has."""
    if xla_bridge.backends_are_initialized():
        return False
    if any(importlib.util.find_spec(f"jax_cuda{major}_plugin") for major in (12, 13)):
        jax.config.update("jax_pjrt_client_create_options", {"memory_fraction": utilization})
    return True


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
    :func:`claim_memory`), less what is in use (on the fullest), of which ``bank_bytes`` are this
    engine's bank, ``weight_bytes`` on each for weights that will be, what a step works with and
    ``staging_bytes`` for adapters on their way to a slot. On a CPU, whose memory is shared: 1 GiB,
    less if no step can use it. Raises ConfigError if one sequence of ``max_model_len`` would not
    fit.
    """
    per_page = page_bytes(shard(config, len(devices)), attention, page_size, dtype)
    needed = -(-max_model_len // page_size)
    remedy = "or max_loras and max_lora_rank, or raise gpu_memory_utilization"
    if override is not None:
        num_pages, how = override, "num_gpu_blocks_override"
    elif devices[0].platform == "cpu":
        # A CPU allocates lazily but zeroes what it hands out: no more than all rows can fill.
        num_pages = max(
            needed, min(_CPU_CACHE_BYTES // (len(devices) * per_page), max_num_seqs * needed)
        )
        how = "the CPU default of 1 GiB"
    else:
        every = [device.memory_stats() for device in devices]
        fullest = min(every, key=lambda stats: stats["bytes_limit"] - stats["bytes_in_use"])
        limit, others = fullest["bytes_limit"], fullest["bytes_in_use"] - bank_bytes
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
    """A step's largest activations (gated MLP in and out, in float32 too) and its logits, twice,
    and what sampling keeps."""
    widest = 2 * config.intermediate_size + config.q_size + 2 * config.kv_size
    activations = max_num_batched_tokens * widest * (jnp.dtype(dtype).itemsize + 4)
    logits = max_num_seqs * config.vocab_size * 4
    state = state_bytes(max_num_seqs, config.vocab_size)
    return 2 * (activations + 3 * logits) + state + 256 * _MIB
