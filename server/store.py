"""The session store: handles for what tools keep. `SessionStore` is the interface, `MemoryStore` keeps it in memory.

A handle is `kind:readable-part-<128 random bits>`; it belongs to the principal that made it, and to others it does
not exist. Kinds: act (captured tensors), vec (directions), kv (caches), run (a tool call that was started as a job).
"""

import re
import secrets
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from engine.errors import clipped
from engine.ops import Array

KINDS = ("act", "vec", "kv", "run")


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


State = Literal["running", "done", "failed", "cancelled", "interrupted"]
"""`interrupted`: the server ended while the run was going on."""


@dataclass(frozen=True)
class Run:
    """A tool call that goes on by itself: what was asked, how far it is, what came of it. JSON values throughout."""

    handle: str
    owner: str
    tool: str
    arguments: Mapping[str, Any]
    provenance: Mapping[str, Any]
    started: float
    """Seconds since 1970, as `time.time` has them."""
    state: State = "running"
    done: int = 0
    total: int | None = None
    what: str = ""
    result: Mapping[str, Any] | None = None
    error: str | None = None
    ended: float | None = None


class SessionStore(Protocol):
    """Where records and runs live."""

    def put(
        self, kind: str, label: str, owner: str, tensors: Mapping[str, Array], provenance: Mapping[str, Any]
    ) -> str:
        """Keep tensors; returns their handle."""
        ...

    def get(self, handle: str, owner: str) -> Record:
        """The record; raises `UnknownHandle`."""
        ...

    def release(self, handle: str, owner: str) -> int:
        """Forget a record or a run; returns the bytes of tensors freed. Raises `UnknownHandle`."""
        ...

    def records(self, owner: str) -> list[Record]:
        """All records of one principal, oldest first."""
        ...

    def start_run(self, owner: str, tool: str, arguments: Mapping[str, Any], provenance: Mapping[str, Any]) -> Run:
        """Keep a run that begins now."""
        ...

    def save_run(self, run: Run) -> None:
        """Keep how far a run is. A run that was released meanwhile stays forgotten."""
        ...

    def run(self, handle: str, owner: str) -> Run:
        """The run; raises `UnknownHandle`."""
        ...

    def runs(self, owner: str) -> list[Run]:
        """All runs of one principal, oldest first."""
        ...

    @property
    def bytes_in_memory(self) -> int:
        """What all principals' records take in memory."""
        ...


class MemoryStore:
    """A `SessionStore` that lives as long as the process."""

    def __init__(self) -> None:
        self._records: dict[str, Record] = {}
        self._runs: dict[str, Run] = {}
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
            raise unknown(handle)
        return record

    def release(self, handle: str, owner: str) -> int:
        if handle.startswith("run:"):
            self.run(handle, owner)
            with self._lock:
                self._runs.pop(handle, None)
            return 0
        record = self.get(handle, owner)
        with self._lock:
            self._records.pop(handle, None)
        return record.nbytes

    def records(self, owner: str) -> list[Record]:
        with self._lock:
            return [record for record in self._records.values() if record.owner == owner]

    def start_run(self, owner: str, tool: str, arguments: Mapping[str, Any], provenance: Mapping[str, Any]) -> Run:
        run = Run(mint("run", tool), owner, tool, dict(arguments), dict(provenance), time.time())
        with self._lock:
            self._runs[run.handle] = run
        return run

    def save_run(self, run: Run) -> None:
        with self._lock:
            if run.handle in self._runs:
                self._runs[run.handle] = run

    def run(self, handle: str, owner: str) -> Run:
        run = self._runs.get(handle)
        if run is None or run.owner != owner:
            raise unknown(handle)
        return run

    def runs(self, owner: str) -> list[Run]:
        with self._lock:
            return [run for run in self._runs.values() if run.owner == owner]

    @property
    def bytes_in_memory(self) -> int:
        with self._lock:
            return sum(record.nbytes for record in self._records.values())


def unknown(handle: str) -> UnknownHandle:
    """The same words for a handle that never was, was released, or is another principal's."""
    return UnknownHandle(
        f"no such handle: {clipped(handle)}. list_session shows the handles that exist; "
        "capture_residuals, prefill_inject(keep=true) and start_job make new ones"
    )


def mint(kind: str, label: str) -> str:
    """A new handle: the kind, up to 32 characters of the label, 128 random bits in hexadecimal."""
    readable = re.sub(r"[^a-z0-9.]+", "-", label.lower()).strip("-")[:32].strip("-")
    return f"{kind}:{readable}-{secrets.token_hex(16)}"
