"""What the server is asked to do, apart from the engine's own options."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from jaxlora.engine_args import EngineArgs
from jaxlora.errors import ConfigError
from jaxlora.server.resolvers import LoRAResolver
from jaxlora.types import LoRARequest

MAX_NAME = 256
"""Characters in an adapter's name."""
_LOG_LEVELS = ("trace", "debug", "info", "warning", "error", "critical")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Options of ``jaxlora serve``; the field names are its flags."""

    engine_args: EngineArgs
    host: str | None = None
    """None is every interface."""
    port: int = 8000
    """0 takes a free one, which is logged."""
    served_model_names: tuple[str, ...] = ()
    """Names of the base model; the first is shown. Empty: the model as it was given."""
    lora_modules: tuple[LoRARequest, ...] = ()
    """Adapters to load before the server is ready."""
    chat_template: str | None = None
    """A Jinja template instead of the model's own."""
    api_keys: tuple[str, ...] = ()
    admin_api_key: str | None = None
    """Guards loading and unloading alone; None: an API key does."""
    allow_runtime_lora_updating: bool = False
    allowed_lora_paths: tuple[Path, ...] = ()
    allowed_lora_repos: tuple[str, ...] = ()
    """Globs. With neither paths nor repositories, any adapter may be loaded at run time."""
    lora_resolver_dir: Path | None = None
    """A folder whose adapters are loaded when they are first asked for."""
    lora_resolver_repos: tuple[str, ...] = ()
    """Globs of hub repositories that are loaded when they are first asked for."""
    lora_resolvers: tuple[LoRAResolver, ...] = ()
    """Further ones, asked after those."""
    strict_client_errors: bool = False
    """An adapter that is refused is the client's error (400), not the server's (500)."""
    return_tokens_as_token_ids: bool = False
    """Show tokens of log-probabilities by their ids; a request may ask for either."""
    max_request_bytes: int = 16 << 20
    max_prompts: int = 256
    """Most prompts of one request."""
    max_completion_tokens: int | None = None
    """Most tokens a request may ask for, and what a chat has that asks for no number; None is what
    the model's length leaves."""
    max_queued_requests: int = 1024
    """Most requests at once, running ones included; more are told to come back (429)."""
    allowed_origins: tuple[str, ...] = ("*",)
    root_path: str = ""
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    uvicorn_log_level: str = "info"
    shutdown_timeout: float = 30.0
    """Seconds that running requests have to finish after SIGTERM."""

    def __post_init__(self) -> None:
        """Raises ConfigError naming the flag and its value."""
        for flag, value, least in (
            ("max-request-bytes", self.max_request_bytes, 1),
            ("max-prompts", self.max_prompts, 1),
            ("max-queued-requests", self.max_queued_requests, 1),
            ("max-completion-tokens", self.max_completion_tokens, 1),
            ("shutdown-timeout", self.shutdown_timeout, 0),
        ):
            if value is not None and not value >= least:
                raise ConfigError(f"--{flag}={value} must be at least {least}")
        if not 0 <= self.port < 2**16:
            raise ConfigError(f"--port={self.port} must be in [0, 65535]")
        if self.uvicorn_log_level not in _LOG_LEVELS:
            known = ", ".join(_LOG_LEVELS)
            raise ConfigError(
                f"--uvicorn-log-level={self.uvicorn_log_level} must be one of {known}"
            )
        if self.ssl_keyfile is not None and self.ssl_certfile is None:
            raise ConfigError(f"--ssl-keyfile={self.ssl_keyfile} needs --ssl-certfile")
        self._check_keys()
        self._check_names()

    def _check_keys(self) -> None:
        """As of a variable that is not set: an empty one would let in whoever sends none."""
        admin = () if self.admin_api_key is None else (self.admin_api_key,)
        for flag, keys in (("api-key", self.api_keys), ("admin-api-key", admin)):
            # A header's value ends with its last letter.
            if not all(key and key == key.strip() for key in keys):
                raise ConfigError(f"--{flag} must not be empty, nor begin or end with a space")

    def _check_names(self) -> None:
        if not all(self.model_names):
            raise ConfigError("--served-model-name must not be empty")
        for name in self.model_names:
            # No reply could hold a path's bytes that are no UTF-8.
            if any("\ud800" <= character <= "\udfff" for character in name):
                raise ConfigError(f"the model's name {name!r} is no text: see --served-model-name")
        for request in self.lora_modules:
            name = request.lora_name
            if problem := problem_of(name):
                raise ConfigError(f"--lora-modules: {problem}")
            if name in self.model_names:
                raise ConfigError(
                    f"--lora-modules: the lora adapter {name!r} conflicts with a served base model"
                )

    @property
    def model_names(self) -> tuple[str, ...]:
        """Names of the base model, the one that is shown first."""
        return self.served_model_names or (self.engine_args.model,)


def problem_of(lora_name: str) -> str | None:
    """Why no adapter can have that name in /v1/models, /metrics and logs; None if one can."""
    # A label of Prometheus lists names between commas.
    if 0 < len(lora_name) <= MAX_NAME and lora_name.isprintable() and "," not in lora_name:
        return None
    shown = lora_name if len(lora_name) <= MAX_NAME else f"{lora_name[:20]}..."
    return f"lora_name {shown!r} must have 1 to {MAX_NAME} printable characters, and no comma"
