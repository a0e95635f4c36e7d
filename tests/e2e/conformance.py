"""The official conformance suite against a running server: `judged` says how each required check went."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from e2e import nodes

REVISIONS = ("2025-11-25", "2026-07-28")
BASELINE = Path(__file__).with_name("conformance_baseline.json")


@dataclass(frozen=True)
class Verdict:
    """The suite's own exit status, and the outcome of each check as `scenario:check`."""

    status: int
    passed: frozenset[str]
    failed: dict[str, str]


def judged(base: str, revision: str, folder: Path) -> Verdict:
    """Run what a revision requires of servers. What the suite runs beside it, such as extensions, does not count."""
    ran = nodes.run(
        "conformance", "server", "--url", f"{base}/mcp", "--requirements", revision, "--output-dir", str(folder)
    )
    ignored = set(re.findall(r"^  \S (\S+) \((?:extension|pending|added-after-release)\)$", ran.stdout, re.MULTILINE))
    checks = [check for path in folder.glob("*/checks.json") for check in _checks(path, ignored)]
    if not checks:
        raise RuntimeError(f"the conformance suite ran nothing: {ran.stdout}{ran.stderr}")
    failed = {name: said for name, status, said in checks if status == "FAILURE"}
    passed = {name for name, status, _ in checks if status == "SUCCESS"}
    return Verdict(ran.returncode, frozenset(passed - failed.keys()), failed)


def _checks(path: Path, ignored: set[str]) -> list[tuple[str, str, str]]:
    """(scenario:check, status, message) of a scenario's results."""
    scenario = re.sub(r"^server-(.+)-\d{4}-\d\d-\d\dT.*$", r"\1", path.parent.name)
    if scenario in ignored:
        return []
    found = json.loads(path.read_text("utf-8"))
    return [(f"{scenario}:{check['id']}", check["status"], check.get("errorMessage", "")) for check in found]
