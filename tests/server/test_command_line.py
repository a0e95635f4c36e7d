"""The `mechscope` script as a person runs it, in processes of its own."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tiny_files
from clients import ERAS, SCRIPT, ask, connected
from serving import serving
from tiny_files import spoil

from engine import load_model
from engine.catalog import CATALOGUE, cached_path
from server.disk_store import open_store
from server.records import file_name
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


def test_a_thorough_doctor_finds_damaged_weights_and_says_what_to_delete(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("engine.load.LEAST", 0)
    sources = [tiny_files.hf_directory(tmp_path / name) for name in ("header", "number", "whole")]
    assert [load_model(path).conversion for path in sources] == ["made"] * 3
    place = tmp_path / "mechscope" / "converted"
    files = {path.name.partition("-")[0]: path for path in place.glob("*.safetensors")}
    spoil(files["number"], -2)
    numbers = f"{files['number'].name}: the numbers of ['1.mlp_norm'] are not those that were written, delete it"
    quick, whole = run("doctor"), run("doctor", "--thorough")
    assert (quick.returncode, whole.returncode) == (0, 1), quick.stdout + whole.stdout
    assert f"3 models, 0 MB in {place}, their headers compared (--thorough: numbers); delete it" in quick.stdout
    assert f"in {place}, their numbers compared with their digests; delete it to free them; {numbers}" in whole.stdout
    spoil(files["header"], files["header"].read_bytes().index(b"hidden_size"))
    broken = run("doctor")
    assert broken.returncode == 1
    assert f"{files['header'].name}: its header is damaged, or its length, delete it" in broken.stdout


@pytest.mark.parametrize("damage", ["zeroed", "cut short"])
def test_a_thorough_doctor_finds_damaged_tensors_and_says_which_to_release(tmp_path: Path, damage: str) -> None:
    store = open_store(tmp_path, 1 << 20, 1 << 20)
    good, bad = (store.put("act", name, "ann", {"a": np.ones(2000, np.float32)}, {}) for name in ("good", "bad"))
    store.close()
    path = tmp_path / "records" / file_name(bad)
    content = path.read_bytes()
    path.write_bytes(content[:-4000] + bytes(4000) if damage == "zeroed" else content[:-4000])
    quick, whole = (run("doctor", *how, MECHSCOPE_WORKSPACE=str(tmp_path)) for how in ((), ("--thorough",)))
    assert (quick.returncode, whole.returncode) == (0, 1), quick.stdout + whole.stdout
    assert "files counted (--thorough reads them)" in quick.stdout
    assert f"compared with their sha256; damaged, to be released and made anew: {bad}\n" in whole.stdout
    assert good not in whole.stdout


def test_a_thorough_doctor_finds_damaged_tensors_while_a_server_works(tmp_path: Path) -> None:
    store = open_store(tmp_path, 1 << 20, 1 << 20)
    handle = store.put("act", "x", "ann", {"a": np.ones(2000, np.float32)}, {})
    assert run("doctor", "--thorough", MECHSCOPE_WORKSPACE=str(tmp_path)).returncode == 0
    spoil(tmp_path / "records" / file_name(handle), -2)
    assert f"made anew: {handle}" in run("doctor", "--thorough", MECHSCOPE_WORKSPACE=str(tmp_path)).stdout
    store.close()


def test_the_doctor_finds_a_damaged_model_of_the_catalogue(tmp_path: Path) -> None:
    entry = CATALOGUE["smollm2-135m-instruct"]
    place = tmp_path / "mechscope" / "models"
    place.mkdir(parents=True)
    with (place / cached_path(entry).name).open("wb") as file:
        file.truncate(entry.nbytes)
    made = run("doctor", XDG_CACHE_HOME=str(tmp_path))
    assert made.returncode == 1
    assert "is damaged; delete it and fetch again" in made.stdout


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
    with serving() as served:
        models = []
        for mode in ERAS:
            async with connected(f"{served.base}/mcp", mode) as client:
                models.append((await ask(client, "load_model", model="synthetic"))["model"])
                assert json.dumps(await ask(client, "logit_lens", prompt="hello"))
        assert models[0] == models[1]
        assert served.stop() == 0
