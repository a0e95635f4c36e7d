"""What a process that loads SmolLM2, runs 32 tokens and captures them needs at its peak.

The figures are of the whole process: interpreter and libraries (about 43 MiB) are not subtracted.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import engine

CHILD = Path(__file__).with_name("measure_memory.py")
MOST = {"dense": 1.25, "mapped": 1.25, "scoped": 0.75, "packed": 0.6}
"""Times the size of all weights as float32. "dense" reads and converts them, "mapped" finds them converted."""

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc"),
]


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict[str, dict[str, int]]:
    root = str(Path(engine.__file__).parents[1])
    env = os.environ | {"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": root}
    runs, shelf = {}, tmp_path_factory.mktemp("converted")
    for kept in MOST:
        command = [sys.executable, str(CHILD), kept, str(shelf)]
        ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        assert ran.returncode == 0, ran.stderr
        runs[kept] = json.loads(ran.stdout)
    shutil.rmtree(shelf)
    return runs


@pytest.mark.parametrize("kept", MOST)
def test_peak_memory_stays_within_its_bound(kept: str, measured: dict[str, dict[str, int]]) -> None:
    run = measured[kept]
    assert run["weights"] == 134_515_008 * 4
    assert run["peak"] <= MOST[kept] * run["weights"], run
    assert run["before"] < 0.15 * run["weights"], "the bound says little about the weights if the rest is large"


def test_the_measure_sees_the_weights(measured: dict[str, dict[str, int]]) -> None:
    for kept in ("dense", "mapped"):
        assert measured[kept]["peak"] >= measured[kept]["weights"]
        assert measured[kept]["peak"] > MOST["scoped"] * measured[kept]["weights"]


def test_a_loaded_model_does_not_hold_its_file_in_memory(measured: dict[str, dict[str, int]]) -> None:
    for kept in ("dense", "scoped", "packed"):
        assert measured[kept]["file"] < 60 << 20, "98 MB of it would be the file"


def test_packed_weights_hold_little_more_than_their_file(measured: dict[str, dict[str, int]]) -> None:
    assert measured["packed"]["held"] < 1.25 * 98_000_000


def test_mapped_weights_are_pages_of_the_file_that_the_system_may_take_back(
    measured: dict[str, dict[str, int]],
) -> None:
    run = measured["mapped"]
    assert run["file"] > 0.95 * run["weights"]
    assert run["anonymous"] < 0.25 * run["weights"]
