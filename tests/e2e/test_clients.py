"""One scenario, played by every kind of client over every transport in both eras: the answers are the same."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from clients import ERAS, SCRIPT, connected
from e2e import nodes
from e2e.scenario import SCENARIO, STEPS, Played, complaints, differences, play, request
from serving import TRANSPORTS, Served, reached, serving

from server.app import build_server

pytestmark = pytest.mark.e2e

LEGACY, MODERN = "2025-11-25", "2026-07-28"
TYPESCRIPT = {"v1": ("v1.mjs",), "v2 legacy": ("v2.mjs", "legacy"), "v2 modern": ("v2.mjs", MODERN)}
REVISION = {"v1": None, "v2 legacy": LEGACY, "v2 modern": MODERN}
SCRIPTS = Path(__file__).with_name("clients")

FLAGS: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "tools/call": lambda p: ["--tool-name", p["name"], "--tool-args-json", json.dumps(p["arguments"])],
    "resources/list": lambda p: [],
    "resources/read": lambda p: ["--uri", p["uri"]],
    "prompts/list": lambda p: [],
    "prompts/get": lambda p: ["--prompt-name", p["name"], "--prompt-args", *map("=".join, p["arguments"].items())],
}
"""What the Inspector's command line takes; it completes nothing."""

Log = list[dict[str, Any]]


@pytest.fixture(scope="module", autouse=True)
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is held but what the scenario makes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MECHSCOPE_WORKSPACE", str(tmp_path_factory.mktemp("workspace")))
        yield


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving("--rate-limit", "10000/second") as server:
        yield server


async def in_memory(mode: str) -> Played:
    async with connected(build_server(), mode) as client:
        return await play(client)


async def connected_to(base: str, transport: str, mode: str) -> Played:
    async with reached(base, transport, mode) as client:
        return await play(client)


@pytest.fixture(scope="module")
def reference() -> Played:
    return anyio.run(in_memory, "auto")


def check(played: Played, reference: Played) -> None:
    assert complaints(played) == []
    assert differences(reference, played) == []


@pytest.mark.parametrize("mode", ERAS)
def test_the_python_client_in_memory(reference: Played, mode: str) -> None:
    check(anyio.run(in_memory, mode), reference)


@pytest.mark.parametrize("mode", ERAS)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_the_python_client_over_every_transport(served: Served, reference: Played, transport: str, mode: str) -> None:
    check(anyio.run(connected_to, served.base, transport, mode), reference)


@pytest.mark.parametrize("era", ["legacy", "modern"])
def test_the_inspector(served: Served, reference: Played, era: str) -> None:
    played = Played([tool["name"] for tool in inspected(served, era, "tools/list")["tools"]], [], {})
    for step in STEPS:
        method, params = request(step, played.kept)
        played.keep(step, inspected(served, era, method, *FLAGS[method](params)) if method in FLAGS else None)
    check(played, reference)
    unanswered = [step for step, answer in zip(STEPS, played.answers, strict=True) if answer is None]
    assert {step.get("method") for step in unanswered} == {"completion/complete"}


def inspected(served: Served, era: str, method: str, *arguments: str) -> dict[str, Any]:
    """One request of the Inspector, in a process of its own: handles live in the server."""
    to = ("--cli", f"{served.base}/mcp", "--transport", "http", "--protocol-era", era, "--format", "json", "--quiet")
    ran = nodes.run("mcp-inspector", *to, "--method", method, *arguments)
    assert ran.stdout, ran.stderr
    return json.loads(ran.stdout)["result"]


@pytest.mark.parametrize("era", ["legacy", "modern"])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_the_inspector_finds_every_schema_portable(served: Served, transport: str, era: str) -> None:
    place = places(served)[transport]
    kind = () if transport == "stdio" else ("--transport", transport)
    ran = nodes.run(
        "mcp-inspector", "--cli", *place, *kind, "--protocol-era", era, "--method", "tools/list", "--strict"
    )
    assert ran.returncode == 0, ran.stderr
    assert "load_model" in ran.stdout


def places(served: Served) -> dict[str, tuple[str, ...]]:
    """Where a transport's server is: a command, or a URL."""
    return {"stdio": (str(SCRIPT), "serve"), "http": (f"{served.base}/mcp",), "sse": (f"{served.base}/sse",)}


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("client", TYPESCRIPT)
def test_the_typescript_clients_over_every_transport(
    served: Served, reference: Played, client: str, transport: str
) -> None:
    before = len(served.log)
    script, *options = TYPESCRIPT[client]
    ran = nodes.run("node", str(SCRIPTS / script), *options, transport, *places(served)[transport])
    assert ran.returncode == 0, ran.stderr
    said = json.loads(ran.stdout)
    own = [json.loads(line) for line in ran.stderr.splitlines()]
    check(Played(said["tools"], said["answers"], said["kept"]), reference)
    assert said["revision"] == REVISION[client]
    check_cancelled(said, lambda: own if transport == "stdio" else served.log[before:])


def check_cancelled(said: dict[str, Any], log: Callable[[], Log]) -> None:
    """Progress rose until the client cancelled; the server stopped this call and the scenario's job, and answers on."""
    done = [report["progress"] for report in said["cancelled"]["progress"]]
    assert len(done) >= 3
    assert done == sorted(set(done))
    assert "enough" in said["cancelled"]["ended"]
    assert not said["after"].get("isError")
    until = time.monotonic() + 30
    while len(cancellations(log())) < 2 and time.monotonic() < until:
        time.sleep(0.1)
    assert len(cancellations(log())) == 2


def cancellations(log: Log) -> Log:
    tool = SCENARIO["long"]["tool"]
    return [record for record in log if record.get("tool") == tool and record.get("outcome") == "cancelled"]
