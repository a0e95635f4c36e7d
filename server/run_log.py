"""`RunLog`: the runs of a workspace. A run that has ended stays as it ended: progress may come late.

A run belongs to the server that started it. When that server is gone, a run it left behind is `interrupted`.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from server.index import Index
from server.store import RESERVED, Run, StoreError, is_handle, mint, run_body, unkept, unknown

Room = Callable[[Any, int, str], None]
"""Raises `OutOfSpace` unless so many bytes of this principal fit; called within a transaction."""


class RunLog:
    """Runs in the index. How often progress is saved is the business of who saves it."""

    def __init__(self, index: Index, server: str, lives: Callable[[str], bool], room: Room) -> None:
        self._index, self._server, self._lives, self._room = index, server, lives, room

    def start(self, owner: str, tool: str, arguments: Mapping[str, Any], provenance: Mapping[str, Any]) -> Run:
        run = Run(mint("run", tool), owner, tool, dict(arguments), dict(provenance), time.time())
        body = run_body(run)
        with self._index.writing() as db:
            self._room(db, len(body) + RESERVED, owner)
            db.execute(
                "INSERT INTO runs (handle, owner, server, state, bytes, body) VALUES (?, ?, ?, ?, ?, ?)",
                (run.handle, owner, self._server, run.state, len(body) + RESERVED, body),
            )
        return run

    def save(self, run: Run) -> None:
        """What cannot be kept of an end is said in its place."""
        try:
            self._update(run)
        except StoreError as error:
            if run.state == "running":
                raise
            self._update(unkept(run, error))

    def _update(self, run: Run) -> None:
        """Nothing happens to a run that has ended or was released."""
        body = run_body(run)
        with self._index.writing() as db:
            row = db.execute("SELECT bytes FROM runs WHERE handle = ? AND state = 'running'", (run.handle,)).fetchone()
            if row is None:
                return
            if len(body) > row["bytes"]:
                self._room(db, len(body) - row["bytes"], run.owner)
            size = max(len(body), row["bytes"]) if run.state == "running" else len(body)
            db.execute(
                "UPDATE runs SET state = ?, bytes = ?, body = ? WHERE handle = ?", (run.state, size, body, run.handle)
            )

    def get(self, handle: str, owner: str) -> Run:
        """Raises `UnknownHandle`."""
        query = "SELECT server, body FROM runs WHERE handle = ? AND owner = ?"
        rows = self._index.read(query, handle, owner) if is_handle(handle) else []
        if not rows:
            raise unknown(handle)
        return self._now(rows[0])

    def all(self, owner: str) -> list[Run]:
        """Oldest first."""
        rows = self._index.read("SELECT server, body FROM runs WHERE owner = ? ORDER BY number", owner)
        return [self._now(row) for row in rows]

    def release(self, handle: str, owner: str) -> None:
        """Raises `UnknownHandle`."""
        with self._index.writing() as db:
            gone = db.execute("DELETE FROM runs WHERE handle = ? AND owner = ?", (handle, owner)).rowcount
        if not gone:
            raise unknown(handle)

    def interrupt_abandoned(self) -> int:
        """Runs of servers that are gone have ended; how many they were."""
        rows = self._index.read("SELECT server, body FROM runs WHERE state = 'running'")
        return sum(self._now(row).state == "interrupted" for row in rows)

    def _now(self, row: Any) -> Run:
        run = Run(**json.loads(row["body"]))
        if run.state != "running" or row["server"] == self._server or self._lives(row["server"]):
            return run
        ended = replace(run, state="interrupted", ended=time.time(), error="the server ended while this was going on")
        self._update(ended)
        return ended
