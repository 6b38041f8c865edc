"""``jaxlora serve``: flags and environment as options of the server."""

from __future__ import annotations

import argparse
import json
import logging
import os
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from jaxlora.cli.arguments import (
    UsageError,
    add_lora_modules,
    add_model,
    engine_args,
    lora_modules,
)
from jaxlora.cli.interrupts import ending_the_process
from jaxlora.server import LOG_FORMAT

if TYPE_CHECKING:
    from jaxlora.cli.arguments import Commands
    from jaxlora.server.options import ServerOptions
    from jaxlora.server.resolvers import LoRAResolver

logger = logging.getLogger(__name__)

_NO_EFFECT = {
    "--enforce-eager": "everything is compiled",
    "--disable-log-requests": "prompts are never logged",
    "--no-enable-log-requests": "prompts are never logged",
    "--disable-log-stats": "statistics are at /metrics only",
    "--disable-uvicorn-access-log": "the log has one line for a request, and no prompts",
    "--enable-chunked-prefill": "prompts are always taken in chunks",
    "--async-scheduling": "steps are always planned ahead",
    "--fully-sharded-loras": "adapters are always shared out with the model",
    "--enable-prompt-tokens-details": "cached tokens are always told",
    "--enable-server-load-tracking": "/load always tells",
    "--enable-request-id-headers": "replies always have X-Request-Id",
    "--disable-frontend-multiprocessing": "there is one process",
    "--trust-remote-code": "nothing remote is ever run",
}
_NO_EFFECT_VALUES = {
    "--compilation-config": "everything is compiled",
    "--max-seq-len-to-capture": "everything is compiled",
    "--swap-space": "what does not fit is computed again",
    "--distributed-executor-backend": "one process has all devices",
    "--scheduling-policy": "priority counts always, and order of arrival among equals",
    "--tokenizer-mode": "tokenizers are fast ones always",
    "--max-log-len": "prompts are never logged",
}
"""Those that take a value."""
_ONLY = {
    "--pipeline-parallel-size": "1",
    "--data-parallel-size": "1",
    "--kv-cache-dtype": "auto",
}
"""The one value that is served."""
_REFUSED = {
    "--enable-auto-tool-choice": "tool calls are not parsed: the text is returned as it is",
    "--tool-call-parser": "tool calls are not parsed: the text is returned as it is",
    "--reasoning-parser": "reasoning is not parsed: the text is returned as it is",
    "--quantization": "use the unquantized checkpoint, or a GGUF file",
}
_AS_GIVEN = """host port admin_api_key strict_client_errors return_tokens_as_token_ids
    max_request_bytes max_prompts max_completion_tokens max_queued_requests root_path ssl_keyfile
    ssl_certfile uvicorn_log_level shutdown_timeout""".split()
"""Fields of ServerOptions that hold what their flags were given."""


