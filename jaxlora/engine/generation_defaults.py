"""Sampling parameters a model recommends: its generation_config.json, in our names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxlora.errors import ConfigError
from jaxlora.models.safetensors_checkpoint import read_json
from jaxlora.types import SamplingParams

_NAMES = {
    "repetition_penalty": "repetition_penalty",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "max_new_tokens": "max_tokens",
}


def generation_defaults(source: str, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords for :class:`SamplingParams`.

    ``source`` is "auto" for the ``checkpoint``'s own generation config, "vllm" for none, or a
    folder with a generation_config.json. Raises ConfigError if there is none in it, or if what it
    recommends is out of range, and ModelLoadError if it is no JSON object.
    """
    if source == "vllm":
        return {}
    found = checkpoint if source == "auto" else _read(Path(source).expanduser())
    defaults = {ours: found[name] for name, ours in _NAMES.items() if found.get(name) is not None}
    try:
        SamplingParams(**defaults)
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"generation_config.json recommends what cannot be served: {error}; "
            "generation_config='vllm' leaves it aside"
        ) from error
    return defaults


def _read(folder: Path) -> dict[str, Any]:
    file = folder / "generation_config.json"
    if not file.is_file():
        raise ConfigError(
            f"generation_config={str(folder)!r} must be auto, vllm, or a folder with a {file.name}"
        )
    return read_json(file)
