"""`Watch`: every tool call is admitted, counted and logged, on every transport. A middleware of the MCP server."""

import time
from typing import Any

import anyio
from mcp.server.context import CallNext, HandlerResult, ServerRequestContext
from mcp.types import CallToolResult, TextContent

from server import logs
from server.auth import principal
from server.gate import Gate, Refusal
from server.lab import Lab
from server.metrics import Metrics
from server.tools import PLACELESS, TOOLS

NAMES = frozenset(function.__name__ for function in TOOLS)
NO_PLACE = frozenset(function.__name__ for function in PLACELESS)

LONGEST_TOKEN = 256
"""Characters of a progress token."""


class Watch:
    """Calls go through `gate` and into `metrics`; a call that is not let in gets an error that says why."""

    def __init__(self, lab: Lab, gate: Gate | None = None) -> None:
        self.gate = Gate() if gate is None else gate
        self.metrics = Metrics(lab, self.gate)

    async def __call__(self, ctx: ServerRequestContext[Any, Any], call_next: CallNext) -> HandlerResult:
        if ctx.method != "tools/call":
            return await call_next(ctx)
        asked = (ctx.params or {}).get("name")
        tool = asked if isinstance(asked, str) and asked in NAMES else "unknown"
        started, outcome = time.perf_counter(), "error"
        with logs.request(), self.metrics.measuring():
            logs.log.debug("called", extra={"tool": tool, "arguments": (ctx.params or {}).get("arguments")})
            try:
                _check_token(ctx)
                with self.gate.admitted(principal(), tool not in NO_PLACE):
                    result = await call_next(ctx)
                    outcome = "error" if _failed(result) else "ok"
                return result
            except Refusal as refusal:
                outcome = refusal.outcome
                return CallToolResult(content=[TextContent(type="text", text=str(refusal))], is_error=True)
            except anyio.get_cancelled_exc_class():
                outcome = "cancelled"
                raise
            finally:
                self.count(tool, outcome, time.perf_counter() - started)

    def count(self, tool: str, outcome: str, seconds: float) -> None:
        """Count and log a call, or a job, that ended."""
        self.metrics.calls.labels(tool, outcome).inc()
        self.metrics.seconds.labels(tool).observe(seconds)
        said = {"tool": tool, "outcome": outcome, "seconds": round(seconds, 4), "principal": principal()}
        logs.log.info("call", extra=said)


def _check_token(ctx: ServerRequestContext[Any, Any]) -> None:
    """Raise `Refusal` for a progress token that every report would repeat at length."""
    meta = (ctx.params or {}).get("_meta")
    token = meta.get("progressToken") if isinstance(meta, dict) else None
    if isinstance(token, str) and len(token) > LONGEST_TOKEN:
        raise Refusal(f"the progress token has {len(token)} characters; give one of at most {LONGEST_TOKEN}")


def _failed(result: HandlerResult) -> bool:
    if isinstance(result, dict):
        return bool(result.get("isError"))
    return bool(getattr(result, "is_error", False))