def add(commands: Commands) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "serve",
        help="serve a model and its adapters over HTTP",
        description="Serves OpenAI's API with vLLM's flags, routes and metrics (docs/server.md). "
        "JAXLORA_ALLOW_RUNTIME_LORA_UPDATING=1 adds the routes that load and unload adapters.",
    )
    add_model(parser)
    add_lora_modules(parser)
    _add_flags(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    logging.basicConfig(format=LOG_FORMAT, level="INFO")
    with ending_the_process():
        options = serve_options(args, os.environ)
        # Not before: the web framework is an extra that other commands do without.
        try:
            from jaxlora.server.run import serve
        except ImportError as error:
            raise UsageError(
                f"the server needs more: pip install 'jaxlora[serve]' ({error})"
            ) from error

    return serve(options)


def serve_options(args: argparse.Namespace, environ: Mapping[str, str]) -> ServerOptions:
    """Flags and environment as options. Raises UsageError, ConfigError."""
    from jaxlora.server.options import ServerOptions

    for flag, reason in _REFUSED.items():
        if getattr(args, _name(flag)):
            raise UsageError(f"{flag} is not served: {reason}")
    for flag, value in _ONLY.items():
        given = getattr(args, _name(flag))
        if given not in (None, value):
            raise UsageError(f"{flag} {given} is not served, only {value}")
    for flag, reason in (_NO_EFFECT | _NO_EFFECT_VALUES).items():
        if getattr(args, _name(flag)):
            logger.warning("%s has no effect: %s", flag, reason)
    for flag in ("--lora-resolver-dir", "--lora-resolver-repo", "--lora-resolver"):
        if getattr(args, _name(flag)) and not args.enable_lora:
            raise UsageError(f"{flag} needs --enable-lora")
    updating = ("JAXLORA_ALLOW_RUNTIME_LORA_UPDATING", "VLLM_ALLOW_RUNTIME_LORA_UPDATING")
    resolver_dir = args.lora_resolver_dir
    if args.enable_lora:
        resolver_dir = resolver_dir or environ.get("VLLM_LORA_RESOLVER_CACHE_DIR")
    # vLLM's, too: who guards a server by it must not find it open.
    api_key = environ.get("JAXLORA_API_KEY") or environ.get("VLLM_API_KEY")
    api_keys = args.api_key or ([api_key] if api_key else [])
    return ServerOptions(
        engine_args=engine_args(args),
        served_model_names=tuple(args.served_model_name or ()),
        lora_modules=lora_modules(args),
        chat_template=_chat_template(args.chat_template),
        api_keys=tuple(api_keys),
        allow_runtime_lora_updating=args.enable_lora
        and any(environ.get(name, "").lower() in ("1", "true") for name in updating),
        allowed_lora_paths=tuple(map(Path, args.allowed_lora_path or ())),
        allowed_lora_repos=tuple(args.allowed_lora_repo or ()),
        lora_resolver_dir=Path(resolver_dir) if resolver_dir else None,
        lora_resolver_repos=tuple(args.lora_resolver_repo or ()),
        lora_resolvers=tuple(map(_resolver, args.lora_resolver or ())),
        allowed_origins=_origins(args.allowed_origins),
        **{name: getattr(args, name) for name in _AS_GIVEN},
    )


def _add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--host", help="the interface to listen on (all)")
    add("--port", type=int, default=8000, help="0 takes a free one, which is logged (%(default)s)")
    add(
        "--served-model-name",
        nargs="+",
        metavar="NAME",
        help="what requests call the base model; the first is shown (the model as it was given)",
    )
    add("--chat-template", help="a Jinja file, or the template itself")
    add(
        "--api-key",
        nargs="+",
        action="extend",
        metavar="KEY",
        help="guards /v1; may be repeated (JAXLORA_API_KEY, VLLM_API_KEY)",
    )
    add("--admin-api-key", help="guards loading and unloading adapters alone")
    add(
        "--allowed-lora-path",
        action="append",
        metavar="DIR",
        help="where adapters may be loaded from at run time; may be repeated",
    )
    add(
        "--allowed-lora-repo",
        action="append",
        metavar="GLOB",
        help="hub repositories that may be loaded at run time; may be repeated",
    )
    add("--lora-resolver-dir", metavar="DIR", help="adapters here are loaded when asked for")
    add(
        "--lora-resolver-repo",
        action="append",
        metavar="GLOB",
        help="hub repositories that are loaded when asked for; may be repeated",
    )
    add(
        "--lora-resolver",
        action="append",
        metavar="MODULE:NAME",
        help="a LoRAResolver of your own, or its class; may be repeated",
    )
    add(
        "--strict-client-errors",
        action="store_true",
        help="an adapter that is refused is the client's error, 400 instead of 500",
    )
    add(
        "--return-tokens-as-token-ids",
        action="store_true",
        help="show the tokens of log-probabilities as token_id:7",
    )
    add(
        "--max-request-bytes",
        type=int,
        default=16 << 20,
        help="most bytes of a request's body (%(default)s)",
    )
    add("--max-prompts", type=int, default=256, help="most prompts of a request (%(default)s)")
    add("--max-completion-tokens", type=int, help="most tokens a request may ask for (no limit)")
    add(
        "--max-queued-requests",
        type=int,
        default=1024,
        help="most requests at once, running ones included (%(default)s)",
    )
    add("--allowed-origins", default='["*"]', help="a JSON list, for CORS (%(default)s)")
    add("--root-path", default="", help="where a proxy has the server")
    add("--ssl-keyfile", metavar="FILE", help="the key, to serve HTTPS")
    add("--ssl-certfile", metavar="FILE", help="the certificate, to serve HTTPS")
    add(
        "--uvicorn-log-level",
        default="info",
        help="of the web server, trace to critical (%(default)s)",
    )
    add(
        "--shutdown-timeout",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="what running requests have to finish after SIGTERM (%(default)s)",
    )
    for flag, reason in _NO_EFFECT.items():
        add(flag, action="store_true", help=f"no effect: {reason}")
    for flag, reason in _NO_EFFECT_VALUES.items():
        add(flag, metavar="VALUE", help=f"no effect: {reason}")
    for flag, value in _ONLY.items():
        add(flag, metavar=value, help="no other value is served")
    for flag, reason in _REFUSED.items():
        add(flag, nargs="?", const=True, help=f"not served: {reason}")


def _name(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def _resolver(name: str) -> LoRAResolver:
    """What ``module:name`` is, made if it is a class."""
    from jaxlora.server.resolvers import LoRAResolver

    try:
        found = pkgutil.resolve_name(name)
        resolver = found() if isinstance(found, type) else found
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise UsageError(f"--lora-resolver {name!r} cannot be had: {error}") from error
    if not isinstance(resolver, LoRAResolver):
        raise UsageError(f"--lora-resolver {name!r} has no method resolve_lora")
    return resolver


def _chat_template(given: str | None) -> str | None:
    """A file's content, or the text itself if it has anything a template has."""
    if given is None or "{" in given or "\n" in given:
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise UsageError(f"--chat-template {given!r} cannot be read: {error}") from error


def _origins(text: str) -> tuple[str, ...]:
    try:
        origins = json.loads(text)
    except ValueError as error:
        raise UsageError(f"--allowed-origins {text!r} is not JSON: {error}") from error
    if not isinstance(origins, list) or not all(isinstance(each, str) for each in origins):
        raise UsageError(f"--allowed-origins {text!r} must be a JSON list of strings")
    return tuple(origins)
