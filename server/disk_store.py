"""`DiskStore`: a session store in a workspace. What it has answered for is on the disk, and survives the process.

Order of writing: file, row, answer. Of deleting: row, file. So a row always has its file, and a process that is
killed in between leaves at most a file without a row, which `mechscope doctor --repair` removes.
"""

import json
import sqlite3
import time
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from engine.ops import Array
from server import records
from server.index import Index, migrate
from server.records import TensorCache
from server.run_log import RunLog
from server.store import (
    DamagedRecord,
    Record,
    RememberedModel,
    Run,
    is_handle,
    layout,
    mint,
    nbytes,
    no_room,
    unknown,
)
from server.workspace import Member, Workspace


class DiskStore:
    """Several processes may have one workspace open; each has a memory budget, and they share the disk budget."""

    def __init__(self, workspace: Workspace, memory_budget: int, disk_budget: int, member: Member) -> None:
        """Of a workspace that `open_store` has prepared."""
        self._workspace, self._member, self._disk_budget = workspace, member, disk_budget
        self._index = Index(workspace.index)
        self._cache = TensorCache(memory_budget)
        self._runs = RunLog(self._index, member.name, workspace.lives, self._require_room)

    # --- records ------------------------------------------------------------------------------------------

    def put(
        self, kind: str, label: str, owner: str, tensors: Mapping[str, Array], provenance: Mapping[str, Any]
    ) -> str:
        handle, kept = mint(kind, label), dict(tensors)
        described = {**provenance, "tensors": layout(kept)}
        data = records.pack(handle, kept, described)
        described["sha256"] = records.sha256(data)
        self._require_room(None, len(data), owner)  # before a file is written that could not stay
        path = self._path(handle)
        records.write(path, data)
        try:
            with self._index.writing() as db:
                self._require_room(db, len(data), owner)
                db.execute(
                    "INSERT INTO records (handle, owner, made, sha256, file_bytes, tensor_bytes, provenance) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?)",
                    (
                        handle, owner, time.time(), described["sha256"],
                        len(data), nbytes(kept), json.dumps(described, allow_nan=False),
                    ),
                )  # fmt: skip
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        self._cache.keep(handle, kept)
        return handle

    def get(self, handle: str, owner: str) -> Record:
        query = "SELECT * FROM records WHERE handle = ? AND owner = ?"
        rows = self._index.read(query, handle, owner) if is_handle(handle) else []
        if not rows:
            raise unknown(handle)
        return self._record(rows[0])

    def release(self, handle: str, owner: str) -> int:
        if not is_handle(handle):
            raise unknown(handle)
        if handle.startswith("run:"):
            self._runs.release(handle, owner)
            return 0
        with self._index.writing() as db:
            row = db.execute(
                "DELETE FROM records WHERE handle = ? AND owner = ? RETURNING tensor_bytes", (handle, owner)
            ).fetchone()
        if row is None:
            raise unknown(handle)
        self._cache.drop(handle)
        self._path(handle).unlink(missing_ok=True)
        return int(row["tensor_bytes"])

    def records(self, owner: str) -> list[Record]:
        rows = self._index.read("SELECT * FROM records WHERE owner = ? ORDER BY number", owner)
        return [self._record(row) for row in rows]

    def _record(self, row: sqlite3.Row) -> Record:
        handle, provenance = row["handle"], json.loads(row["provenance"])
        tensors = OnDisk(self, handle, row["sha256"], list(provenance["tensors"]))
        return Record(handle, row["owner"], tensors, provenance, row["tensor_bytes"], handle in self._cache)

    def tensors(self, handle: str, sha256: str) -> Mapping[str, Array]:
        """From memory, or read and checked. Raises `DamagedRecord`, or `UnknownHandle` if it was released meanwhile."""
        held = self._cache.get(handle)
        if held is None:
            try:
                held = records.read(self._path(handle), handle, sha256)
            except DamagedRecord:
                if not self._index.read("SELECT 1 FROM records WHERE handle = ?", handle):
                    raise unknown(handle) from None
                raise
            self._cache.keep(handle, held)
        return held

    def _path(self, handle: str) -> Path:
        return self._workspace.records / records.file_name(handle)

    # --- budgets ------------------------------------------------------------------------------------------

    def _require_room(self, db: sqlite3.Connection | None, wanted: int, owner: str) -> None:
        """Raise `OutOfSpace` unless it fits; within a transaction no other process can take the room meanwhile."""
        used = self.bytes_on_disk if db is None else int(db.execute(_USED).fetchone()["used"])
        if used + wanted > self._disk_budget:
            raise no_room(wanted, used, self._disk_budget, self.records(owner))

    def require_room(self, wanted: int, owner: str) -> None:
        self._require_room(None, wanted, owner)

    def shrink(self, to: int) -> int:
        return self._cache.shrink(to)

    @property
    def bytes_in_memory(self) -> int:
        return self._cache.nbytes

    @property
    def bytes_on_disk(self) -> int:
        return int(self._index.read(_USED)[0]["used"])

    # --- runs ---------------------------------------------------------------------------------------------

    def start_run(self, owner: str, tool: str, arguments: Mapping[str, Any], provenance: Mapping[str, Any]) -> Run:
        return self._runs.start(owner, tool, arguments, provenance)

    def save_run(self, run: Run) -> None:
        self._runs.save(run)

    def run(self, handle: str, owner: str) -> Run:
        return self._runs.get(handle, owner)

    def runs(self, owner: str) -> list[Run]:
        return self._runs.all(owner)

    def interrupt_abandoned(self) -> int:
        """Runs of servers that are gone become `interrupted`; how many they were."""
        return self._runs.interrupt_abandoned()

    # --- models -------------------------------------------------------------------------------------------

    def remember_model(
        self, name: str, source: str, weights: str, dense_layers: int | None, fingerprint: str, nbytes: int
    ) -> RememberedModel:
        known = (json.dumps(source), weights, dense_layers, fingerprint)
        with self._index.writing() as db:
            row = db.execute(
                "SELECT * FROM models WHERE source = ? AND weights = ? AND dense_layers IS ? AND fingerprint = ?", known
            ).fetchone()
            if row is not None:
                return _model(row)
            made = RememberedModel(mint("model", name), name, source, weights, dense_layers, fingerprint, nbytes)
            db.execute(
                "INSERT INTO models (handle, name, source, weights, dense_layers, fingerprint, bytes) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                (made.handle, json.dumps(name), *known, nbytes),
            )
        return made

    def models(self) -> list[RememberedModel]:
        return [_model(row) for row in self._index.read("SELECT * FROM models ORDER BY number")]

    def close(self) -> None:
        """Leave the workspace to others."""
        self._index.close()
        self._member.leave()


