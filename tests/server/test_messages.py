"""Every message that docs/troubleshooting.md quotes is what somebody gets: each is provoked for real and compared."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import httpx2 as httpx
import pytest
import tiny_files
from clients import SCRIPT, ask, connected, refused
from documents import ROOT
from mcp.client.stdio import StdioServerParameters
from serving import serving, token_file
from slow_model import Entered

from engine.catalog import CATALOGUE
from server.app import build_server
from server.gate import Gate
from server.lab import Lab
from server.sources import Sources
from server.watch import Watch

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
MODEL = next(iter(CATALOGUE))
NOWHERE = "http://127.0.0.1:9"
QUOTED = re.findall(r"^\| `([^`]+)` \|", PAGE, re.MULTILINE)
"""Those that stand alone in the first column of a table; with a status they are in `STATUSES`."""


def run(*arguments: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    """The `mechscope` script, in lines as long as they come."""
    words, wide = [SCRIPT, *map(str, arguments)], {"COLUMNS": "2000"}
    return subprocess.run(
        words, env=os.environ | wide | env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
    )


def plain(said: str) -> str:
    """In one line, without the frame that the command line draws around an error."""
    return " ".join(re.sub(r"[│╭╮╰╯─]|\x1b\[[0-9;]*m", " ", said).split())


# --- it does not start ------------------------------------------------------------------------------------------------


def started(*arguments: str | Path, **env: str) -> str:
    """What `mechscope serve` says when it ends at once."""
    made = run("serve", *arguments, **env)
    assert made.returncode != 0
    return made.stderr


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o600)
    return path


AT_THE_START: dict[str, Callable[[Path], str]] = {
    "no such environment variable: …; there are …": lambda at: started(MECHSCOPE_PROT="1"),
    "there is no such setting; there are …": lambda at: started("--config", written(at / "config", "prot = 1")),
    "… is not TOML: …": lambda at: started("--config", written(at / "config", "host = localhost")),
    "there is no configuration file …": lambda at: started("--config", at / "nowhere"),
    "there is no folder …": lambda at: started("--models-dir", at / "nowhere"),
    "… is not localhost: beyond localhost clients must show a token. Give --token-file": lambda at: started(
        "--http", "--host", "0.0.0.0"
    ),
    "token_file: … cannot be read: …": lambda at: started("--http", "--token-file", at / "nowhere"),
    "… has … words; write a name and a token, nothing else": lambda at: started(
        "--http", "--token-file", written(at / "tokens", "laptop")
    ),
    "… a token is at least … letters, digits and …": lambda at: started(
        "--http", "--token-file", written(at / "tokens", "laptop short")
    ),
}


# --- HTTP answers with an error ---------------------------------------------------------------------------------------

HELLO = {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "t", "version": "1"}}
BODY = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": HELLO}
ACCEPT = {"accept": "application/json, text/event-stream"}


def posted(*arguments: str | Path, times: int = 1, more: str = "", **sent: str) -> httpx.Response:
    """The answer to a request, the last of several, of a server that is started for it."""
    headers = ACCEPT | {name.replace("_", "-"): value for name, value in sent.items()}
    with serving(*map(str, arguments)) as served:
        made = [httpx.post(f"{served.base}/mcp", json=BODY | {"more": more}, headers=headers) for _ in range(times)]
    return made[-1]


STATUSES: dict[str, Callable[[Path], httpx.Response]] = {
    "401 `send a token: Authorization: Bearer TOKEN`": lambda at: posted("--token-file", token_file(at)),
    "401 `this token is not known`": lambda at: posted(
        "--token-file", token_file(at), authorization=f"Bearer {'x' * 40}"
    ),
    "421 `…: this server answers to localhost and to what its … names`": lambda at: posted(host="example.org"),
    "403 `…: this server answers to localhost and to what its … names`": lambda at: posted(origin="https://a.org"),
    "429 `too many requests: …; try again in … s`": lambda at: posted("--rate-limit", "1/minute", times=2),
    "404 Session not found": lambda at: posted(mcp_session_id="f" * 32),
    "406 Not Acceptable": lambda at: posted(accept="application/json"),
    "413": lambda at: posted("--body-limit", "1KiB", more="x" * 2000),
}
BY_HAND = ("503",)
"""tests/server/test_http.py has it: it takes as many connections as are allowed."""


@pytest.mark.parametrize("row", STATUSES)
def test_a_status_is_what_one_gets(row: str, tmp_path: Path) -> None:
    status, _, said = row.partition(" ")
    made = STATUSES[row](tmp_path)
    assert made.status_code == int(status)
    assert re.search(re.escape(said.strip("`")).replace("…", ".+"), made.text), made.text


def test_every_status_in_the_table_is_provoked() -> None:
    table = PAGE.partition("## HTTP answers")[2].partition("## Tools answer")[0]
    rows = [row.strip() for row in re.findall(r"^\| (\d{3}[^|]*)\|", table, re.MULTILINE)]
    told = [re.sub(r"^(\d+)(?: or \d+)?", r"\1", row) for row in rows]
    assert set(told) <= {*STATUSES, *BY_HAND}
    assert {row.partition(" ")[0] for row in STATUSES} <= set(re.findall(r"\b\d{3}\b", table))


# --- tools answer with an error ---------------------------------------------------------------------------------------


async def _answer(lab: Lab, gate: Gate, tool: str, arguments: dict[str, Any]) -> str:
    async with connected(build_server(lab, watch=Watch(lab, gate))) as client:
        result = await client.call_tool(tool, arguments)
        assert result.is_error, result.structured_content
        return str(result.content[0].text)


def answered(tool: str, lab: Lab | None = None, gate: Gate | None = None, /, **arguments: Any) -> str:
    """The error of one call."""
    return anyio.run(_answer, synthetic() if lab is None else lab, Gate() if gate is None else gate, tool, arguments)


def synthetic() -> Lab:
    lab = Lab()
    lab.load("synthetic", "dense")
    return lab


async def _one_too_many(lab: Lab, gate: Gate) -> str:
    """A job runs; then one call more than are let in."""
    entered = Entered(lab.models[0].model)
    lab.models[0].model = entered.model
    entered.hold_at(1)
    long = {"prompt": "hello", "max_new_tokens": 200}
    try:
        async with connected(build_server(lab, watch=Watch(lab, gate))) as client:
            job = await ask(client, "start_job", tool="generate_with_hooks", arguments=long)
            said = await refused(client, "list_session")
            await ask(client, "cancel_job", run=job["run"])
    finally:
        entered.let_go()
    return said


def closed() -> Gate:
    gate = Gate()
    gate.closed = True
    return gate


def elsewhere(at: Path) -> Sources:
    """Models are loaded from the folder `models`, and nothing is downloaded."""
    (at / "models").mkdir()
    return Sources((at / "models",), downloads=False)


def linked(at: Path) -> str:
    """A directory whose weights are links to another place."""
    lab = Lab(sources=elsewhere(at))
    tiny_files.hf_directory(at / "outside", tiny_files.small())
    shutil.copytree(at / "outside", at / "models" / "tiny")
    weights = at / "models" / "tiny" / "model.safetensors"
    weights.unlink()
    weights.symlink_to(at / "outside" / "model.safetensors")
    return answered("load_model", lab, model=str(at / "models" / "tiny"))


def defective() -> Lab:
    """A defect that is put there."""
    lab = synthetic()
    lab.models[0].model.__dict__["config"] = None
    return lab


def fetched(at: Path) -> str:
    """From an index that is not there."""
    made = run("fetch", XDG_CACHE_HOME=str(at), PIP_INDEX_URL=NOWHERE, PIP_RETRIES="0", PIP_CONFIG_FILE=os.devnull)
    assert made.returncode == 1
    return made.stderr


def from_the_hub(at: Path, name: str) -> str:
    """Of a hub that is not there: what is in its cache is all there is."""
    made = run("demo", "--model", name, HF_HOME=str(at), HF_HUB_OFFLINE="1")
    assert made.returncode == 1
    return made.stderr


def with_pickles(at: Path) -> str:
    """A repository in the hub's cache that has weights of one kind only."""
    repository = at / "hub" / "models--owner--pickles"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text('{"model_type": "llama"}')
    (snapshot / "pytorch_model.bin").write_bytes(b"")
    return from_the_hub(at, "owner/pickles")


