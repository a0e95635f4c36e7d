"""What ships beside the code works: compose file, desktop configuration, bundle and registry entry."""

import json
import os
import re
import socket
import subprocess
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx2 as httpx
import jsonschema
import pytest
import yaml
from clients import SCRIPT, ask, connected
from dockerfile import instructions
from mcp.client.stdio import StdioServerParameters
from serving import TOKENS, headers, reached, token_file
from waiting import PATIENCE, wait_for

from server.settings import Settings, read_settings
from server.tools import TOOLS

ROOT = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text("utf-8"))
SERVICE = COMPOSE["services"]["mechscope"]
DOCKERFILE = dict(instructions((ROOT / "Dockerfile").read_text("utf-8")))
PORT = "8765"


class Composed:
    """The compose file's service as a process: its paths are below `root`, its port is a free one."""

    def __init__(self, root: Path) -> None:
        self.root = root
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = str(probe.getsockname()[1])
        (root / "run" / "secrets").mkdir(parents=True)
        token_file(root / "run" / "secrets")
        (root / "data").mkdir()
        command = [self.moved(word) for word in [*json.loads(DOCKERFILE["ENTRYPOINT"]), *SERVICE["command"]]]
        assert command[0] == SCRIPT.name
        self.process = subprocess.Popen([SCRIPT, *command[1:]], env=self.environment(), stderr=subprocess.DEVNULL)

    def environment(self) -> dict[str, str]:
        image = dict(pair.split("=", 1) for pair in DOCKERFILE["ENV"].split())
        given = {name: self.moved(value) for name, value in (image | SERVICE["environment"]).items()}
        return {"PATH": f"{SCRIPT.parent}:{os.defpath}"} | {k: v for k, v in given.items() if k != "PATH"}

    def moved(self, word: str) -> str:
        return re.sub(r"^/(data|run)/", f"{self.root}/\\1/", word.replace(PORT, self.port))

    def healthy(self) -> bool:
        test = [self.moved(word) for word in SERVICE["healthcheck"]["test"]]
        assert test.pop(0) == "CMD"
        return subprocess.run(test, env=self.environment(), stderr=subprocess.DEVNULL).returncode == 0


@pytest.fixture(scope="module")
def composed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Composed]:
    started = Composed(tmp_path_factory.mktemp("container"))
    try:
        yield started
    finally:
        started.process.terminate()
        assert started.process.wait(PATIENCE) == 0


@pytest.mark.anyio
async def test_the_composed_server_is_healthy_and_serves_those_with_a_token(composed: Composed) -> None:
    wait_for(lambda: composed.process.poll() is not None or composed.healthy(), "a healthy server")
    assert composed.process.poll() is None
    base = f"http://127.0.0.1:{composed.port}"
    assert httpx.get(f"{base}/metrics").status_code == 401
    assert httpx.get(f"{base}/metrics", headers=headers("ann")).status_code == 200
    async with reached(base, "http", name="ann") as client:
        assert (await ask(client, "load_model", model="synthetic"))["model"]


def test_the_composed_server_is_reached_from_this_machine_only_and_writes_to_its_volume_only() -> None:
    (published,) = SERVICE["ports"]
    assert published == f"127.0.0.1:{PORT}:{PORT}"
    assert SERVICE["read_only"] is True
    assert SERVICE["cap_drop"] == ["ALL"]
    assert SERVICE["volumes"] == [f"data:{DOCKERFILE['VOLUME']}"]
    assert "data" in COMPOSE["volumes"]
    assert SERVICE["environment"]["MECHSCOPE_TOKEN_FILE"] == f"/run/secrets/{SERVICE['secrets'][0]}"
    assert SERVICE["secrets"][0] in COMPOSE["secrets"]


def test_the_composed_image_is_this_version_and_gets_time_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    assert SERVICE["image"] == f"mechscope:{version('mechscope')}"
    for name, value in SERVICE["environment"].items():
        monkeypatch.setenv(name, value)
    assert int(SERVICE["stop_grace_period"].removesuffix("s")) > read_settings({}).stop_within + 5


@pytest.mark.anyio
async def test_the_desktop_configuration_starts_a_server() -> None:
    config = json.loads((ROOT / "deploy" / "claude_desktop_config.json").read_text("utf-8"))
    entry = config["mcpServers"]["mechscope"]
    path = f"{SCRIPT.parent}:{os.environ['PATH']}"
    variables = os.environ | entry["env"] | {"PATH": path}
    async with connected(StdioServerParameters(command=entry["command"], args=entry["args"], env=variables)) as client:
        assert {tool.name for tool in (await client.list_tools()).tools} == {f.__name__ for f in TOOLS}


