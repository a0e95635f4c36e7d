"""`mechscope serve` as a process: three transports, tokens, limits, what operators see, and a graceful stop."""

import json
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import anyio
import httpx2 as httpx
import pytest
import tiny_files
from clients import ERAS, ask, connected
from serving import TRANSPORTS, Served, ending, headers, over_stdio, reached, serving, token_file
from typer.testing import CliRunner
from waiting import wait_for

from server.__main__ import app
from server.repair import state
from server.settings import BadSettings, Settings, read_settings

PROMPT = "The capital of France is"
HELLO = {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "test", "version": "1"}}
CALL = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": HELLO}
ACCEPT = {"Accept": "application/json, text/event-stream", "Content-Type": "application/json"}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory):
    tokens = token_file(tmp_path_factory.mktemp("tokens"))
    with serving("--token-file", str(tokens), "--body-limit", "64KiB") as served:
        yield served


def post(served: Served, name: str | None = "ann", **more: str) -> httpx.Response:
    return httpx.post(f"{served.base}/mcp", json=CALL, headers=ACCEPT | headers(name) | more)


@pytest.mark.anyio
@pytest.mark.parametrize("mode", ERAS)
@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_every_transport_runs_the_same_scenario_in_both_eras(guarded: Served, transport: str, mode: str) -> None:
    async with reached(guarded.base, transport, mode, "ann") as client:
        await ask(client, "load_model", model="synthetic")
        held = await ask(client, "capture_residuals", prompt=PROMPT)
        lens = await ask(client, "logit_lens", tensor=held["handle"], layers=[-1])
        assert len(lens["rows"]) == 1
        assert held["handle"] in {row["handle"] for row in (await ask(client, "list_session"))["handles"]}


@pytest.mark.anyio
async def test_a_principals_handles_do_not_exist_for_another(guarded: Served) -> None:
    async with reached(guarded.base, "http", name="ann") as ann, reached(guarded.base, "sse", name="bob") as bob:
        await ask(ann, "load_model", model="synthetic")
        held = await ask(ann, "capture_residuals", prompt=PROMPT)
        assert held["handle"] not in str(await ask(bob, "list_session"))
        for tool in ("read_tensor", "release"):
            refused = await bob.call_tool(tool, {"handle": held["handle"]})
            assert refused.is_error
            assert "no such handle" in refused.content[0].text
        assert held["handle"] in str(await ask(ann, "list_session"))


def test_without_a_known_token_the_answer_is_401_and_says_how(guarded: Served) -> None:
    for name, extra in ((None, {}), (None, {"Authorization": "Bearer wrong"}), (None, {"Authorization": "Basic YTpi"})):
        answer = post(guarded, name, **extra)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"].startswith("Bearer")
        assert httpx.get(f"{guarded.base}/sse", headers=extra).status_code == 401
        assert httpx.get(f"{guarded.base}/metrics", headers=extra).status_code == 401
    assert post(guarded).status_code == 200


def test_unknown_hosts_and_origins_are_refused(guarded: Served) -> None:
    assert post(guarded, Host="evil.example").status_code == 421
    for port in ("evil.example", "80.evil.example", "80:evil", "", "8 0", "123456", "\u0668"):
        assert post(guarded, Host=f"localhost:{port}".encode()).status_code in (400, 421), port
        assert post(guarded, Origin=f"http://localhost:{port}".encode()).status_code == 403, port
    assert post(guarded, Origin="https://evil.example").status_code == 403
    assert post(guarded, Origin="http://localhost:3000").status_code == 200


def test_a_body_beyond_the_limit_is_refused(guarded: Served) -> None:
    body = CALL | {"params": HELLO | {"x": "y" * 100_000}}
    assert httpx.post(f"{guarded.base}/mcp", json=body, headers=ACCEPT | headers("ann")).status_code == 413


