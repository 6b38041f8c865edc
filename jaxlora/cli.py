"""``jaxlora``: the command line. The only code that reads argv and the environment.

A command adds its parser in a function of its own and sets ``run``, which takes the parsed
arguments and returns the exit status. It imports what it needs when it runs: ``jaxlora --help`` is
quick.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlora.config import EngineArgs
from jaxlora.errors import JaxloraError
from jaxlora.types import MAX_LOGPROBS, LoRARequest

if TYPE_CHECKING:
    from jaxlora.server.options import ServerOptions

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


logger = logging.getLogger(__name__)

_NO_EFFECT = {
    "--enforce-eager": "everything is compiled",
    "--disable-log-requests": "prompts are never logged",
    "--trust-remote-code": "nothing remote is ever run",
}
_REFUSED = {
    "--enable-auto-tool-choice": "tool calls are not parsed: the text is returned as it is",
    "--tool-call-parser": "tool calls are not parsed: the text is returned as it is",
    "--reasoning-parser": "reasoning is not parsed: the text is returned as it is",
    "--quantization": "use the unquantized checkpoint, or a GGUF file",
}


class UsageError(Exception):
    """A flag that cannot be honoured."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the process's exit status."""
    args = _parser().parse_args(sys.argv[1:] if argv is None else argv)
    try:
        status: int = args.run(args)
    except (JaxloraError, UsageError, OSError) as error:
        print(f"jaxlora: {error}", file=sys.stderr)
        return 1
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="jaxlora", description="One model, many LoRA adapters.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_adapters(commands)
    _add_serve(commands)
    return parser


def _add_adapters(commands: Commands) -> None:
    parser = commands.add_parser("adapters", help="look at LoRA adapters")
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    inspect = actions.add_parser(
        "inspect",
        help="what an adapter holds, and whether it would be served",
        description="Prints rank, targets, size and norms of a PEFT adapter, and whether it would "
        "be served or why not. The exit status is 1 if it would be refused.",
    )
    inspect.add_argument("path", help="the adapter's folder, or its id on the hub")
    inspect.add_argument(
        "--model",
        help="the base model (folder, .gguf file or hub id): without it shapes are not checked",
    )
    inspect.set_defaults(run=_inspect)


def _inspect(args: argparse.Namespace) -> int:
    from jaxlora.adapters.inspection import inspect_adapter
    from jaxlora.adapters.sources import resolve
    from jaxlora.models.checkpoints import open_checkpoint

    base = open_checkpoint(args.model) if args.model else None
    found = inspect_adapter(resolve(args.path), base)
    print(found)
    return 1 if found.refusals else 0


def _add_serve(commands: Commands) -> None:
    parser = commands.add_parser("serve", help="serve a model and its adapters over HTTP")
    _add_serve_flags(parser)
    parser.set_defaults(run=_serve)


def _serve(args: argparse.Namespace) -> int:
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level="INFO")
    options = serve_options(args, os.environ)
    # Not before: the web framework is an extra that other commands do without.
    from jaxlora.server.run import serve

    return serve(options)


def serve_options(args: argparse.Namespace, environ: Mapping[str, str]) -> ServerOptions:
    """Flags and environment as options. Raises UsageError, ConfigError."""
    try:
        from jaxlora.server.options import ServerOptions
    except ImportError as error:
        raise UsageError(
            f"the server needs more: pip install 'jaxlora[serve]' ({error})"
        ) from error
    for flag, reason in _REFUSED.items():
        if getattr(args, _name(flag)):
            raise UsageError(f"{flag} is not served: {reason}")
    for flag, reason in _NO_EFFECT.items():
        if getattr(args, _name(flag)):
            logger.warning("%s has no effect: %s", flag, reason)
    if args.lora_modules and not args.enable_lora:
        raise UsageError("--lora-modules needs --enable-lora")
    updating = ("JAXLORA_ALLOW_RUNTIME_LORA_UPDATING", "VLLM_ALLOW_RUNTIME_LORA_UPDATING")
    resolver_dir = args.lora_resolver_dir or environ.get("VLLM_LORA_RESOLVER_CACHE_DIR")
    api_keys = args.api_key or [key for key in [environ.get("JAXLORA_API_KEY")] if key]
    engine_fields = {name: getattr(args, name) for name in _ENGINE_FLAGS}
    return ServerOptions(
        engine_args=EngineArgs(model=args.model, **engine_fields),
        host=args.host,
        port=args.port,
        served_model_names=tuple(args.served_model_name or ()),
        lora_modules=tuple(_lora_module(text) for text in args.lora_modules or ()),
        chat_template=_chat_template(args.chat_template),
        api_keys=tuple(api_keys),
        admin_api_key=args.admin_api_key,
        allow_runtime_lora_updating=args.enable_lora
        and any(environ.get(name, "").lower() in ("1", "true") for name in updating),
        allowed_lora_paths=tuple(map(Path, args.allowed_lora_path or ())),
        allowed_lora_repos=tuple(args.allowed_lora_repo or ()),
        lora_resolver_dir=Path(resolver_dir) if resolver_dir else None,
        lora_resolver_repos=tuple(args.lora_resolver_repo or ()),
        strict_client_errors=args.strict_client_errors,
        max_logprobs=args.max_logprobs,
        return_tokens_as_token_ids=args.return_tokens_as_token_ids,
        max_request_bytes=args.max_request_bytes,
        max_prompts=args.max_prompts,
        max_queued_requests=args.max_queued_requests,
        allowed_origins=_origins(args.allowed_origins),
        root_path=args.root_path,
        ssl_keyfile=args.ssl_keyfile,
        ssl_certfile=args.ssl_certfile,
        uvicorn_log_level=args.uvicorn_log_level,
        shutdown_timeout=args.shutdown_timeout,
    )


