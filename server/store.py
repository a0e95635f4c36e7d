"""The session store: handles for what tools keep. `SessionStore` is the interface, `MemoryStore` keeps it in memory.

A handle is `kind:readable-part-<128 random bits>`; it belongs to the principal that made it, and to others it does
not exist. Kinds: act (captured tensors), vec (directions), kv (caches).
"""

import re
import secrets
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from engine.ops import Array

KINDS = ("act", "vec", "kv")


class UnknownHandle(Exception):
    """No such handle, or not this principal's."""


@dataclass(frozen=True)
class Record:
    """What a handle stands for: named tensors, and how they were made (JSON values)."""

    handle: str
    owner: str
    tensors: Mapping[str, Array]
    provenance: Mapping[str, Any]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


class SessionStore(Protocol):
    """Where records live."""

    def put(
        self, kind: str, label: str, owner: str, tensors: Mapping[str, Array], provenance: Mapping[str, Any]
    ) -> str:
        """Keep tensors; returns their handle."""
        ...

    def get(self, handle: str, owner: str) -> Record:
        """The record; raises `UnknownHandle`."""
        ...

    def release(self, handle: str, owner: str) -> int:
        """Forget a record; returns the bytes freed. Raises `UnknownHandle`."""
        ...

    def records(self, owner: str) -> list[Record]:
        """All records of one principal, oldest first."""
        ...

    @property
    def bytes_in_memory(self) -> int:
        """What all principals' records take in memory."""
        ...


class MemoryStore:
    """A `SessionStore` that lives as long as the process."""

    def __init__(self) -> None:
        self._records: dict[str, Record] = {}
        self._lock = threading.Lock()

    def put(
        self, kind: str, label: str, owner: str, tensors: Mapping[str, Array], provenance: Mapping[str, Any]
    ) -> str:
        handle = mint(kind, label)
        with self._lock:
            self._records[handle] = Record(handle, owner, dict(tensors), dict(provenance))
        return handle

    def get(self, handle: str, owner: str) -> Record:
        record = self._records.get(handle)
        if record is None or record.owner != owner:
            raise UnknownHandle(
                f"no such handle: {handle!r}. list_session shows the handles that exist; "
                "capture_residuals and prefill_inject(keep=true) make new ones"
            )
        return record

    def release(self, handle: str, owner: str) -> int:
        record = self.get(handle, owner)
        with self._lock:
            self._records.pop(handle, None)
        return record.nbytes

    def records(self, owner: str) -> list[Record]:
        with self._lock:
            return [record for record in self._records.values() if record.owner == owner]

    @property
    def bytes_in_memory(self) -> int:
        with self._lock:
            return sum(record.nbytes for record in self._records.values())


def mint(kind: str, label: str) -> str:
    """A new handle: the kind, up to 32 characters of the label, 128 random bits in hexadecimal."""
    readable = re.sub(r"[^a-z0-9.]+", "-", label.lower()).strip("-")[:32].strip("-")
    return f"{kind}:{readable}-{secrets.token_hex(16)}"
