"""The session store: handles for what tools keep. `SessionStore` is the interface, `MemoryStore` keeps it in memory,
`server.disk_store.DiskStore` on disk.

A handle is `kind:readable-part-<128 random bits>`; it belongs to the principal that made it, and to others it does
not exist. Kinds: act (captured tensors), kv (caches), run (a tool call that was started as a job); and model, which all
principals share.

StoreError          what a store cannot do; the message says what to do instead
    UnknownHandle   no such handle, or not this principal's
    OutOfSpace      a budget is used up
    DamagedRecord   the file of a record is missing or not what was written
"""

import json
import re
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Protocol

from pydantic import ByteSize

from engine.errors import clipped
from engine.ops import Array

_HANDLE = re.compile(r"[a-z]+:[a-z0-9.-]*-[0-9a-f]{32}")


class StoreError(Exception):
    """What a store cannot do."""


class UnknownHandle(StoreError):
    """No such handle, or not this principal's."""


class OutOfSpace(StoreError):
    """There is no room for what was to be kept."""


class DamagedRecord(StoreError):
    """A record's tensors cannot be had back."""


@dataclass(frozen=True)
class Record:
    """What a handle stands for: named tensors, and how they were made (JSON values).

    Provenance has what the tool said, and `tensors`: dtype and shape of each; on disk also the file's `sha256`.
    Tensors that are on disk only are read when one is looked at: that may raise `DamagedRecord`.
    """

    handle: str
    owner: str
    tensors: Mapping[str, Array]
    provenance: Mapping[str, Any]
    nbytes: int
    in_memory: bool = True


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


@dataclass(frozen=True)
class RememberedModel:
    """A model that was loaded once: what it takes to load it again under its handle."""

    handle: str
    name: str
    source: str
    weights: str
    """How they are kept, as `load_model` has it."""
    dense_layers: int | None
    """The budget of scoped weights; None for others."""
    fingerprint: str
    nbytes: int


class SessionStore(Protocol):
    """Where records, runs and the handles of models live."""

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

    def remember_model(
        self, name: str, source: str, weights: str, dense_layers: int | None, fingerprint: str, nbytes: int
    ) -> RememberedModel:
        """A model with its handle: the one it got before, or a new one for other weights."""
        ...

    def models(self) -> list[RememberedModel]:
        """All models that have handles, oldest first."""
        ...

    def require_room(self, wanted: int, owner: str) -> None:
        """Raise `OutOfSpace` unless tensors of so many bytes could be kept now."""
        ...

    def shrink(self, to: int) -> int:
        """Let go of what is in memory and elsewhere too, until so many bytes are left; returns how many are."""
        ...

    @property
    def bytes_in_memory(self) -> int:
        """What all principals' records take in memory, and runs that are nowhere else."""
        ...

    @property
    def bytes_on_disk(self) -> int:
        """What all principals' records and runs take on disk."""
        ...


