"""`Teller`: progress for a call's client, which is never waited for."""

import asyncio
from collections.abc import Awaitable, Callable

from server.logs import log

LAST = 2.0
"""Seconds that a client gets at a call's end to read the last of it."""

Report = Callable[[float, float | None, str | None], Awaitable[None]]


class Teller:
    """Sends one report at a time. Those that come meanwhile take each other's place, so that a client which does not
    read keeps nobody but itself waiting. All methods belong to the event loop's thread.
    """

    def __init__(self, report: Report) -> None:
        self._report = report
        self._next: tuple[float, float | None, str | None] | None = None
        self._sending: asyncio.Task[None] | None = None

    def tell(self, done: float, total: float | None, what: str | None) -> None:
        self._next = done, total, what
        if self._sending is None or self._sending.done():
            self._sending = asyncio.get_running_loop().create_task(self._send())

    async def _send(self) -> None:
        while self._next is not None:
            said, self._next = self._next, None
            try:
                await self._report(*said)
            except Exception:  # a client that has gone; what it asked for is not less worth for that
                log.debug("progress could not be told", exc_info=True)

    async def end(self) -> None:
        """Returns when the last has been told, or will not be."""
        if self._sending is not None:
            await asyncio.wait({self._sending}, timeout=LAST)
            self.drop()

    def drop(self) -> None:
        """Tell nothing more."""
        self._next = None
        if self._sending is not None:
            self._sending.cancel()
