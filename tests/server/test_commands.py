"""Every command that the README and docs print runs as printed, or is in `ELSEWHERE` with the reason why not here."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import httpx2 as httpx
import pytest
from clients import SCRIPT
from documents import PAGES, ROOT, commands
from e2e import nodes
from serving import Served, serving, token_file

ELSEWHERE = {
    r"make test\b": "it would run itself",
    r"make demo\b": "makes an environment: `make e2e` runs it in a fresh clone",
    r"make bundle\b": "needs npm and a minute; it tries what it makes (tests/bundle.py)",
    r"docker ": "needs Docker; `make dockerfile` follows the Dockerfile without it",
    r"(uvx|pipx) ": "need uv and pipx, and install everything anew",
    r"claude ": "needs Claude Code; the command it is given is one that runs here",
    r"npx \S+ mechscope": "opens a browser",
    r"npx \S+ --cli": "needs npm: `make e2e` runs it",
}
PAGES_WITH_COMMANDS = [page for page in PAGES if commands(page)]
AT = "127.0.0.1:8765"


def reason(command: str) -> str | None:
    return next((why for pattern, why in ELSEWHERE.items() if re.match(pattern, command)), None)


class Reader:
    """Follows a page in one folder, in which a checkout's environment is; what a command exports stays."""

    def __init__(self, folder: Path) -> None:
        (folder / ".venv").symlink_to(SCRIPT.parents[1])
        self._folder = folder
        path = os.pathsep.join(part for part in os.environ["PATH"].split(os.pathsep) if Path(part) != SCRIPT.parent)
        self._env = os.environ | {"HOME": str(folder), "PATH": path}

    def installed(self) -> None:
        """As pages for operators suppose: the script is found, and there are tokens."""
        self._env["PATH"] = f"{SCRIPT.parent}{os.pathsep}{self._env['PATH']}"
        token_file(self._folder)

    def follow(self, command: str) -> None:
        if re.match(r"(\S*/)?mechscope serve\b", command):
            self._serve(shlex.split(command))
        elif command.startswith("curl "):
            self._ask(command)
        else:
            self._run(command)

    def _run(self, command: str) -> str:
        ran = subprocess.run(
            ["sh", "-c", f'{command}\nprintf "\\n%s" "$PATH"'],
            cwd=self._folder, env=self._env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr
        said, _, self._env["PATH"] = ran.stdout.rpartition("\n")
        return said

    def _serve(self, words: list[str]) -> None:
        """It serves until it is stopped, and then ends well."""
        (script,) = self._run(f"command -v {words[0]}").split()
        served = Served(*words[2:], env=self._env, command=(script,), cwd=self._folder)
        assert httpx.get(f"{served.base}/health").status_code == 200
        assert served.stop() == 0

    def _ask(self, command: str) -> None:
        tokens = token_file(self._folder)
        with serving("--token-file", str(tokens)) as served:
            self._env["TOKEN"] = tokens.read_text().split()[-1]
            said = self._run(command.replace(f"http://{AT}", served.base))
        assert '"protocolVersion"' in said


@pytest.mark.parametrize("page", PAGES_WITH_COMMANDS, ids=lambda page: page.stem)
def test_a_pages_commands_run_in_their_order(page: Path, tmp_path: Path) -> None:
    reader = Reader(tmp_path)
    if page.name == "operate.md":
        reader.installed()
    for command in commands(page):
        if reason(command) is None:
            reader.follow(command)


def test_every_reason_is_one_for_a_command_that_is_printed() -> None:
    printed = [command for page in PAGES for command in commands(page)]
    assert len(printed) > 15
    assert [pattern for pattern in ELSEWHERE if not any(re.match(pattern, command) for command in printed)] == []
    assert sum(reason(command) is None for command in printed) >= 8


@pytest.mark.e2e
def test_the_inspectors_commands_list_the_tools(tmp_path: Path) -> None:
    tokens = token_file(tmp_path)
    lines = [line for line in commands(ROOT / "docs" / "connect.md") if re.match(r"npx \S+ --cli", line)]
    assert len(lines) == 2
    with serving("--token-file", str(tokens)) as served:
        token = tokens.read_text().split()[-1]
        for line in lines:
            words = shlex.split(line.replace("$TOKEN", token).replace(f"http://{AT}", served.base))[2:]
            ran = nodes.run("mcp-inspector", *(str(SCRIPT) if word == "mechscope" else word for word in words))
            assert "load_model" in {tool["name"] for tool in json.loads(ran.stdout)["tools"]}, ran.stderr


@pytest.mark.e2e
def test_the_first_command_of_the_readme_works_in_a_fresh_clone(tmp_path: Path) -> None:
    (first, *_) = commands(ROOT / "README.md")
    subprocess.run(["git", "clone", "--quiet", ROOT, tmp_path / "clone"], check=True)
    ran = subprocess.run(["sh", "-c", first], cwd=tmp_path / "clone", capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "kv_inject_test" in ran.stdout
    doctor = [line for line in commands(ROOT / "docs" / "install.md") if line.startswith(".venv/bin/mechscope")]
    ran = subprocess.run(["sh", "-c", doctor[0]], cwd=tmp_path / "clone", capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout
