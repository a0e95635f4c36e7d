"""Follows the Dockerfile without Docker: `python tests/dockerfile.py [NAME=VALUE build arguments ...]`.

Every instruction is carried out in an empty directory that stands for the image's root: COPY copies (what
.dockerignore lets through, or from an earlier stage), RUN runs in a shell with only the ENV and ARG of its stage, and
absolute paths outside the system's own folders are moved below that root. Then the result is used as a container
would be: its health check, `--help`, an MCP client's first message over stdio and over HTTP.

What differs from a real build is printed: the base image is this machine's Python, and commands that need root
(`NEEDS_ROOT`) are skipped.
"""

import fnmatch
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from string import Template

REPOSITORY = Path(__file__).parents[1]
NEEDS_ROOT = ("useradd", "chown")
SKIPPED = "skipped, needs root:"
NOT_MOVED = ("bin", "dev", "etc", "lib", "proc", "sbin", "tmp", "usr")
KEPT = re.compile(r"PIP_\w+|SSL_CERT_\w+|REQUESTS_CA_BUNDLE|\w+_proxy", re.IGNORECASE)
"""The environment variables of this machine that a build sees: how pip reaches its index."""

HELLO = {
    "jsonrpc": "2.0",
    "id": 1,
    "method": "initialize",
    "params": {
        "protocolVersion": "2025-06-18",
        "capabilities": {},
        "clientInfo": {"name": "dockerfile", "version": "0"},
    },
}


@dataclass
class Stage:
    """One FROM. `variables` are ENV and ARG; only `exported` ones (ENV) reach a container."""

    name: str
    variables: dict[str, str]
    exported: set[str]
    workdir: str = "/"
    commands: dict[str, list[str]] = field(default_factory=dict)
    """HEALTHCHECK, ENTRYPOINT, CMD"""


