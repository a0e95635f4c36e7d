"""`Index`: the SQLite database of a workspace. What a handle stands for is here; numbers are in files beside it.

Several processes share one index. Writers take turns (`BEGIN IMMEDIATE`), readers never wait for them (WAL), and what
was committed is on the disk (`synchronous=FULL`).
"""

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from server.store import StoreError

PATIENCE = 60.0
"""Seconds to wait for another process that writes."""

MIGRATIONS = (
    """
    CREATE TABLE records (
        number INTEGER PRIMARY KEY,
        handle TEXT NOT NULL UNIQUE,
        owner TEXT NOT NULL,
        made REAL NOT NULL,
        sha256 TEXT NOT NULL,
        file_bytes INTEGER NOT NULL,
        tensor_bytes INTEGER NOT NULL,
        provenance TEXT NOT NULL
    );
    CREATE INDEX records_of ON records (owner);
    CREATE TABLE runs (
        number INTEGER PRIMARY KEY,
        handle TEXT NOT NULL UNIQUE,
        owner TEXT NOT NULL,
        server TEXT NOT NULL,
        state TEXT NOT NULL,
        bytes INTEGER NOT NULL,
        body TEXT NOT NULL
    );
    CREATE INDEX runs_of ON runs (owner);
    CREATE TABLE models (
        number INTEGER PRIMARY KEY,
        handle TEXT NOT NULL UNIQUE,
        name TEXT NOT NULL,
        source TEXT NOT NULL,
        dense_layers INTEGER,
        fingerprint TEXT NOT NULL,
        bytes INTEGER NOT NULL
    );
    """,
    """
    CREATE TABLE origin (made REAL NOT NULL);
    INSERT INTO origin
        SELECT iif(EXISTS (SELECT 1 FROM records), 0, (julianday('now') - 2440587.5) * 86400);
    """,
    """
    ALTER TABLE models ADD COLUMN weights TEXT NOT NULL DEFAULT 'dense';
    UPDATE models SET weights = 'scoped' WHERE dense_layers IS NOT NULL;
    UPDATE models SET weights = 'bf16' WHERE fingerprint LIKE '%:bf16';
    """,
)
"""Each brings an index to the next version; `user_version` counts those that were applied."""


class Index:
    """Two connections, so that threads which read do not wait for threads which write."""

    def __init__(self, path: Path) -> None:
        """Open an index that `migrate` has brought up to date."""
        self._path = path
        with _explained(path):
            self._writer, self._reader = _connect(path), _connect(path)
        self._writing, self._reading = threading.Lock(), threading.Lock()

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction: committed at the end of the `with` block, undone by an exception. Raises `StoreError`."""
        with self._writing, _explained(self._path), transaction(self._writer):
            yield self._writer

    def read(self, query: str, *values: Any) -> list[sqlite3.Row]:
        """The rows of a query. Raises `StoreError`."""
        with self._reading, _explained(self._path):
            return self._reader.execute(query, values).fetchall()

    def close(self) -> None:
        """Close both connections; the last to close a database merges its log."""
        with self._writing, self._reading:
            self._writer.close()
            self._reader.close()


def migrate(path: Path) -> None:
    """Make an index, or bring it up to date. Call it within `Workspace.locked`: switching to WAL cannot be shared."""
    with _explained(path):
        path.touch(mode=0o600)  # prompts are in it; SQLite gives its other files the same mode
        connection = _connect(path)
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            with transaction(connection):
                _apply(connection, path)
        finally:
            connection.close()


def _apply(connection: sqlite3.Connection, path: Path) -> None:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > len(MIGRATIONS):
        raise StoreError(f"{path} was written by a newer mechscope; update this one, or choose another --workspace")
    for script in MIGRATIONS[version:]:
        for statement in script.split(";"):
            connection.execute(statement)
    connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """A write transaction for the length of a `with` block."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):  # an error of the disk may have undone it already
            connection.execute("ROLLBACK")
        raise


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=PATIENCE, isolation_level=None, check_same_thread=False)
    connection.row_factory = sqlite3.Row
    connection.execute("PRAGMA synchronous = FULL")
    return connection


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """SQLite's errors, in words that say where and what to do."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise StoreError(f"the index {path} cannot be used: {reason}; {_advice(error)}") from error


def _advice(error: Exception) -> str:
    name = getattr(error, "sqlite_errorname", "") or ""
    if name == "SQLITE_FULL":
        return "free the disk it is on, then call again"
    if name.startswith("SQLITE_BUSY"):
        return "another server has been writing for long: call again"
    if isinstance(error, OSError) or name.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM")):
        return "the server's user must be able to write to it and its folder"
    return "stop its servers and run `mechscope doctor --repair`"
