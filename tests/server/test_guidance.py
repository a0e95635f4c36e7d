"""What the pages for people say is what the code says, and their examples run."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2 as httpx
import pytest
from clients import SCRIPT, ask, connected
from mcp.client.stdio import StdioServerParameters
from serving import TOKENS, Served, serving, token_file

from server.gate import Gate
from server.lab import Lab
from server.metrics import Metrics
from server.settings import PREFIX, Settings, read_settings

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "compose.yaml", *DOCS.glob("*.md")]
HERE = "http://127.0.0.1:8765"


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text("utf-8"), re.DOTALL)


def test_the_operators_page_names_every_metric() -> None:
    told = re.findall(r"^\| `(mechscope_\w+)`", (DOCS / "operate.md").read_text("utf-8"), re.MULTILINE)
    families = [f for f in Metrics(Lab(), Gate()).registry.collect() if f.name.startswith("mechscope")]
    assert sorted(told) == sorted(f"{f.name}_total" if f.type == "counter" else f.name for f in families)


def test_every_flag_and_variable_in_the_pages_exists() -> None:
    known = {flag for name in Settings.model_fields for flag in (f"--{name}", f"--no-{name}")}
    known = {flag.replace("_", "-") for flag in known} | {"--config", "--method", "--build-arg", "--thorough"}
    variables = {f"{PREFIX}{name.upper()}" for name in Settings.model_fields} | {f"{PREFIX}CONFIG", f"{PREFIX}TOKEN"}
    for page in PAGES:
        text = page.read_text("utf-8")
        commands = " ".join(re.findall(r"mechscope serve[^`\n]*|`--[^`]*`", text))
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", commands)) <= known, page.name
        assert set(re.findall(rf"{PREFIX}[A-Z_]+\w", text)) <= variables, page.name


def test_the_toml_on_the_operators_page_is_valid(tmp_path: Path) -> None:
    (sample,) = blocks("operate.md", "toml")
    file = tmp_path / "config.toml"
    file.write_text(sample.replace("/srv/models", str(tmp_path)))
    found = read_settings({}, file)
    assert found.http
    assert found.models_dir == (tmp_path.resolve(),)


def entries() -> list[dict[str, object]]:
    found = []
    for text in blocks("connect.md", "json"):
        sample = json.loads(text)
        found += (sample.get("mcpServers") or sample["servers"]).values()
    return found


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving("--token-file", str(token_file(tmp_path_factory.mktemp("tokens")))) as served:
        yield served


def test_the_sample_desktop_configuration_is_the_one_that_ships() -> None:
    shipped = json.loads((ROOT / "deploy" / "claude_desktop_config.json").read_text("utf-8"))
    assert shipped in [json.loads(text) for text in blocks("connect.md", "json")]


@pytest.mark.anyio
async def test_every_configured_command_is_mechscopes_and_serves() -> None:
    commands = {(e["command"], *e["args"]) for e in entries() if e.get("command") not in (None, "npx")}
    assert commands == {("mechscope", "serve")}
    async with connected(StdioServerParameters(command=str(SCRIPT), args=["serve"], env=dict(os.environ))) as client:
        assert await ask(client, "load_model", model="synthetic")


def test_every_configured_address_takes_the_configured_header(guarded: Served) -> None:
    reached = [entry for entry in entries() if "url" in entry]
    assert len(reached) == 3
    for entry in reached:
        filled = {name: re.sub(r"\$\{.*?\}", TOKENS["ann"], value) for name, value in entry["headers"].items()}
        accept = {"Accept": "application/json, text/event-stream"}
        params = {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "t", "version": "1"}}
        body = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": params}
        answer = httpx.post(entry["url"].replace(HERE, guarded.base), json=body, headers=filled | accept)
        assert answer.status_code == 200


def at(guarded: Served, code: str) -> str:
    assert HERE in code
    return code.replace(HERE, guarded.base)


def test_the_python_of_the_connecting_page_runs(guarded: Served) -> None:
    (code,) = blocks("connect.md", "python")
    variables = os.environ | {"TOKEN": TOKENS["ann"]}
    made = subprocess.run([sys.executable, "-c", at(guarded, code)], env=variables, capture_output=True, text=True)
    assert made.stdout.splitlines() == ["synthetic", "1 layer read"], made.stderr


@pytest.mark.parametrize(("token", "answers"), [(TOKENS["ann"], '"serverInfo"'), ("x" * 40, "this token is not known")])
def test_the_curl_of_the_connecting_page_runs(guarded: Served, token: str, answers: str) -> None:
    (code,) = [text for text in blocks("connect.md", "sh") if text.startswith("curl")]
    made = subprocess.run(
        ["sh", "-c", at(guarded, code)], env=os.environ | {"TOKEN": token}, capture_output=True, text=True
    )
    assert answers in made.stdout, made.stderr


def test_the_way_to_make_a_token_file_makes_one_that_serves(tmp_path: Path) -> None:
    (code,) = [text for text in blocks("connect.md", "sh") if "openssl" in text]
    make, _, serve = code.strip().partition("\n")
    subprocess.run(["sh", "-c", make], cwd=tmp_path, check=True)
    assert serve == "mechscope serve --http --token-file tokens"
    with serving("--token-file", str(tmp_path / "tokens")) as served:
        assert not [record for record in served.log if record["level"] == "WARNING"]
