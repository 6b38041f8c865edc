"""From options to an engine's parts: what a start does, in order."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxlora.adapters.adapter import Adapter
from jaxlora.adapters.bank import AdapterBank
from jaxlora.adapters.base_weights import BaseWeights
from jaxlora.adapters.host_blocks import choose_memory
from jaxlora.adapters.host_cache import HostCache, default_max_bytes
from jaxlora.adapters.peft import adapter_from_tensors, load_adapter
from jaxlora.adapters.peft_layout import Limits
from jaxlora.adapters.registry import AdapterRegistry
from jaxlora.adapters.sources import fingerprint, read_unchanged, resolve
from jaxlora.adapters.staging import StagingArea
from jaxlora.config import ModelConfig
from jaxlora.engine.buckets import tokens_for_weights
from jaxlora.engine.generation_defaults import generation_defaults
from jaxlora.engine.grammars import Grammars
from jaxlora.engine.intake import Intake
from jaxlora.engine.loading import WeightLoading
from jaxlora.engine.memory import (
    available_bytes,
    check_room,
    check_step,
    claim_memory,
    plan_pages,
)
from jaxlora.engine.pages import PagePool
from jaxlora.engine.parts import EngineParts
from jaxlora.engine.programs import use_compilation_cache
from jaxlora.engine.runner import Runner
from jaxlora.engine.scheduler import Scheduler
from jaxlora.engine.start_report import StartReport
from jaxlora.engine_args import EngineArgs
from jaxlora.errors import AdapterNotFoundError, ConfigError
from jaxlora.models.cache import make_cache
from jaxlora.models.checkpoints import Checkpoint, open_checkpoint
from jaxlora.models.lora import MODULES, groups
from jaxlora.models.weights import weight_shapes
from jaxlora.parallel import Devices, ShapesOnly, bytes_on_each, shard
from jaxlora.tokenizer import Tokenizer, load_tokenizer
from jaxlora.types import LoRARequest
from kernels_pallas.dispatch import (
    choose_lora_linear,
    choose_lora_matmul,
    choose_paged_attention,
    choose_slot_write,
    default_dtype,
    default_page_size,
    kind_of,
)

logger = logging.getLogger(__name__)


def build(args: EngineArgs, *, use_tqdm: bool) -> EngineParts:
    """Loads model and tokenizer, plans memory, makes bank and cache, and compiles everything a step
    can need. Raises ConfigError or ModelLoadError naming what cannot be honoured."""
    if args.tensor_parallel_size > 1 and args.lora_extras:
        raise ConfigError(
            f"lora_extras={list(args.lora_extras)} is not served with "
            f"tensor_parallel_size={args.tensor_parallel_size}; use 1, or no extras"
        )
    report = StartReport()
    claimed = claim_memory(args.gpu_memory_utilization)
    use_compilation_cache(args.compilation_cache_dir)
    checkpoint = open_checkpoint(
        args.model,
        revision=args.revision,
        download_dir=args.download_dir,
        load_format=args.load_format,
    )
    config = ModelConfig.from_hf(checkpoint.hf_config())
    tokenizer = None if args.skip_tokenizer_init else _tokenizer(args, checkpoint)
    report.note("checkpoint and tokenizer")
    devices = Devices.first(args.tensor_parallel_size)
    device = devices.mesh.devices.flat[0]
    report.note("devices")
    dtype = _dtype(args.dtype, config, device)
    max_model_len = _max_model_len(args, config)
    config = _within_window(config, max_model_len)
    local = shard(config, devices.count)
    max_num_seqs, max_tokens = _step_limits(args, config, dtype, devices)
    graph, shapes = weight_shapes(config, dtype, devices)

    bank, registry, base = None, None, None
    if args.enable_lora:
        bank, registry, base = _adapter_parts(args, config, dtype, devices, shapes, tokenizer)
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
        devices.mesh.devices.tolist(),
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
        staging_bytes=0 if bank is None else bank.staging_bytes,
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
    with WeightLoading(args, config, checkpoint, dtype, devices, use_tqdm=use_tqdm) as loading:
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
    # The tokenizer's ids include those of the generation config.
    eos = {*config.eos_token_ids, *(tokenizer.eos_token_ids if tokenizer else ())}
    grammars = (
        None
        if tokenizer is None
        else Grammars.of(tokenizer, vocab_size=config.vocab_size, eos_token_ids=frozenset(eos))
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
            eos_token_ids=frozenset(eos),
            seed=args.seed,
            max_logprobs=args.max_logprobs,
        ),
        generation_defaults=generation_defaults(
            args.generation_config, checkpoint.generation_config()
        ),
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
        devices.mesh.devices.tolist(),
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
    """Without a sliding window that hides nothing: not every kernel of attention has them."""
    if config.sliding_window is None or config.sliding_window < max_model_len:
        return config
    logger.info(
        "sliding window of %d: none, as max_model_len=%d", config.sliding_window, max_model_len
    )
    return dataclasses.replace(config, sliding_window=None)


def _adapter_parts(
    args: EngineArgs,
    config: ModelConfig,
    dtype: np.dtype[Any],
    devices: Devices,
    shapes: nnx.State[Any, Any],
    tokenizer: Tokenizer | None,
) -> tuple[AdapterBank, AdapterRegistry, BaseWeights | None]:
    if args.lora_dtype not in ("auto", dtype.name):
        raise ConfigError(
            f"lora_dtype={args.lora_dtype!r} differs from the model's dtype {dtype.name}, which is "
            "not served; use auto"
        )
    modules: tuple[str, ...] = MODULES
    if args.lora_target_modules is not None:
        modules = tuple(name.removesuffix("_proj") for name in args.lora_target_modules)
        unknown = sorted(set(modules) - set(MODULES))
        if unknown:
            raise ConfigError(
                f"lora_target_modules has {unknown}; known: "
                f"{', '.join(name + '_proj' for name in MODULES)}"
            )
    device = devices.mesh.devices.flat[0]
    kernel, reason = choose_lora_matmul(kind_of(device), dtype, device_kind=device.device_kind)
    logger.info("LoRA matmul: %s (%s)", kernel.name, reason)
    writer, reason = choose_slot_write(
        kind_of(device),
        dtype,
        shapes=[(g.d_in, g.splits) for g in groups(shard(config, devices.count))],
    )
    logger.info("slot write: %s (%s)", writer.name, reason)
    max_bytes = default_max_bytes()
    if args.max_cpu_lora_gb is not None:
        max_bytes = int(min(args.max_cpu_lora_gb * (1 << 30), 1 << 60))
    allocate, kind = choose_memory(device, max_bytes)
    bank = _bank(
        args,
        devices,
        partial(
            AdapterBank,
            config,
            kernel=kernel,
            writer=writer,
            max_rank=args.max_lora_rank,
            dtype=dtype,
            modules=modules,
            extras=args.lora_extras,
            allocate=allocate,
        ),
    )
    base = None
    if args.lora_extras:
        names = {"embed_tokens": "embed", "lm_head": "lm_head"}
        outside = [names[extra] for extra in args.lora_extras if extra in names]
        base = BaseWeights(
            config,
            shapes,
            max_rank=bank.max_rank,
            dora_targets=(*modules, *outside) if "dora" in args.lora_extras else (),
        )
        if bank.extras is not None:
            bank.extras.use_base(base.matrix)
    logger.info(
        "adapter bank: %d slots of rank %d on %s, on each device %.1f MiB, and %.1f MiB for what "
        "is on its way",
        args.max_loras,
        args.max_lora_rank,
        ", ".join([*modules, *args.lora_extras]),
        bank.num_bytes / (1 << 20),
        bank.staging_bytes / (1 << 20),
    )

    host = HostCache(max_adapters=args.max_cpu_loras, max_bytes=max_bytes)
    logger.info("adapters in host memory: %s; it is %s", host.limits(), kind)

    token_of = None if tokenizer is None else tokenizer.token

    limits = Limits(args.max_lora_rank, modules, tuple(args.lora_extras), dtype.name)

    def load(request: LoRARequest) -> Adapter:
        how: dict[str, Any] = {
            "limits": limits,
            "is_base_copy": None if base is None else base.is_copy,
            "allocate": allocate,
        }
        name, given = request.lora_name, request.tensors
        if given is not None:
            adapter = adapter_from_tensors(name, given.tensors, given.config, config, **how)
        elif not request.lora_path:
            raise AdapterNotFoundError(
                f"No adapter found for {name!r}: it is not loaded, and has no lora_path"
            )
        else:
            folder = resolve(
                request.lora_path, download_dir=args.download_dir, max_bytes=host.max_bytes
            )
            adapter, state = read_unchanged(
                request.lora_path,
                folder,
                lambda: load_adapter(
                    name, folder, config, token_of=token_of, max_bytes=host.max_bytes, **how
                ),
            )
            adapter = dataclasses.replace(adapter, fingerprint=state, folder=str(folder))
        return adapter if base is None else base.with_gains(adapter)

    staging = StagingArea(
        bank.stage,
        size_of=bank.staged_bytes,
        threads=ThreadPoolExecutor(2, "jaxlora-staging"),
        max_bytes=bank.staging_bytes,
    )
    registry = AdapterRegistry(
        args.max_loras,
        load,
        staging=staging,
        host=host,
        fingerprint=lambda request: fingerprint(request.lora_path),
    )
    return bank, registry, base


def _bank(args: EngineArgs, devices: Devices, make: Callable[..., AdapterBank]) -> AdapterBank:
    """The bank, if there is room for it."""
    slots = f"max_loras={args.max_loras} slots of max_lora_rank={args.max_lora_rank}"
    remedy = "lower either, or name fewer lora_target_modules or lora_extras"
    one = make(ShapesOnly(devices.mesh), num_slots=1).num_bytes
    available = available_bytes(devices.mesh.devices.tolist())
    check_room(slots, args.max_loras, one, available, remedy)
    try:
        return make(devices, num_slots=args.max_loras)
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(
            f"{slots} have no room on the device: {remedy}, or raise gpu_memory_utilization "
            f"({error})"
        ) from error
