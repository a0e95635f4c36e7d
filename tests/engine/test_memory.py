"""What a process that loads SmolLM2, runs 32 tokens and captures them needs at its peak.

The figures are of the whole process: interpreter and libraries (about 43 MiB) are not subtracted.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import engine

CHILD = Path(__file__).with_name("measure_memory.py")
MOST = {"dense": 1.3, "scoped": 0.75}
"""Times the size of all weights as float32."""

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc"),
]


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, int]]:
    root = str(Path(engine.__file__).parents[1])
    env = os.environ | {"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": root}
    runs = {}
    for kept in MOST:
        ran = subprocess.run([sys.executable, str(CHILD), kept], env=env, capture_output=True, text=True, timeout=120)
        assert ran.returncode == 0, ran.stderr
        runs[kept] = json.loads(ran.stdout)
    return runs


@pytest.mark.parametrize("kept", MOST)
def test_peak_memory_stays_within_its_bound(kept: str, measured: dict[str, dict[str, int]]) -> None:
    run = measured[kept]
    assert run["weights"] == 134_515_008 * 4
    assert run["peak"] <= MOST[kept] * run["weights"], run
    assert run["before"] < 0.15 * run["weights"], "the bound says little about the weights if the rest is large"


def test_the_measure_sees_the_weights(measured: dict[str, dict[str, int]]) -> None:
    assert measured["dense"]["peak"] >= measured["dense"]["weights"]
    assert measured["dense"]["peak"] > MOST["scoped"] * measured["dense"]["weights"]


def test_a_loaded_model_does_not_hold_its_file_in_memory(measured: dict[str, dict[str, int]]) -> None:
    for run in measured.values():
        assert run["file"] < 60 << 20, "98 MB of it would be the file"
