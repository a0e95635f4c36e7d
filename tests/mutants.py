"""Break the engine and the server in named ways and expect the tests to notice: `make mutants`.

misplaced   mutants whose text is not in its file exactly once, or that are not Python
main        control runs, then every mutant in a copy of the engine, two at a time; exit 1 if one survives

Mutants of the architectures are run on the golden numbers of the rows that they concern, and each row must be off by at
least 100 times what is allowed. The others are run on the test that each names, and those of the engine on all of its
tests if that one does not notice. Every run checks that it imports the copy.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from math import inf
from pathlib import Path
from typing import NamedTuple

import families
from family_mutants import FAMILY_MUTANTS, concerns, uncovered
from gguf_mutants import GGUF_MUTANTS
from golden_check import WRONG_ENGINE
from mutant import Mutant
from oracle.measure import CONTROL
from plain_mutants import PLAIN_MUTANTS
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import track
from rich.table import Table
from server_mutants import SERVER_MUTANTS

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("docs", "engine", "schemas", "server", "tests", "pyproject.toml")
SLOW = ("test_bad_files.py", "test_catalog.py", "test_fuzz.py", "test_memory.py")
"""Tests that run many or heavy subprocesses; no mutant here is theirs to catch."""
PHASES = ("not real", "real")
WORKERS = 2
SECONDS, NO_TESTS = 900, 5
RUNNER = f"""
import sys
from pathlib import Path
copy = Path(sys.argv.pop(1))
import engine, server
if not all(Path(package.__file__).resolve().is_relative_to(copy) for package in (engine, server)):
    sys.exit({WRONG_ENGINE})
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""


MUTANTS = (*PLAIN_MUTANTS, *GGUF_MUTANTS, *FAMILY_MUTANTS, *SERVER_MUTANTS)


class Verdict(NamedTuple):
    """Whether a mutant was caught, and by what."""

    caught: bool
    by: str


def misplaced() -> list[str]:
    """Names of mutants whose text does not occur exactly once in its file, changes nothing, or is not Python after."""
    return [mutant.name for mutant in MUTANTS if not _fits(mutant, (ROOT / mutant.path).read_text("utf-8"))]


def _fits(mutant: Mutant, source: str) -> bool:
    if source.count(mutant.old) != 1 or mutant.old == mutant.new:
        return False
    try:
        ast.parse(source.replace(mutant.old, mutant.new))
    except SyntaxError:
        return False
    return True


# --- copies -------------------------------------------------------------------------------------------------------


