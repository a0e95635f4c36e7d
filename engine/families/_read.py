"""Typed, bounded reading of config.json: `whole`, `real`, `flag`, `choice`."""

import math
from collections.abc import Mapping
from typing import Any

from engine.errors import DamagedFile

MOST = {"num_hidden_layers": 1_000, "vocab_size": 10_000_000, "max_position_embeddings": 100_000_000}
"""Upper bounds of sizes; every other size is at most 1,000,000. A file that claims more is damaged."""


def whole(raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A whole number of at least 1."""
    value = default if raw.get(key) is None else raw[key]
    most = MOST.get(key, 1_000_000)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise DamagedFile(f"config: {key} is {value!r}; it must be a whole number from 1 to {most}")
    return value


def real(raw: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A finite number above zero."""
    value = default if raw.get(key) is None else raw[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise DamagedFile(f"config: {key} is {value!r}; it must be a number above zero")
    return float(value)


def flag(raw: Mapping[str, Any], key: str, default: bool) -> bool:
    """True or false."""
    value = default if raw.get(key) is None else raw[key]
    if not isinstance(value, bool):
        raise DamagedFile(f"config: {key} is {value!r}; it must be true or false")
    return value


def choice(raw: Mapping[str, Any], key: str, default: str, valid: tuple[str, ...]) -> str:
    """One of `valid`."""
    value = default if raw.get(key) is None else raw[key]
    if value not in valid:
        raise DamagedFile(f"config: {key} is {value!r}; the supported values are {', '.join(valid)}")
    return str(value)
