"""Freed memory goes back to the system when nobody has called for a while, and not before."""

import anyio
import pytest

from server import idle
from server.gate import Gate

pytestmark = pytest.mark.anyio


async def test_memory_is_given_back_once_after_each_time_of_work(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    monkeypatch.setattr(idle, "give_back", lambda: given.append(1))
    gate = Gate()
    async with anyio.create_task_group() as group:
        group.start_soon(idle.give_back_when_idle, gate, 0.02)
        await anyio.sleep(0.1)
        assert given == [], "nobody has called"
        with gate.admitted("ann"):
            await anyio.sleep(0.1)
            assert given == [], "somebody is inside"
        await anyio.sleep(0.1)
        assert len(given) == 1
        with gate.admitted("ann"):
            pass
        await anyio.sleep(0.1)
        assert len(given) == 2
        group.cancel_scope.cancel()


async def test_between_calls_that_follow_each_other_memory_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    monkeypatch.setattr(idle, "give_back", lambda: given.append(1))
    gate = Gate()
    async with anyio.create_task_group() as group:
        group.start_soon(idle.give_back_when_idle, gate, 0.3)
        for _ in range(50):
            with gate.admitted("ann"):
                pass
            await anyio.sleep(0.02)
        assert given == []
        group.cancel_scope.cancel()
