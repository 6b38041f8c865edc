"""A checkpoint: a config and named tensors, in Hugging Face's names, wherever they are stored."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from jaxlora.errors import ConfigError, ModelLoadError
from jaxlora.models.gguf_checkpoint import GGUFCheckpoint
from jaxlora.models.safetensors_checkpoint import INDEX_FILE, SafetensorsCheckpoint

LoadFormat = Literal["auto", "safetensors", "gguf", "dummy"]

_SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_WEIGHT_FILES = ("model.safetensors", "model-*.safetensors", INDEX_FILE)
# organization/name on the hub, then perhaps a GGUF file in it.
_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(/(?P<file>.+\.gguf))?")


@runtime_checkable
class Checkpoint(Protocol):
    """What the rest of jaxlora may ask of a checkpoint."""

    path: Path
    """The directory or the GGUF file on this machine."""

    def hf_config(self) -> dict[str, Any]:
        """config.json, or what it would be: ModelConfig.from_hf reads it."""
        ...

    def generation_config(self) -> dict[str, Any]:
        """generation_config.json, or an empty dict."""
        ...

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yields (Hugging Face name, array) with matrices [out, in], reading one at a time.

        An array is the caller's own; dropping it before the next one keeps host memory at one
        tensor.
        """
        ...


def open_checkpoint(
    model: str,
    *,
    revision: str | None = None,
    download_dir: str | None = None,
    load_format: LoadFormat = "auto",
) -> Checkpoint:
    """Opens a model and checks all that can be checked without reading its weights.

    ``model`` is a directory with config.json and safetensors, a .gguf file, a hub id, or a hub
    id with a GGUF file behind it (``organization/name/file.gguf``). ``revision`` and
    ``download_dir`` (the hub's cache directory) apply to hub ids. ``load_format`` "dummy" needs
    a config only, for random weights; "safetensors" and "gguf" insist on that format.

    Raises ModelLoadError naming the file or tensor that is missing, broken or not served.
    """
    path = resolve_model(
        model, revision=revision, download_dir=download_dir, weights=load_format != "dummy"
    )
    is_file = path.is_file()
    if is_file and load_format == "safetensors":
        raise ModelLoadError(f"{model} is a GGUF file, but load_format is 'safetensors'")
    if not is_file and load_format == "gguf":
        raise ModelLoadError(
            f"{model} is a directory, but load_format is 'gguf': give the path of the .gguf file"
        )
    try:
        if is_file:
            return GGUFCheckpoint(path)
        return SafetensorsCheckpoint(path, with_weights=load_format != "dummy")
    except OSError as error:
        raise _cannot_be_read(model, error) from error


def resolve_model(
    model: str, *, revision: str | None, download_dir: str | None, weights: bool
) -> Path:
    """The directory or .gguf file of a model on this machine, downloaded if it is a hub id.

    A path that exists wins over a hub id of the same spelling.
    """
    try:
        path = Path(model).expanduser()
        exists, is_file = path.exists(), path.is_file()
    except (OSError, RuntimeError) as error:
        # It may not be looked at, is too long, or of a user who is not there.
        raise _cannot_be_read(model, error) from error
    if exists:
        if revision is not None:
            raise ConfigError(f"revision={revision!r} applies to hub ids, but {model} is a path")
        if is_file and path.suffix != ".gguf":
            raise ModelLoadError(
                f"{model} is a file, but not a .gguf one: give the directory of a model"
            )
        return path
    match = _HUB_ID.fullmatch(model)
    if match is None:
        raise ModelLoadError(
            f"{model} does not exist and is not a hub id (organization/name): check the path"
        )
    return _download(match["repo"], match["file"], revision, download_dir, weights)


def _cannot_be_read(model: str, error: Exception) -> ModelLoadError:
    return ModelLoadError(
        f"{model} cannot be read: {error}; give the path of a model that who runs this may read"
    )


def _download(
    repo: str, file: str | None, revision: str | None, download_dir: str | None, weights: bool
) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download

    try:
        if file is not None:
            return Path(hf_hub_download(repo, file, revision=revision, cache_dir=download_dir))
        return Path(
            snapshot_download(
                repo,
                revision=revision,
                cache_dir=download_dir,
                allow_patterns=[*_SMALL_FILES, *(_WEIGHT_FILES if weights else ())],
            )
        )
    # Its errors (no such repository or revision, gated, offline, no connection) have no common
    # base but these two, and say themselves what is wrong.
    except (OSError, ValueError) as error:
        raise ModelLoadError(
            f"{repo}{f'/{file}' if file else ''} is not a path here and could not be had from the "
            f"Hugging Face hub: {error}. Check the spelling and the connection, log in if the "
            "model is gated, or give a local directory"
        ) from error
