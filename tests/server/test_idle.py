"""Freed memory goes back to the system when nobody has called for a while, and not before."""

from collections.abc import AsyncIterator

import anyio
import pytest
from waiting import Naps

from server import idle
from server.gate import Gate

pytestmark = pytest.mark.anyio


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows whenever memory is given back."""
    given: list[int] = []
    monkeypatch.setattr(idle, "give_back", lambda: given.append(1))
    return given


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
async def naps(gate: Gate) -> AsyncIterator[Naps]:
    """Of a task that watches the gate."""
    naps = Naps()
    async with anyio.create_task_group() as group:
        group.start_soon(idle.give_back_when_idle, gate, naps.sleep)
        await naps.begun()
        yield naps
        group.cancel_scope.cancel()


async def test_memory_is_given_back_once_after_each_time_of_work(gate: Gate, naps: Naps, given: list[int]) -> None:
    await naps.end()
    assert given == [], "nobody has called"
    with gate.admitted("ann"):
        for _ in range(3):
            await naps.end()
        assert given == [], "somebody is inside"
    for _ in range(3):
        await naps.end()
    assert len(given) == 1
    with gate.admitted("ann"):
        pass
    for _ in range(3):
        await naps.end()
    assert len(given) == 2
    assert set(naps.asked) == {idle.IDLE}


async def test_between_calls_that_follow_each_other_memory_is_kept(gate: Gate, naps: Naps, given: list[int]) -> None:
    for _ in range(5):
        with gate.admitted("ann"):
            pass
        await naps.end()
    assert given == []
    await naps.end()
    assert given == [1]