class Build:
    """`root` stands for the root directory of the stage being built; finished stages are moved to `stage-NAME`."""

    def __init__(self, base: Path, arguments: dict[str, str]) -> None:
        self.base, self.root, self.context = base, base / "root", base / "context"
        self.arguments = arguments
        self.before_from: dict[str, str] = {}
        self.stages: list[Stage] = []
        _copy_context(REPOSITORY, self.context)
        self.path = f"{_shims(base / 'shims')}:/usr/local/bin:/usr/bin:/bin"

    @property
    def stage(self) -> Stage:
        return self.stages[-1]

    def follow(self, instruction: str, rest: str) -> None:
        print(f"[{self.stage.name if self.stages else '-'}] {instruction} {rest}", flush=True)
        getattr(self, f"_{instruction.lower()}")(rest)

    def _from(self, rest: str) -> None:
        image, _, name = Template(rest).safe_substitute(self.before_from).partition(" AS ")
        print(f"    {image}: Python {sys.version.split()[0]} of this machine instead")
        if self.stages:
            self.root.rename(self.base / f"stage-{self.stage.name}")
        self.root.mkdir()
        (self.root / "home").mkdir()
        self.stages.append(Stage(name or "final", {"PATH": self.path}, {"PATH"}))

    def _arg(self, rest: str) -> None:
        name, _, default = rest.partition("=")
        known = self.arguments.get(name, self.before_from.get(name, self._expanded(default)))
        (self.stage.variables if self.stages else self.before_from)[name] = known

    def _env(self, rest: str) -> None:
        for pair in shlex.split(rest):
            name, _, value = pair.partition("=")
            self.stage.variables[name] = self._expanded(self._moved(value))
            self.stage.exported.add(name)

    def _workdir(self, rest: str) -> None:
        self.stage.workdir = str(Path(self.stage.workdir) / self._expanded(rest))
        self._at(self.stage.workdir).mkdir(parents=True, exist_ok=True)

    def _copy(self, rest: str) -> None:
        words = shlex.split(self._expanded(rest))
        source = self.context
        if words[0].startswith("--from="):
            source = self.base / f"stage-{words.pop(0).removeprefix('--from=')}"
        *names, target = words
        to = self._at(str(Path(self.stage.workdir) / target))
        for name in names:
            found = source / name.lstrip("/")
            if found.is_dir():
                shutil.copytree(found, to, symlinks=True, dirs_exist_ok=True)
            else:
                into = to / found.name if target.endswith("/") else to
                into.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(found, into)

    def _run(self, rest: str) -> None:
        ran = subprocess.run(
            ["/bin/sh", "-ec", self._moved(rest)],
            cwd=self._at(self.stage.workdir),
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for line in ran.stdout.splitlines():
            if ran.returncode != 0 or SKIPPED in line:
                print(f"    {line}")
        if ran.returncode != 0:
            sys.exit(f"this RUN ended with {ran.returncode}")

    def _user(self, rest: str) -> None:
        print(f"    not {rest} but the user running this")

    def _volume(self, rest: str) -> None:
        assert self._at(rest).is_dir(), f"{rest} does not exist in the image"

    def _healthcheck(self, rest: str) -> None:
        self._keep("HEALTHCHECK", rest[rest.index("CMD") + 3 :])

    def _entrypoint(self, rest: str) -> None:
        self._keep("ENTRYPOINT", rest)

    def _cmd(self, rest: str) -> None:
        self._keep("CMD", rest)

    def _keep(self, name: str, exec_form: str) -> None:
        self.stage.commands[name] = json.loads(exec_form)

    def environment(self, in_container: bool = False) -> dict[str, str]:
        stage = self.stage
        seen = {k: v for k, v in stage.variables.items() if not in_container or k in stage.exported}
        kept = {} if in_container else {k: v for k, v in os.environ.items() if KEPT.fullmatch(k)}
        return kept | {"HOME": str(self.root / "home"), "TMPDIR": str(self.base / "tmp")} | seen

    def start(self, command: list[str]) -> "subprocess.Popen[str]":
        """A process as a container of the last stage runs it."""
        environment = self.environment(in_container=True)
        found = shutil.which(command[0], path=environment["PATH"])
        assert found is not None, f"{command[0]} is not on the image's PATH"
        assert Path(found).is_relative_to(self.root), f"{found} is not part of the image"
        print("$", *command, flush=True)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        directory = self._at(self.stage.workdir)
        return subprocess.Popen([found, *command[1:]], cwd=directory, env=environment, text=True, **pipes)

    def _at(self, path: str) -> Path:
        return self.root / path.lstrip("/")

    def _moved(self, text: str) -> str:
        """Absolute paths below the root, but for the system's own folders."""
        return re.sub(rf"(?<![\w./}}-])/(?!(?:{'|'.join(NOT_MOVED)})\b)(?=\w)", f"{self.root}/", text)

    def _expanded(self, text: str) -> str:
        return Template(text).safe_substitute(self.stage.variables if self.stages else self.before_from)


def _shims(folder: Path) -> Path:
    """`python` is this machine's; what needs root only says that it was skipped."""
    folder.mkdir()
    (folder.parent / "tmp").mkdir()
    base_python = getattr(sys, "_base_executable", sys.executable)
    scripts = {"python": f'exec "{base_python}" "$@"'}
    scripts |= {name: f'echo "{SKIPPED} {name} $*"' for name in NEEDS_ROOT}
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    return folder


def instructions(text: str) -> Iterator[tuple[str, str]]:
    """(INSTRUCTION, the rest) with comments dropped and continued lines joined."""
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    for line in re.sub(r"\\\n\s*", " ", lines).splitlines():
        if line.strip():
            instruction, _, rest = line.strip().partition(" ")
            yield instruction, rest.strip()


def _copy_context(source: Path, target: Path) -> None:
    rules = [line.strip() for line in (source / ".dockerignore").read_text().splitlines() if line.strip()]

    def left_out(path: Path) -> bool:
        """The last rule that fits the path or a folder above it decides."""
        verdict = False
        above = [str(p) for p in (path, *path.parents)][:-1]
        for rule in rules:
            pattern = rule.lstrip("!").removeprefix("**/")
            names = [Path(p).name for p in above] if "**/" in rule else above
            if any(fnmatch.fnmatch(name, pattern) for name in names):
                verdict = not rule.startswith("!")
        return verdict

    for root, folders, files in os.walk(source):
        at = Path(root).relative_to(source)
        folders[:] = [name for name in folders if not left_out(at / name)]
        for name in files:
            if not left_out(at / name):
                (target / at).mkdir(parents=True, exist_ok=True)
                shutil.copy2(source / at / name, target / at / name)


# --- the container ----------------------------------------------------------------------------------------------


def check(build: Build) -> None:
    commands = build.stage.commands
    health = _output(build.start(commands["HEALTHCHECK"]))
    print(health)
    assert str(build.root) in health, "doctor looks at something outside the image"
    assert "serve" in _output(build.start([*commands["ENTRYPOINT"], "--help"]))
    _check_stdio(build, [*commands["ENTRYPOINT"], *commands["CMD"]])
    _check_http(build, [*commands["ENTRYPOINT"], "serve", "--http"])


def _output(process: "subprocess.Popen[str]") -> str:
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 0, f"ended with {process.returncode}: {said}"
    return said


def _check_stdio(build: Build, command: list[str]) -> None:
    with _running(build.start(command)) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(HELLO) + "\n")
        process.stdin.flush()
        answer = json.loads(process.stdout.readline())
    print("   ", answer["result"]["serverInfo"])


def _check_http(build: Build, command: list[str]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    headers = {"Content-Type": "application/json", "Accept": "application/json, text/event-stream"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/mcp", json.dumps(HELLO).encode(), headers)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with _running(build.start([*command, "--port", str(port)])) as process:
        deadline = time.monotonic() + 60
        while True:
            try:
                answer = opener.open(request, timeout=30).read().decode()
                break
            except urllib.error.URLError:
                assert process.poll() is None, f"ended with {process.returncode}"
                assert time.monotonic() < deadline, "no answer in a minute"
                time.sleep(0.2)
    assert '"serverInfo"' in answer, answer
    print("    answered", len(answer), "bytes")


@contextmanager
def _running(process: "subprocess.Popen[str]") -> Iterator["subprocess.Popen[str]"]:
    try:
        with process:
            yield process
            process.terminate()
    finally:
        process.kill()


def main() -> None:
    arguments = dict(argument.split("=", 1) for argument in sys.argv[1:])
    with tempfile.TemporaryDirectory(prefix="dockerfile-") as base:
        build = Build(Path(base).resolve(), arguments)
        for instruction, rest in instructions((REPOSITORY / "Dockerfile").read_text()):
            build.follow(instruction, rest)
        check(build)
    print("the Dockerfile builds and its image serves")


if __name__ == "__main__":
    main()
