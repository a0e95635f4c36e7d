"""`Workspace`: the folder of what sessions keep, and the locks of those who use it.

index.sqlite    what there is (`server.index`)
records/        a safetensors file for each act: and kv: handle (`server.records`)
servers/        a file for each server process, which holds a lock on it as long as it lives
lock            held while the folder is made, brought up to date, joined or repaired
"""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from server.store import StoreError

PATIENCE = 60.0
"""Seconds to wait for another process that makes or repairs the workspace."""


class InUse(StoreError):
    """Somebody else holds the workspace."""


class Workspace:
    """A folder; nothing is made before `create`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.index = root / "index.sqlite"
        self.records = root / "records"
        self._servers = root / "servers"

    def create(self) -> None:
        """Make the folders, for this user only: prompts are in them. Raises `StoreError`."""
        with self._writable("made"):
            for folder in (self.root, self.records, self._servers):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    @contextmanager
    def _writable(self, what: str) -> Iterator[None]:
        try:
            yield
        except Timeout:  # an OSError too
            raise
        except OSError as error:
            raise StoreError(
                f"the workspace {self.root} cannot be {what}: {error.strerror} ({error.filename}); choose another "
                "--workspace, or serve with --read-only, which needs none"
            ) from None

    @contextmanager
    def locked(self, within: float = PATIENCE) -> Iterator[None]:
        """Alone in the workspace but for servers that have joined. Raises `InUse`, or `StoreError` where it cannot be
        written to.
        """
        lock = FileLock(self.root / "lock", timeout=within)
        try:
            with self._writable("locked"):
                lock.acquire()
        except Timeout:
            raise InUse(f"another process makes or repairs the workspace {self.root}; try again later") from None
        try:
            yield
        finally:
            lock.release()

    def join(self) -> "Member":
        """Become one of the servers; call it within `locked`."""
        name = secrets.token_hex(8)
        lock = FileLock(self._servers / name, thread_local=False)
        with self._writable("joined"):
            lock.acquire()
        return Member(name, lock)

    def lives(self, server: str) -> bool:
        """Whether the process of a server still runs: only then is its file locked."""
        if not (self._servers / server).exists():
            return False
        probe = FileLock(self._servers / server)
        try:
            probe.acquire(blocking=False)
        except Timeout:
            return True
        probe.release()
        return False

    def busy(self) -> bool:
        """Whether a server runs here."""
        return any(self.lives(path.name) for path in self._servers.glob("*"))

    def living(self) -> list[str]:
        """The servers that run; files of those that are gone are removed. Call it within `locked`."""
        names = [path.name for path in self._servers.iterdir()]
        alive = [name for name in names if self.lives(name)]
        for name in set(names) - set(alive):
            (self._servers / name).unlink(missing_ok=True)
        return alive


class Member:
    """A server's place in a workspace, until `leave` or the end of the process."""

    def __init__(self, name: str, lock: FileLock) -> None:
        self.name = name
        self._lock = lock

    def leave(self) -> None:
        """Make room for repairs."""
        self._lock.release()
        Path(self._lock.lock_file).unlink(missing_ok=True)
