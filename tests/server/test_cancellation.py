"""Long work reports progress and stops within a layer of being cancelled."""

from functools import partial
from typing import Any

import anyio
import pytest
from clients import ERAS, STDIO, ask, connected
from mcp import Client
from slow_model import Entered
from waiting import until

from server.app import build_server
from server.gate import Gate
from server.lab import Lab
from server.watch import Watch

pytestmark = pytest.mark.anyio

LONG = {
    "generate_with_hooks": {"prompt": "hello", "max_new_tokens": 200},
    "kv_inject_test": {"recipient": "hello", "donor": "world", "target": "d"},
    "causal_trace": {"clean": "hello", "corrupt": "jelly", "token": "o"},
    "prefill_inject": {"recipient": "hello", "donor": "world", "max_new_tokens": 200},
}


@pytest.mark.parametrize("mode", ERAS)
@pytest.mark.parametrize("tool", LONG)
async def test_at_most_one_layer_is_entered_after_a_cancel(lab: Lab, slow: Entered, tool: str, mode: str) -> None:
    slow.hold_at(3)
    gate = Gate()
    async with connected(build_server(lab, watch=Watch(lab, gate)), mode) as client:
        await cancelled_while_held(client, slow, gate, tool, LONG[tool])
        assert slow.count <= 3 + 1
        entered = slow.count
        await ask(client, "logit_lens", prompt="hello")
        assert slow.count == entered + 4


async def cancelled_while_held(client: Client, slow: Entered, gate: Gate, tool: str, arguments: dict[str, Any]) -> None:
    """Make a call, cancel it while a layer is held, and return when the server has ended it."""
    async with anyio.create_task_group() as group:
        group.start_soon(client.call_tool, tool, arguments)
        await slow.held()
        group.cancel_scope.cancel()
    slow.let_go()
    while gate.inside:
        await anyio.sleep(0)


async def test_a_cancelled_call_leaves_weights_and_session_as_they_were(lab: Lab, slow: Entered) -> None:
    before = lab.models[0].model.params.embed.sum()
    slow.hold_at(3)
    gate = Gate()
    async with connected(build_server(lab, watch=Watch(lab, gate))) as client:
        await cancelled_while_held(client, slow, gate, "prefill_inject", LONG["prefill_inject"] | {"keep": True})
        assert (await ask(client, "list_session"))["handles"] == []
    assert lab.models[0].model.params.embed.sum() == before


async def test_progress_rises_to_a_known_total(lab: Lab, slow: Entered, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.call.REPORT_EVERY", 0.0)
    seen: list[tuple[float, float | None]] = []

    async def follow(progress: float, total: float | None, message: str | None) -> None:
        seen.append((progress, total))

    slow.hold_at(3)
    async with connected(build_server(lab)) as client, anyio.create_task_group() as group:
        group.start_soon(partial(client.call_tool, "kv_inject_test", LONG["kv_inject_test"], progress_callback=follow))
        await until(lambda: seen, "progress while a layer is held")
        slow.let_go()
    done = [progress for progress, _ in seen]
    assert done == sorted(set(done))
    assert done[0] <= 3 < done[-1] == slow.count
    assert {total for _, total in seen} == {slow.count}


async def test_two_calls_on_one_model_run_one_after_the_other(lab: Lab, slow: Entered) -> None:
    layers: list[str] = []
    async with connected(build_server(lab)) as client, anyio.create_task_group() as group:

        async def follow(progress: float, total: float | None, message: str | None) -> None:
            layers.append(message or "")

        slow.hold_at(2)
        group.start_soon(client.call_tool, "logit_lens", {"prompt": "hello"})
        await slow.held()
        waits = partial(client.call_tool, "logit_lens", {"prompt": "hello"}, progress_callback=follow)
        group.start_soon(waits)
        while not layers:
            await anyio.sleep(0)
        assert "waiting for" in layers[0]
        assert slow.count == 2
        slow.let_go()
    assert slow.count == 2 * 4


async def test_the_event_loop_stays_free_while_a_model_works(lab: Lab, slow: Entered) -> None:
    async with connected(build_server(lab)) as client, anyio.create_task_group() as group:
        slow.hold_at(2)
        group.start_soon(client.call_tool, "generate_with_hooks", LONG["generate_with_hooks"])
        await slow.held()
        await ask(client, "list_session")  # answered while a layer waits
        assert slow.count == 2
        group.cancel_scope.cancel()
        slow.let_go()


@pytest.mark.real
@pytest.mark.parametrize("mode", ERAS)
async def test_over_stdio_the_next_call_works_at_once_after_a_cancel(mode: str) -> None:
    async with connected(STDIO, mode) as client:
        await ask(client, "load_model")
        begun, told = anyio.Event(), []

        async def follow(progress: float, total: float | None, message: str | None) -> None:
            told.append((progress, total))
            begun.set()

        long = {"prompt": "Once upon a time", "max_new_tokens": 500}
        async with anyio.create_task_group() as group:
            group.start_soon(partial(client.call_tool, "generate_with_hooks", long, progress_callback=follow))
            await begun.wait()
            group.cancel_scope.cancel()
        await ask(client, "logit_lens", prompt="Once upon a time", layers=[-1])
        progress, total = told[-1]
        assert progress < total / 2, "the next call did not wait for the first to end by itself"
