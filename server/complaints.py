"""Validation errors -> one line an agent can act on: `explain`; `crowded` finds what would make too many of them.

Pydantic reports every branch of a union; of those, only the branches nearest to what was sent are told.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from engine.errors import clipped

MOST = 6
"""Complaints in one message."""
MOST_FIELDS = 100
SHOULD = "Input should be "
"""How pydantic begins what a branch takes."""


@dataclass(frozen=True)
class Complaint:
    """One error of pydantic's; `whole` when it is about all that a union was given."""

    place: str
    kind: str
    reason: str
    whole: bool

    @property
    def is_of_type(self) -> bool:
        """Whether the branch takes another type altogether."""
        return self.whole and (self.kind.endswith("_type") or self.kind == "literal_error")


def explain(tool: str, error: ValidationError, arguments: dict[str, Any], valid: list[str]) -> str:
    """What was wrong with the arguments, which are those that were validated, and which ones exist."""
    unions: dict[str, dict[str, list[Complaint]]] = defaultdict(lambda: defaultdict(list))
    for item in error.errors(include_url=False, include_context=False):
        place, union, branch = _located(item, arguments)
        complaint = Complaint(place, item["type"], _reason(item, valid), place == union)
        unions[union or place][branch].append(complaint)
    told: dict[str, list[str]] = defaultdict(list)
    for branches in unions.values():
        for complaint in _nearest(branches):
            told[complaint.place].append(complaint.reason)
    lines = [f"{place}: {reason}" for place, reasons in told.items() for reason in _joined(reasons)]
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


def _nearest(branches: dict[str, list[Complaint]]) -> list[Complaint]:
    """Of the branches of a union that fit best: the right type first, then the right fields, then the fewest."""

    def distance(complaints: list[Complaint]) -> tuple[bool, int, int]:
        wrong_fields = sum(item.kind in ("missing", "extra_forbidden") for item in complaints)
        return any(item.is_of_type for item in complaints), wrong_fields, len(complaints)

    least = min(map(distance, branches.values()))
    return [item for complaints in branches.values() if distance(complaints) == least for item in complaints]


def _joined(reasons: list[str]) -> list[str]:
    """What would be valid at one place in one sentence: each branch of a union says what it takes."""
    valid = [reason.removeprefix(SHOULD) for reason in reasons if reason.startswith(SHOULD)]
    others = [reason for reason in reasons if not reason.startswith(SHOULD)]
    return [*([SHOULD + " or ".join(dict.fromkeys(valid))] if valid else []), *dict.fromkeys(others)]


def _located(item: ErrorDetails, arguments: dict[str, Any]) -> tuple[str, str, str]:
    """(place in the arguments, place of the union it belongs to, name of the union's branch).

    Names of branches stand between the keys that lead to what was complained about: where that is reached, no part
    but a missing field's name is a key.
    """
    shown: list[str] = []
    union, branch = "", ""
    value: Any = arguments
    for index, part in enumerate(item["loc"]):
        missing = index == len(item["loc"]) - 1 and item["type"] == "missing"
        if missing or (value is not item["input"] and _has(value, part)):
            shown.append(_named(part))
            value = None if missing else value[part]
        elif not branch:
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
    return f"{SHOULD}an object" if item["type"] == "model_type" else item["msg"]
