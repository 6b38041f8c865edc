"""From options to what an engine has for adapters."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxlora.adapters.adapter import Adapter
from jaxlora.adapters.bank import AdapterBank
from jaxlora.adapters.base_weights import BaseWeights
from jaxlora.adapters.host_blocks import AdapterMemory, Allocate, choose_memory
from jaxlora.adapters.host_cache import HostCache, default_max_bytes
from jaxlora.adapters.peft import adapter_from_tensors, load_adapter
from jaxlora.adapters.peft_layout import Limits
from jaxlora.adapters.registry import AdapterRegistry
from jaxlora.adapters.sources import fingerprint, read_unchanged, resolve
from jaxlora.adapters.staging import StagingArea
from jaxlora.config import ModelConfig
from jaxlora.engine.memory import available_bytes, check_room
from jaxlora.engine_args import EngineArgs
from jaxlora.errors import AdapterNotFoundError, ConfigError
from jaxlora.models.lora import MODULES, groups
from jaxlora.parallel import Devices, ShapesOnly, shard
from jaxlora.tokenizer import Tokenizer
from jaxlora.types import LoRARequest
from kernels_pallas.dispatch import choose_lora_matmul, choose_slot_write, kind_of

logger = logging.getLogger(__name__)


def build_adapters(
    args: EngineArgs,
    config: ModelConfig,
    dtype: np.dtype[Any],
    devices: Devices,
    shapes: nnx.State[Any, Any],
    tokenizer: Tokenizer | None,
) -> tuple[AdapterBank, AdapterRegistry, BaseWeights | None, AdapterMemory]:
    """The slots, who is in them, what adapters must know of the base, whose weights may be
    ``shapes`` yet, and their memory, part of which a thread still makes ready. Raises ConfigError
    naming what cannot be honoured."""
    if args.lora_dtype not in ("auto", dtype.name):
        raise ConfigError(
            f"lora_dtype={args.lora_dtype!r} differs from the model's dtype {dtype.name}, which is "
            "not served; use auto"
        )
    modules = _modules(args)
    device = devices.all[0]
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
    make = partial(
        AdapterBank,
        config,
        kernel=kernel,
        writer=writer,
        max_rank=args.max_lora_rank,
        dtype=dtype,
        modules=modules,
        extras=args.lora_extras,
    )
    one_slot = make(ShapesOnly(devices.mesh), num_slots=1)
    memory = choose_memory(
        device,
        max_bytes=max_bytes,
        max_adapters=args.max_cpu_loras,
        adapter_bytes=one_slot.packed_bytes,
    )
    bank = _bank(args, devices, one_slot.num_bytes, partial(make, allocate=memory.take))
    base = None
    if args.lora_extras:
        names = {"embed_tokens": "embed", "lm_head": "lm_head"}
        outside = [names[extra] for extra in args.lora_extras if extra in names]
        base = BaseWeights(
            config,
            devices,
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
        bank.reserved_bytes / (1 << 20),
    )

    host = HostCache(max_adapters=args.max_cpu_loras, max_bytes=max_bytes)
    logger.info("adapters in host memory: %s; it is %s", host.limits(), memory.kind)

    load = _loader(
        args,
        config,
        Limits(args.max_lora_rank, modules, tuple(args.lora_extras), dtype.name),
        allocate=memory.take,
        base=base,
        tokenizer=tokenizer,
        max_bytes=max_bytes,
    )
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
    return bank, registry, base, memory


def _modules(args: EngineArgs) -> tuple[str, ...]:
    """Modules that adapters may change, in our names."""
    names, known = args.lora_target_modules, ", ".join(f"{name}_proj" for name in MODULES)
    if names is None:
        return MODULES
    modules = {name: name.removesuffix("_proj") for name in names}
    unknown = sorted(name for name, module in modules.items() if module not in MODULES)
    if unknown:
        raise ConfigError(f"lora_target_modules has {unknown}; known: {known}")
    if not modules and not args.lora_extras:
        raise ConfigError(
            f"lora_target_modules={names!r} leaves adapters nothing to change: name some of "
            f"{known}, or lora_extras"
        )
    return tuple(modules.values())


def _bank(
    args: EngineArgs, devices: Devices, slot_bytes: int, make: Callable[..., AdapterBank]
) -> AdapterBank:
    """The bank, if there is room for it."""
    slots = f"max_loras={args.max_loras} slots of max_lora_rank={args.max_lora_rank}"
    remedy = "lower either, or name fewer lora_target_modules or lora_extras"
    available = available_bytes(devices.all)
    check_room(slots, args.max_loras, slot_bytes, available, remedy)
    try:
        return make(devices, num_slots=args.max_loras)
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(
            f"{slots} have no room on the device: {remedy}, or raise gpu_memory_utilization "
            f"({error})"
        ) from error


def _loader(
    args: EngineArgs,
    config: ModelConfig,
    limits: Limits,
    *,
    allocate: Allocate,
    base: BaseWeights | None,
    tokenizer: Tokenizer | None,
    max_bytes: int,
) -> Callable[[LoRARequest], Adapter]:
    """What reads an adapter, from wherever a request says it is."""
    token_of = None if tokenizer is None else tokenizer.token

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
                f"No adapter found for {name!r}: the request has no lora_path, and no adapter of "
                "that name was read from one"
            )
        else:
            folder = resolve(request.lora_path, download_dir=args.download_dir, max_bytes=max_bytes)
            # A link may lead elsewhere when it is read again.
            folder = folder.resolve()
            adapter, state = read_unchanged(
                request.lora_path,
                folder,
                lambda: load_adapter(
                    name, folder, config, token_of=token_of, max_bytes=max_bytes, **how
                ),
            )
            adapter = dataclasses.replace(adapter, fingerprint=state, folder=str(folder))
        return adapter if base is None else base.with_gains(adapter)

    return load
