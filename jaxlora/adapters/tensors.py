"""An adapter's tensors in few large blocks, from a safetensors file or from memory.

The safetensors library judges a file and gives the headers. Its reader of tensors holds Python's
lock while it copies, hundreds of times for an adapter, and the thread that steps the engine waits
for that lock. Blocks are read in few pieces, without it, by several threads, which look at each
piece while their cores' caches hold it; and what follows from the headers alone is kept for the
next file with the same ones.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Concatenate, Final, NamedTuple, ParamSpec, TypeVar

import jax
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxlora.adapters.file_state import file_state
from jaxlora.adapters.host_blocks import Allocate, ordinary_memory
from jaxlora.adapters.pieces import Piece, bits, in_pieces
from jaxlora.errors import AdapterRefusedError

_P = ParamSpec("_P")
_T = TypeVar("_T")

MAX_KEPT_BYTES: Final = 256 << 10
"""The largest header, and the largest configuration, that is kept. What comes of one takes several
times as much, and files come from strangers: 64 of theirs could take gigabytes for good."""

DTYPES: Final = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""The dtypes that are read, by safetensors' names."""
_NUMPY: Final = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
_ORDER: Final = {"float32": 0, "bfloat16": 1, "float16": 2}
"""In which safetensors saves them."""


class Header(NamedTuple):
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Of a tensor of one of DTYPES."""
        return math.prod(self.shape) * _NUMPY[self.dtype].itemsize


class Headers(dict[str, Header]):
    """Those of all tensors of a source by name, in the order in which they lie. To a cache each is
    a thing of its own; files that were saved alike share one."""

    are_kept = False
    """Whether the next file may share them."""

    __hash__ = object.__hash__  # type: ignore[assignment]


def cached(
    function: Callable[Concatenate[Headers, _P], _T],
) -> Callable[Concatenate[Headers, _P], _T]:
    """Keeps 64 answers that follow from headers, and none from headers that do not come again."""
    known: Callable[..., _T] = functools.lru_cache(maxsize=64)(function)

    def call(headers: Headers, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        return (known if headers.are_kept else function)(headers, *args, **kwargs)

    return call


class Place(NamedTuple):
    """Where a tensor lies."""

    block: int
    offset: int
    """Its first element in the block."""
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Tensors:
    """Tensors, and the memory they lie in. Both are read-only."""

    places: Mapping[str, Place]
    blocks: tuple[np.ndarray, ...]
    """Flat arrays, each of one dtype, that hold the tensors and nothing else."""

    def __getitem__(self, name: str) -> np.ndarray:
        block, offset, shape = self.places[name]
        return self.blocks[block][offset : offset + math.prod(shape)].reshape(shape)


class _Run(NamedTuple):
    """Tensors of one dtype that lie side by side."""

    start: int
    """In bytes after the first tensor's."""
    num_bytes: int
    dtype: str
    names: tuple[str, ...]


class TensorFile:
    """A safetensors file. Raises SafetensorError or OSError where it is damaged."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            self._state = file_state(found)
            size = file.read(8)
            num_bytes = int.from_bytes(size, "little")
            text = file.read(min(num_bytes, found.st_size))
        if len(text) != num_bytes:
            raise SafetensorError(f"it ends before its header of {num_bytes} bytes does")
        self.headers = _headers(_Text(text, path, self._state))
        self._start = len(size) + len(text)

    def read(
        self,
        names: frozenset[str],
        look: Callable[[np.ndarray], _T],
        allocate: Allocate = ordinary_memory,
    ) -> tuple[Tensors, list[_T]]:
        """Those tensors, in memory that ``allocate`` gives, and what ``look`` returned for each
        piece of the blocks, in order; every tensor of the file must be of one of DTYPES.

        Raises SafetensorError if the file is another than the one whose headers were read.
        """
        runs, places = _plan(self.headers, names)
        blocks = _allocated(runs, allocate)
        with self._path.open("rb", buffering=0) as file:
            descriptor = file.fileno()
            _check_state(self._state, os.fstat(descriptor))

            def read_piece(piece: Piece) -> _T:
                at = self._start + runs[piece.block].start + piece.at
                rest = piece.values.view(np.uint8).data
                while rest:
                    count = os.preadv(descriptor, [rest], at)
                    if not count:
                        raise SafetensorError("it ends before its last tensor does")
                    rest, at = rest[count:], at + count
                return look(piece.values)

            seen = in_pieces(blocks, read_piece)
            _check_state(self._state, os.fstat(descriptor))
        return Tensors(places, _frozen(blocks)), seen


class TensorsInMemory:
    """Arrays of the host or of a device under their names; what is read is copied. Raises
    AdapterRefusedError for what is no array."""

    def __init__(self, tensors: Mapping[str, np.ndarray | jax.Array]) -> None:
        unchecked: Mapping[str, Any] = tensors
        for name, given in unchecked.items():
            is_masked = isinstance(given, np.ma.MaskedArray)
            if is_masked or not isinstance(given, np.ndarray | jax.Array):
                kind = f"{type(given).__module__}.{type(given).__qualname__}"
                raise AdapterRefusedError(
                    f"{name} is a {kind}, and tensors must be numpy or jax arrays: of torch's give "
                    "tensor.numpy(), of bfloat16 tensor.float().numpy()"
                )
            if isinstance(given, jax.Array) and given.is_deleted():
                raise AdapterRefusedError(
                    f"{name} was deleted, as what a program was given to donate is: add or update "
                    "an adapter before its arrays are"
                )
        self._tensors = tensors
        headers = {
            name: Header(tuple(map(int, array.shape)), _dtype_name(array.dtype))
            for name, array in tensors.items()
        }
        # As safetensors orders what it saves, so that the version is that of the file.
        self.headers = Headers(
            sorted(headers.items(), key=lambda item: (_ORDER.get(item[1].dtype, 0), item[0]))
        )

    def read(
        self,
        names: frozenset[str],
        look: Callable[[np.ndarray], _T],
        allocate: Allocate = ordinary_memory,
    ) -> tuple[Tensors, list[_T]]:
        """Copies of those arrays, in memory that ``allocate`` gives, and what ``look`` returned for
        each piece, in order."""
        for name in names:
            array = self._tensors[name]
            if isinstance(array, jax.Array):
                array.copy_to_host_async()
        # As integers: numpy copies bfloat16 element by element.
        arrays = {name: np.ascontiguousarray(self._tensors[name]) for name in names}
        flat = {name: bits(array.reshape(-1)) for name, array in arrays.items()}
        runs, places = _plan(self.headers, names)
        blocks = _allocated(runs, allocate)
        starts = [[places[name].offset for name in run.names] for run in runs]

        def copy_piece(piece: Piece) -> _T:
            into, begin = bits(piece.values), piece.at // piece.values.itemsize
            end = begin + into.size
            of_run, run = starts[piece.block], runs[piece.block]
            for i in range(bisect_right(of_run, begin) - 1, bisect_left(of_run, end)):
                start, source = of_run[i], flat[run.names[i]]
                first, last = max(start, begin), min(start + source.size, end)
                into[first - begin : last - begin] = source[first - start : last - start]
            return look(piece.values)

        seen = in_pieces(blocks, copy_piece)
        return Tensors(places, _frozen(blocks)), seen


TensorSource = TensorFile | TensorsInMemory
"""Where an adapter's tensors are."""


