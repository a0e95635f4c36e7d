"""What operators read about the server's event loop."""

import time

import anyio
import httpx2 as httpx
import pytest
from serving import serving
from waiting import until, wait_for

from server.gate import Gate
from server.lab import Lab
from server.metrics import SAMPLE, Metrics

HELD = 0.4
"""Seconds for which a test holds its event loop up."""


def delays(shown: str) -> dict[str, float]:
    """{upper bound in seconds: how many timers were at most that late}"""
    rows = [line for line in shown.splitlines() if line.startswith("mechscope_loop_delay_seconds_bucket")]
    return {row.split('"')[1]: float(row.split()[-1]) for row in rows}


def lateness(shown: str) -> float:
    """Seconds by which all timers together were late."""
    (row,) = [line for line in shown.splitlines() if line.startswith("mechscope_loop_delay_seconds_sum")]
    return float(row.split()[-1])


@pytest.mark.anyio
async def test_a_held_up_event_loop_shows_as_late_timers(anyio_backend: str) -> None:
    metrics, began = Metrics(Lab(), Gate()), anyio.current_time()

    def shown() -> str:
        return metrics.shown().decode()

    async with anyio.create_task_group() as group:
        group.start_soon(metrics.follow_loop)
        await until(lambda: delays(shown())["+Inf"] >= 1, "a timer")
        before = delays(shown())
        time.sleep(HELD)
        await until(lambda: delays(shown())["+Inf"] > before["+Inf"], "a timer after the loop was held up")
        group.cancel_scope.cancel()
    after = delays(shown())
    assert (after["+Inf"] - after["0.3"]) - (before["+Inf"] - before["0.3"]) >= 1
    assert HELD - SAMPLE <= lateness(shown()) <= anyio.current_time() - began


def test_a_server_measures_its_loop_while_it_serves() -> None:
    with serving() as served:

        def timers() -> float:
            return delays(httpx.get(f"{served.base}/metrics").text)["+Inf"]

        before = timers()
        wait_for(lambda: timers() >= before + 5, "five timers while the server serves")
