"""Where `mechscope serve` answers and how it speaks to people: addresses, names, terminals and files of settings."""

import json
import os
import pty
import socket
import subprocess
from importlib.metadata import version
from pathlib import Path

import httpx2 as httpx
import pytest
from clients import SCRIPT, ask, connected
from mcp.client.stdio import StdioServerParameters
from serving import Served, reached, serving, token_file

HELLO = {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "test", "version": "1"}}
CALL = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": HELLO}
ACCEPT = {"Accept": "application/json, text/event-stream", "Content-Type": "application/json"}


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


HOSTS = {
    "127.0.0.2": "127.0.0.2",
    "localhost": "localhost",
    "::1": "[::1]",
    "0:0:0:0:0:0:0:1": "[::1]",
}


def status(served: Served, **headers: str) -> int:
    return httpx.post(f"{served.base}/mcp", json=CALL, headers=ACCEPT | headers).status_code


@pytest.mark.anyio
@pytest.mark.parametrize("host", HOSTS)
async def test_a_server_answers_at_the_address_it_prints_and_guards_it(host: str) -> None:
    if ":" in host and not has_ipv6():
        pytest.skip("this machine has no IPv6")
    with serving("--host", host) as served:
        at = served.base.removeprefix("http://")
        assert at.rpartition(":")[0] == HOSTS[host]
        async with reached(served.base, "http") as client:
            await ask(client, "list_session")
        assert status(served) == status(served, Origin=f"http://{at}") == 200
        assert status(served, Host="evil.example") == status(served, Host=f"evil.{at}") == 421
        assert status(served, Origin="http://evil.example") == 403


def test_a_machines_own_name_is_answered_with_a_token(tmp_path: Path) -> None:
    name = socket.gethostname()
    try:
        socket.getaddrinfo(name, 0)
    except OSError:
        pytest.skip("this machine's name has no address")
    with serving("--host", name, "--token-file", str(token_file(tmp_path))) as served:
        assert served.base.startswith(f"http://{name.lower()}:")
        token = {"Authorization": f"Bearer {'a' * 40}"}
        assert status(served, **token) == 200
        assert status(served) == 401
        assert status(served, Host="evil.example", **token) == 421


def test_every_address_of_localhost_listens_on_one_port() -> None:
    with serving("--host", "localhost") as served:
        port = served.base.rpartition(":")[2]
        places = {place[4][0] for place in socket.getaddrinfo("localhost", port, type=socket.SOCK_STREAM)}
        for place in places if has_ipv6() else {"127.0.0.1"}:
            name = f"[{place}]" if ":" in place else place
            assert httpx.get(f"http://{name}:{port}/metrics").status_code == 200


def test_a_port_that_is_taken_is_an_error_that_names_it() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        command = [SCRIPT, "serve", "--http", "--port", port]
        made = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)
    assert made.returncode == 2
    assert port in made.stderr
    assert "cannot be listened on" in " ".join(made.stderr.replace("│", " ").split())


def usual_file(folder: Path, text: str) -> tuple[Path, dict[str, str]]:
    """A settings file in the place where it is looked for, and the environment that says which place that is."""
    file = folder / "mechscope" / "config.toml"
    file.parent.mkdir()
    file.write_text(text)
    return file, os.environ | {"XDG_CONFIG_HOME": str(folder)}


@pytest.mark.anyio
async def test_a_client_that_starts_the_server_gets_stdio_whatever_the_usual_file_says(tmp_path: Path) -> None:
    _, env = usual_file(tmp_path, 'http = true\nhost = "0.0.0.0"\n')
    async with connected(StdioServerParameters(command=str(SCRIPT), args=["serve"], env=env)) as client:
        await ask(client, "list_session")


def first_logged(env: dict[str, str], *arguments: str, stdin: int) -> str:
    """The message of the first line that a server logs."""
    pipes = {"stdin": stdin, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with subprocess.Popen([SCRIPT, "serve", *arguments], env=env, text=True, **pipes) as process:
        try:
            assert process.stderr is not None
            return json.loads(process.stderr.readline())["message"]
        finally:
            process.terminate()


def test_the_log_says_which_file_is_not_followed_and_why(tmp_path: Path) -> None:
    file, env = usual_file(tmp_path, "http = true\nport = 0\n")
    said = first_logged(env, stdin=subprocess.PIPE)
    assert said.startswith(f"http = true of {file} is not followed, because stdin belongs to a client")
    assert first_logged(env, stdin=subprocess.DEVNULL) == "serving"


@pytest.mark.parametrize("stdin", [subprocess.PIPE, subprocess.DEVNULL])
@pytest.mark.parametrize("way", ["--config", "MECHSCOPE_CONFIG"])
def test_a_named_file_that_says_http_is_followed_wherever_stdin_leads(tmp_path: Path, way: str, stdin: int) -> None:
    file = tmp_path / "config.toml"
    file.write_text("http = true\nport = 0\n")
    arguments = ["--config", str(file)] if way == "--config" else []
    env = os.environ | ({} if arguments else {way: str(file)})
    assert first_logged(env, *arguments, stdin=stdin) == "serving"


def said_in_a_terminal(*arguments: str, until: str) -> str:
    """What a server prints where a person sees it, up to some words."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen([SCRIPT, "serve", *arguments], stdin=theirs, stdout=subprocess.DEVNULL, stderr=theirs)
    said = ""
    try:
        while until not in said:
            said += os.read(ours, 4096).decode()
    finally:
        process.kill()
        process.wait()
        os.close(theirs)
        os.close(ours)
    return said


def test_in_a_terminal_a_person_reads_what_it_waits_for() -> None:
    said = said_in_a_terminal(until="Control-C ends it")
    assert "waits for an MCP client" in said
    assert f"claude mcp add mechscope -- {SCRIPT} serve" in said
    assert "http://127.0.0.1:8765/mcp" in said


def test_in_a_terminal_a_person_reads_where_http_is() -> None:
    said = said_in_a_terminal("--http", "--port", "0", until="Control-C ends it")
    url = said.partition("serves MCP at ")[2].split()[0]
    assert url in said.partition('"url": "')[2]
    assert f"claude mcp add --transport http mechscope {url}" in said


def test_the_version_is_told() -> None:
    made = subprocess.run([SCRIPT, "--version"], capture_output=True, text=True, timeout=120)
    assert (made.returncode, made.stdout) == (0, f"mechscope {version('mechscope')}\n")
