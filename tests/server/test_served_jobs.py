"""Jobs, cancellation and principals with real `mechscope serve` processes, on every transport in both eras.

The model in these processes counts the layers that it enters, and holds them: `layers`.
"""

import json
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import mcp.client.stdio
import pytest
from clients import ERAS, ask, connected, refused
from mcp import Client, MCPError
from mcp.client.stdio import stdio_client
from mcp.types import ResourceTemplateReference
from serving import TRANSPORTS, Served, over_stdio, reached, serving, token_file
from slow_model import Layers
from waiting import PATIENCE

pytestmark = pytest.mark.anyio

LONG = {"prompt": "hello", "max_new_tokens": 200}
JOB = {"tool": "generate_with_hooks", "arguments": LONG}


@pytest.fixture(scope="module")
def layers_of_all(tmp_path_factory: pytest.TempPathFactory) -> Layers:
    return Layers(tmp_path_factory.mktemp("layers") / "entered")


@pytest.fixture
def layers(layers_of_all: Layers) -> Iterator[Layers]:
    """None is held when a test ends."""
    yield layers_of_all
    layers_of_all.let_go()


@pytest.fixture(scope="module")
def slow_server(layers_of_all: Layers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    tokens = token_file(tmp_path_factory.mktemp("tokens"))
    with serving("--token-file", str(tokens), command=layers_of_all.command) as served:
        yield served


@asynccontextmanager
async def working(
    served: Served, layers: Layers, transport: str, mode: str, name: str = "ann"
) -> AsyncIterator[Client]:
    """A client of the slow server, the model loaded; over stdio, of a slow process of its own."""
    if transport == "stdio":
        reach = connected(over_stdio(command=layers.command), mode)
    else:
        reach = reached(served.base, transport, mode, name)
    async with reach as client:
        await ask(client, "load_model", model="synthetic")
        yield client


@pytest.mark.parametrize("mode", ERAS)
@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_cancelled_call_stops_within_a_layer_and_the_next_call_works_at_once(
    slow_server: Served, layers: Layers, transport: str, mode: str
) -> None:
    async with working(slow_server, layers, transport, mode) as client:
        layers.hold_after(2)
        async with anyio.create_task_group() as group:
            group.start_soon(client.call_tool, "generate_with_hooks", LONG)
            await layers.held()
            at_cancel = layers.count
            group.cancel_scope.cancel()
        await layers.cancelled()
        layers.let_go()
        await ask(client, "logit_lens", prompt="hello")
        assert layers.count <= at_cancel + 1 + 4, "one that was on its way, the lens"


@pytest.mark.parametrize("mode", ERAS)
@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_cancelled_job_stops_within_a_layer_and_the_next_call_works_at_once(
    slow_server: Served, layers: Layers, transport: str, mode: str
) -> None:
    async with working(slow_server, layers, transport, mode) as client:
        layers.hold_after(2)
        run = (await ask(client, "start_job", **JOB))["run"]
        await layers.held()
        at_cancel = layers.count
        assert (await ask(client, "cancel_job", run=run))["state"] == "cancelled"
        assert layers.count <= at_cancel + 1
        entered = layers.count
        layers.let_go()
        await ask(client, "logit_lens", prompt="hello")
        assert layers.count == entered + 4


@pytest.mark.parametrize("mode", ERAS)
@pytest.mark.parametrize(("transport", "other"), [("http", "sse"), ("sse", "http")])
async def test_a_job_outlives_its_connection(
    slow_server: Served, layers: Layers, transport: str, other: str, mode: str
) -> None:
    arguments = {"clean": "hello", "corrupt": "jelly", "token": "o"}
    async with working(slow_server, layers, transport, mode) as client:
        layers.hold_after(2)
        run = (await ask(client, "start_job", tool="causal_trace", arguments=arguments))["run"]
        assert (await ask(client, "get_job", run=run, wait_seconds=0))["state"] == "running"
        await layers.held()
    layers.let_go()
    async with working(slow_server, layers, other, mode) as client:
        while (job := await ask(client, "get_job", run=run, wait_seconds=20))["state"] == "running":
            pass
        assert (job["state"], job["result"]["cells"]) == ("done", 20)


@pytest.mark.parametrize("mode", ERAS)
@pytest.mark.parametrize("transport", ["http", "sse"])
async def test_nothing_of_one_principal_exists_for_another(
    slow_server: Served, layers: Layers, transport: str, mode: str
) -> None:
    async with (
        working(slow_server, layers, transport, mode, "ann") as ann,
        working(slow_server, layers, transport, mode, "bob") as bob,
    ):
        act = (await ask(ann, "capture_residuals", prompt="hello"))["handle"]
        layers.hold_after(2)
        run = (await ask(ann, "start_job", **JOB))["run"]
        for tool, arguments in (
            ("get_job", {"run": run}),
            ("cancel_job", {"run": run}),
            ("release", {"handle": run}),
            ("read_tensor", {"handle": act}),
        ):
            assert "no such handle" in await refused(bob, tool, **arguments)
        for uri in (f"mechscope://tensors/{act}", f"mechscope://runs/{run}"):
            with pytest.raises(MCPError, match="no such handle"):
                await bob.read_resource(uri)
            assert await ann.read_resource(uri)
        for kind, handle in (("tensors", act), ("runs", run)):
            assert handle in await _everything(ann, kind)
            assert handle not in await _everything(bob, kind)
        assert (await ask(ann, "cancel_job", run=run))["state"] == "cancelled"


async def _everything(client: Client, kind: str) -> str:
    """What a principal is shown without naming a handle."""
    ref = ResourceTemplateReference(type="ref/resource", uri=f"mechscope://{kind}/{{handle}}")
    shown = [
        (await client.complete(ref, {"name": "handle", "value": ""})).completion,
        await client.list_resources(),
        (await client.read_resource("mechscope://session")).contents,
        await ask(client, "list_session"),
    ]
    return str(shown)


async def test_a_job_of_one_principal_leaves_the_places_of_another_free(layers: Layers, tmp_path: Path) -> None:
    limits = ("--token-file", str(token_file(tmp_path)), "--max-calls-each", "1")
    with serving(*limits, command=layers.command) as served:
        async with reached(served.base, "http", name="ann") as ann, reached(served.base, "sse", name="bob") as bob:
            await ask(ann, "load_model", model="synthetic")
            layers.hold_after(2)
            run = (await ask(ann, "start_job", **JOB))["run"]
            assert "your calls and jobs" in await refused(ann, "tokenize", text="hello")
            assert (await ask(bob, "tokenize", text="hello"))["count"] == 5
            await ask(ann, "cancel_job", run=run)
            assert (await ask(ann, "tokenize", text="hello"))["count"] == 5


async def test_a_stopped_server_ends_calls_and_jobs_in_time_and_says_so(layers: Layers) -> None:
    """Neither would end by itself: a layer is held for ever."""
    told: list[str] = []

    async def call(client: Client) -> None:
        result = await client.call_tool("logit_lens", {"prompt": "hello"})
        told.append(result.content[0].text if result.is_error else "finished")

    with serving("--stop-within", "0.2", command=layers.command) as served:
        async with reached(served.base, "http") as client, anyio.create_task_group() as group:
            await ask(client, "load_model", model="synthetic")
            layers.hold_after(2)
            group.start_soon(call, client)
            await layers.held()
            await ask(client, "start_job", **JOB)
            assert await anyio.to_thread.run_sync(served.stop, signal.SIGTERM) == 0
        ended = {record["tool"]: record["outcome"] for record in served.log if record["message"] == "call"}
    assert (ended["logit_lens"], ended["generate_with_hooks"]) == ("stopped", "stopped")
    assert "stopping" in told[0]


async def test_over_stdio_a_process_ends_at_once_when_its_client_leaves_a_job_behind(
    layers: Layers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mcp.client.stdio, "PROCESS_TERMINATION_TIMEOUT", PATIENCE)
    with (tmp_path / "log").open("w+") as log:
        async with connected(stdio_client(over_stdio(command=layers.command), errlog=log)) as client:
            await ask(client, "load_model", model="synthetic")
            layers.hold_after(2)
            await ask(client, "start_job", **JOB)
            await layers.held()
            entered = layers.count
        log.seek(0)
        said = [json.loads(line) for line in log]
    assert "stopping" not in [record["message"] for record in said], "the client had to end it by a signal"
    calls = [record for record in said if "outcome" in record]
    assert [(call["tool"], call["outcome"]) for call in calls][-1] == ("generate_with_hooks", "stopped")
    assert layers.count <= entered + 1