def read_headers(file: Any) -> Headers:
    """Shapes and dtypes of the tensors in a safetensors file that is open."""
    parts = {name: file.get_slice(name) for name in file.offset_keys()}
    return Headers(
        (name, Header(tuple(part.get_shape()), DTYPES.get(part.get_dtype(), part.get_dtype())))
        for name, part in parts.items()
    )


@dataclasses.dataclass(frozen=True)
class _Text:
    """A file's header, and which file that is."""

    text: bytes
    path: Path = dataclasses.field(compare=False)
    state: tuple[int, ...] = dataclasses.field(compare=False)

    @property
    def num_bytes_after(self) -> int:
        """Of the file, behind its header and the eight bytes of that one's size."""
        return self.state[2] - 8 - len(self.text)


def _headers(text: _Text) -> Headers:
    if len(text.text) > MAX_KEPT_BYTES:
        return _judged(text)
    headers, num_bytes = _known_headers(text)
    if num_bytes != text.num_bytes_after:
        raise SafetensorError("its size is not what its header says")
    return headers


@functools.lru_cache(maxsize=64)
def _known_headers(text: _Text) -> tuple[Headers, int]:
    """And the bytes of all tensors."""
    headers = _judged(text)
    headers.are_kept = True
    return headers, text.num_bytes_after


def _judged(text: _Text) -> Headers:
    # pread, not mmap: a file that shrinks while it is read is an error, not a SIGBUS.
    with safe_open(text.path, framework="np", backend="pread") as file:
        headers = read_headers(file)
    _check_state(text.state, text.path.stat())
    return headers


def _allocated(runs: Sequence[_Run], allocate: Allocate) -> list[np.ndarray]:
    return [allocate(run.num_bytes).view(_NUMPY[run.dtype]) for run in runs]


def _frozen(blocks: list[np.ndarray]) -> tuple[np.ndarray, ...]:
    for block in blocks:
        block.flags.writeable = False
    return tuple(blocks)


@cached
def _plan(headers: Headers, names: frozenset[str]) -> tuple[list[_Run], dict[str, Place]]:
    """What is to be read for those tensors, and where they are then."""
    # Neither the format nor memory has gaps: tensors follow one another.
    sizes = [header.num_bytes for header in headers.values()]
    starts = itertools.accumulate(sizes, initial=0)
    runs: list[_Run] = []
    places: dict[str, Place] = {}
    for (name, header), start in zip(headers.items(), starts, strict=False):
        if name not in names:
            continue
        size, last = header.num_bytes, runs[-1] if runs else None
        if last and last.start + last.num_bytes == start and last.dtype == header.dtype:
            run = last._replace(num_bytes=last.num_bytes + size, names=(*last.names, name))
            runs[-1] = run
        else:
            run = _Run(start, size, header.dtype, (name,))
            runs.append(run)
        offset = (start - run.start) // _NUMPY[header.dtype].itemsize
        places[name] = Place(len(runs) - 1, offset, header.shape)
    return runs, places


def _check_state(state: tuple[int, ...], now: os.stat_result) -> None:
    if file_state(now) != state:
        raise SafetensorError("it was changed while it was read; load it again")


def _dtype_name(dtype: Any) -> str:
    # JAX has one of its own for keys, which has no byte order.
    return dtype.name if getattr(dtype, "isnative", True) else dtype.str
