"""Starts: the second maps the weights that the first one converted; and what a start leaves behind."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_files
from clients import ask, connected
from serving import over_stdio

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


def test_a_full_collection_does_not_go_through_what_starting_made(tmp_path):
    script = "import gc, server.serve; from server.settings import Settings; server.serve._serve_http = show"
    show = "def show(*_): print(gc.get_freeze_count(), len(gc.get_objects()))"
    serve = f"server.serve.serve(Settings(http=True, workspace={str(tmp_path)!r}))"
    ran = subprocess.run([sys.executable, "-c", "\n".join([show, script, serve])], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    left_alone, looked_at = map(int, ran.stdout.split())
    assert left_alone > 50_000
    assert looked_at < left_alone / 100