@contextmanager
def project_copy(mutant: Mutant | None = None) -> Iterator[Path]:
    """A copy of the project, with the mutant in it."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as directory:
        copy = Path(directory).resolve()
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__", "node_modules", ".*"))
            else:
                shutil.copy(source, copy / name)
        if mutant is not None:
            path = copy / mutant.path
            path.write_text(path.read_text("utf-8").replace(mutant.old, mutant.new), "utf-8")
        yield copy


def run(copy: Path, *command: str) -> subprocess.CompletedProcess[str] | None:
    """Python in a copy; None when it takes too long."""
    environment = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "OPENBLAS_NUM_THREADS": "1"}
    try:
        return subprocess.run(
            [sys.executable, *command], cwd=copy, env=environment, capture_output=True, text=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        return None


def stopped(ran: subprocess.CompletedProcess[str]) -> SystemExit:
    return SystemExit(f"this could not run (exit {ran.returncode}):\n{ran.stdout[-2000:]}{ran.stderr[-2000:]}")


# --- mutants that tests notice --------------------------------------------------------------------------------------


def failed_test(copy: Path, marker: str, files: list[str]) -> str | None:
    """The first test that fails in a copy of the project; None when all pass."""
    skipped = [f"--ignore=tests/engine/{name}" for name in SLOW]
    options = ["-x", "-q", "-p", "no:cacheprovider", "--tb=no", "--no-header", f"--basetemp={copy / 'tmp'}"]
    ran = run(copy, "-c", RUNNER, str(copy), *options, *skipped, *files, "-m", marker)
    if ran is None:
        return f"nothing within {SECONDS} s"
    if ran.returncode in (0, NO_TESTS):
        return None
    found = re.search(r"^(?:FAILED|ERROR) (?:tests/(?:engine|server)/)?(.+?)(?: - .*)?$", ran.stdout, re.MULTILINE)
    if found is None or ran.returncode != 1:
        raise stopped(ran)
    return found[1]


def caught_by(mutant: Mutant) -> Verdict:
    """The test that notices the mutant, the one it names first."""
    with project_copy(mutant) as copy:
        for files in ([mutant.test], ["tests/engine"])[: 2 if mutant.package == "engine" else 1]:
            for phase in PHASES:
                if found := failed_test(copy, phase, files):
                    return Verdict(True, found if files == [mutant.test] else f"{found}, not {mutant.at}")
    return Verdict(False, "nothing: it survives")


def broken_test(phase: str) -> str | None:
    """A test that fails without any mutant."""
    with project_copy() as copy:
        return failed_test(copy, phase, ["tests/engine", *sorted({mutant.test for mutant in SERVER_MUTANTS})])


# --- mutants that the golden numbers notice -------------------------------------------------------------------------


def factors(rows: list[str], mutant: Mutant | None = None) -> dict[str, float]:
    """How far each row is from the golden numbers, in multiples of what is allowed; infinite if it cannot be run."""
    with project_copy(mutant) as copy:
        ran = run(copy, str(copy / "tests/golden_check.py"), str(copy), *rows)
        if ran is None or ran.returncode:
            raise SystemExit("the golden numbers took too long") if ran is None else stopped(ran)
        return {row: inf if isinstance(found, str) else found for row, found in json.loads(ran.stdout).items()}


def seen_by(mutant: Mutant) -> Verdict:
    """The row that is least disturbed."""
    found = factors(concerns(mutant), mutant)
    row = min(found, key=found.__getitem__)
    size = "cannot be run" if found[row] == inf else f"{found[row]:,.0f} x the tolerance"
    return Verdict(found[row] >= CONTROL, f"{row}: {size}{f', the least of {len(found)} rows' * (len(found) > 1)}")


# --- the report -------------------------------------------------------------------------------------------------------


def verdict(mutant: Mutant) -> Verdict:
    return seen_by(mutant) if mutant.features else caught_by(mutant)


def wrong_without_mutants(pool: ThreadPoolExecutor) -> list[str]:
    """What the mutants could not be judged by."""
    found = [test for test in pool.map(broken_test, PHASES) if test]
    return found + [row for row, factor in factors([*families.ROWS]).items() if factor > 1]


def main() -> int:
    console, start = Console(), time.perf_counter()
    if wrong := [f"{name} no longer fits the code" for name in misplaced()] + [*uncovered()]:
        console.print("\n".join(wrong))
        return 1
    with ThreadPoolExecutor(WORKERS) as pool:
        if broken := wrong_without_mutants(pool):
            console.print(f"without any mutant these fail: {', '.join(broken)}")
            return 1
        console.print(f"control: all tests pass without a mutant ({time.perf_counter() - start:.0f} s)")
        found = track(pool.map(verdict, MUTANTS), "mutants", len(MUTANTS), console=console, transient=True)
        results = dict(zip(MUTANTS, found, strict=True))
    table = Table("mutant", box=SIMPLE)
    table.add_column("noticed by", overflow="fold")
    for mutant, (caught, by) in results.items():
        table.add_row(mutant.name, by if caught else f"[bold red]{by}[/]")
    console.print(table)
    survivors = sum(not caught for caught, _ in results.values())
    seconds = time.perf_counter() - start
    console.print(f"{len(MUTANTS) - survivors} of {len(MUTANTS)} mutants caught in {seconds:.0f} s")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
