"""What is wrong with a workspace, and `mechscope doctor --repair`, which puts it in order.

A server that was killed may leave files that no handle refers to. Files that are missing or damaged are the work of
others: a handle whose file is missing is removed, since nothing can bring it back; one whose file is damaged stays,
and says so when it is used, until it is released. Files from before the index was made belong to an index that was
lost: they stay.
"""

import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from pydantic import ByteSize

from server import records
from server.index import Index, migrate
from server.store import StoreError
from server.workspace import InUse, Workspace

Say = Callable[[str], None]
CLOCKS = 2.0
"""Seconds by which the clocks of files and of SQLite may differ."""


@dataclass(frozen=True)
class Findings:
    """Files and handles that do not fit together."""

    strays: list[Path]
    """Files that no handle refers to, unfinished ones included."""
    older: list[Path]
    """Files that no handle refers to, from before there was this index."""
    missing: list[str]
    damaged: list[str]
    handles: int
    nbytes: int


def inspect(workspace: Workspace, index: Index, deep: bool) -> Findings:
    """Compare index and files; a `deep` look reads every file."""
    present = set(workspace.records.iterdir())  # before the rows: a file precedes its row
    rows = index.read("SELECT handle, sha256, file_bytes FROM records ORDER BY number")
    paths = {row["handle"]: workspace.records / records.file_name(row["handle"]) for row in rows}
    missing = [handle for handle, path in paths.items() if not path.exists()]
    faults = {row["handle"]: records.fault(paths[row["handle"]], row["sha256"]) for row in rows if deep}
    damaged = [handle for handle, fault in faults.items() if fault not in (None, records.MISSING)]
    unknown = sorted(present - set(paths.values()))
    (origin,) = index.read("SELECT made FROM origin")
    older = [path for path in unknown if path.stat().st_mtime < origin["made"] - CLOCKS]
    strays = [path for path in unknown if path not in older]
    return Findings(strays, older, missing, damaged, len(rows), sum(row["file_bytes"] for row in rows))


def state(root: Path, deep: bool = False) -> tuple[bool, str]:
    """Whether a workspace is in order, and what it holds; a `deep` look reads every file."""
    workspace = Workspace(root)
    if not workspace.index.exists():
        return True, "no handles yet"
    try:
        workspace.create()
        busy = workspace.busy()
        with closing(Index(workspace.index)) as index:
            found = inspect(workspace, index, deep)
    except StoreError as error:
        return False, str(error)
    held = f"{found.handles} handles, {ByteSize(found.nbytes).human_readable()}"
    held += ", all files compared with their sha256" if deep else ", files counted (--thorough reads them)"
    if found.damaged:
        return False, f"{held}; damaged, to be released and made anew: {', '.join(found.damaged)}"
    if busy:  # files come before their rows and go after them, so nothing can be said
        return True, f"{held}, in use by a server"
    if found.strays or found.missing:
        many, few = len(found.strays), len(found.missing)
        return False, f"{held}; {many} files too many, {few} too few: mechscope doctor --repair"
    if found.older:
        return False, f"{held}; {_told(found.older)}"
    return True, held


def repair(root: Path, say: Say) -> None:
    """Put a workspace in order, telling each thing that is done. Raises `InUse` while a server runs on it."""
    workspace = Workspace(root)
    if not workspace.index.exists():
        say(f"{root} has no workspace: there is nothing to repair")
        return
    workspace.create()
    with workspace.locked(within=5):
        if servers := workspace.living():
            raise InUse(f"{len(servers)} servers run on {root}; stop them, then repair")
        _check_database(workspace.index)
        migrate(workspace.index)
        with closing(Index(workspace.index)) as index:
            _tidy(workspace, index, say)


def _check_database(path: Path) -> None:
    connection = sqlite3.connect(path)
    try:
        (said,) = connection.execute("PRAGMA integrity_check").fetchone()
    except sqlite3.Error as error:
        said = str(error)
    finally:
        connection.close()
    if said != "ok":
        raise StoreError(
            f"the index {path} is damaged ({said}) and its handles are lost. Their tensors are still in "
            f"{path.parent / 'records'}, as safetensors files that say what they are: keep a copy of that folder, then "
            f"delete {path.parent} to begin anew"
        )


def _tidy(workspace: Workspace, index: Index, say: Say) -> None:
    found = inspect(workspace, index, deep=True)
    for path in found.strays:
        say(f"removed {path.name}, {ByteSize(path.stat().st_size).human_readable()}: no handle refers to it")
        path.unlink()
    for handle in found.missing:
        with index.writing() as db:
            db.execute("DELETE FROM records WHERE handle = ?", (handle,))
        say(f"removed the handle {handle}: its file is missing")
    for handle in found.damaged:
        say(f"left {handle}, whose file is damaged: release it")
    if found.older:
        say(f"left {_told(found.older)}")
    say(f"{workspace.root} is in order: {found.handles - len(found.missing)} handles")


def _told(older: list[Path]) -> str:
    return (
        f"{len(older)} files in {older[0].parent} are from before the index: it was lost, and their handles with it. "
        "Each says itself what it is (safetensors metadata); take them elsewhere, or delete them"
    )
