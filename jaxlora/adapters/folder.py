"""The folder PEFT saves an adapter in: which files it has, and that they are its own.

A folder may come from anyone, so nothing is unpickled, no link is followed out of it and nothing
of unbounded size is parsed.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import operator
import os
import re
from pathlib import Path
from typing import Any, Final

from jaxlora.checks import shown
from jaxlora.errors import AdapterNotFoundError, AdapterRefusedError

CONFIG_FILE: Final = "adapter_config.json"
WEIGHTS_FILE: Final = "adapter_model.safetensors"

# JSON is parsed with Python's lock held, so a large file would hold up the thread that steps the
# engine: a dense one for 0.1 s a MiB.
_MAX_CONFIG_BYTES: Final = 1 << 20
_MAX_JSON_BYTES: Final = 8 << 20
_MAX_HEADER_BYTES: Final = 4 << 20
_MAX_NAMES: Final = 5
_MLX_OPTIONS: Final = ("fine_tune_type", "lora_parameters")
"""Of mlx-lm's own adapter_config.json, not of PEFT's; at first it had only the second."""
_USUAL_BYTES: Final = 256 << 10
"""That a list of added tokens has at most, as a rule."""
_ADDED_TOKENS: Final = re.compile(rb'"added_tokens"\s*:\s*')


def check_size(num_bytes: int, max_bytes: int | None) -> None:
    """Raises AdapterRefusedError if a file of weights is larger than is allowed."""
    if max_bytes is not None and num_bytes > max_bytes:
        raise AdapterRefusedError(
            f"{WEIGHTS_FILE} has {num_bytes} bytes, more than the {max_bytes} that host memory has "
            "for adapters; raise max_cpu_lora_gb"
        )


def cannot_be_read(what: str, error: OSError) -> AdapterRefusedError:
    """The refusal of an adapter that is there, as far as can be told."""
    return AdapterRefusedError(
        f"{what} cannot be read: {error}; who runs this process must be able to list the adapter's "
        "folder and to read its files"
    )


@dataclasses.dataclass(frozen=True)
class AdapterFolder:
    """A folder with an adapter_config.json. Raises AdapterNotFoundError if it has none, and
    AdapterRefusedError, as all methods do, if that or any file it needs cannot be read."""

    path: Path

    def __post_init__(self) -> None:
        try:
            os.lstat(self.path / CONFIG_FILE)
        except PermissionError as error:
            raise cannot_be_read("the adapter's folder", error) from error
        except FileNotFoundError as error:
            raise AdapterNotFoundError(
                f"No adapter found for {self.path}{self._lacks()}"
            ) from error
        except (OSError, ValueError) as error:
            raise AdapterNotFoundError(f"No adapter found for {self.path}: {error}") from error

    def config(self) -> dict[str, Any]:
        """The content of adapter_config.json."""
        config = self._json(CONFIG_FILE, _MAX_CONFIG_BYTES)
        if not isinstance(config, dict):
            raise AdapterRefusedError(f"{CONFIG_FILE} holds {type(config).__name__}, not an object")
        # Said before the weights are looked for, which have another name there.
        found = [name for name in _MLX_OPTIONS if name in config]
        if found and "peft_type" not in config:
            raise AdapterRefusedError(
                f"mlx-lm wrote this adapter: its {CONFIG_FILE} has {' and '.join(found)} "
                "instead of a peft_type, which is not served. Fuse it with its model (mlx_lm.fuse, "
                "dequantized) and serve that, or convert it to PEFT's format: LoRA's lora_a and "
                f"lora_b, transposed, in {WEIGHTS_FILE}, and as lora_alpha scale times rank."
            )
        return config

    def weights_file(self, max_bytes: int | None = None) -> Path:
        """The one safetensors file; weights in another form, and a file of more than ``max_bytes``
        or with an absurd header, are refused with the remedy."""
        suffixes = (".bin", ".pt", ".pth", ".safetensors", ".index.json")
        try:
            file = self._file(WEIGHTS_FILE)
            if file is not None:
                check_size(file.stat().st_size, max_bytes)
                self._check_header()
                return file
            found = (p.name for p in self.path.iterdir() if p.name.endswith(suffixes))
            others = sorted(itertools.islice(found, _MAX_NAMES))
        except OSError as error:
            raise cannot_be_read(WEIGHTS_FILE, error) from error
        if not others:
            raise AdapterNotFoundError(
                f"No adapter found for {self.path}: {CONFIG_FILE} is there, {WEIGHTS_FILE} is not"
            )
        raise AdapterRefusedError(
            f"The adapter has no {WEIGHTS_FILE}, only {', '.join(map(shown, others))}. Pickled or "
            "sharded weights are not read: convert them to one safetensors file, for example with "
            f"safetensors.torch.save_file(torch.load(FILE, weights_only=True), {WEIGHTS_FILE!r})."
        )

    def added_tokens(self) -> dict[int, str | None]:
        """By id, what tokens are called that the folder's tokenizer has beside its vocabulary
        proper; None for what is not said.

        They stand in three files, according to the version that saved them.
        """
        found: dict[int, str | None] = {}
        try:
            for text, number in (self._json("added_tokens.json") or {}).items():
                found[operator.index(number)] = text
            settings = self.tokenizer_settings()
            for number, token in (settings.get("added_tokens_decoder") or {}).items():
                found[int(number)] = token.get("content")
            for token in self._added_tokens() or ():
                found[int(token["id"])] = token.get("content")
            return found
        except (AttributeError, KeyError, TypeError, RecursionError, ValueError) as error:
            if isinstance(error, AdapterRefusedError):
                raise
            raise AdapterRefusedError(
                f"The tokenizer in the adapter's folder cannot be read: {error!r}"
            ) from error

    def pad_token(self) -> str | None:
        """What the folder's tokenizer fills up batches with, if it says so."""
        token = self.tokenizer_settings().get("pad_token")
        token = token.get("content") if isinstance(token, dict) else token
        return token if isinstance(token, str) else None

    def text(self, name: str, max_bytes: int = _MAX_JSON_BYTES) -> str | None:
        """The content of a file, None if there is none; refused if it is elsewhere, or huge."""
        data = self._begin(name, max_bytes + 1)
        if data is None:
            return None
        if len(data) > max_bytes:
            raise AdapterRefusedError(f"{name} is larger than {max_bytes >> 20} MiB")
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise AdapterRefusedError(f"{name} cannot be read: {error}") from error

    def tokenizer_settings(self) -> dict[str, Any]:
        """The content of tokenizer_config.json, empty if there is none."""
        settings = self._json("tokenizer_config.json") or {}
        if not isinstance(settings, dict):
            kind = type(settings).__name__
            raise AdapterRefusedError(f"tokenizer_config.json holds {kind}, not an object")
        return settings

    def _lacks(self) -> str:
        """Why a folder is no adapter's, if there is a folder."""
        if not self.path.is_dir():
            return ""
        if not (self.path / "config.json").exists():
            return f": the folder has no {CONFIG_FILE}"
        return (
            f": the folder has no {CONFIG_FILE}, but a config.json, so it looks like a whole "
            "model; serve it as the model, or give the folder that PEFT's save_pretrained wrote"
        )

    def _added_tokens(self) -> Any:
        """The list of that name in tokenizer.json, which precedes the vocabulary there.

        That may have 200,000 entries, and nothing of it is wanted: it is not even decoded.
        """
        data = self._begin("tokenizer.json", _MAX_JSON_BYTES) or b""
        found = _ADDED_TOKENS.search(data)
        if found is None:
            return None
        head = data[found.end() : found.end() + _USUAL_BYTES]
        try:
            # A character may be cut off at the end, which is not the list's then.
            return json.JSONDecoder().raw_decode(head.decode(errors="ignore"))[0]
        except json.JSONDecodeError:
            rest = data[found.end() :].decode(errors="ignore")
            return json.JSONDecoder().raw_decode(rest)[0]

    def _begin(self, name: str, max_bytes: int) -> bytes | None:
        """Of a file so many bytes, or all there are; None if there is no file."""
        try:
            file = self._file(name)
            if file is None:
                return None
            with file.open("rb") as stream:
                return stream.read(max_bytes)
        except OSError as error:
            raise cannot_be_read(name, error) from error

    def _check_header(self) -> None:
        """A header that says it is large would be parsed, name by name, before it is found out."""
        size = int.from_bytes(self._begin(WEIGHTS_FILE, 8) or b"", "little")
        if size > _MAX_HEADER_BYTES:
            raise AdapterRefusedError(
                f"{WEIGHTS_FILE} is truncated or damaged: its header would have {size} bytes, more "
                f"than the {_MAX_HEADER_BYTES} that are read"
            )

    def _json(self, name: str, max_bytes: int = _MAX_JSON_BYTES) -> Any:
        text = self.text(name, max_bytes)
        try:
            return None if text is None else json.loads(text)
        except (ValueError, RecursionError) as error:
            raise AdapterRefusedError(f"{name} is not JSON: {error}") from error

    def _file(self, name: str) -> Path | None:
        """Where a file of the folder really is, or None; refused if that is elsewhere."""
        link = self.path / name
        if not os.path.lexists(link):
            return None
        # os.path.realpath, because Path.resolve raises on a ring of links.
        target, home = Path(os.path.realpath(link)), Path(os.path.realpath(self.path))
        # A hub cache has <repo>/snapshots/<revision>/<file> as links to <repo>/blobs/<hash>.
        snapshots = (p for p in home.parents if p.name == "snapshots")
        homes = (home, *(p.parent / "blobs" for p in snapshots))
        if not any(target.is_relative_to(h) for h in homes):
            raise AdapterRefusedError(f"{name} is a symbolic link out of the adapter's folder")
        if not target.is_file():
            raise AdapterRefusedError(f"{name} is not a regular file")
        return target
