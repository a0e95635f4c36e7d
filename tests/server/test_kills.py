"""A process that is killed while it writes loses nothing that it has answered for."""

import os
import random
import signal
import subprocess
import sys
import time
from collections import defaultdict
from itertools import islice, takewhile
from pathlib import Path

import anyio
import pytest
from clients import ask, connected
from serving import over_stdio, reached, serving

from server.disk_store import open_store
from server.records import fault, file_name
from server.repair import repair

KILLS, SEED = 60, 7
WRITER = Path(__file__).with_name("write_until_killed.py")

Told = dict[str, dict[str, str]]
"""By the words of `write_until_killed`: handles, with their sha256 if told."""


def killed(writer: subprocess.Popen[str], seed: int, lines: int, delay: float) -> list[list[str]]:
    """What a writer tells until it is killed, some time after so many lines; it begins by opening the workspace."""
    assert writer.stdin is not None
    assert writer.stdout is not None
    writer.stdin.write(f"{seed}\n")
    word, pid = writer.stdout.readline().split()
    assert word == "begun"
    told = list(islice(writer.stdout, lines))
    time.sleep(delay)
    os.kill(int(pid), signal.SIGKILL)
    told += takewhile(lambda line: line != f"killed {pid}\n", writer.stdout)
    return [line.split() for line in told]


def missing(root: Path, told: Told) -> set[str]:
    """Handles that were returned, not released, and are not there with the right content."""
    store = open_store(root, 1 << 16, 1 << 40)
    there = {record.handle: record.provenance["sha256"] for record in store.records("ann")}
    states = {run.handle: run.state for run in store.runs("ann")}
    store.close()
    expected = {handle: sha for handle, sha in told["put"].items() if handle not in told["releasing"]}
    lost = {handle for handle, sha in expected.items() if there.get(handle) != sha}
    lost |= {handle for handle, sha in there.items() if fault(root / "records" / file_name(handle), sha)}
    lost |= {handle for handle in told["released"] if handle in there}
    lost |= {handle for handle in told["started"] if states.get(handle) not in ("interrupted", "done")}
    return lost | {handle for handle in told["done"] if states.get(handle) != "done"}


def test_every_handle_that_was_returned_survives_sixty_kills_while_writing(tmp_path: Path) -> None:
    drawn = random.Random(SEED)
    told: Told = defaultdict(dict)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, WRITER, str(tmp_path)], text=True, bufsize=1, **pipes) as writer:
        for number in range(KILLS):
            for word, handle, *more in killed(writer, number, drawn.randrange(12), drawn.uniform(0, 0.04)):
                told[word][handle] = "".join(more)
            assert missing(tmp_path, told) == set(), f"after kill {number}"
        writer.stdin.close()
    assert sum(map(len, told.values())) >= 200
    assert len(told["put"]) > KILLS
    said: list[str] = []
    repair(tmp_path, said.append)
    assert not any("missing" in line or "damaged" in line for line in said)
    store = open_store(tmp_path, 1 << 16, 1 << 40)
    names = {file_name(record.handle) for record in store.records("ann")}
    store.close()
    assert {path.name for path in (tmp_path / "records").iterdir()} == names


@pytest.mark.anyio
async def test_a_server_that_was_killed_knows_every_handle_when_it_is_started_again(tmp_path: Path) -> None:
    workspace = ("--workspace", str(tmp_path))
    with serving(*workspace) as served:
        async with reached(served.base, "http") as client:
            model = (await ask(client, "load_model", model="synthetic"))["model"]
            held = await ask(client, "capture_residuals", prompt="hello", positions="all")
            lens = await ask(client, "logit_lens", tensor=held["handle"], layers=[-1])
            cache = await ask(client, "prefill_inject", recipient="hello", donor="world", keep=True)
        served.process.kill()
        await anyio.to_thread.run_sync(served.process.wait)
    async with connected(over_stdio(*workspace)) as client:
        listed = await ask(client, "list_session")
        assert {row["handle"] for row in listed["handles"]} == {held["handle"], cache["handle"]}
        assert [row["in_memory"] for row in listed["models"]] == [False]
        again = await ask(client, "logit_lens", tensor=held["handle"], layers=[-1], model=model)
        assert again["rows"] == lens["rows"]
        await ask(client, "generate_with_hooks", prompt="!", cache=cache["handle"], max_new_tokens=2)
        await ask(client, "release", handle=held["handle"])
    async with connected(over_stdio(*workspace)) as client:
        assert [row["handle"] for row in (await ask(client, "list_session"))["handles"]] == [cache["handle"]]
