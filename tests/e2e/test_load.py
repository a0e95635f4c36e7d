"""A real server under twenty HTTP clients for a minute, and over two thousand calls: busy at worst, never slow to
answer, and afterwards as large as before.
"""

import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import httpx2 as httpx
import pytest
from clients import ERAS
from mcp import Client
from serving import Served, reached, serving

from server.idle import IDLE

pytestmark = [pytest.mark.e2e, pytest.mark.anyio]

CLIENTS, SECONDS, WARM_UP = 20, 60, 20
SOAK, SAMPLES = 2_000, 4
LATE = "0.1"
"""Seconds that the event loop may be late: a bucket of mechscope_loop_delay_seconds."""
QUIET, STRAY, CROWDED = 0.2, 0.001, 0.01
"""Processors that others may use on a quiet machine; the share of timers that may be late there, because virtual
machines are stopped now and then without a trace, and elsewhere. A tool that blocks the loop makes one timer in twenty
late: each of its calls does.
"""
LOAD_GROWTH, SOAK_GROWTH = 32 << 20, 16 << 20
"""Bytes of resident memory that the allocator may keep of its own, once the server was idle."""
BUSY = ("mechscope is full: ", "of your calls and jobs run or wait, and no more may")
"""How the documented answers to too many calls read."""

PATIENCE = 1
"""Seconds that a client waits when it is told to call again."""

SHORT, LONG = "abcabcabcab", "The capital of France is Paris. " * 12
STEER = {"layer": 1, "vector": {"random_seed": 1}, "alpha": 4.0}
MIX: tuple[tuple[str, dict[str, Any]], ...] = (
    ("list_session", {}),
    ("tokenize", {"text": LONG}),
    ("capture_residuals", {"prompt": SHORT, "lens_k": 3}),
    ("capture_residuals", {"prompt": LONG, "positions": "all", "points": ["resid_post", "mlp_act", "attn_pattern"]}),
    ("logit_lens", {"prompt": LONG}),
    ("track_race", {"prompt": SHORT}),
    ("attention_pattern", {"prompt": LONG, "layers": [1, 2], "k": 5}),
    ("forward_ablate", {"prompt": LONG, "layers": [1], "point": "attn_out"}),
    ("forward_steer", {"prompt": SHORT, "steers": [STEER]}),
    ("patch_activations", {"donor": "abdabd", "recipient": "abcabc", "targets": [{"layer": 1, "position": -1}]}),
    ("causal_trace", {"clean": "abdabdab", "corrupt": "abcabcab", "metric": "kl"}),
    ("generate_with_hooks", {"prompt": SHORT, "max_new_tokens": 20, "steers": [STEER]}),
    ("prefill_inject", {"recipient": "abcabc", "donor": "abdabd", "max_new_tokens": 5, "keep": True}),
    ("kv_inject_test", {"recipient": "abcabc", "donor": "abdabd", "target": "d"}),
    ("compare", {"a": SHORT, "b": "abdabdabdab"}),
    ("project_through_unembed", {"vector": {"random_seed": 3}}),
)
"""Every kind of work: reading, sweeps, generation, and calls that keep megabytes under a handle."""


class Clients:
    """What a number of clients did: calls by outcome, and what was refused for another reason than being busy."""

    def __init__(self, served: Served) -> None:
        self._base = served.base
        self.outcomes: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.answered: set[str] = set()

    async def run(self, seconds: float, clients: int) -> None:
        """So many clients at once, half of them in each era, for so long."""
        until = time.monotonic() + seconds
        async with anyio.create_task_group() as group:
            for seed in range(clients):
                group.start_soon(self._one, seed, until)

    async def _one(self, seed: int, until: float) -> None:
        draw = random.Random(seed)
        async with reached(self._base, "http", ERAS[seed % len(ERAS)]) as client:
            while time.monotonic() < until:
                await self.call(client, *draw.choice(MIX))

    async def call(self, client: Client, tool: str, arguments: dict[str, Any]) -> None:
        """One call; what it keeps under a handle is released."""
        result = await client.call_tool(tool, arguments)
        if result.is_error:
            text = result.content[0].text
            busy = any(words in text for words in BUSY)
            self.outcomes["busy" if busy else "error"] += 1
            self.errors.update([] if busy else [f"{tool}: {text}"])
            await anyio.sleep(PATIENCE)
            return
        self.outcomes["ok"] += 1
        self.answered.add(tool)
        if (handle := (result.structured_content or {}).get("handle")) and tool != "release":
            while (await client.call_tool("release", {"handle": handle})).is_error:
                await anyio.sleep(PATIENCE)


