"""`Gate`: how many tool calls may be inside at a time, in all and for one principal; closing it ends them all.

A job is inside for as long as it runs: it takes over the place of the call that started it. Calls that only ask about
jobs or cancel them take no place, so that a full server can still be asked and relieved.
"""

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
        self._inside: dict[anyio.CancelScope, str | None] = {}
        """Whose place it is; None for a call that takes none."""
        self.entered = 0
        """How many calls and jobs have ever been inside."""
        self.closed = False
        self._swept = False

    @property
    def inside(self) -> int:
        """How many places are taken."""
        return sum(principal is not None for principal in self._inside.values())

    @contextmanager
    def admitted(self, principal: str, takes_place: bool = True) -> Iterator[None]:
        """Inside for the length of a `with` block. Raises `Full`, or `Stopped`, before or at the end of it."""
        if self.closed:
            raise Stopped("mechscope is stopping and takes no more calls; call again later")
        if takes_place:
            self._check(principal)
        with self.taken_over(principal if takes_place else None):
            yield

    @contextmanager
    def taken_over(self, principal: str | None) -> Iterator[None]:
        """Inside unchecked: a job, which takes the place of the call that started it. Raises `Stopped` at the end."""
        with anyio.CancelScope() as scope:
            if self._swept:
                scope.cancel()
            self._inside[scope] = principal
            self.entered += 1
            try:
                yield
            finally:
                del self._inside[scope]
        if scope.cancelled_caught:
            raise Stopped("mechscope is stopping: this call was cancelled and nothing was kept; call again later")

    def _check(self, principal: str) -> None:
        if self.inside >= self._most:
            raise Full(f"mechscope is full: {self.inside} calls and jobs run or wait; call again in a few seconds")
        own = Counter(self._inside.values())[principal]
        if own >= self._most_each:
            raise Full(
                f"{own} of your calls and jobs run or wait, and no more may; wait for one to end or cancel a job, "
                "then call again"
            )

    async def close(self, within: float) -> None:
        """Let nobody in any more; give those inside so many seconds to end, then cancel them."""
        self.closed = True
        await self._empty(within)
        self._swept = True  # a job whose call was inside may come in later still
        for scope in self._inside:
            scope.cancel()
        await self._empty(UNWIND)

    async def _empty(self, within: float) -> None:
        with anyio.move_on_after(within):
            while self._inside:
                await anyio.sleep(0.02)
