"""Files of tensors: `pack`, `write` and `read`; and `TensorCache`, what of them is in memory.

A file is complete or absent: it is written beside its name, brought to the disk and then renamed.
"""

import errno
import hashlib
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from engine.ops import Array
from server.store import DamagedRecord, OutOfSpace, StoreError, nbytes

SUFFIX, UNFINISHED = ".safetensors", ".writing"
MISSING = "is missing"
"""The fault of a file that is not there: it may have been released meanwhile."""


def file_name(handle: str) -> str:
    """act:paris-<bits> -> act-paris-<bits>.safetensors: colons are not for file names everywhere."""
    return f"{handle.replace(':', '-', 1)}{SUFFIX}"


def pack(handle: str, tensors: Mapping[str, Array], provenance: Mapping[str, Any]) -> bytes:
    """The content of a file, which says itself what it is."""
    rows = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}  # `save` writes memory as it lies
    return save(rows, metadata={"handle": handle, "provenance": json.dumps(provenance)})


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def write(path: Path, data: bytes) -> None:
    """Raises `OutOfSpace` when the disk is full, `StoreError` when it takes no file; then nothing is left of it."""
    unfinished = path.with_suffix(UNFINISHED)
    try:
        with unfinished.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
            path.unlink(missing_ok=True)
        said = f"{path.parent} takes no file: {error.strerror}; nothing was kept"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutOfSpace(f"{said}. Release handles, or free the disk") from None
        raise StoreError(f"{said}. Whoever runs the server must make it writable") from None


def _sync_folder(folder: Path) -> None:
    """A new name is on the disk only when its folder is."""
    if os.name == "nt":  # folders cannot be opened there; names are journalled
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fault(path: Path, expected: str) -> str | None:
    """What is wrong with a file, or None."""
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return MISSING
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None if found == expected else "was damaged on disk (its sha256 is not the one it was written with)"


def read(path: Path, handle: str, expected: str) -> dict[str, Array]:
    """The tensors of a file. Raises `DamagedRecord` unless they are those that were written."""
    try:
        data = path.read_bytes()
        if sha256(data) == expected:
            return load(data)
    except (OSError, SafetensorError):
        pass
    wrong = fault(path, expected) or "is not a file of tensors"
    raise DamagedRecord(f"{handle}: its file {path.name} {wrong}; release it and make it anew")


class TensorCache:
    """Tensors by handle, the least recently used dropped first when they take more than `budget` bytes."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._held: OrderedDict[str, Mapping[str, Array]] = OrderedDict()
        self._lock = threading.Lock()
        self.nbytes = 0

    def __contains__(self, handle: str) -> bool:
        return handle in self._held

    def get(self, handle: str) -> Mapping[str, Array] | None:
        with self._lock:
            if handle in self._held:
                self._held.move_to_end(handle)
            return self._held.get(handle)

    def keep(self, handle: str, tensors: Mapping[str, Array]) -> None:
        """What alone is more than the budget is not kept."""
        size = nbytes(tensors)
        with self._lock:
            self._drop(handle)
            while self._held and self.nbytes + size > self._budget:
                self._drop(next(iter(self._held)))
            if size <= self._budget:
                self._held[handle] = tensors
                self.nbytes += size

    def shrink(self, to: int) -> int:
        """Drop the least recently used until at most so many bytes are held; returns how many are."""
        with self._lock:
            while self._held and self.nbytes > to:
                self._drop(next(iter(self._held)))
            return self.nbytes

    def drop(self, handle: str) -> None:
        with self._lock:
            self._drop(handle)

    def _drop(self, handle: str) -> None:
        self.nbytes -= nbytes(self._held.pop(handle, {}))
