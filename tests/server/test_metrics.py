"""What operators read about the server's event loop."""

import time

import anyio
import httpx2 as httpx
import pytest
from serving import serving

from server.gate import Gate
from server.lab import Lab
from server.metrics import Metrics


def delays(shown: str) -> dict[str, float]:
    """{upper bound in seconds: how many timers were at most that late}"""
    rows = [line for line in shown.splitlines() if line.startswith("mechscope_loop_delay_seconds_bucket")]
    return {row.split('"')[1]: float(row.split()[-1]) for row in rows}


@pytest.mark.anyio
async def test_a_held_up_event_loop_shows_as_late_timers(anyio_backend: str) -> None:
    metrics = Metrics(Lab(), Gate())
    async with anyio.create_task_group() as group:
        group.start_soon(metrics.follow_loop)
        await anyio.sleep(0.1)
        time.sleep(0.4)
        await anyio.sleep(0.1)
        group.cancel_scope.cancel()
    late = delays(metrics.shown().decode())
    assert late["+Inf"] - late["0.3"] >= 1
    assert late["3.0"] == late["+Inf"]


def test_a_server_measures_its_loop_while_it_serves() -> None:
    with serving() as served:
        before = delays(httpx.get(f"{served.base}/metrics").text)
        time.sleep(1)
        after = delays(httpx.get(f"{served.base}/metrics").text)
    assert after["+Inf"] - before["+Inf"] >= 5
