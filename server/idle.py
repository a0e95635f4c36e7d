"""What a server does when nobody calls: `give_back_when_idle`."""

from collections.abc import Awaitable, Callable

import anyio
import anyio.to_thread

from engine.heap import give_back
from server.gate import Gate

IDLE = 5.0
"""Seconds without a call after which freed memory is not kept for the next one."""


async def give_back_when_idle(gate: Gate, sleep: Callable[[float], Awaitable[None]] = anyio.sleep) -> None:
    """For ever: once after every time of work, return to the system what the engine keeps of freed memory."""
    given_back_at = gate.entered
    while True:
        seen = gate.entered
        await sleep(IDLE)
        if gate.inside == 0 and gate.entered == seen and seen != given_back_at:
            await anyio.to_thread.run_sync(give_back)
            given_back_at = seen