def test_the_bundles_variables_are_settings_and_its_defaults_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = json.loads((ROOT / "deploy" / "manifest.json").read_text("utf-8"))
    asked = set()
    for name, value in manifest["server"]["mcp_config"]["env"].items():
        option = re.fullmatch(r"\$\{user_config\.(\w+)\}", value)
        assert option is not None
        asked.add(option[1])
        default = manifest["user_config"][option[1]]["default"]
        shown = default if isinstance(default, str) else json.dumps(default)
        monkeypatch.setenv(name, shown.replace("${HOME}", str(Path.home())))
    assert asked == set(manifest["user_config"])
    found = read_settings({})
    assert (found.models_dir, found.downloads, found.read_only) == ((Path.home().resolve(),), True, False)


def test_the_bundles_entry_point_exists_and_its_command_is_the_script() -> None:
    server = json.loads((ROOT / "deploy" / "manifest.json").read_text("utf-8"))["server"]
    assert (ROOT / server["entry_point"]).is_file()
    assert server["mcp_config"]["args"][-2:] == ["mechscope", "serve"]


TEXT = {"type": "string", "minLength": 1}
VARIABLE = {
    "required": ["name"],
    "properties": {
        "name": TEXT,
        "description": TEXT,
        "default": TEXT,
        "choices": {"type": "array", "items": TEXT},
        "format": {"enum": ["string", "number", "boolean", "filepath"]},
    },
    "additionalProperties": False,
}
ARGUMENT = {
    "required": ["type", "value"],
    "properties": {"type": {"const": "positional"}, "value": TEXT},
    "additionalProperties": False,
}
PACKAGE = {
    "required": ["registryType", "identifier", "version", "transport"],
    "properties": {
        "registryType": {"const": "pypi"},
        "identifier": TEXT,
        "version": {"type": "string", "pattern": r"^\d+\.\d+\.\d+$"},
        "runtimeHint": {"const": "uvx"},
        "transport": {"const": {"type": "stdio"}},
        "packageArguments": {"type": "array", "items": ARGUMENT},
        "environmentVariables": {"type": "array", "items": VARIABLE},
    },
    "additionalProperties": False,
}
ENTRY = {
    "required": ["$schema", "name", "description", "version", "packages"],
    "properties": {
        "$schema": {"const": "https://static.modelcontextprotocol.io/schemas/2025-12-11/server.schema.json"},
        "name": {"type": "string", "maxLength": 200, "pattern": "^[a-zA-Z0-9.-]+/[a-zA-Z0-9._-]+$"},
        "title": {"type": "string", "minLength": 1, "maxLength": 100},
        "description": {"type": "string", "minLength": 1, "maxLength": 100},
        "version": {"type": "string", "pattern": r"^\d+\.\d+\.\d+$"},
        "packages": {"type": "array", "minItems": 1, "items": PACKAGE},
    },
    "additionalProperties": False,
}
"""What the registry's schema of 2025-12-11 demands of the fields this entry uses, and of nothing else."""


def registry_entry() -> dict[str, Any]:
    entry: dict[str, Any] = json.loads((ROOT / "server.json").read_text("utf-8"))
    return entry


def test_the_registry_entry_fits_its_schema_and_the_readme_names_it() -> None:
    entry = registry_entry()
    jsonschema.validate(entry, ENTRY)
    assert f"mcp-name: {entry['name']}" in (ROOT / "README.md").read_text("utf-8")


@pytest.mark.anyio
async def test_the_registry_entrys_arguments_and_defaults_start_a_server() -> None:
    (package,) = registry_entry()["packages"]
    variables = {row["name"]: row["default"] for row in package["environmentVariables"] if "default" in row}
    assert len(variables) > 3
    words = [word["value"] for word in package["packageArguments"]]
    async with connected(StdioServerParameters(command=str(SCRIPT), args=words, env=os.environ | variables)) as client:
        assert client.server_info.version == package["version"]


def test_the_registry_entrys_variables_are_settings() -> None:
    (package,) = registry_entry()["packages"]
    names = {f"MECHSCOPE_{name.upper()}" for name in Settings.model_fields}
    assert {row["name"] for row in package["environmentVariables"]} <= names


def test_no_token_is_part_of_what_ships() -> None:
    shipped = "".join(path.read_text("utf-8") for path in [ROOT / "compose.yaml", *(ROOT / "deploy").iterdir()])
    assert not [token for token in TOKENS.values() if token in shipped]
    assert not re.findall(r"\b[0-9a-f]{32,}\b", shipped)