class MemoryStore:
    """A `SessionStore` that lives as long as the process."""

    bytes_on_disk = 0

    def __init__(self, budget: int | None = None) -> None:
        """Records and runs take at most `budget` bytes."""
        self._budget = budget
        self._records: dict[str, Record] = {}
        self._runs: dict[str, Run] = {}
        self._taken_by: dict[str, int] = {}
        """Bytes by handle, records' and runs'; `_used` is their sum."""
        self._used = 0
        self._models: dict[str, RememberedModel] = {}
        self._lock = threading.RLock()

    def put(
        self, kind: str, label: str, owner: str, tensors: Mapping[str, Array], provenance: Mapping[str, Any]
    ) -> str:
        handle, size = mint(kind, label), nbytes(tensors)
        made = Record(handle, owner, dict(tensors), {**provenance, "tensors": layout(tensors)}, size)
        with self._lock:
            self.require_room(size, owner)
            self._records[handle] = made
            self._count(handle, size)
        return handle

    def _count(self, handle: str, size: int) -> None:
        """What a handle takes from now on."""
        self._used += size - self._taken_by.pop(handle, 0)
        if size:
            self._taken_by[handle] = size

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
                self._count(handle, 0)
            return 0
        record = self.get(handle, owner)
        with self._lock:
            self._records.pop(handle, None)
            self._count(handle, 0)
        return record.nbytes

    def records(self, owner: str) -> list[Record]:
        with self._lock:
            return [record for record in self._records.values() if record.owner == owner]

    def start_run(self, owner: str, tool: str, arguments: Mapping[str, Any], provenance: Mapping[str, Any]) -> Run:
        run = Run(mint("run", tool), owner, tool, dict(arguments), dict(provenance), time.time())
        with self._lock:
            size = _taken(run)
            self.require_room(size, owner)
            self._runs[run.handle] = run
            self._count(run.handle, size)
        return run

    def save_run(self, run: Run) -> None:
        with self._lock:
            if run.handle in self._runs:
                self._runs[run.handle], size = self._fitting(run)
                self._count(run.handle, size)

    def _fitting(self, run: Run) -> tuple[Run, int]:
        """The run, or word of why what came of it could not be kept; and its size."""
        size = _taken(run)
        try:
            self.require_room(size - self._taken_by[run.handle], run.owner)
        except OutOfSpace as error:
            short = unkept(run, error)
            return short, _taken(short)
        return run, size

    def run(self, handle: str, owner: str) -> Run:
        run = self._runs.get(handle)
        if run is None or run.owner != owner:
            raise unknown(handle)
        return run

    def runs(self, owner: str) -> list[Run]:
        with self._lock:
            return [run for run in self._runs.values() if run.owner == owner]

    def remember_model(
        self, name: str, source: str, weights: str, dense_layers: int | None, fingerprint: str, nbytes: int
    ) -> RememberedModel:
        made = RememberedModel(mint("model", name), name, source, weights, dense_layers, fingerprint, nbytes)
        with self._lock:
            known = next((model for model in self._models.values() if is_same(model, made)), made)
            self._models[known.handle] = known
        return known

    def models(self) -> list[RememberedModel]:
        with self._lock:
            return list(self._models.values())

    @property
    def bytes_in_memory(self) -> int:
        return self._used

    def require_room(self, wanted: int, owner: str) -> None:
        with self._lock:
            used = self.bytes_in_memory
            if self._budget is not None and used + wanted > self._budget:
                raise no_room(wanted, used, self._budget, self.records(owner))

    def shrink(self, to: int) -> int:
        return self.bytes_in_memory


RESERVED = 4096
"""Bytes of a budget that a run takes beyond its start, so that it can always end with a word of why."""


def run_body(run: Run) -> str:
    """A run as JSON; ASCII, so that its length is its bytes."""
    return json.dumps(asdict(run), allow_nan=False)


def unkept(run: Run, why: StoreError) -> Run:
    """The end of a run whose result there is no room for."""
    said = f"it was {run.state}, but what came of it could not be kept: {why}"[: RESERVED // 4]
    return replace(run, state="failed", result=None, error=said)


def _taken(run: Run) -> int:
    return len(run_body(run)) + (RESERVED if run.state == "running" else 0)


def unknown(handle: str) -> UnknownHandle:
    """The same words for a handle that never was, was released, or is another principal's."""
    return UnknownHandle(
        f"no such handle: {clipped(handle)}. list_session shows the handles that exist; "
        "capture_residuals, prefill_inject(keep=true) and start_job make new ones"
    )


def no_room(wanted: int, used: int, budget: int, own: Sequence[Record]) -> OutOfSpace:
    """The error of a budget that is used up; it names the principal's largest handles."""
    largest = sorted(own, key=lambda record: -record.nbytes)[:3]
    names = ", ".join(f"{record.handle} ({ByteSize(record.nbytes).human_readable()})" for record in largest)
    wants, has, may = (ByteSize(number).human_readable() for number in (wanted, used, budget))
    return OutOfSpace(
        f"this takes {wants}, and {has} of {may} are used: nothing was kept. Release what is no longer needed; "
        f"your largest: {names or 'none, so others hold it all'}"
    )


def is_same(one: RememberedModel, other: RememberedModel) -> bool:
    """Whether two are the same weights from the same place, kept in the same way."""
    return replace(one, handle=other.handle, name=other.name, nbytes=other.nbytes) == other


def nbytes(tensors: Mapping[str, Array]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def layout(tensors: Mapping[str, Array]) -> dict[str, Any]:
    """{name: dtype and shape}, as provenance has it."""
    return {name: {"dtype": str(tensor.dtype), "shape": list(tensor.shape)} for name, tensor in tensors.items()}


def is_handle(text: str) -> bool:
    """Whether `mint` may have made it; only then is it looked for."""
    return _HANDLE.fullmatch(text) is not None


def mint(kind: str, label: str) -> str:
    """A new handle: the kind, up to 32 characters of the label, 128 random bits in hexadecimal."""
    readable = re.sub(r"[^a-z0-9.]+", "-", label.lower()).strip("-")[:32].strip("-")
    return f"{kind}:{readable}-{secrets.token_hex(16)}"