_USED = "SELECT (SELECT coalesce(sum(file_bytes), 0) FROM records) + (SELECT coalesce(sum(bytes), 0) FROM runs) AS used"


def _model(row: sqlite3.Row) -> RememberedModel:
    """Names and paths are kept as JSON: not every path is valid Unicode."""
    name, source = json.loads(row["name"]), json.loads(row["source"])
    kept, budget = row["weights"], row["dense_layers"]
    return RememberedModel(row["handle"], name, source, kept, budget, row["fingerprint"], row["bytes"])


class OnDisk(Mapping[str, Array]):
    """The tensors of a record by name; they are read when one is looked at."""

    def __init__(self, store: DiskStore, handle: str, sha256: str, names: list[str]) -> None:
        self._store, self._handle, self._sha256, self._names = store, handle, sha256, names

    @cached_property
    def _tensors(self) -> Mapping[str, Array]:
        return self._store.tensors(self._handle, self._sha256)

    def __getitem__(self, name: str) -> Array:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def open_store(root: Path, memory_budget: int, disk_budget: int) -> DiskStore:
    """The store of a workspace, which is made when there is none. Raises `StoreError`."""
    workspace = Workspace(root)
    workspace.create()
    with workspace.locked():
        migrate(workspace.index)
        workspace.living()
        store = DiskStore(workspace, memory_budget, disk_budget, workspace.join())
        store.interrupt_abandoned()
    return store