_ENGINE_FLAGS: dict[str, dict[str, Any]] = {
    "tokenizer": {"help": "take the tokenizer from here instead of from the model"},
    "dtype": {
        "default": "auto",
        "help": "float32, float16, bfloat16, or auto: the checkpoint's, on a CPU float32",
    },
    "max_model_len": {
        "type": int,
        "help": "most tokens of a sequence, prompt included (the model's own limit)",
    },
    "max_num_seqs": {"type": int, "help": "most sequences in a step (256, on a CPU 16)"},
    "max_num_batched_tokens": {"type": int, "help": "most tokens in a step (2048, on a CPU 256)"},
    "gpu_memory_utilization": {
        "type": float,
        "default": 0.9,
        "help": "share of the accelerator's memory to use (%(default)s)",
    },
    "tensor_parallel_size": {"type": int, "default": 1, "help": "only 1 is served so far"},
    "seed": {"type": int, "default": 0, "help": "seed of requests that bring none (%(default)s)"},
    "load_format": {
        "default": "auto",
        "help": "auto, safetensors, gguf, or dummy for random weights",
    },
    "revision": {"help": "branch, tag or commit of a hub repository"},
    "download_dir": {"help": "where hub downloads are kept"},
    "block_size": {
        "type": int,
        "default": 16,
        "help": "tokens in a page of the KV cache (%(default)s)",
    },
    "num_gpu_blocks_override": {
        "type": int,
        "help": "pages of the KV cache, instead of what memory allows",
    },
    "enable_prefix_caching": {
        "action": argparse.BooleanOptionalAction,
        "default": True,
        "help": "share the pages of prompts that begin alike (on)",
    },
    "enable_lora": {"action": "store_true", "help": "serve LoRA adapters"},
    "max_loras": {
        "type": int,
        "default": 8,
        "help": "adapters on the device at once (%(default)s)",
    },
    "max_cpu_loras": {"type": int, "help": "adapters kept in host memory (no limit)"},
    "max_cpu_lora_gb": {"type": float, "help": "host memory for adapters (a quarter of it)"},
    "max_lora_rank": {
        "type": int,
        "default": 16,
        "help": "largest rank an adapter may have (%(default)s)",
    },
    "lora_dtype": {"default": "auto", "help": "auto: the model's"},
    "lora_target_modules": {
        "nargs": "+",
        "help": "linears adapters may change, q_proj ... down_proj (all)",
    },
    "lora_extras": {
        "nargs": "+",
        "default": (),
        "help": "what else adapters may bring: dora, bias, embed_tokens, ... (docs/adapters.md)",
    },
    "compilation_cache_dir": {
        "default": "auto",
        "help": "where compiled programs are kept (the user's cache folder)",
    },
}
"""EngineArgs' fields that are flags, and how they are read."""


def _add_serve_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", help="a directory, a .gguf file or a hub id")
    for name, how in _ENGINE_FLAGS.items():
        flags = [f"--{name.replace('_', '-')}"]
        flags += ["-tp"] if name == "tensor_parallel_size" else []
        add(*flags, dest=name, **how)
    add("--host")
    add("--port", type=int, default=8000)
    add("--served-model-name", nargs="+", metavar="NAME")
    add(
        "--lora-modules",
        nargs="+",
        metavar="NAME=PATH",
        help='adapters to start with; also as JSON {"name", "path", "base_model_name"}',
    )
    add("--chat-template", help="a Jinja file, or the template itself")
    add("--api-key", action="append", help="guards /v1; may be repeated")
    add("--admin-api-key", help="guards loading and unloading adapters alone")
    add("--allowed-lora-path", action="append", metavar="DIR")
    add("--allowed-lora-repo", action="append", metavar="GLOB")
    add("--lora-resolver-dir", metavar="DIR", help="adapters here are loaded when asked for")
    add("--lora-resolver-repo", action="append", metavar="GLOB")
    add("--strict-client-errors", action="store_true")
    add("--max-logprobs", type=int, default=MAX_LOGPROBS)
    add("--return-tokens-as-token-ids", action="store_true")
    add("--max-request-bytes", type=int, default=16 << 20)
    add("--max-prompts", type=int, default=256)
    add("--max-queued-requests", type=int, default=1024)
    add("--allowed-origins", default='["*"]', help="a JSON list, for CORS")
    add("--root-path", default="")
    add("--ssl-keyfile")
    add("--ssl-certfile")
    add("--uvicorn-log-level", default="info")
    add("--shutdown-timeout", type=float, default=30.0, metavar="SECONDS")
    for flag, reason in _NO_EFFECT.items():
        add(flag, action="store_true", help=f"no effect: {reason}")
    for flag, reason in _REFUSED.items():
        add(flag, nargs="?", const=True, help=f"not served: {reason}")


def _name(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


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
    except (ValueError, KeyError, AttributeError) as error:
        raise UsageError(f"--lora-modules {text!r} cannot be read: {error}") from error


def _chat_template(given: str | None) -> str | None:
    """A file's content, or the text itself if it has anything a template has."""
    if given is None or "{" in given or "\n" in given:
        return given
    return Path(given).read_text(encoding="utf-8")


def _origins(text: str) -> tuple[str, ...]:
    try:
        origins = json.loads(text)
    except ValueError as error:
        raise UsageError(f"--allowed-origins {text!r} is not JSON: {error}") from error
    if not isinstance(origins, list) or not all(isinstance(each, str) for each in origins):
        raise UsageError(f"--allowed-origins {text!r} must be a JSON list of strings")
    return tuple(origins)
