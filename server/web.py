"""HTTP: one application with Streamable HTTP (`/mcp`), SSE (`/sse`, `/messages/`), `/health`, `/ready` and `/metrics`.

What a request passes, from outside in: its id and log line, the check of Host and Origin, its token, the rate limit,
the demand for a token; errors about its body come to name it. `/health` and `/ready` are for whoever watches the
process, and skip the checks.
"""

import ipaddress
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
from mcp.server import MCPServer
from mcp.server.auth.middleware.auth_context import AuthContextMiddleware
from mcp.server.auth.middleware.bearer_auth import BearerAuthBackend
from mcp.server.transport_security import TransportSecuritySettings
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from server.auth import Tokens
from server.checks import KnownPlaces, RateLimit, Requests, RequireToken
from server.idle import give_back_when_idle
from server.settings import Settings
from server.unreadable import NameIds
from server.watch import Watch

LOCAL_NAMES = ("127.0.0.1", "localhost", "[::1]")


def http_app(server: MCPServer[None], settings: Settings, watch: Watch, tokens: Tokens | None) -> Starlette:
    """Both transports and the operator's pages. The lab lives outside: with SSE, MCP's lifespan is one connection's."""
    security = transport_security(settings)
    most = int(settings.body_limit)
    streamable = server.streamable_http_app(
        transport_security=security, max_request_body_size=most, max_sessions=settings.max_connections
    )
    sse = server.sse_app(transport_security=security, max_request_body_size=most)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with server.session_manager.run(), anyio.create_task_group() as group:
            group.start_soon(watch.metrics.follow_loop)
            group.start_soon(give_back_when_idle, watch.gate)
            yield
            group.cancel_scope.cancel()

    return Starlette(
        routes=[*streamable.routes, *sse.routes, *_pages(watch)],
        middleware=_middleware(settings, watch, tokens, security),
        lifespan=lifespan,
    )


def name_in_url(host: str) -> str:
    """What stands for `--host` in a URL: a name, or an address as browsers write it."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host.lower()
    if address.is_unspecified:  # every address, of which this machine can reach its own
        address = ipaddress.ip_address("::1" if address.version == 6 else "127.0.0.1")
    return f"[{address.compressed}]" if address.version == 6 else address.compressed


def transport_security(settings: Settings) -> TransportSecuritySettings:
    """Which Host and Origin headers are answered: localhost's, `--host`'s, and those in the settings, on every bind."""
    own = list(dict.fromkeys([*LOCAL_NAMES, name_in_url(settings.host)]))
    names = [*own, *settings.allowed_hosts]
    return TransportSecuritySettings(
        allowed_hosts=[*names, *(f"{name}:*" for name in names if _without_port(name))],
        allowed_origins=[
            *(f"http://{name}{port}" for name in own for port in ("", ":*")),
            *settings.allowed_origins,
        ],
    )


def _without_port(name: str) -> bool:
    return ":" not in name.rpartition("]")[2]


def _middleware(
    settings: Settings, watch: Watch, tokens: Tokens | None, security: TransportSecuritySettings
) -> list[Middleware]:
    outer = [Middleware(Requests, metrics=watch.metrics), Middleware(KnownPlaces, security=security)]
    limit, ids = Middleware(RateLimit, rate=settings.rate_limit), Middleware(NameIds)
    if tokens is None:
        return [*outer, limit, ids]
    known = Middleware(AuthenticationMiddleware, backend=BearerAuthBackend(tokens))
    return [*outer, known, Middleware(AuthContextMiddleware), limit, Middleware(RequireToken), ids]


def _pages(watch: Watch) -> list[Route]:
    async def health(request: Request) -> Response:
        return JSONResponse({"status": "alive"})

    async def ready(request: Request) -> Response:
        stopping = watch.gate.closed
        return JSONResponse({"status": "stopping" if stopping else "ready"}, 503 if stopping else 200)

    def metrics(request: Request) -> Response:  # on a worker thread: it asks the workspace
        return Response(watch.metrics.shown(), media_type=CONTENT_TYPE_LATEST)

    return [Route("/health", health), Route("/ready", ready), Route("/metrics", metrics)]