NOT_JSON = {
    "half a surrogate": '{"\\ud800": 1}',
    "a thousand lists": '{"x": ' + "[" * 1000 + "]" * 1000 + "}",
    "a number of 5000 digits": '{"x": ' + "1" * 5000 + "}",
}
NO_ARGUMENTS = {"NaN": '{"x": NaN}', "a number beyond floats": '{"x": 1e999}', "a list": "[]", "a text": '"x"'}


@pytest.mark.parametrize("name", NOT_JSON | NO_ARGUMENTS)
def test_arguments_that_no_client_would_send_are_refused(guarded: Served, name: str) -> None:
    call = {"jsonrpc": "2.0", "id": 2, "method": "tools/call", "params": {"name": "list_session", "arguments": "HERE"}}
    body = json.dumps(call).replace('"HERE"', (NOT_JSON | NO_ARGUMENTS)[name])
    session = {"Mcp-Session-Id": post(guarded).headers["mcp-session-id"]}
    answer = httpx.post(f"{guarded.base}/mcp", content=body, headers=ACCEPT | headers("ann") | session)
    assert answer.status_code == (400 if name in NOT_JSON else 200), answer.text
    assert any(words in answer.text for words in ("Parse error", "was not run", "Invalid request")), answer.text
    assert post(guarded).status_code == 200


@pytest.mark.parametrize("name", [["logit_lens"], {"logit_lens": 1}, 3, None])
def test_a_tools_name_that_is_no_text_is_an_invalid_request(guarded: Served, name: object) -> None:
    call = {"jsonrpc": "2.0", "id": 2, "method": "tools/call", "params": {"name": name, "arguments": {}}}
    session = {"Mcp-Session-Id": post(guarded).headers["mcp-session-id"]}
    answer = httpx.post(f"{guarded.base}/mcp", json=call, headers=ACCEPT | headers("ann") | session)
    assert "Invalid request parameters" in answer.text


def test_health_and_readiness_are_open_and_metrics_count(guarded: Served) -> None:
    assert httpx.get(f"{guarded.base}/health").json() == {"status": "alive"}
    assert httpx.get(f"{guarded.base}/ready").json() == {"status": "ready"}

    async def call() -> None:
        async with reached(guarded.base, "http", name="ann") as client:
            await ask(client, "load_model", model="synthetic")
            await ask(client, "logit_lens", prompt=PROMPT)

    def counted() -> str:
        return httpx.get(f"{guarded.base}/metrics", headers=headers("ann")).text

    before = counted()
    anyio.run(call)
    after = counted()
    lines = [line for line in after.splitlines() if "logit_lens" in line and "count" in line]
    assert lines
    assert before != after


def test_the_log_names_calls_and_callers_but_no_prompt(guarded: Served) -> None:
    async def call() -> None:
        async with reached(guarded.base, "http", name="bob") as client:
            await ask(client, "load_model", model="synthetic")
            await ask(client, "tokenize", text="a very secret prompt")

    def calls() -> list[str]:
        return [record["principal"] for record in guarded.log if record.get("tool") == "tokenize"]

    before = len(calls())
    anyio.run(call)
    wait_for(lambda: len(calls()) > before, "the call's line in the log")
    assert calls()[-1] == "bob"
    assert "secret" not in str(guarded.log)
    assert all("b" * 40 not in str(record) for record in guarded.log)


def test_too_many_requests_are_told_to_wait() -> None:
    with serving("--rate-limit", "5/minute") as served:
        answers = [post(served, None) for _ in range(7)]
    assert [answer.status_code for answer in answers[:5]] == [200] * 5
    assert {answer.status_code for answer in answers[5:]} == {429}
    assert int(answers[-1].headers["retry-after"]) > 0


