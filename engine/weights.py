"""Lazy sources of tensors: `Tensors`, `Counted`, `Prefixed`, and `Safetensors` for files of floating-point numbers.

A source gives float32 arrays in the shape files store them, (out, in) for matrices. Families ask for a name and the
shape that the config implies; a missing tensor or another shape is a `DamagedFile`, never a guess.
"""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from engine.errors import DamagedFile, clipped
from engine.floats import to_float32
from engine.ops import Array


class Tensors(Protocol):
    """A source of tensors by Hugging Face name."""

    def __contains__(self, name: str) -> bool: ...

    def names(self) -> Iterable[str]:
        """Every tensor's Hugging Face name."""
        ...

    def get(self, name: str, shape: tuple[int, ...]) -> Array:
        """The tensor as float32; raises `DamagedFile` when it is missing or has another shape."""
        ...


_HARMLESS = re.compile(r"(.*\.rotary_emb\.inv_freq|.*\.(masked_bias|attn\.bias|attention\.bias))")
"""Names that files may hold without a reader: buffers that older checkpoints saved."""


class Counted:
    """A source that remembers what was read, so that nothing in a file is ignored silently, and refuses numbers
    that are not finite.
    """

    def __init__(self, source: Tensors) -> None:
        self._source = source
        self._read: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._source

    def names(self) -> Iterable[str]:
        return self._source.names()

    def get(self, name: str, shape: tuple[int, ...]) -> Array:
        self._read.add(name)
        array = self._source.get(name, shape)
        if not (np.isfinite(array.min()) and np.isfinite(array.max())):  # NaN is both; no array of flags is made
            raise DamagedFile(f"the tensor {name} holds NaN or infinity; fetch the weights again")
        return array

    def check_all_read(self) -> None:
        """Raise `DamagedFile` for tensors that no part of the architecture uses: it would be another model."""
        unread = sorted(name for name in self.names() if name not in self._read and not _HARMLESS.fullmatch(name))
        if unread:
            raise DamagedFile(
                f"the weights hold {len(unread)} tensors that the config does not account for, such as "
                f"{clipped(unread[0])}; the config and the weights do not belong together"
            )


class Prefixed:
    """A source whose names may lack the prefix of the family's base model, or have it where it does not belong.

    Checkpoints of the base model alone lack it, and transformers reads them so (core_model_loading.py,
    `rename_source_key`). An empty prefix changes nothing.
    """

    def __init__(self, source: Tensors, prefix: str) -> None:
        self._source, self._prefix = source, prefix

    def __contains__(self, name: str) -> bool:
        return self._stored(name) in self._source

    def names(self) -> Iterable[str]:
        return self._source.names()

    def get(self, name: str, shape: tuple[int, ...]) -> Array:
        return self._source.get(self._stored(name), shape)

    def _stored(self, name: str) -> str:
        """What the source calls it; its own name if it is missing."""
        forms = {name, self._prefix + name, name.removeprefix(self._prefix)}
        held = sorted(form for form in forms if form in self._source)
        if len(held) > 1:
            raise DamagedFile(f"the weights hold {clipped(held[0])} twice, one of them as {clipped(held[1])}")
        return held[0] if held else name


class Safetensors:
    """The tensors of some safetensors files, memory-mapped; they are converted when asked for.

    The `safetensors` library checks each header; it is not used for the data because its numpy loader
    refuses bf16.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._entries: dict[str, tuple[Path, str, tuple[int, ...], int, int]] = {}
        for path in files:
            for name, entry in _read_header(path):
                if name in self._entries:
                    raise DamagedFile(f"{clipped(name)} is in both {self._entries[name][0].name} and {path.name}")
                self._entries[name] = entry

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def names(self) -> Iterable[str]:
        return self._entries

    def stored(self, name: str) -> tuple[str, tuple[int, ...]]:
        """The type and the shape of a tensor that is there."""
        _, dtype, shape, _, _ = self._entries[name]
        return dtype, shape

    def get(self, name: str, shape: tuple[int, ...], dtype: str | None = None) -> Array:
        """`dtype` takes the place of the type that the file names, for bytes that stand for numbers."""
        if name not in self._entries:
            raise DamagedFile(f"the weights have no tensor {name!r}, which config.json implies")
        path, named, found, start, stop = self._entries[name]
        if found != shape:
            raise DamagedFile(f"{path.name}: {name} has shape {clipped(found)}, but the config implies {shape}")
        try:
            raw = np.memmap(path, np.uint8, "r", offset=start, shape=(stop - start,))
        except (OSError, ValueError):
            raise DamagedFile(f"{path.name} has changed or gone since it was loaded; load the model again") from None
        return to_float32(raw, dtype or named, name).reshape(shape)


def _read_header(path: Path) -> Iterator[tuple[str, tuple[Path, str, tuple[int, ...], int, int]]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"):  # checks sizes, offsets and overlaps
            pass
    except (SafetensorError, OSError) as error:
        raise DamagedFile(f"{path.name} is not a whole safetensors file: {str(error)[:200]}; fetch it again") from None
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    for name, row in header.items():
        if name != "__metadata__":
            start, stop = row["data_offsets"]
            yield name, (path, row["dtype"], tuple(row["shape"]), 8 + size + start, 8 + size + stop)


_MOST_JSON = 256 << 20


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises `DamagedFile` when it is anything else."""
    try:
        if (size := path.stat().st_size) > _MOST_JSON:
            raise DamagedFile(f"{path.name} is {size} bytes long; at most {_MOST_JSON} are read")
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedFile(f"{path.name} cannot be read as JSON: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise DamagedFile(f"{path.name} is not a JSON object")
    return value
