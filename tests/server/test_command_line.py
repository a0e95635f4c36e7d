"""The `mechscope` script as a person runs it, in processes of its own."""

import json
import os
import socket
import subprocess
import time
from pathlib import Path

import pytest
from clients import ERAS, SCRIPT, ask, connected

from server.settings import OF_HTTP, Settings
from server.tools import TOOLS


def run(*arguments: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SCRIPT, *arguments],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=cwd, env=os.environ | env, timeout=120,
    )  # fmt: skip


def test_the_demo_on_synthetic_weights_calls_every_tool_and_says_it_is_synthetic() -> None:
    made = run("demo", "--model", "synthetic")
    assert made.returncode == 0, made.stdout + made.stderr
    assert [f.__name__ for f in TOOLS if f"\n{f.__name__} " not in made.stdout] == []
    assert "synthetic weights" in made.stdout


def test_the_demo_stops_with_an_error_for_an_unknown_model() -> None:
    made = run("demo", "--model", "gpt-7")
    assert made.returncode == 1
    assert "gpt-7" in made.stderr
    assert "smollm2-135m-instruct" in made.stderr


def test_the_doctor_finds_a_sound_installation_sound() -> None:
    made = run("doctor")
    assert made.returncode == 0, made.stdout
    assert all(word in made.stdout for word in ("Python", "openblas", "writable", "self-test", "cached and uncached"))


def test_a_thorough_doctor_finds_damaged_weights_and_says_what_to_delete(tmp_path: Path) -> None:
    place = tmp_path / "mechscope" / "converted"
    place.mkdir(parents=True)
    (place / "some-model.safetensors").write_bytes(b"damaged")
    quick, whole = (run("doctor", *thorough, XDG_CACHE_HOME=str(tmp_path)) for thorough in ((), ("--thorough",)))
    assert quick.returncode == 0, quick.stdout
    assert f"1 models, 0 MB in {place}; delete it to free them" in quick.stdout
    assert whole.returncode == 1
    assert "some-model.safetensors: its header is damaged, delete it" in whole.stdout


@pytest.mark.parametrize("place", ["XDG_CACHE_HOME", "MECHSCOPE_WORKSPACE"])
def test_the_doctor_finds_a_folder_that_cannot_be_written(tmp_path: Path, place: str) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("not a directory")
    made = run("doctor", **{place: str(in_the_way)})
    assert made.returncode == 1
    assert "cannot be written" in made.stdout


def test_the_doctor_finds_a_foreign_package_of_the_same_name(tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "__init__.py").write_text("")
    made = run("doctor", PYTHONPATH=str(tmp_path))
    assert made.returncode == 1
    assert "engine" in made.stdout + made.stderr


def test_a_folder_called_server_where_it_runs_does_not_disturb_the_script(tmp_path: Path) -> None:
    (tmp_path / "server").mkdir()
    (tmp_path / "server" / "__init__.py").write_text("raise SystemExit('the wrong server')")
    assert run("doctor", cwd=tmp_path).returncode == 0


def test_fetching_an_unknown_name_lists_the_catalogue() -> None:
    made = run("fetch", "gpt-7")
    assert made.returncode == 1
    assert "smollm2-135m-instruct" in made.stderr


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.1", "example.org"])
def test_http_beyond_localhost_is_refused(host: str) -> None:
    made = run("serve", "--http", "--host", host)
    assert made.returncode != 0
    assert "localhost" in made.stderr


def test_settings_of_http_are_not_dropped_silently_over_stdio() -> None:
    made = run("serve", "--port", "1")
    assert made.returncode == 0
    assert "without --http these settings do nothing" in made.stderr
    assert "port" in made.stderr
    assert set(Settings.model_fields) > OF_HTTP


@pytest.mark.anyio
@pytest.mark.parametrize("mode", ERAS)
async def test_stdio_serves_both_eras_and_keeps_handles_between_calls(mode: str) -> None:
    async with connected(mode=mode) as client:
        await ask(client, "load_model", model="synthetic")
        held = await ask(client, "capture_residuals", prompt="hello", positions="all")
        answer = await ask(client, "logit_lens", tensor=held["handle"], layers=[-1], positions=[-1])
    assert len(answer["rows"]) == 1


@pytest.mark.anyio
async def test_http_on_localhost_serves_both_eras_from_one_lab() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([SCRIPT, "serve", "--http", "--port", str(port)], stderr=subprocess.DEVNULL)
    try:
        _wait_for(port)
        url = f"http://127.0.0.1:{port}/mcp"
        models = []
        for mode in ERAS:
            async with connected(url, mode) as client:
                models.append((await ask(client, "load_model", model="synthetic"))["model"])
                assert json.dumps(await ask(client, "logit_lens", prompt="hello"))
        assert models[0] == models[1]
    finally:
        server.terminate()
        assert server.wait(20) is not None


def _wait_for(port: int) -> None:
    for _ in range(200):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise TimeoutError("the server did not start")