@pytest.mark.anyio
async def test_two_servers_share_a_workspace_and_principals_stay_apart_in_both(tmp_path: Path) -> None:
    arguments = ("--workspace", str(tmp_path / "new"), "--token-file", str(token_file(tmp_path)))
    with ThreadPoolExecutor(2) as threads, ExitStack() as servers:
        made = [threads.submit(Served, *arguments) for _ in range(2)]  # at once: both find no workspace
        bases = [servers.enter_context(ending(served.result())).base for served in made]
        async with reached(bases[0], "http", name="ann") as here, reached(bases[1], "http", name="ann") as there:
            model = (await ask(here, "load_model", model="synthetic"))["model"]
            held = await ask(here, "capture_residuals", prompt=PROMPT)
            await ask(there, "logit_lens", tensor=held["handle"], layers=[-1], model=model)
            async with reached(bases[1], "http", name="bob") as bob:
                assert (await ask(bob, "list_session"))["handles"] == []
                assert (await bob.call_tool("read_tensor", {"handle": held["handle"]})).is_error
            await ask(there, "release", handle=held["handle"])
            assert (await here.call_tool("read_tensor", {"handle": held["handle"]})).is_error


def test_a_stopped_server_leaves_the_workspace_in_order_and_a_read_only_one_leaves_it_alone(tmp_path: Path) -> None:
    async def capture(served: Served) -> None:
        async with reached(served.base, "http") as client:
            await ask(client, "load_model", model="synthetic")
            for _ in range(3):
                await ask(client, "capture_residuals", prompt=PROMPT)
            metrics = httpx.get(f"{served.base}/metrics").text
            on_disk = float(metrics.split("\nmechscope_bytes_on_disk ")[1].split()[0])
            assert (on_disk > 0) != ("--read-only" in served.process.args)

    for more, handles in (("--read-only", 0), ("--no-read-only", 3)):
        place = tmp_path / more
        with serving("--workspace", str(place), more) as served:
            anyio.run(capture, served)
            assert served.stop(signal.SIGTERM) == 0
        sound, said = state(place)
        assert sound
        assert f"{handles} handles" in said or (said, handles) == ("no handles yet", 0)


def test_flags_go_before_the_environment_and_that_before_the_file(tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "config.toml"
    file.write_text('port = 1111\nlog_level = "debug"\nmax_calls = 3\n')
    monkeypatch.setenv("MECHSCOPE_PORT", "2222")
    monkeypatch.setenv("MECHSCOPE_MAX_CALLS", "4")
    found = read_settings({"port": 3333}, file)
    assert (found.port, found.max_calls, found.log_level) == (3333, 4, "debug")
    assert Settings().toolset == "all"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("prot = 1", "no such setting"),
        ("port = 70000", "port"),
        ('rate_limit = "often"', "rate_limit"),
        ("=", "not TOML"),
    ],
)
def test_a_bad_file_says_what_is_wrong(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "config.toml").write_text(text + "\n")
    with pytest.raises(BadSettings, match=says):
        read_settings({}, tmp_path / "config.toml")


@pytest.mark.parametrize("way", ["flag", "variable", "file"])
def test_the_workspace_and_its_budgets_are_set_in_every_way(tmp_path: Path, monkeypatch, way: str) -> None:
    wanted = {"workspace": str(tmp_path / "w"), "memory_budget": "1MiB", "disk_budget": "2MB", "model_budget": "3GiB"}
    monkeypatch.delenv("MECHSCOPE_WORKSPACE")
    file = tmp_path / "config.toml"
    file.write_text("".join(f'{name} = "{value}"\n' for name, value in wanted.items() if way == "file"))
    for name, value in wanted.items():
        if way == "variable":
            monkeypatch.setenv(f"MECHSCOPE_{name.upper()}", value)
    found = read_settings(wanted if way == "flag" else {}, file)
    assert found.workspace == tmp_path / "w"
    assert (found.memory_budget, found.disk_budget, found.model_budget) == (1 << 20, 2_000_000, 3 << 30)


def test_a_misspelt_variable_is_refused(monkeypatch) -> None:
    monkeypatch.setenv("MECHSCOPE_PROT", "1")
    with pytest.raises(BadSettings, match="no such environment variable: MECHSCOPE_PROT"):
        read_settings({})


