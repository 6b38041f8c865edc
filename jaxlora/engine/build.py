"""From options to an engine's parts: what a start does, in order."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxlora.config import ModelConfig, overridden, token_ids
from jaxlora.engine.buckets import tokens_for_weights
from jaxlora.engine.build_adapters import build_adapters
from jaxlora.engine.client import ask_for_client
from jaxlora.engine.generation_defaults import generation_defaults
from jaxlora.engine.grammars import Grammars
from jaxlora.engine.intake import Intake
from jaxlora.engine.loading import WeightLoading
from jaxlora.engine.memory import check_step, plan_pages
from jaxlora.engine.pages import PagePool
from jaxlora.engine.parts import EngineParts
from jaxlora.engine.programs import use_compilation_cache
from jaxlora.engine.runner import Runner
from jaxlora.engine.scheduler import Scheduler
from jaxlora.engine.start_report import StartReport
from jaxlora.engine_args import EngineArgs
from jaxlora.errors import ConfigError
from jaxlora.models.cache import make_cache
from jaxlora.models.checkpoints import Checkpoint, open_checkpoint
from jaxlora.models.lora import groups
from jaxlora.models.weights import weight_shapes
from jaxlora.parallel import Devices, ShapesOnly, bytes_on_each, shard
from jaxlora.tokenizer import Tokenizer, load_tokenizer
from kernels_pallas.dispatch import (
    choose_lora_linear,
    choose_paged_attention,
    default_dtype,
    default_page_size,
    kind_of,
)

logger = logging.getLogger(__name__)


def build(args: EngineArgs, *, use_tqdm: bool) -> EngineParts:
    """Loads model and tokenizer, plans memory, makes bank and cache, and compiles everything a step
    can need. Raises ConfigError or ModelLoadError naming what cannot be honoured."""
    report = StartReport()
    use_compilation_cache(args.compilation_cache_dir)
    checkpoint = open_checkpoint(
        args.model,
        revision=args.revision,
        download_dir=args.download_dir,
        load_format=args.load_format,
    )
    config = ModelConfig.from_hf(overridden(checkpoint.hf_config(), args.hf_overrides or {}))
    tokenizer = None if args.skip_tokenizer_init else _tokenizer(args, checkpoint)
    generation_config = checkpoint.generation_config()
    eos = _eos_token_ids(config, generation_config, tokenizer)
    defaults = generation_defaults(args.generation_config, generation_config)
    report.note("checkpoint and tokenizer")
    claimed = ask_for_client(args.gpu_memory_utilization, num_devices=args.tensor_parallel_size)
    devices = Devices.first(args.tensor_parallel_size)
    device = devices.all[0]
    report.note("devices")
    dtype = _dtype(args.dtype, config, device)
    max_model_len = _max_model_len(args, config)
    config = _within_window(config, max_model_len)
    local = shard(config, devices.count)
    max_num_seqs, max_tokens = _step_limits(args, config, dtype, devices)
    graph, shapes = weight_shapes(config, dtype, devices)

    bank, registry, base, memory = None, None, None, None
    if args.enable_lora:
        bank, registry, base, memory = build_adapters(
            args, config, dtype, devices, shapes, tokenizer
        )
    elif args.lora_extras:
        raise ConfigError(f"lora_extras={list(args.lora_extras)} needs enable_lora=True")
    page_size = args.block_size or default_page_size(device.platform, max_model_len)
    kind = kind_of(device)
    attention, reason = choose_paged_attention(
        kind,
        dtype,
        num_heads=local.num_heads,
        num_kv_heads=local.num_kv_heads,
        head_dim=local.head_dim,
        page_size=page_size,
        sliding_window=config.sliding_window,
    )
    logger.info("paged attention: %s (%s)", attention.name, reason)
    num_pages = plan_pages(
        config,
        attention,
        devices.all,
        dtype=dtype,
        page_size=page_size,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_tokens,
        utilization=args.gpu_memory_utilization,
        claimed=claimed,
        override=args.num_gpu_blocks_override,
        weight_bytes=bytes_on_each(shapes),
        bank_bytes=0 if bank is None else bank.num_bytes,
        staging_bytes=0 if bank is None else bank.reserved_bytes,
    )
    cache_on = partial(
        make_cache, local, attention, num_pages=num_pages, page_size=page_size, dtype=dtype
    )
    pool = PagePool(num_pages, page_size)
    linear, reason = choose_lora_linear(
        kind,
        dtype,
        shapes=[(g.d_in, g.splits, g.gated) for g in groups(local)],
        num_slots=0 if bank is None else bank.num_slots,
        rank=0 if bank is None else bank.max_rank,
        device_kind=device.device_kind,
    )
    logger.info("linears in one piece: %s (%s)", "XLA" if linear is None else linear.name, reason)
    runner = Runner(
        config,
        (graph, shapes),
        cache_on(ShapesOnly(devices.mesh)),
        devices=devices,
        bank=bank,
        attention=attention,
        linear=linear,
        base=base,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_tokens,
        pages_per_row=pool.pages_for(max_model_len),
        max_logprobs=args.max_logprobs,
    )
    report.note("adapter slots")
    with WeightLoading(
        args,
        config,
        checkpoint,
        dtype,
        devices,
        use_tqdm=use_tqdm,
        # Pinning holds up whoever uses the device, be it to time kernels or to serve.
        wait=(lambda: None) if memory is None else memory.wait,
    ) as loading:
        report.programs = runner.compile(use_tqdm=use_tqdm, after=loading.weights)
        report.note("programs")
        _, state = loading.weights.result()
        report.note("waiting for weights")
        report.weight_seconds = loading.seconds
    if base is not None:
        base.use_weights(state)
    # The cache takes what loading and compiling have left.
    runner.use_arrays(state, cache_on(devices))
    report.note("KV cache")
    grammars = (
        None
        if tokenizer is None
        else Grammars.of(tokenizer, vocab_size=config.vocab_size, eos_token_ids=eos)
    )
    report.note("grammars")
    logger.info("%s", report)
    scheduler = Scheduler(
        pool=pool,
        registry=registry,
        max_num_seqs=max_num_seqs,
        step_sizes=runner.token_buckets,
        tokens_for_weights=tokens_for_weights(device.platform),
        max_scored_step=runner.max_scored_step,
        enable_prefix_caching=args.enable_prefix_caching,
    )
    return EngineParts(
        runner=runner,
        scheduler=scheduler,
        registry=registry,
        intake=Intake(
            tokenizer=tokenizer,
            grammars=grammars,
            vocab_size=config.vocab_size,
            max_model_len=max_model_len,
            eos_token_ids=eos,
            seed=args.seed,
            max_logprobs=args.max_logprobs,
            stream_interval=args.stream_interval,
        ),
        generation_defaults=defaults,
        lora_slot_timeout=args.lora_slot_timeout,
        start_report=report,
    )


def _tokenizer(args: EngineArgs, checkpoint: Checkpoint) -> Tokenizer:
    return load_tokenizer(
        args.tokenizer or checkpoint,
        # It names a state of the model's repository, not of another tokenizer's.
        revision=None if args.tokenizer else args.revision,
        download_dir=args.download_dir,
    )


def _eos_token_ids(
    config: ModelConfig, generation_config: Mapping[str, Any], tokenizer: Tokenizer | None
) -> frozenset[int]:
    """What ends a sequence by any of the model's files, and by the tokenizer."""
    given = {
        *config.eos_token_ids,
        *token_ids(generation_config, "eos_token_id", "generation_config.json"),
    }
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        given.add(tokenizer.eos_token_id)
    known = frozenset(i for i in given if 0 <= i < config.vocab_size)
    if known != given:
        logger.warning(
            "eos_token_id: %s left out, as the model has a vocabulary of %d ids",
            sorted(given - known),
            config.vocab_size,
        )
    return known