LITTLE = f"""
import resource
import engine
resource.setrlimit(resource.RLIMIT_AS, (500 << 20, 500 << 20))
engine.load_model({MODEL!r}, converted=False)
"""


def with_little_memory(at: Path) -> str:
    env = os.environ | {"OPENBLAS_NUM_THREADS": "1", "MECHSCOPE_FAST": "no"}
    return subprocess.run([sys.executable, "-c", LITTLE], env=env, capture_output=True, text=True).stderr


BY_TOOLS: dict[str, Callable[[Path], str]] = {
    "mechscope is full: … calls and jobs run or wait; call again in a few seconds": lambda at: anyio.run(
        _one_too_many, synthetic(), Gate(1, 8)
    ),
    "… of your calls and jobs run or wait, and no more may; wait for one to end or cancel a job, then call again": (
        lambda at: anyio.run(_one_too_many, synthetic(), Gate(8, 1))
    ),
    "mechscope is stopping and takes no more calls; call again later": lambda at: answered(
        "list_session", None, closed()
    ),
    "… was not run. …": lambda at: answered("tokenize", text=5),
    "no such handle: …": lambda at: answered("release", handle=f"act:gone-{'0' * 32}"),
    "… models are loaded; …": lambda at: answered("logit_lens", Lab(), prompt="hello"),
    "there is no model … here; …": lambda at: answered("load_model", Lab(sources=elsewhere(at)), model="./gone"),
    "no paths, for want of a --models-dir": lambda at: answered("load_model", Lab(sources=Sources(())), model=str(at)),
    "… is not in the cache, and downloads are switched off; …": lambda at: started_without_downloads(at),
    "… is not an ordinary file in a folder that models are loaded from: devices, pipes and links that lead elsewhere "
    "are not opened": linked,
    "pip could not download …": fetched,
    "the hub did not give …": lambda at: from_the_hub(at, "owner/elsewhere"),
    "… has no model.safetensors on the hub, nor an index of its shards, and pickles are never loaded (loading one can "
    "run any code); choose a repository with safetensors, or convert the weights": with_pickles,
    "there is not enough memory for …; …": with_little_memory,
    "… is … tokens, not one: …; give one of them by text or id…": lambda at: answered(
        "track_token", prompt="hello", token="ab"
    ),
    "… failed inside mechscope (…, fault … in the server's log); this is a defect: nothing was computed and nothing "
    "was lost": lambda at: answered("logit_lens", defective(), prompt="hello"),
}


