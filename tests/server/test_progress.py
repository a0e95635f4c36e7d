"""Progress is told to a client that reads, and never waited for where one does not."""

from typing import Any

import anyio
import pytest
from clients import ask, connected
from mcp.shared.memory import create_client_server_memory_streams
from mcp.shared.message import SessionMessage
from mcp.types import JSONRPCNotification, JSONRPCRequest
from slow_model import Entered
from waiting import PATIENCE

import server.call
from server.app import build_server
from server.lab import Lab
from server.progress import Teller

pytestmark = pytest.mark.anyio

START = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "deaf", "version": "0"}}
CALL = {"name": "logit_lens", "arguments": {"prompt": "hello"}, "_meta": {"progressToken": 1}}


def request(number: int, method: str, params: dict[str, Any]) -> SessionMessage:
    return SessionMessage(JSONRPCRequest(jsonrpc="2.0", id=number, method=method, params=params))


async def test_a_client_that_asks_for_progress_and_never_reads_holds_nobody_up(
    lab: Lab, slow: Entered, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.call, "REPORT_EVERY", 0.0)
    mcp = build_server(lab)
    low_level: Any = mcp._lowlevel_server
    slow.hold_at(1)
    async with (
        create_client_server_memory_streams() as ((read, write), (theirs, answers)),
        anyio.create_task_group() as group,
    ):
        group.start_soon(low_level.run, theirs, answers, low_level.create_initialization_options())
        await write.send(request(1, "initialize", START))
        await read.receive()
        ready = JSONRPCNotification(jsonrpc="2.0", method="notifications/initialized", params={})
        await write.send(SessionMessage(ready))
        await write.send(request(2, "tools/call", CALL))
        await slow.held()
        slow.let_go()
        async with connected(mcp) as client:
            with anyio.fail_after(PATIENCE):
                await ask(client, "logit_lens", prompt="hello")
        assert slow.count == 2 * lab.models[0].model.config.n_layers
        group.cancel_scope.cancel()


async def test_a_report_that_is_on_its_way_is_followed_by_the_last_one() -> None:
    told: list[float] = []
    go = anyio.Event()

    async def report(done: float, total: float | None, what: str | None) -> None:
        told.append(done)
        await go.wait()

    teller = Teller(report)
    for done in range(1, 6):
        teller.tell(done, 5, None)
        await anyio.sleep(0)
    go.set()
    await teller.end()
    assert told == [1, 5]


async def test_progress_that_cannot_be_told_is_no_fault_of_the_call(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    async def gone(*_: Any) -> None:
        raise anyio.BrokenResourceError

    monkeypatch.setattr("mcp.server.mcpserver.Context.report_progress", lambda self, *said: gone(*said))
    async with connected(build_server(lab)) as client:
        await ask(client, "logit_lens", prompt="hello")


@pytest.mark.parametrize(("length", "expected"), [(256, None), (257, "the progress token has 257 characters")])
async def test_a_progress_token_has_a_limit(lab: Lab, length: int, expected: str | None) -> None:
    async with connected(build_server(lab), "legacy") as client:
        meta: Any = {"progress_token": "x" * length}
        result = await client.call_tool("tokenize", {"text": "hello"}, meta=meta)
        said = result.content[0].text
    assert (expected is None) == (not result.is_error), said
    assert expected is None or expected in said
