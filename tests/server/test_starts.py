"""Starts: the second maps the weights that the first one converted; and what a start leaves behind."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_files
from clients import ask, connected
from serving import over_stdio

from engine import converted
from server.app import build_server
from server.lab import Lab

WIDE = 1 << 15
"""Neurons of an MLP large enough for its model to be kept."""


def model(path: Path) -> str:
    tensors, noise = tiny_files.weights(), np.random.default_rng(0)
    for name in tensors:
        if "mlp" in name:
            shape = (32, WIDE) if "down" in name else (WIDE, 32)
            tensors[name] = noise.standard_normal(shape, np.float32) / 64
    return str(tiny_files.hf_directory(path, tensors, intermediate_size=WIDE))


@pytest.mark.anyio
async def test_the_second_start_uses_what_the_first_one_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = model(tmp_path / "model")
    starts = {
        "untouched": ["--no-converted"],
        "nor written": ["--read-only"],
        "first": [],
        "second": [],
        "switched off": ["--no-converted"],
    }
    said, seen = {}, []
    for start, flags in starts.items():
        async with connected(over_stdio(*flags)) as client:
            said[start] = (await ask(client, "load_model", model=path))["conversion"]
            seen.append((await ask(client, "track_token", prompt="the", token=" the"))["rows"])
    assert list(said.values()) == ["none", "none", "made", "used", "none"]
    assert all(rows == seen[0] for rows in seen)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A model that is converted, however small, and the folder of conversions."""
    monkeypatch.setattr("engine.load.LEAST", 0)
    monkeypatch.setattr("engine.converted.directory", lambda: tmp_path / "converted")
    return str(tiny_files.hf_directory(tmp_path / "tiny"))


def damage(when: str) -> None:
    (file,) = converted.held()
    with file.open("r+b") as opened:
        opened.seek(-10_000, 2)
        opened.write(bytes(9_000))
    if when == "while it is mapped":
        os.utime(file, ns=(0, 0))  # as if it were not the moment in which it was mapped


@pytest.mark.anyio
@pytest.mark.parametrize("when", ["before the start", "while it is mapped"])
async def test_damaged_converted_weights_give_no_answer_and_are_made_again(when, tiny):
    asked = {"prompt": "the and the", "token": "the"}
    async with connected(build_server(Lab())) as client:
        first = await ask(client, "load_model", model=tiny)
        expected = await ask(client, "track_token", **asked)
    if when == "before the start":
        damage(when)
    async with connected(build_server(Lab())) as client:
        second = await ask(client, "load_model", model=tiny)
        if when == "while it is mapped":
            assert (await ask(client, "track_token", **asked))["rows"] == expected["rows"]
            damage(when)
        found = await ask(client, "track_token", **asked)
        third = await ask(client, "load_model", model=tiny)
    assert found["rows"] == expected["rows"]
    assert first["fingerprint"] == second["fingerprint"] == third["fingerprint"]
    assert [receipt["conversion"] for receipt in (first, second, third)] == ["made", "used", "made"]


def test_a_full_collection_does_not_go_through_what_starting_made(tmp_path):
    script = "import gc, server.serve; from server.settings import Settings; server.serve._serve_http = show"
    show = "def show(*_): print(gc.get_freeze_count(), len(gc.get_objects()))"
    serve = f"server.serve.serve(Settings(http=True, workspace={str(tmp_path)!r}))"
    ran = subprocess.run([sys.executable, "-c", "\n".join([show, script, serve])], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    left_alone, looked_at = map(int, ran.stdout.split())
    assert left_alone > 50_000
    assert looked_at < left_alone / 100
