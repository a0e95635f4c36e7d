"""Jobs: the same call as a direct one, by itself, within the limits."""

from collections import Counter
from functools import partial

import anyio
import pytest
from clients import ERAS, ask, connected, refused
from mcp import Client
from slow_model import Entered
from waiting import PATIENCE, until

import server.call
import server.jobs
from server.app import build_server
from server.auth import LOCAL
from server.gate import Gate, Stopped
from server.lab import Lab
from server.store import MemoryStore, Run, StoreError
from server.tools import NEVER_JOBS, TOOLS
from server.watch import Watch

pytestmark = pytest.mark.anyio

TRACE = {"clean": "hello", "corrupt": "jelly", "token": "o"}
LONG = {"prompt": "hello", "max_new_tokens": 200}


async def started(client: Client, tool: str, /, **arguments: object) -> str:
    return (await ask(client, "start_job", tool=tool, arguments=arguments))["run"]


async def ended(client: Client, run: str) -> dict:
    while (job := await ask(client, "get_job", run=run, wait_seconds=20))["state"] == "running":
        pass
    return job


@pytest.mark.parametrize("mode", ERAS)
@pytest.mark.parametrize(
    ("tool", "arguments"), [("logit_lens", {"prompt": "hello", "k": 3}), ("kv_inject_test", None), ("load_model", {})]
)
async def test_a_job_gives_what_the_tool_gives(lab: Lab, tool: str, arguments: dict | None, mode: str) -> None:
    arguments = {"recipient": "hello", "donor": "world", "target": "d"} if arguments is None else arguments
    arguments = {"model": "synthetic"} | arguments
    async with connected(build_server(lab), mode) as client:
        direct = await ask(client, tool, **arguments)
        job = await ended(client, await started(client, tool, **arguments))
    assert job["state"] == "done"
    assert "error" not in job
    assert {**job["result"], "seconds": None} == {**direct, "seconds": None}


async def test_the_progress_of_a_job_ends_at_its_total(lab: Lab, slow: Entered) -> None:
    async with connected(build_server(lab)) as client:
        job = await ended(client, await started(client, "logit_lens", prompt="hello"))
        test = await ended(
            client, await started(client, "kv_inject_test", recipient="hello", donor="world", target="d")
        )
    assert job["done"] == 4
    assert test["done"] == test["total"] == slow.count - 4


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        ("causal_trace", {"clean": "hello", "corupt": "jelly"}),
        ("logit_lens", {"prompt": ""}),
        ("forward_steer", {"prompt": "hello", "steers": [{"layer": "1", "vector": {"random_seed": 1}, "alpha": 1.0}]}),
        ("load_model", {"weights": "light"}),
    ],
)
async def test_arguments_that_do_not_fit_are_refused_at_once_in_the_tools_own_words(
    lab: Lab, tool: str, arguments: dict
) -> None:
    async with connected(build_server(lab)) as client:
        assert await refused(client, "start_job", tool=tool, arguments=arguments) == await refused(
            client, tool, **arguments
        )
        assert (await ask(client, "list_session"))["handles"] == []


async def test_a_job_fails_in_the_words_of_a_direct_call(lab: Lab) -> None:
    async with connected(build_server(lab)) as client:
        direct = await refused(client, "logit_lens", prompt="hello", layers=[9])
        job = await ended(client, await started(client, "logit_lens", prompt="hello", layers=[9]))
    assert job["state"] == "failed"
    assert "result" not in job
    assert job["error"] == direct


@pytest.mark.parametrize("tool", [*(f.__name__ for f in NEVER_JOBS), "no_such_tool"])
async def test_what_makes_no_sense_as_a_job_is_refused_with_what_does(lab: Lab, tool: str) -> None:
    async with connected(build_server(lab)) as client:
        text = await refused(client, "start_job", tool=tool, arguments={})
    assert repr(tool) in text
    assert all(f.__name__ in text for f in TOOLS if f not in NEVER_JOBS)


async def test_a_job_runs_only_what_the_server_offers(lab: Lab) -> None:
    async with connected(build_server(lab, toolset="core", read_only=True)) as client:
        assert "causal_trace" not in await refused(client, "start_job", tool="kv_inject_test", arguments={})
        assert (await ended(client, await started(client, "logit_lens", prompt="hello")))["state"] == "done"
    async with connected(build_server(lab, read_only=True)) as client:
        arguments = {"recipient": "hello", "donor": "world", "keep": True}
        assert "keep: unknown argument" in await refused(
            client, "start_job", tool="prefill_inject", arguments=arguments
        )


async def test_a_call_that_waits_for_its_turn_hears_so(lab: Lab, slow: Entered) -> None:
    heard: list[str | None] = []

    async def hear(done: float, total: float | None, what: str | None) -> None:
        heard.append(what)

    slow.hold_at(2)
    async with connected(build_server(lab)) as client:
        run = await started(client, "generate_with_hooks", **LONG)
        await slow.held()
        async with anyio.create_task_group() as calls:
            calls.start_soon(partial(client.call_tool, "logit_lens", {"prompt": "hello"}, progress_callback=hear))
            while not heard:
                await anyio.sleep(0)
            assert slow.count == 2
            await ask(client, "cancel_job", run=run)
            slow.let_go()
    assert heard[0] == "waiting for synthetic: another call or job has it"


