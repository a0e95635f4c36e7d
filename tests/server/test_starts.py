"""A server's second start maps the weights that its first one converted, unless it is told not to."""

from pathlib import Path

import numpy as np
import pytest
import tiny_files
from clients import ask, connected
from serving import over_stdio

pytestmark = pytest.mark.anyio

WIDE = 1 << 15
"""Neurons of an MLP large enough for its model to be kept."""


def model(path: Path) -> str:
    tensors, noise = tiny_files.weights(), np.random.default_rng(0)
    for name in tensors:
        if "mlp" in name:
            shape = (32, WIDE) if "down" in name else (WIDE, 32)
            tensors[name] = noise.standard_normal(shape, np.float32) / 64
    return str(tiny_files.hf_directory(path, tensors, intermediate_size=WIDE))


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