def _step_limits(
    args: EngineArgs, config: ModelConfig, dtype: np.dtype[Any], devices: Devices
) -> tuple[int, int]:
    """Most sequences and most tokens of a step."""
    on_cpu = devices.platform == "cpu"
    max_num_seqs = args.max_num_seqs or (16 if on_cpu else 256)
    max_tokens = args.max_num_batched_tokens or (256 if on_cpu else 2048)
    if max_tokens < max_num_seqs:
        raise ConfigError(
            f"max_num_batched_tokens={max_tokens} is less than max_num_seqs={max_num_seqs}: a step "
            "must hold a token of every running sequence"
        )
    check_step(
        config,
        dtype,
        devices.all,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_tokens,
    )
    return max_num_seqs, max_tokens


def _dtype(name: str, config: ModelConfig, device: Any) -> np.dtype[Any]:
    if name == "auto":
        name, reason = default_dtype(device, config.dtype)
        logger.info("dtype: %s (%s)", name, reason)
    return jnp.dtype(name)


def _max_model_len(args: EngineArgs, config: ModelConfig) -> int:
    limit = config.max_position_embeddings
    if args.max_model_len is not None and args.max_model_len > limit:
        raise ConfigError(
            f"max_model_len={args.max_model_len} is more than the model's "
            f"max_position_embeddings={limit}"
        )
    return args.max_model_len or limit


def _within_window(config: ModelConfig, max_model_len: int) -> ModelConfig:
    """Without a sliding window that hides nothing: not every kernel of attention has them, and
    none can leave it out in some layers."""
    window = config.sliding_window
    if window is not None and window >= max_model_len:
        logger.info("sliding window of %d: none, as max_model_len=%d", window, max_model_len)
        return dataclasses.replace(config, sliding_window=None, sees_past_window=False)
    if config.sees_past_window:
        raise ConfigError(
            f"sliding_window={window} on some layers only (layer_types, max_window_layers) is not "
            f"served for contexts of max_model_len={max_model_len}, but for those of up to {window}"
        )
    return config
