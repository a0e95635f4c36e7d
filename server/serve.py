"""`mechscope serve`: settings -> one process with one lab, over stdio or HTTP, until it is stopped.

SIGTERM or SIGINT closes the gate: no call is let in, those inside get `stop_within` seconds to end, what is left is
cancelled and answered, then the process ends. A second signal ends it at once. Records are on their way to the store
before a call returns; of what is written while stopping there is only how jobs ended.
"""

import asyncio
import errno
import gc
import logging
import os
import signal
import socket
import sys
from types import FrameType
from typing import Any

import anyio
import uvicorn
from mcp.server import MCPServer

from engine import fast
from engine.heap import keep_freed_memory
from server import logs
from server.app import build_server
from server.auth import Tokens
from server.disk_store import open_store
from server.gate import Gate
from server.idle import give_back_when_idle
from server.lab import Lab
from server.machine import physical_memory
from server.settings import OF_HTTP, BadSettings, Settings
from server.sources import Sources
from server.store import MemoryStore, SessionStore, StoreError
from server.watch import Watch
from server.web import http_app, name_in_url

FLUSH = 0.2
"""Seconds for the answers of ended calls to be written."""

WAITS = """\
mechscope waits for an MCP client on its standard input, and this is a terminal. A client starts it by itself:
  Claude Code     claude mcp add mechscope -- {script} serve
  other clients   "command": "{script}", "args": ["serve"]
Over HTTP, at http://127.0.0.1:{port}/mcp:
  {script} serve --http
Control-C ends it."""

SERVES_HTTP = """\
mechscope serves MCP at http://{place}/mcp (and SSE at http://{place}/sse). Connect a client, for example:
  claude mcp add --transport http mechscope http://{place}/mcp
Control-C ends it."""


def serve(settings: Settings) -> None:
    """Serve MCP over stdio, or with --http over HTTP: /mcp (Streamable HTTP) and /sse on one port."""
    logs.configure(settings.log_level)
    keep_freed_memory()  # before there are threads
    if not settings.fast:
        fast.switch_off("switched off by --no-fast")
    converted = settings.converted and not settings.read_only
    lab = Lab(store(settings), sources(settings), model_budget(settings), converted, settings.memory_budget)
    watch = Watch(lab, Gate(settings.max_calls, settings.max_calls_each))
    server = build_server(lab, settings.toolset, settings.read_only, watch)
    gc.freeze()  # a full collection goes through modules and schemas for 0.1 s, and nobody is answered meanwhile
    if settings.unfollowed is not None:
        said = "http = true of %s is not followed, because stdin belongs to a client; --http or --config asks for it"
        logs.log.warning(said, settings.unfollowed)
    if unused := sorted(settings.model_fields_set & OF_HTTP) if not settings.http else ():
        logs.log.warning("without --http these settings do nothing", extra={"settings": ", ".join(unused)})
    if not settings.http and sys.stdin is not None and sys.stdin.isatty():
        print(WAITS.format(script=sys.argv[0], port=settings.port), file=sys.stderr)
    if settings.http:
        _serve_http(server, settings, watch)
    else:
        anyio.run(_serve_stdio, server, watch.gate, settings.stop_within)


def store(settings: Settings) -> SessionStore:
    """A read-only server leaves the workspace alone: what its clients capture lives as long as it does."""
    if settings.read_only:
        return MemoryStore(settings.memory_budget)
    try:
        return open_store(settings.workspace, settings.memory_budget, settings.disk_budget)
    except StoreError as error:
        raise BadSettings(f"workspace: {error}") from None


def model_budget(settings: Settings) -> int | None:
    """Four fifths of the memory there is, if nothing else is said: activations and records need the rest."""
    if settings.model_budget is not None:
        return settings.model_budget
    memory = physical_memory()
    return None if memory is None else memory * 4 // 5


def sources(settings: Settings) -> Sources:
    """A stdio client runs as the user who started the server; an HTTP client may be anyone with a token."""
    anywhere = not settings.models_dir and not settings.http
    return Sources(None if anywhere else settings.models_dir, settings.downloads and not settings.read_only)


async def _serve_stdio(server: MCPServer[None], gate: Gate, within: float) -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(_stop_on_signal, gate, within)
        group.start_soon(give_back_when_idle, gate)
        await server.run_stdio_async()
        await gate.close(0)  # the client is gone: jobs have nobody to report to, and save how far they came
        group.cancel_scope.cancel()


async def _stop_on_signal(gate: Gate, within: float) -> None:
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        await anext(signals)
        logs.log.info("stopping", extra={"calls": gate.inside})
        async with anyio.create_task_group() as group:
            group.start_soon(_close, gate, within)
            await anext(signals)
            _exit()


async def _close(gate: Gate, within: float) -> None:
    await gate.close(within)
    await anyio.sleep(FLUSH)
    _exit()


def _exit() -> None:
    """Without waiting for the thread that reads stdin: it cannot be woken while the client keeps the pipe open."""
    logging.shutdown()
    os._exit(0)


def _serve_http(server: MCPServer[None], settings: Settings, watch: Watch) -> None:
    tokens = None if settings.token_file is None else Tokens.read(settings.token_file)
    app = http_app(server, settings, watch, tokens)
    config = uvicorn.Config(
        app,
        settings.host,
        settings.port,
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=settings.max_connections,
        timeout_graceful_shutdown=2,
    )
    Draining(config, watch.gate, settings.stop_within).run(listening(settings.host, settings.port))


def listening(host: str, port: int) -> list[socket.socket]:
    """Sockets on every address that the host has here, all on one port. Raises `BadSettings`."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise BadSettings(f"host: {host} has no address here: {error.strerror}") from None
    made: list[socket.socket] = []
    wrong: OSError | None = None
    for family, _, _, _, place in dict.fromkeys(found):
        try:
            made.append(_bound(family, (place[0], made[0].getsockname()[1] if made else port, *place[2:])))
        except OSError as error:  # localhost may have an address of a family that is switched off
            wrong = error
    if wrong is not None and (not made or wrong.errno == errno.EADDRINUSE):
        raise BadSettings(f"port: {host}:{port} cannot be listened on: {wrong.strerror}")
    return made


def _bound(family: int, place: tuple[Any, ...]) -> socket.socket:
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        if os.name == "posix":
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.bind(place)
    except OSError:
        made.close()
        raise
    return made


class Draining(uvicorn.Server):
    """uvicorn that closes the gate before it closes connections, so that running calls are answered."""

    def __init__(self, config: uvicorn.Config, gate: Gate, within: float) -> None:
        super().__init__(config)
        self._gate, self._within = gate, within
        self._closing: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        await super().startup(sockets)  # type: ignore[arg-type]
        self._loop = asyncio.get_running_loop()
        place = f"{name_in_url(self.config.host)}:{self.servers[0].sockets[0].getsockname()[1]}"
        logs.log.info("serving", extra={"url": f"http://{place}/mcp", "sse": f"http://{place}/sse"})
        if sys.stderr.isatty():
            print(SERVES_HTTP.format(place=place), file=sys.stderr)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self.started or self._gate.closed:
            self.should_exit = self.force_exit = True
        else:
            self._loop.call_soon_threadsafe(self._start_closing)

    def _start_closing(self) -> None:
        logs.log.info("stopping", extra={"calls": self._gate.inside})
        self._closing = self._loop.create_task(self._close())

    async def _close(self) -> None:
        await self._gate.close(self._within)
        await asyncio.sleep(FLUSH)
        self.should_exit = True