@pytest.mark.parametrize("mode", ERAS)
async def test_a_job_goes_on_when_its_connection_ends(lab: Lab, slow: Entered, mode: str) -> None:
    slow.hold_at(2)
    mcp = build_server(lab)
    async with connected(mcp, mode) as client:
        run = await started(client, "causal_trace", **TRACE)
        await slow.held()
        assert (await ask(client, "get_job", run=run, wait_seconds=0))["state"] == "running"
    slow.let_go()
    async with connected(mcp, mode) as client:
        assert (await ended(client, run))["result"]["metric"] == "logit of 'o'"


@pytest.mark.parametrize("mode", ERAS)
@pytest.mark.parametrize(("tool", "arguments"), [("causal_trace", TRACE), ("generate_with_hooks", LONG)])
async def test_cancelling_a_job_stops_it_within_one_layer(
    lab: Lab, slow: Entered, tool: str, arguments: dict, mode: str
) -> None:
    slow.hold_at(3)
    gate = Gate()
    async with connected(build_server(lab, watch=Watch(lab, gate)), mode) as client:
        run = await started(client, tool, **arguments)
        await slow.held()
        job = await ask(client, "cancel_job", run=run)
        assert (job["state"], gate.inside) == ("cancelled", 0)
        entered = slow.count
        assert entered <= 3 + 1
        slow.let_go()
        assert await ask(client, "cancel_job", run=run) == job
        assert "result" not in await ask(client, "get_job", run=run)
        await ask(client, "logit_lens", prompt="hello")
        assert slow.count == entered + 4


async def test_a_job_that_waits_for_the_model_can_be_cancelled_too(lab: Lab, slow: Entered) -> None:
    slow.hold_at(2)
    async with connected(build_server(lab)) as client:
        first = await started(client, "generate_with_hooks", **LONG)
        second = await started(client, "logit_lens", prompt="hello")
        assert (await ask(client, "cancel_job", run=second))["state"] == "cancelled"
        assert (await ask(client, "get_job", run=first, wait_seconds=0))["state"] == "running"
        assert (await ask(client, "cancel_job", run=first))["state"] == "cancelled"


async def test_a_running_job_is_listed_and_cannot_be_released(lab: Lab, slow: Entered) -> None:
    slow.hold_at(2)
    async with connected(build_server(lab)) as client:
        run = await started(client, "generate_with_hooks", **LONG)
        listed = (await ask(client, "list_session"))["handles"]
        assert [(held["handle"], held["about"]) for held in listed] == [(run, "generate_with_hooks, running")]
        assert "cancel_job" in await refused(client, "release", handle=run)
        await ask(client, "cancel_job", run=run)
        await ask(client, "release", handle=run)
        assert "no such handle" in await refused(client, "get_job", run=run)


async def test_jobs_count_as_calls_and_a_full_server_can_still_be_asked_and_relieved(lab: Lab, slow: Entered) -> None:
    gate = Gate(most=2, most_each=2)
    slow.hold_at(2)
    async with connected(build_server(lab, watch=Watch(lab, gate))) as client:
        runs = [await started(client, "generate_with_hooks", **LONG) for _ in range(2)]
        assert gate.inside == 2
        assert "full" in await refused(client, "tokenize", text="hello")
        assert "full" in await refused(client, "start_job", tool="logit_lens", arguments={"prompt": "hello"})
        assert (await ask(client, "get_job", run=runs[0], wait_seconds=0))["state"] == "running"
        for run in runs:
            await ask(client, "cancel_job", run=run)
        assert gate.inside == 0
        slow.let_go()
        await ask(client, "logit_lens", prompt="hello")


async def test_one_call_at_a_time_allows_one_job(lab: Lab) -> None:
    async with connected(build_server(lab, watch=Watch(lab, Gate(most_each=1)))) as client:
        assert (await ended(client, await started(client, "logit_lens", prompt="hello")))["state"] == "done"


class Saves(MemoryStore):
    """Remembers what is saved of runs."""

    def __init__(self) -> None:
        super().__init__()
        self.saved: list[Run] = []

    def save_run(self, run: Run) -> None:
        self.saved.append(run)
        super().save_run(run)


