"""Real `mechscope serve` processes for the tests, and clients of all three transports.

serving     a server over HTTP on a free port, until the end of a `with` block
reached     a client of one transport, in one era
"""

import json
import os
import signal
import subprocess
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from clients import SCRIPT, connected
from mcp import Client
from mcp.client.sse import sse_client
from mcp.client.stdio import StdioServerParameters
from mcp.client.streamable_http import streamable_http_client
from mcp.shared._httpx_utils import create_mcp_http_client
from waiting import PATIENCE

TOKENS = {"ann": "a" * 40, "bob": "b" * 40}
TRANSPORTS = ("stdio", "http", "sse")
MECHSCOPE = (str(SCRIPT),)


class Served:
    """A server process. Its log is read as it is written, so that it never blocks."""

    def __init__(
        self,
        *arguments: str,
        env: dict[str, str] | None = None,
        command: Sequence[str] = MECHSCOPE,
        cwd: Path | None = None,
    ) -> None:
        whole = [*command, "serve", "--http", "--port", "0", *arguments]
        self.process = subprocess.Popen(whole, stderr=subprocess.PIPE, text=True, env=os.environ | (env or {}), cwd=cwd)
        self.log: list[dict[str, Any]] = []
        self._listening = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if not self._listening.wait(PATIENCE) or not self._urls:
            self.stop(signal.SIGKILL)
            raise RuntimeError(f"the server did not start: {self.log}")

    _urls: dict[str, Any] | None = None

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            record = json.loads(line) if line.startswith("{") else {"message": line}  # what Python says at its end
            self.log.append(record)
            if record["message"] == "serving":
                self._urls = record
                self._listening.set()
        self._listening.set()

    @property
    def base(self) -> str:
        assert self._urls is not None
        return str(self._urls["url"]).removesuffix("/mcp")

    def stop(self, sig: int = signal.SIGTERM, within: float = PATIENCE) -> int:
        self.process.send_signal(sig)
        try:
            return self.process.wait(within)
        finally:
            self.process.kill()
            self._reader.join(PATIENCE)
            assert self.process.stderr is not None
            self.process.stderr.close()


@contextmanager
def serving(*arguments: str, env: dict[str, str] | None = None, command: Sequence[str] = MECHSCOPE) -> Iterator[Served]:
    with ending(Served(*arguments, env=env, command=command)) as served:
        yield served


@contextmanager
def ending(served: Served) -> Iterator[Served]:
    """A server that is killed at the end of a `with` block."""
    try:
        yield served
    finally:
        served.stop(signal.SIGKILL)


def token_file(folder: Path) -> Path:
    path = folder / "tokens"
    path.write_text("# who may call\n" + "".join(f"{name} {token}\n" for name, token in TOKENS.items()))
    path.chmod(0o600)
    return path


def headers(name: str | None) -> dict[str, str]:
    return {} if name is None else {"Authorization": f"Bearer {TOKENS[name]}"}


@asynccontextmanager
async def reached(base: str, transport: str, mode: str = "auto", name: str | None = None) -> AsyncIterator[Client]:
    if transport == "http":
        async with (
            create_mcp_http_client(headers=headers(name)) as http,
            connected(streamable_http_client(f"{base}/mcp", http_client=http), mode) as client,
        ):
            yield client
        return
    server = sse_client(f"{base}/sse", headers=headers(name)) if transport == "sse" else over_stdio()
    async with connected(server, mode) as client:
        yield client


def over_stdio(*arguments: str, command: Sequence[str] = MECHSCOPE) -> StdioServerParameters:
    return StdioServerParameters(command=command[0], args=[*command[1:], "serve", *arguments], env=dict(os.environ))