def started_without_downloads(at: Path) -> str:
    """`load_model` of a server that may not fetch, where nothing was fetched before."""

    async def call() -> str:
        variables = os.environ | {"XDG_CACHE_HOME": str(at)}
        server = StdioServerParameters(command=str(SCRIPT), args=["serve", "--no-downloads"], env=variables)
        async with connected(server) as client:
            return await refused(client, "load_model", model=MODEL)

    return anyio.run(call)


# --- the doctor says FAIL ---------------------------------------------------------------------------------------------


def examined(**env: str) -> str:
    made = run("doctor", MECHSCOPE_FAST="no", **env)
    assert made.returncode == 1
    (failed,) = [line for line in made.stdout.splitlines() if line.startswith("FAIL")]
    return failed


def beside_another(at: Path) -> str:
    (at / "schemas").mkdir()
    (at / "schemas" / "__init__.py").write_text("")
    made = run("doctor", PYTHONPATH=str(at))
    return made.stdout + made.stderr


def with_a_damaged_file(at: Path) -> str:
    entry = CATALOGUE[MODEL]
    (at / "mechscope" / "models").mkdir(parents=True)
    (at / "mechscope" / "models" / f"{entry.name}-{entry.sha256[:12]}.gguf").write_bytes(b"GGUF")
    return examined(XDG_CACHE_HOME=str(at))


BY_THE_DOCTOR: dict[str, Callable[[Path], str]] = {
    "other packages of the same name: …; install mechscope on its own (uvx, pipx)": beside_another,
    "… is damaged; delete it and fetch again": with_a_damaged_file,
    "… cannot be written: …": lambda at: examined(MECHSCOPE_WORKSPACE=str(written(at / "file", ""))),
}


# --- all --------------------------------------------------------------------------------------------------------------

PROVOKED = AT_THE_START | BY_TOOLS | BY_THE_DOCTOR
ELSEWHERE = {
    "Parse error: Invalid JSON: …": "test_unreadable.py",
    "… the numbers of … are not those that were written, delete it": "test_command_line.py",
    "… damaged, to be released and made anew: …": "test_command_line.py",
}
"""Messages that tests of their own provoke."""
REAL = ("there is not enough memory for …; …",)


@pytest.mark.parametrize("message", [pytest.param(m, marks=[pytest.mark.real] * (m in REAL)) for m in PROVOKED])
def test_a_quoted_message_is_what_one_gets(message: str, tmp_path: Path) -> None:
    said = plain(PROVOKED[message](tmp_path))
    assert re.search(re.escape(message).replace("…", ".+?"), said), said


def test_every_message_that_is_quoted_is_provoked() -> None:
    assert sorted(QUOTED) == sorted([*PROVOKED, *ELSEWHERE])