def test_beyond_localhost_a_token_is_demanded(tmp_path: Path) -> None:
    refused = CliRunner().invoke(app, ["serve", "--http", "--host", "0.0.0.0"])
    assert refused.exit_code != 0
    assert "token" in refused.output
    with serving("--host", "0.0.0.0", "--token-file", str(token_file(tmp_path))) as served:
        at = served.base.replace("0.0.0.0", "127.0.0.1")
        assert httpx.get(f"{at}/health").status_code == 200
        assert httpx.post(f"{at}/mcp", json=CALL, headers=ACCEPT).status_code == 401
        assert httpx.post(f"{at}/mcp", json=CALL, headers=ACCEPT | {"Host": "evil.example"}).status_code == 421


def test_paths_in_settings_may_begin_at_home() -> None:
    settings = read_settings({"token_file": "~/tokens", "workspace": "~/work"})
    assert (settings.token_file, settings.workspace) == (Path.home() / "tokens", Path.home() / "work")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds no token"),
        ("ann\n", "1 words"),
        ("ann short\n", "at least 32"),
        ("local " + "a" * 40, "not 'local'"),
    ],
)
def test_a_token_file_that_cannot_be_used_is_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "tokens"
    path.write_text(text)
    path.chmod(0o600)
    refused = CliRunner().invoke(app, ["serve", "--http", "--token-file", str(path)])
    assert refused.exit_code != 0
    assert says in " ".join(refused.output.replace("│", " ").split()), "the box wraps where the path ends"


@pytest.mark.anyio
async def test_models_by_path_load_from_allowed_folders_only(tmp_path: Path) -> None:
    inside = tmp_path / "models"
    inside.mkdir()
    (inside / "link").symlink_to("/etc")
    with serving("--models-dir", str(inside)) as served:
        async with reached(served.base, "http") as client:
            for path in ("/etc", str(inside / "link"), str(inside / ".." / "x.gguf"), "/dev/zero"):
                refused = await client.call_tool("load_model", {"model": path})
                assert refused.is_error, path
                assert "config.json" not in refused.content[0].text


@pytest.mark.anyio
async def test_what_fills_the_memory_of_a_read_only_server_can_be_released() -> None:
    with serving("--read-only", "--memory-budget", "1MiB") as served:
        async with reached(served.base, "http") as client:
            await ask(client, "load_model", model="synthetic")
            held = []
            rows = {"prompt": PROMPT, "points": ["resid_post", "mlp_act", "z"], "positions": "all"}
            while not (result := await client.call_tool("capture_residuals", rows)).is_error:
                held.append(result.structured_content["handle"])
            assert "release" in result.content[0].text
            await ask(client, "release", handle=held[0])
            await ask(client, "capture_residuals", **rows)


@pytest.mark.anyio
async def test_a_toolset_offers_its_tools_only() -> None:
    with serving("--toolset", "core") as served:
        async with reached(served.base, "http") as client:
            names = {tool.name for tool in (await client.list_tools()).tools}
    assert "logit_lens" in names
    assert "causal_trace" not in names


@pytest.mark.anyio
async def test_a_model_that_stdio_loaded_by_path_does_not_exist_over_http(tmp_path: Path) -> None:
    path = str(tiny_files.hf_directory(tmp_path / "secret-place"))
    workspace = ("--workspace", str(tmp_path / "workspace"))
    async with connected(over_stdio(*workspace)) as client:
        own = (await ask(client, "load_model", model=path))["model"]
    with serving(*workspace) as served:
        async with reached(served.base, "http") as client:
            assert (await ask(client, "list_session"))["models"] == []
            for named in ({"model": own}, {"model": "secret-place"}, {}):
                said = (await client.call_tool("tokenize", {"text": "the", **named})).content[0].text
                assert "load_model" in said
                assert "secret-place" not in said.replace(named.get("model", ""), "")
    async with connected(over_stdio(*workspace)) as client:
        assert (await ask(client, "tokenize", text="the", model=own))["model"] == own
