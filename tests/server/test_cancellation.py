"""Long work reports progress and stops within a layer of being cancelled."""

import time

import anyio
import pytest
from clients import ERAS, STDIO, ask, connected
from slow_model import LAYER_SECONDS, Entered

from server.app import build_server
from server.lab import Lab

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
    async with connected(build_server(lab), mode) as client:
        with anyio.move_on_after(2 * LAYER_SECONDS):
            await client.call_tool(tool, LONG[tool])
            pytest.fail("the call ended before it was cancelled")
        at_cancel = slow.count
        assert at_cancel >= 1
        await anyio.sleep(10 * LAYER_SECONDS)
        assert slow.count <= at_cancel + 1
        entered = slow.count
        await ask(client, "logit_lens", prompt="hello")
        assert slow.count == entered + 4


async def test_a_cancelled_call_leaves_weights_and_session_as_they_were(lab: Lab, slow: Entered) -> None:
    before = lab.models[0].model.params.embed.sum()
    async with connected(build_server(lab)) as client:
        with anyio.move_on_after(3 * LAYER_SECONDS):
            await client.call_tool("prefill_inject", LONG["prefill_inject"] | {"keep": True})
        assert (await ask(client, "list_session"))["handles"] == []
    assert lab.models[0].model.params.embed.sum() == before


async def test_progress_rises_to_a_known_total(lab: Lab, slow: Entered) -> None:
    seen: list[tuple[float, float | None]] = []

    async def follow(progress: float, total: float | None, message: str | None) -> None:
        seen.append((progress, total))

    async with connected(build_server(lab)) as client:
        await client.call_tool("kv_inject_test", LONG["kv_inject_test"], progress_callback=follow)
    done = [progress for progress, _ in seen]
    totals = {total for _, total in seen}
    assert len(seen) >= 3
    assert done == sorted(set(done))
    assert len(totals) == 1
    assert slow.count == totals.pop()


async def test_two_calls_on_one_model_run_one_after_the_other(lab: Lab, slow: Entered) -> None:
    started = time.perf_counter()
    async with connected(build_server(lab)) as client, anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(client.call_tool, "logit_lens", {"prompt": "hello"})
    assert time.perf_counter() - started >= 3 * 4 * LAYER_SECONDS


async def test_the_event_loop_stays_free_while_a_model_works(lab: Lab, slow: Entered) -> None:
    async with connected(build_server(lab)) as client, anyio.create_task_group() as group:
        group.start_soon(client.call_tool, "generate_with_hooks", LONG["generate_with_hooks"])
        await anyio.sleep(2 * LAYER_SECONDS)
        started = time.perf_counter()
        await ask(client, "list_session")
        assert time.perf_counter() - started < 1
        group.cancel_scope.cancel()


@pytest.mark.real
@pytest.mark.parametrize("mode", ERAS)
async def test_over_stdio_the_next_call_works_at_once_after_a_cancel(mode: str) -> None:
    async with connected(STDIO, mode) as client:
        await ask(client, "load_model")
        with anyio.move_on_after(1):
            await client.call_tool("generate_with_hooks", {"prompt": "Once upon a time", "max_new_tokens": 500})
            pytest.fail("the call ended before it was cancelled")
        started = time.perf_counter()
        await ask(client, "logit_lens", prompt="Once upon a time", layers=[-1])
        assert time.perf_counter() - started < 5
