"""What every HTTP request passes before it reaches a transport: ASGI middleware, in the order `server.web` gives.

Requests      an id, a log line, a count
KnownPlaces   Host and Origin are known: 421 and 403
RateLimit     so many requests of a principal, or of an address without one: 429
RequireToken  401 without a token that is known
"""

import math
import re
import time
from collections.abc import Sequence

from limits import parse
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import MovingWindowRateLimiter
from mcp.server.auth.middleware.bearer_auth import AuthenticatedUser
from mcp.server.transport_security import TransportSecuritySettings
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server import logs
from server.metrics import Metrics

OPEN = ("/health", "/ready")
PATHS = (*OPEN, "/metrics", "/mcp", "/sse", "/messages/")
"""Paths as metrics name them; others count as `other`."""

ELSEWHERE = "this server answers to localhost and to what its"

BUSY = -32000
"""JSON-RPC's first code for a server's own errors."""


class Requests:
    """Outermost: the request's id goes into the logs and back to the client."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500
        with logs.request() as request:

            async def answer(message: Message) -> None:
                nonlocal status
                if message["type"] == "http.response.start":
                    status = message["status"]
                    MutableHeaders(scope=message)["x-request-id"] = request
                await send(message)

            try:
                await self.app(scope, receive, answer)
            finally:
                self._count(scope, status, time.perf_counter() - started)

    def _count(self, scope: Scope, status: int, seconds: float) -> None:
        path = scope["path"] if scope["path"] in PATHS else "other"
        self._metrics.requests.labels(path, str(status)).inc()
        said = {"method": scope["method"], "path": path, "status": status, "seconds": round(seconds, 4)}
        if (name := _name(scope)) is not None:
            said["principal"] = name
        (logs.log.debug if path in OPEN else logs.log.info)("request", extra=said)


class KnownPlaces:
    """Web pages cannot reach the server by a name of their own (DNS rebinding) or from an origin of their own."""

    def __init__(self, app: ASGIApp, security: TransportSecuritySettings) -> None:
        self.app, self._security = app, security

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refused = None
        if scope["type"] == "http" and scope["path"] not in OPEN:
            refused = self._refusal(Headers(scope=scope))
        await (refused or self.app)(scope, receive, send)

    def _refusal(self, headers: Headers) -> JSONResponse | None:
        """The library's own check takes anything behind a known name and a colon; here that is a port."""
        if not _is_named(headers.get("host", ""), self._security.allowed_hosts):
            return _error(f"Invalid Host header: {ELSEWHERE} --allowed-hosts names", 421)
        origin = headers.get("origin")  # of web pages alone
        if origin and not _is_named(origin, self._security.allowed_origins):
            return _error(f"Invalid Origin header: {ELSEWHERE} --allowed-origins names", 403)
        return None


def _is_named(place: str, allowed: Sequence[str]) -> bool:
    name, _, port = place.rpartition(":")
    return place in allowed or (f"{name}:*" in allowed and re.fullmatch(r"[0-9]{1,5}", port) is not None)


class RateLimit:
    """A moving window for each principal; before a token is known, for each address."""

    def __init__(self, app: ASGIApp, rate: str) -> None:
        self.app, self._rate = app, parse(rate)
        self._storage = MemoryStorage()  # the synchronous one starts a thread at every hit
        self._limiter = MovingWindowRateLimiter(self._storage)
        self._latest = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._follow_clock()
        if scope["type"] != "http" or scope["path"] in OPEN or await self._limiter.hit(self._rate, *_who(scope)):
            await self.app(scope, receive, send)
            return
        window = await self._limiter.get_window_stats(self._rate, *_who(scope))
        wait = max(1, math.ceil(window.reset_time - time.time()))
        said = f"too many requests: {self._rate}; try again in {wait} s"
        await _error(said, 429, {"retry-after": str(wait)})(scope, receive, send)

    async def _follow_clock(self) -> None:
        """Begin anew when the clock was set back: the library counts by it, and would wait until it catches up."""
        if (now := time.time()) < self._latest:
            await self._storage.reset()
        self._latest = now


class RequireToken:
    """Everything but `OPEN` needs a token."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN or _name(scope) is not None:
            await self.app(scope, receive, send)
            return
        shown = Request(scope).headers.get("authorization", "").lower().startswith("bearer ")
        challenge = 'Bearer realm="mechscope"' + (', error="invalid_token"' if shown else "")
        said = "this token is not known" if shown else "send a token: Authorization: Bearer TOKEN"
        await _error(said, 401, {"www-authenticate": challenge})(scope, receive, send)


def _name(scope: Scope) -> str | None:
    user = scope.get("user")
    return user.access_token.client_id if isinstance(user, AuthenticatedUser) else None


def _who(scope: Scope) -> tuple[str, str]:
    name = _name(scope)
    return ("address", (scope.get("client") or ("", 0))[0]) if name is None else ("principal", name)


def _error(said: str, status: int, headers: dict[str, str] | None = None) -> JSONResponse:
    """An answer that HTTP clients and JSON-RPC clients both understand."""
    body = {"jsonrpc": "2.0", "id": None, "error": {"code": BUSY, "message": said}}
    return JSONResponse(body, status, headers)
