"""Damaged files from a seed: each is refused in words or loads and runs, within 2 GB and 10 seconds.

Every case runs in a process of its own (load_fuzzed.py, which says what "loads and runs" means; fuzzing.py, what the
damage is). What such runs have found is in test_spoiled_files.py, one by one.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import fuzzing
import pytest

import engine

CHILD = Path(__file__).with_name("load_fuzzed.py")
Row = dict[str, Any]


def told(*arguments: str) -> list[Row]:
    root = Path(engine.__file__).parents[1]
    limits = {"OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
    ran = subprocess.run(
        [sys.executable, str(CHILD), *arguments],
        env=os.environ | limits | {"PYTHONPATH": os.pathsep.join((str(root), str(Path(fuzzing.__file__).parent)))},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert "Traceback" not in ran.stderr
    return [json.loads(line) for line in ran.stdout.splitlines()]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    return told(str(tmp_path_factory.mktemp("fuzz")))


def test_the_child_notices_what_goes_wrong() -> None:
    found = {row["label"]: (row["outcome"], row["said"]) for row in told("--controls")}
    assert {outcome for outcome, _ in found.values()} == {"wrong"}
    assert "ended with -11" in found["a crash"][1]
    assert "ended with -14" in found["a hang"][1]
    assert "MemoryError" in found["three gigabytes"][1]
    assert "KeyError" in found["a raw error"][1]
    assert len(found) == 8


def test_every_damaged_file_is_refused_in_words_or_loads_and_runs(rows: list[Row]) -> None:
    assert Counter(row["kind"] for row in rows) == fuzzing.COUNTS
    assert len({row["label"] for row in rows}) == len(rows) >= 500
    wrong = [f"{row['label']}: {row['said']}" for row in rows if row["outcome"] == "wrong"]
    assert not wrong, "\n".join(wrong)


def test_no_damaged_file_takes_long_or_much_memory(rows: list[Row]) -> None:
    assert max(row["seconds"] for row in rows) < 10
    assert max(row["bytes"] for row in rows) < 500 << 20, "the originals are smaller than 600 kB"


def test_the_corpus_has_files_that_are_refused_and_files_that_load(rows: list[Row]) -> None:
    outcomes = Counter((row["kind"], row["outcome"]) for row in rows)
    assert all(outcomes[kind, "refused"] >= 50 and outcomes[kind, "loaded"] >= 10 for kind in fuzzing.COUNTS), outcomes