async def test_progress_is_saved_now_and_then_and_the_end_always(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = Lab(store := Saves())
    lab.load("synthetic", "dense")
    lab.models[0].model = (slow := Entered(lab.models[0].model)).model
    monkeypatch.setattr(server.call, "REPORT_EVERY", 0.0)
    monkeypatch.setattr(server.jobs, "SAVE_EVERY", 3.0)
    monkeypatch.setattr(server.jobs, "clock", lambda: float(slow.count))  # a layer lasts a second
    slow.hold_at(4)
    async with connected(build_server(lab)) as client:
        run = await started(client, "causal_trace", **TRACE)
        await until(lambda: store.saved, "progress that is saved while a layer is held")
        slow.let_go()
        await ended(client, run)
    *before, last = store.saved
    assert (last.state, last.done) == ("done", slow.count)
    assert {run.state for run in before} == {"running"}
    done = [run.done for run in before]
    assert done == sorted(set(done))
    assert 3 <= done[0] <= 4
    assert len(done) <= slow.count / 3


class NoProgress(MemoryStore):
    """A store that can take no progress for now."""

    def save_run(self, run: Run) -> None:
        if run.state == "running":
            raise StoreError("no room for progress")
        super().save_run(run)


async def test_a_job_whose_progress_cannot_be_saved_goes_on_to_its_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server.jobs, "SAVE_EVERY", 0.0)
    lab = Lab(NoProgress())
    lab.load("synthetic", "dense")
    async with connected(build_server(lab)) as client:
        job = await ended(client, await started(client, "causal_trace", **TRACE))
    assert job["state"] == "done"
    assert "could not be saved" in caplog.text


class Full(MemoryStore):
    """A store that can take no more."""

    def save_run(self, run: Run) -> None:
        raise OSError("no space left")


async def test_a_job_whose_end_cannot_be_saved_leaves_its_place_and_a_line_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    lab = Lab(Full())
    lab.load("synthetic", "dense")
    watch = Watch(lab)
    async with connected(build_server(lab, watch=watch)) as client:
        run = await started(client, "logit_lens", prompt="hello")
        await ask(client, "get_job", run=run)
        assert watch.gate.inside == 0
    assert f"how {run} ended could not be saved" in caplog.text


async def test_a_stopping_server_saves_how_far_its_jobs_came(lab: Lab, slow: Entered) -> None:
    watch = Watch(lab)
    slow.hold_at(5)
    async with connected(build_server(lab, watch=watch)) as client:
        run = await started(client, "generate_with_hooks", **LONG)
        await slow.held()
        await watch.gate.close(0)
        stopped = lab.store.run(run, LOCAL)
        assert (stopped.state, stopped.done > 0) == ("interrupted", True)
        assert "server was stopped" in str(stopped.error)
        assert (watch.gate.inside, slow.count) == (0, 5)
        assert "stopping" in await refused(client, "start_job", tool="logit_lens", arguments={"prompt": "hello"})


async def test_a_stopping_server_lets_jobs_end_that_are_nearly_done(lab: Lab, slow: Entered) -> None:
    watch = Watch(lab)
    slow.hold_at(4)
    async with connected(build_server(lab, watch=watch)) as client, anyio.create_task_group() as group:
        run = await started(client, "logit_lens", prompt="hello")
        await slow.held()
        group.start_soon(watch.gate.close, PATIENCE)
        while not watch.gate.closed:
            await anyio.sleep(0)
        slow.let_go()
    assert lab.store.run(run, LOCAL).state == "done"


async def test_metrics_count_jobs_as_calls_of_their_tools(lab: Lab, slow: Entered) -> None:
    watch = Watch(lab)
    async with connected(build_server(lab, watch=watch)) as client:
        await ended(client, await started(client, "logit_lens", prompt="hello"))
        await ended(client, await started(client, "logit_lens", prompt="hello", layers=[9]))
        slow.hold_at(slow.count + 1)
        await ask(client, "cancel_job", run=await started(client, "generate_with_hooks", **LONG))
    calls = Counter(
        {
            (sample.labels["tool"], sample.labels["outcome"]): int(sample.value)
            for metric in watch.metrics.calls.collect()
            for sample in metric.samples
            if sample.name == "mechscope_calls_total" and sample.labels["tool"] not in ("start_job", "get_job")
        }
    )
    assert calls == {
        ("logit_lens", "ok"): 1,
        ("logit_lens", "error"): 1,
        ("generate_with_hooks", "cancelled"): 1,
        ("cancel_job", "ok"): 1,
    }


async def test_while_a_job_works_with_the_model_texts_are_tokenized(lab: Lab, slow: Entered) -> None:
    slow.hold_at(2)
    async with connected(build_server(lab)) as client:
        run = await started(client, "generate_with_hooks", **LONG)
        await slow.held()
        assert (await ask(client, "tokenize", text="hello"))["count"] == 5
        assert slow.count == 2
        assert (await ask(client, "cancel_job", run=run))["state"] == "cancelled"


async def test_a_job_that_comes_in_when_all_were_sent_out_is_sent_out_too() -> None:
    gate, worked = Gate(), False

    async def job() -> None:
        nonlocal worked
        with gate.taken_over("ann"):
            await anyio.sleep(0)
            worked = True

    await gate.close(0)
    with pytest.raises(Stopped):
        await job()
    assert not worked
    assert gate.inside == 0
