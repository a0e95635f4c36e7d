"""`Gate`: how many tool calls may be inside at a time, in all and for one principal; closing it ends them all."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import anyio

MOST, MOST_EACH = 16, 8
UNWIND = 2.0
"""Seconds that cancelled calls get to end: they notice at their next layer."""


class Refusal(Exception):
    """A call that was not let in, or was ended from outside."""

    outcome = "refused"


class Full(Refusal):
    """Too many calls are inside."""

    outcome = "full"


class Stopped(Refusal):
    """The server is stopping."""

    outcome = "stopped"


class Gate:
    """Calls that wait for a model count as inside. All methods belong to the event loop's thread."""

    def __init__(self, most: int = MOST, most_each: int = MOST_EACH) -> None:
        self._most, self._most_each = most, most_each
        self._inside: dict[anyio.CancelScope, str] = {}
        self.closed = False

    @property
    def inside(self) -> int:
        return len(self._inside)

    @contextmanager
    def admitted(self, principal: str) -> Iterator[None]:
        """Inside for the length of a `with` block. Raises `Full`, or `Stopped`, before or at the end of it."""
        self._check(principal)
        with anyio.CancelScope() as scope:
            self._inside[scope] = principal
            try:
                yield
            finally:
                del self._inside[scope]
        if scope.cancelled_caught:
            raise Stopped("mechscope is stopping: this call was cancelled and nothing was kept; call again later")

    def _check(self, principal: str) -> None:
        if self.closed:
            raise Stopped("mechscope is stopping and takes no more calls; call again later")
        if self.inside >= self._most:
            raise Full(f"mechscope is full: {self.inside} calls run or wait; call again in a few seconds")
        own = Counter(self._inside.values())[principal]
        if own >= self._most_each:
            raise Full(f"{own} of your calls run or wait, and no more may; wait for one to end, then call again")

    async def close(self, within: float) -> None:
        """Let nobody in any more; give those inside so many seconds to end, then cancel them."""
        self.closed = True
        await self._empty(within)
        for scope in self._inside:
            scope.cancel()
        await self._empty(UNWIND)

    async def _empty(self, within: float) -> None:
        with anyio.move_on_after(within):
            while self._inside:
                await anyio.sleep(0.02)
