"""Validation errors -> one line an agent can act on: `explain`; `crowded` finds what would make too many of them.

Pydantic reports every branch of a union; of those, only the branches nearest to what was sent are told.
"""

from collections import defaultdict
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from engine.errors import clipped

MOST = 6
"""Complaints in one message."""
MOST_FIELDS = 100


def explain(tool: str, error: ValidationError, arguments: dict[str, Any], valid: list[str]) -> str:
    """What was wrong with the arguments, and which ones exist."""
    unions: dict[str, dict[str, list[ErrorDetails]]] = defaultdict(lambda: defaultdict(list))
    places: dict[int, str] = {}
    for item in error.errors(include_url=False, include_context=False, include_input=False):
        place, union, branch = _located(item, arguments)
        places[id(item)] = place
        unions[union or place][branch].append(item)
    lines = [
        f"{places[id(item)]}: {_reason(item, valid)}"
        for branches in unions.values()
        for complaints in _nearest(branches)
        for item in complaints
    ]
    lines = list(dict.fromkeys(lines))
    more = f" (and {len(lines) - MOST} more)" if len(lines) > MOST else ""
    return f"{tool} was not run. " + "; ".join(lines[:MOST]) + more


def crowded(value: Any, place: str = "") -> str | None:
    """The place of an object with more fields than any argument has: to tell each of a million takes minutes."""
    if isinstance(value, dict) and len(value) > MOST_FIELDS:
        return place or "arguments"
    items = value.items() if isinstance(value, dict) else enumerate(value)
    inner = (
        crowded(item, f"{place}.{_named(key)}".lstrip(".")) for key, item in items if isinstance(item, dict | list)
    )
    return next((found for found in inner if found is not None), None)


def _nearest(branches: dict[str, list[ErrorDetails]]) -> list[list[ErrorDetails]]:
    """The branches of a union that fit best: the right fields first, then the fewest complaints."""

    def distance(complaints: list[ErrorDetails]) -> tuple[int, int]:
        wrong_fields = sum(item["type"] in ("missing", "extra_forbidden") for item in complaints)
        return wrong_fields, len(complaints)

    least = min(map(distance, branches.values()))
    return [complaints for complaints in branches.values() if distance(complaints) == least]


def _located(item: ErrorDetails, arguments: dict[str, Any]) -> tuple[str, str, str]:
    """(place in the arguments, place of the union it belongs to, name of the union's branch)."""
    shown: list[str] = []
    union, branch = "", ""
    value: Any = arguments
    for index, part in enumerate(item["loc"]):
        missing = index == len(item["loc"]) - 1 and item["type"] == "missing"
        if missing or _has(value, part):
            shown.append(_named(part))
            value = None if missing else value[part]
        elif not union:
            union, branch = ".".join(shown), str(part)
    return ".".join(shown) or "arguments", union, branch


def _named(part: int | str) -> str:
    """A key as a caller wrote it, unless it is long or cannot be written."""
    name = str(part)
    return name if len(name) <= 40 and name.isprintable() and name else clipped(name, 40)


def _has(value: Any, part: int | str) -> bool:
    if isinstance(value, dict):
        return part in value
    return isinstance(value, list) and isinstance(part, int) and 0 <= part < len(value)


def _reason(item: ErrorDetails, valid: list[str]) -> str:
    if item["type"] == "extra_forbidden":
        return f"unknown argument; valid: {', '.join(valid) or 'none'}" if len(item["loc"]) == 1 else "unknown field"
    return item["msg"]
