"""Where an adapter's files are: a folder on this machine, or a hub repository."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from jaxlora.errors import AdapterNotFoundError

_ADAPTER_FILES = ["adapter_config.json", "adapter_model.safetensors"]


def resolve(lora_path: str, *, download_dir: str | None = None) -> Path:
    """The local folder of an adapter: ``~`` expanded, an existing path as it is, otherwise a hub
    repository of that id, of which only the adapter's own files are fetched.

    Raises AdapterNotFoundError if there is neither.
    """
    path = Path(lora_path).expanduser()
    if path.exists():
        return path.absolute()
    if not lora_path or path.is_absolute() or lora_path.startswith(("~", ".")):
        raise AdapterNotFoundError(f"No adapter found for {lora_path!r}: no such folder")
    try:
        folder = huggingface_hub.snapshot_download(
            lora_path, allow_patterns=_ADAPTER_FILES, cache_dir=download_dir
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise AdapterNotFoundError(
            f"No adapter found for {lora_path!r}: no such folder, and the hub said: {error}"
        ) from error
    return Path(folder)


def fingerprint(lora_path: str) -> tuple[int, ...]:
    """Device, inode, size and time of change of each of an adapter's files, which tell without
    reading whether they are others now; () for a hub repository and where a file is missing."""
    if not lora_path:
        return ()
    folder = Path(lora_path).expanduser()
    try:
        found = [(folder / name).stat() for name in _ADAPTER_FILES]
    except OSError:
        return ()
    return tuple(n for s in found for n in (s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns))
