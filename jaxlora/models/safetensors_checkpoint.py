"""A Hugging Face model directory whose weights are safetensors, in one file or in shards.

The file format is described at https://github.com/huggingface/safetensors#format: eight bytes
with the header's length, a JSON header, then the tensors' bytes without holes.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxlora.checks import some
from jaxlora.errors import ModelLoadError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# Weight files of a model, as opposed to an adapter's or the second copy that Mistral publishes.
_WEIGHT_FILE = re.compile(r"model(-.*)?\.safetensors")


@dataclasses.dataclass(frozen=True)
class _Entry:
    """Where a tensor's bytes are; ``offset`` counts from the start of the file."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int


class SafetensorsCheckpoint:
    """The Checkpoint of a directory with config.json and safetensors.

    Everything that can be wrong with the files short of their contents is found on construction,
    from their headers. ``tensors`` then reads one tensor at a time into an array of its own
    (no memory map), so host memory holds one tensor, not a shard.

    Raises ModelLoadError naming the file or tensor: config.json or weights absent, a shard that
    is missing, truncated or not in the index, tensors on which index and shards disagree, a
    dtype other than F64, F32, F16, BF16.
    """

    path: Path

    def __init__(self, path: Path, *, with_weights: bool = True) -> None:
        """``with_weights=False`` looks at config.json only, for random weights."""
        self.path = path
        if not (path / "config.json").is_file():
            raise ModelLoadError(
                f"{path} has no config.json: give the directory of a Hugging Face model, a .gguf "
                "file, or a hub id (organization/name, or organization/name/file.gguf)"
            )
        self._shards: dict[str, list[_Entry]] = _read_shards(path) if with_weights else {}

    def hf_config(self) -> dict[str, Any]:
        """config.json as it is."""
        return read_json(self.path / "config.json")

    def generation_config(self) -> dict[str, Any]:
        """generation_config.json as it is, or an empty dict."""
        file = self.path / "generation_config.json"
        return read_json(file) if file.is_file() else {}

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yields (name, array) shard by shard, in the order of the bytes, in the stored dtype."""
        for shard, entries in self._shards.items():
            with (self.path / shard).open("rb") as file:
                for entry in entries:
                    # Not by way of a variable, which would keep the array until the next is read.
                    yield entry.name, _read(file, entry)


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file; ModelLoadError if it is anything else."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelLoadError(f"{file} is missing") from error
    except OSError as error:
        raise ModelLoadError(f"{file} cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(f"{file} is not valid JSON ({error}): download it again") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{file} holds {type(value).__name__}, not a JSON object")
    return value


def _read_shards(path: Path) -> dict[str, list[_Entry]]:
    """The tensors of every shard, in the order of the index's shards."""
    found = sorted(p.name for p in path.glob("*.safetensors") if _WEIGHT_FILE.fullmatch(p.name))
    if (path / INDEX_FILE).is_file():
        weight_map = _read_weight_map(path / INDEX_FILE)
        shards = sorted(set(weight_map.values()))
        if missing := [shard for shard in shards if not (path / shard).is_file()]:
            raise ModelLoadError(
                f"{path} lacks {some(missing)}, which {INDEX_FILE} names: download them again"
            )
        if extra := [shard for shard in found if shard not in shards]:
            raise ModelLoadError(
                f"{path} has {some(extra)}, which {INDEX_FILE} does not name: it is unclear "
                "which weights are meant, so remove the ones that are not"
            )
        entries = {shard: _read_header(path / shard) for shard in shards}
        _check_index(path, weight_map, entries)
        return entries
    if found == [SINGLE_FILE]:
        return {SINGLE_FILE: _read_header(path / SINGLE_FILE)}
    if found:
        raise ModelLoadError(f"{path} has the shards {some(found)} but no {INDEX_FILE}")
    if pickles := sorted(p.name for p in path.glob("*.bin")):
        raise ModelLoadError(
            f"{path} has its weights as {some(pickles)} only, which are pickles and can run code "
            "when read: convert them to safetensors (save_pretrained writes them)"
        )
    others = sorted(p.name for p in path.glob("*.safetensors"))
    hint = f" (it has {some(others)})" if others else ""
    raise ModelLoadError(f"{path} has neither {SINGLE_FILE} nor {INDEX_FILE}{hint}")


def _read_weight_map(file: Path) -> dict[str, str]:
    """Tensor name to shard file name."""
    weight_map = read_json(file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelLoadError(f"{file} has no weight_map")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ModelLoadError(f"{file} places {name} in {shard!r}, which is not a file name")
    return weight_map


def _check_index(
    path: Path, weight_map: Mapping[str, str], shards: Mapping[str, Sequence[_Entry]]
) -> None:
    """Every tensor is in exactly the shard that the index says."""
    for shard, entries in shards.items():
        present = {entry.name for entry in entries}
        if absent := [n for n, s in weight_map.items() if s == shard and n not in present]:
            raise ModelLoadError(
                f"{path / shard} lacks {some(absent)}, which {INDEX_FILE} places there"
            )
        if strays := [name for name in sorted(present) if weight_map.get(name) != shard]:
            name = strays[0]
            where = f"in {weight_map[name]} too" if name in weight_map else "nowhere"
            raise ModelLoadError(
                f"{path / shard} has {some(strays)}, but {INDEX_FILE} places {name} {where}: "
                "the shards are not of one checkpoint"
            )


def _read_header(file: Path) -> list[_Entry]:
    """The tensors of one file in the order of their bytes."""
    try:
        # The library checks the header: lengths, holes, overlaps and the size of the file.
        with safe_open(file, framework="numpy"):
            pass
    except SafetensorError as error:
        raise ModelLoadError(
            f"{file} is truncated or not a safetensors file ({error}): download it again"
        ) from error
    with file.open("rb") as stream:
        header_len = int.from_bytes(stream.read(8), "little")
        # Members as pairs, because a dict would hide a name that occurs twice.
        pairs = json.loads(stream.read(header_len), object_pairs_hook=list)
    entries: list[_Entry] = []
    seen: set[str] = set()
    for name, members in pairs:
        if name == "__metadata__":
            continue
        if name in seen:
            raise ModelLoadError(f"{file} has the tensor {name} twice")
        seen.add(name)
        member = dict(members)
        if member["dtype"] not in _DTYPES:
            raise ModelLoadError(
                f"{file} stores {name} as {member['dtype']}; served are {', '.join(_DTYPES)}. Use "
                "the unquantized checkpoint, or a GGUF file"
            )
        entries.append(
            _Entry(
                name=name,
                dtype=_DTYPES[member["dtype"]],
                shape=tuple(member["shape"]),
                offset=8 + header_len + member["data_offsets"][0],
            )
        )
    return sorted(entries, key=lambda entry: entry.offset)


def _read(file: BinaryIO, entry: _Entry) -> np.ndarray:
    file.seek(entry.offset)
    num_bytes = math.prod(entry.shape) * entry.dtype.itemsize
    flat = np.fromfile(file, dtype=np.uint8, count=num_bytes)
    return flat.view(entry.dtype).reshape(entry.shape)
