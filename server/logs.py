"""Logs: one JSON object per line on stderr, with the id of the request it belongs to.

Prompts are logged at debug level only. The MCP library's own lines repeat errors, which quote arguments, so below
debug level it may speak of warnings only; and a traceback shows where and which type, but not the exception's text,
which may quote arguments too.
"""

import logging
import secrets
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from pythonjsonlogger.json import JsonFormatter

log = logging.getLogger("mechscope")

_request: ContextVar[str | None] = ContextVar("request", default=None)

QUIET = ("mcp", "httpx", "httpcore", "uvicorn", "sse_starlette", "asyncio", "filelock", "huggingface_hub")
"""Libraries that log below the level of warnings only when debugging."""


def configure(level: str) -> None:
    """Send every logger's records to stderr as JSON; `level` as in the settings."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Lines(values=level == "debug"))
    handler.addFilter(_with_request)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.NOTSET if level == "debug" else logging.WARNING)


class Lines(JsonFormatter):
    """Records as JSON; without `values`, exceptions are told by type and place only."""

    def __init__(self, values: bool) -> None:
        super().__init__(
            "{asctime}{levelname}{name}{message}",
            style="{",
            rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
            datefmt="%Y-%m-%dT%H:%M:%S%z",
        )
        self._values = values

    def formatException(self, ei: Any) -> str:  # noqa: N802
        if self._values:
            return "".join(traceback.format_exception(*ei))
        kind, _, place = ei
        return "".join(traceback.format_tb(place)) + getattr(kind, "__name__", "no exception")


def _with_request(record: logging.LogRecord) -> bool:
    """Every record says which request it belongs to."""
    if (request := _request.get()) is not None and not hasattr(record, "request"):
        record.request = request
    return True


@contextmanager
def request() -> Iterator[str]:
    """The id of the request that is being answered; a new one where none is being answered yet."""
    if (known := _request.get()) is not None:
        yield known
        return
    token = _request.set(made := secrets.token_hex(8))
    try:
        yield made
    finally:
        _request.reset(token)
