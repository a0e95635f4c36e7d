"""Validation errors -> one line an agent can act on: `explain`.

Pydantic reports every branch of a union; of those, only the branches nearest to what was sent are told.
"""

from collections import defaultdict
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

MOST = 6
"""Complaints in one message."""


def explain(tool: str, error: ValidationError, arguments: dict[str, Any], valid: list[str]) -> str:
    """What was wrong with the arguments, and which ones exist."""
    branches: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for item in error.errors(include_url=False, include_context=False, include_input=False):
        place, union, branch = _located(item, arguments)
        branches[union or place][branch].append(f"{place}: {_reason(item, valid)}")
    lines: list[str] = []
    for by_branch in branches.values():
        fewest = min(len(complaints) for complaints in by_branch.values())
        nearest = [line for complaints in by_branch.values() if len(complaints) == fewest for line in complaints]
        lines += dict.fromkeys(nearest)
    more = f" (and {len(lines) - MOST} more)" if len(lines) > MOST else ""
    return f"{tool} was not run. " + "; ".join(lines[:MOST]) + more


def _located(item: ErrorDetails, arguments: dict[str, Any]) -> tuple[str, str, str]:
    """(place in the arguments, place of the union it belongs to, name of the union's branch)."""
    real: list[str] = []
    union, branch = "", ""
    value: Any = arguments
    for index, part in enumerate(item["loc"]):
        missing = index == len(item["loc"]) - 1 and item["type"] == "missing"
        if missing or _has(value, part):
            real.append(str(part))
            value = None if missing else value[part]
        elif not union:
            union, branch = ".".join(real), str(part)
    return ".".join(real) or "arguments", union, branch


def _has(value: Any, part: int | str) -> bool:
    if isinstance(value, dict):
        return part in value
    return isinstance(value, list) and isinstance(part, int) and 0 <= part < len(value)


def _reason(item: ErrorDetails, valid: list[str]) -> str:
    if item["type"] == "extra_forbidden":
        return f"unknown argument; valid: {', '.join(valid)}" if len(item["loc"]) == 1 else "unknown field"
    return item["msg"]
