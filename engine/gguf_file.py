"""A bounded reader of GGUF files (format: ggml-org/ggml, docs/gguf.md): metadata and tensor table.

`GgufFile.open` maps the file and parses its header; every count and offset is checked against the bytes
that are really there before anything is allocated. `GgufFile.dense` dequantises one tensor with the `gguf`
library, a stretch of blocks at a time; `GgufFile.steps` gives the scales and minima of its blocks. The library's own
reader is not used: it follows any count a damaged header declares.
"""

import math
import mmap as memory
import struct
from dataclasses import dataclass
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import numpy as np

from engine import gguf_blocks
from engine.errors import DamagedFile, clipped
from engine.levels import GROUP
from engine.matrices import Array

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS = 4
_MOST_ELEMENTS = 1 << 24
_LEAST_KEY, _LEAST_ROW = 8 + 4 + 1, 8 + 4 + 8 + 4 + 8
"""Bytes that a metadata entry and a row of the tensor table take at least."""
_STRETCH = 1 << 18
"""Elements dequantised at a time: a megabyte of float32, which bounds what the library allocates beside the result."""


@dataclass(frozen=True)
class GgufTensor:
    """One row of the tensor table. `shape` is outermost first (numpy order); `offset` is from the file's start."""

    shape: tuple[int, ...]
    quantisation: int
    offset: int
    nbytes: int


