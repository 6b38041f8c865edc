"""What commands have in common: the engine's options as flags, adapters as arguments."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from jaxlora.engine_args import EngineArgs
from jaxlora.types import LoRARequest

if TYPE_CHECKING:
    # Only type checkers can subscript it.
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


class UsageError(Exception):
    """A flag that cannot be honoured."""


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds the model, and every option of EngineArgs as a flag."""
    parser.add_argument("model", help="a directory, a .gguf file or a hub id")
    for name, how in _ENGINE_FLAGS.items():
        flags = [f"--{name.replace('_', '-')}"]
        flags += ["-tp"] if name == "tensor_parallel_size" else []
        parser.add_argument(*flags, dest=name, **{"default": getattr(EngineArgs, name)} | how)


def engine_args(args: argparse.Namespace) -> EngineArgs:
    """The engine's options among the arguments. Raises ConfigError."""
    fields = {name: getattr(args, name) for name in _ENGINE_FLAGS}
    return EngineArgs(model=args.model, **fields)


def add_lora_modules(parser: argparse.ArgumentParser) -> None:
    """Adds --lora-modules."""
    parser.add_argument(
        "--lora-modules",
        nargs="+",
        action="extend",
        metavar="NAME=PATH",
        help='adapters to start with; also as JSON {"name", "path", "base_model_name"}',
    )


def lora_modules(args: argparse.Namespace) -> tuple[LoRARequest, ...]:
    """The adapters among the arguments. Raises UsageError."""
    if args.lora_modules and not args.enable_lora:
        raise UsageError("--lora-modules needs --enable-lora")
    requests = tuple(_lora_module(text) for text in args.lora_modules or ())
    names = [request.lora_name for request in requests]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"--lora-modules has two adapters of the name {name!r}")
    return requests


def _lora_module(text: str) -> LoRARequest:
    """``name=path``, or JSON with name, path and maybe base_model_name."""
    try:
        if text.lstrip().startswith("{"):
            fields = json.loads(text)
            base = fields.get("base_model_name")
            return LoRARequest(fields["name"], None, fields["path"], base_model_name=base)
        name, separator, path = text.partition("=")
        if not (name and separator and path):
            raise ValueError("it must be NAME=PATH")
        return LoRARequest(name, None, path)
    except KeyError as error:
        raise UsageError(f"--lora-modules {text!r} has no {error}") from error
    except ValueError as error:
        raise UsageError(f"--lora-modules {text!r} cannot be read: {error}") from error


def _tokens(text: str) -> int:
    """A number, in thousands with a k and in units of 1024 with a K, as vLLM takes it."""
    unit = {"k": 1000, "K": 1024}.get(text[-1:], 1)
    try:
        return int(text) if unit == 1 else round(float(text[:-1]) * unit)
    except (ValueError, OverflowError):
        message = f"{text!r} must be a number of tokens, such as 32768, 32k or 32K"
        raise argparse.ArgumentTypeError(message) from None


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} must be a JSON object")
    return value


_ENGINE_FLAGS: dict[str, dict[str, Any]] = {
    "tokenizer": {"help": "take the tokenizer from here instead of from the model"},
    "dtype": {"help": "float32, float16, bfloat16, or auto: the checkpoint's, on a CPU float32"},
    "max_model_len": {
        "type": _tokens,
        "help": "most tokens of a sequence, prompt included, also as 32k, 32K "
        "(the model's own limit)",
    },
    "max_num_seqs": {"type": int, "help": "most sequences in a step (256, on a CPU 16)"},
    "max_num_batched_tokens": {
        "type": _tokens,
        "help": "most tokens in a step (2048, on a CPU 256)",
    },
    "gpu_memory_utilization": {
        "type": float,
        "default": 0.9,
        "help": "share of the accelerator's memory to use (%(default)s)",
    },
    "tensor_parallel_size": {"type": int, "help": "devices that share the model"},
    "seed": {"type": int, "help": "seed of requests that bring none (%(default)s)"},
    "hf_overrides": {
        "type": _json_object,
        "metavar": "JSON",
        "help": "keys of config.json and what to put in their place",
    },
    "load_format": {"help": "auto, safetensors, gguf, or dummy for random weights"},
    "generation_config": {
        "help": "default sampling parameters: auto, the model's; vllm, none; or a folder with them"
    },
    "revision": {"help": "branch, tag or commit of a hub repository"},
    "download_dir": {"help": "where hub downloads are kept"},
    "block_size": {
        "type": int,
        "help": "tokens in a page of the KV cache (16, on a TPU up to 256)",
    },
    "num_gpu_blocks_override": {
        "type": int,
        "help": "pages of the KV cache, instead of what memory allows",
    },
    "enable_prefix_caching": {
        "action": argparse.BooleanOptionalAction,
        "help": "share the pages of prompts that begin alike (on)",
    },
    "enable_lora": {"action": "store_true", "help": "serve LoRA adapters"},
    "max_loras": {"type": int, "help": "adapters on the device at once (%(default)s)"},
    "max_cpu_loras": {"type": int, "help": "adapters kept in host memory (no limit)"},
    "max_cpu_lora_gb": {"type": float, "help": "host memory for adapters (a quarter of it)"},
    "lora_slot_timeout": {
        "type": float,
        "help": "seconds to wait for a slot while none changes hands, or inf (%(default)s)",
    },
    "max_lora_rank": {"type": int, "help": "largest rank an adapter may have (%(default)s)"},
    "lora_dtype": {"help": "auto: the model's"},
    "lora_target_modules": {
        "nargs": "+",
        "help": "linears adapters may change, q_proj ... down_proj (all)",
    },
    "lora_extras": {
        "nargs": "+",
        "help": "what else adapters may bring: dora, bias, embed_tokens, ... (docs/adapters.md)",
    },
    "max_logprobs": {
        "type": int,
        "help": "most alternatives to a token that are told, -1 for all (%(default)s)",
    },
    "stream_interval": {
        "type": int,
        "help": "tokens of each piece of a stream: more cost less, and come later (%(default)s)",
    },
    "compilation_cache_dir": {"help": "where compiled programs are kept (the user's cache folder)"},
}
"""EngineArgs' fields that are flags, and how they are read; as a rule a default is the field's."""
