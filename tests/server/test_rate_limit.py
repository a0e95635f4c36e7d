"""The rate limit, apart from a server."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from starlette.types import Message, Receive, Scope, Send

from server.checks import RateLimit

pytestmark = pytest.mark.anyio

SCOPE = {"type": "http", "path": "/mcp", "method": "POST", "headers": [], "client": ("127.0.0.1", 1)}
REQUESTS = 30


async def test_a_clock_that_is_set_back_locks_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1e9]
    monkeypatch.setattr("time.time", lambda: now[0])
    answered: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        answered.append(200)

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            answered.append(message["status"])

    limited = RateLimit(app, "2/minute")
    for set_back in (0, 0, 0, 3600, 0, 0):
        now[0] -= set_back
        await limited(dict(SCOPE), receive, send)
    assert answered == [200, 200, 429, 200, 200, 429]


async def test_the_event_loop_does_not_wait_for_a_thread_at_every_request(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[threading.Thread] = []
    start = threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", lambda thread: (started.append(thread), start(thread))[1])
    passed: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        passed.append(scope)

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        raise AssertionError(message)

    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
    limited = RateLimit(app, f"{REQUESTS}/minute")
    for _ in range(REQUESTS):
        await limited(dict(SCOPE), receive, send)
        for timer in [thread for thread in started if isinstance(thread, threading.Timer)]:
            timer.join()  # a limiter that counts by threads starts the next one only now
    assert len(passed) == REQUESTS
    assert len(started) <= 1, "the pool's own"