def metrics(served: Served) -> dict[str, float]:
    """Everything in /metrics, {name with labels: value}."""
    lines = httpx.get(f"{served.base}/metrics").text.splitlines()
    return {name: float(value) for name, _, value in (x.rpartition(" ") for x in lines if not x.startswith("#"))}


def late_timers(shown: dict[str, float]) -> float:
    """How many of the server's timers went off more than `LATE` seconds late."""
    name = 'mechscope_loop_delay_seconds_bucket{{le="{}"}}'
    return shown[name.format("+Inf")] - shown[name.format(LATE)]


def cpu_seconds() -> float:
    """What all processes of this machine have used so far; 0 where the system does not say."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _, _, irq, softirq, steal = map(int, stat.read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def figures(served: Served) -> dict[str, float]:
    """`metrics`, and the CPU seconds of all that is neither the server nor its clients."""
    shown = metrics(served)
    return shown | {"others": cpu_seconds() - time.process_time() - shown["process_cpu_seconds_total"]}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    """On one processor for arithmetic: the clients, which run here, need another."""
    with serving(
        "--rate-limit", "100000/second", "--workspace", str(tmp_path), env={"OPENBLAS_NUM_THREADS": "1"}
    ) as server:
        yield server


async def load_model(served: Served) -> None:
    async with reached(served.base, "http") as client:
        assert not (await client.call_tool("load_model", {"model": "synthetic"})).is_error


async def test_twenty_clients_meet_no_error_but_busy_and_leave_nothing_behind(served: Served) -> None:
    await load_model(served)
    await Clients(served).run(WARM_UP, CLIENTS)
    await anyio.sleep(2 * IDLE + 1)
    before, clients = figures(served), Clients(served)
    await clients.run(SECONDS, CLIENTS)
    others = (figures(served)["others"] - before["others"]) / SECONDS
    await anyio.sleep(2 * IDLE + 1)
    after = figures(served)
    grown = {name: after[name] - before.get(name, 0) for name in after}
    late, timers = late_timers(grown), grown["mechscope_loop_delay_seconds_count"]
    memory = grown["process_resident_memory_bytes"]
    print(
        f"{dict(clients.outcomes)}; {late:.0f} of {timers:.0f} timers late, others took {others:.1f} processors; ",
        end="",
    )
    print(f"{memory / 2**20:.1f} MB more")
    assert not clients.errors
    assert clients.answered == {tool for tool, _ in MIX}
    assert clients.outcomes["busy"], "the gate was never full: this was no load"
    assert late <= (STRAY if others < QUIET else CROWDED) * timers
    assert memory < LOAD_GROWTH
    assert after['mechscope_bytes_held{what="records"}'] == 0
    assert after["mechscope_calls_inside"] == after["mechscope_faults_total"] == 0


async def test_two_thousand_calls_leave_memory_files_and_handles_as_they_were(served: Served, tmp_path: Path) -> None:
    await load_model(served)
    clients = Clients(served)
    seen: list[dict[str, float]] = []
    async with reached(served.base, "http") as client:
        for number in range(1, SOAK + 1):
            await clients.call(client, *MIX[number % len(MIX)])
            if number % (SOAK // SAMPLES) == 0:
                seen.append(metrics(served) | {"files": len([*tmp_path.rglob("*.safetensors")])})
        session = (await client.call_tool("list_session", {})).structured_content
    print(
        [f"{row['process_resident_memory_bytes'] / 2**20:.1f} MB, {row['process_open_fds']:.0f} files" for row in seen]
    )
    first, last = seen[0], seen[-1]
    assert clients.outcomes == {"ok": SOAK}, clients.errors
    assert session is not None
    assert session["handles"] == []
    assert last["process_resident_memory_bytes"] - first["process_resident_memory_bytes"] < SOAK_GROWTH
    assert last["process_open_fds"] <= first["process_open_fds"] + 2
    assert (last["files"], last['mechscope_bytes_held{what="records"}']) == (0, 0)