class _Cursor:
    """Reads forward through the header and refuses to leave the file."""

    def __init__(self, data: mmap, path: Path) -> None:
        self.data, self.path, self.at = data, path, 0

    def damaged(self, what: str) -> DamagedFile:
        return DamagedFile(f"{self.path.name}: {what} (at byte {self.at} of {len(self.data)}); fetch the file again")

    def take(self, size: int) -> int:
        """Move past `size` bytes; returns where they began."""
        start = self.at
        if size > len(self.data) - start:
            raise self.damaged("the header goes on past the end of the file")
        self.at += size
        return start

    def expect(self, count: int, size: int, what: str) -> None:
        """Refuse a count of things of at least `size` bytes each that cannot all be in the file."""
        if count * size > len(self.data) - self.at:
            raise self.damaged(f"the header claims {count} {what}")

    def scalar(self, code: str) -> Any:
        return struct.unpack_from("<" + code, self.data, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        size = self.scalar("Q")
        start = self.take(size)
        try:
            return self.data[start : start + size].decode("utf-8")
        except UnicodeDecodeError:
            raise self.damaged("a name or text in the header is not UTF-8") from None

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array()
        raise self.damaged(f"unknown metadata type {kind}")

    def array(self) -> list[Any]:
        kind, count = self.scalar("I"), self.scalar("Q")
        if count > _MOST_ELEMENTS:
            raise self.damaged(f"a metadata array claims {count} elements; at most {_MOST_ELEMENTS} are read")
        if kind in _SCALARS:
            code = _SCALARS[kind]
            size = struct.calcsize("<" + code)
            start = self.take(size * count)
            values: list[Any] = np.frombuffer(self.data, "<" + code, count, start).tolist()
            return values
        if kind != _STRING:
            raise self.damaged(f"a metadata array holds elements of type {kind}")
        self.expect(count, 8, "strings in a metadata array")
        return [self.string() for _ in range(count)]


class GgufFile:
    """An open GGUF file: `metadata` (key -> value) and `tensors` (name -> `GgufTensor`)."""

    def __init__(self, path: Path, data: mmap, metadata: dict[str, Any], tensors: dict[str, GgufTensor]) -> None:
        self.path = path
        self.metadata = metadata
        self.tensors = tensors
        self._data = data

    @classmethod
    def open(cls, path: Path) -> "GgufFile":
        """Map and parse; raises `DamagedFile` for anything that is not a whole little-endian GGUF v2 or v3 file."""
        with path.open("rb") as file:
            if file.seek(0, 2) < 24:
                raise DamagedFile(f"{path.name} is too short to be a GGUF file")
            data = mmap(file.fileno(), 0, access=ACCESS_READ)
        cursor = _Cursor(data, path)
        if data[:4] != b"GGUF":
            raise DamagedFile(f"{path.name} is not a GGUF file: it starts with {data[:4]!r}")
        cursor.at = 4
        version = cursor.scalar("I")
        if version not in (2, 3):
            raise cursor.damaged(f"GGUF version {version}; versions 2 and 3 are supported")
        n_tensors, n_keys = cursor.scalar("Q"), cursor.scalar("Q")
        cursor.expect(n_keys, _LEAST_KEY, "metadata keys")
        cursor.expect(n_tensors, _LEAST_ROW, "tensors")
        metadata = _read_metadata(cursor, n_keys)
        return cls(path, data, metadata, _read_tensor_table(cursor, n_tensors, metadata))

    def dense(self, name: str) -> Array:
        """The tensor as float32, a copy in memory, dequantised by the `gguf` library.

        Raises `DamagedFile` for a type that the library cannot dequantise.
        """
        from gguf.quants import dequantize

        kind, block, raw = self._blocks(name)
        dense = np.empty((len(raw), block), np.float32)
        step = _STRETCH // block
        try:
            for start in range(0, len(raw), step):  # as one row: the library goes through rows 16 at a time
                row = raw[start : start + step].reshape(1, -1)
                dense[start : start + step] = dequantize(row, kind).reshape(-1, block)
        except NotImplementedError:
            raise DamagedFile(
                f"{self.path.name}: {clipped(name)} is stored as {kind.name}, which cannot be read"
            ) from None
        self._forget()
        return dense.reshape(self.tensors[name].shape)

    def steps(self, name: str) -> tuple[Array, Array]:
        """Scales and minima of a matrix's blocks, each (out, in / GROUP): see `gguf_blocks`.

        Zeros for vectors and for types that do not have them: no number but zero is made of those.
        """
        kind, block, raw = self._blocks(name)
        *rows, features = self.tensors[name].shape
        if not rows or kind.name not in gguf_blocks.KINDS:
            nothing = np.zeros((*rows, features // GROUP if rows else features), np.float32)
            return nothing, nothing
        scales, minima = gguf_blocks.steps(raw, kind.name, block)
        self._forget()
        return scales.reshape(*rows, -1), minima.reshape(*rows, -1)

    def _blocks(self, name: str) -> tuple[Any, int, gguf_blocks.Bytes]:
        """The type of a tensor's blocks, the weights of one, and their (blocks, bytes)."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        tensor = self.tensors[name]
        kind = GGMLQuantizationType(tensor.quantisation)
        block, size = GGML_QUANT_SIZES[kind]
        return kind, block, np.frombuffer(self._data, np.uint8, tensor.nbytes, tensor.offset).reshape(-1, size)

    def _forget(self) -> None:
        """Take the file's pages out of this process; they stay in the system's cache.

        All of them: what a fault maps in besides the page that was read depends on how the system cached the file.
        """
        if hasattr(memory, "MADV_DONTNEED"):  # not on Windows
            self._data.madvise(memory.MADV_DONTNEED)


def _read_metadata(cursor: _Cursor, n_keys: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(n_keys):  # bounded: each round reads at least a length field, or raises
        key = cursor.string()
        if key in metadata:
            raise cursor.damaged(f"the metadata key {clipped(key)} appears twice")
        metadata[key] = cursor.value(cursor.scalar("I"))
    return metadata


def _read_tensor_table(cursor: _Cursor, n_tensors: int, metadata: dict[str, Any]) -> dict[str, GgufTensor]:
    rows: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(n_tensors):
        name, n_dimensions = cursor.string(), cursor.scalar("I")
        if name in rows:
            raise cursor.damaged(f"the tensor {clipped(name)} appears twice")
        if not 1 <= n_dimensions <= _MOST_DIMENSIONS:
            raise cursor.damaged(f"the tensor {clipped(name)} has {n_dimensions} dimensions")
        shape = tuple(cursor.scalar("Q") for _ in range(n_dimensions))[::-1]
        rows[name] = (shape, cursor.scalar("I"), cursor.scalar("Q"))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment > 1 << 20 or alignment & (alignment - 1):
        raise cursor.damaged(f"general.alignment is {clipped(alignment)}, not a power of two")
    start = expected = _aligned(cursor.at, alignment)
    tensors: dict[str, GgufTensor] = {}
    for name, (shape, quantisation, offset) in rows.items():
        tensors[name] = _placed(cursor, name, start, shape, quantisation, offset)
        if tensors[name].offset != expected:  # ggml refuses such files too
            raise cursor.damaged(f"the tensor {clipped(name)} does not follow the one before it")
        expected = _aligned(expected + tensors[name].nbytes, alignment)
    return tensors


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


def _placed(
    cursor: _Cursor, name: str, start: int, shape: tuple[int, ...], quantisation: int, offset: int
) -> GgufTensor:
    """A row of the tensor table, checked to lie inside the file."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(quantisation)]
    except (ValueError, KeyError):
        raise cursor.damaged(f"the tensor {clipped(name)} has the unknown type {quantisation}") from None
    elements = math.prod(shape)
    if elements == 0 or shape[-1] % block:
        raise cursor.damaged(f"the tensor {clipped(name)} of shape {clipped(shape)} does not fill blocks of {block}")
    nbytes = elements // block * block_bytes
    if start + offset + nbytes > len(cursor.data):
        raise cursor.damaged(f"the tensor {clipped(name)} lies beyond the end of the file")
    return GgufTensor(shape, quantisation, start + offset, nbytes)
