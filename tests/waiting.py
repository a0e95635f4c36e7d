"""Waiting for what must come, however busy the machine is: a look now and then, and at last a word of what did not.

wait_for   until a condition holds
until      the same on an event loop, which goes on meanwhile
Naps       a clock that a test moves: `sleep` lasts until the test ends it
"""

import time
from collections.abc import Callable

import anyio

PATIENCE = 120.0
"""Seconds after which nothing will come any more: ten times what a machine with a load of twenty needs."""
LOOK = 0.01
"""Seconds between looks at what sends no event: a file, a port, another process."""


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"this did not come: {what}"
        time.sleep(LOOK)


async def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"this did not come: {what}"
        await anyio.sleep(LOOK)


class Naps:
    """In the place of `anyio.sleep` for one task."""

    def __init__(self) -> None:
        self.asked: list[float] = []
        """Seconds of every nap that was begun."""
        self._ended = anyio.Event()
        self._asleep = anyio.Event()

    async def sleep(self, seconds: float) -> None:
        self.asked.append(seconds)
        self._asleep.set()
        await self._ended.wait()
        self._ended = anyio.Event()

    async def begun(self) -> None:
        """Returns when the task sleeps: it has done all that it does when awake."""
        with anyio.fail_after(PATIENCE):
            await self._asleep.wait()

    async def end(self) -> None:
        """End the nap, and return when the task sleeps again."""
        await self.begun()
        self._asleep = anyio.Event()
        self._ended.set()
        await self.begun()
