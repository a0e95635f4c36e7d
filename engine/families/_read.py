"""Typed, bounded reading of config.json: `whole`, `real`, `flag`, `choice`."""

from collections.abc import Mapping
from typing import Any

from engine.errors import DamagedFile, clipped

MOST = {"num_hidden_layers": 1_000, "vocab_size": 10_000_000, "max_position_embeddings": 100_000_000}
"""Upper bounds of sizes; every other size is at most 1,000,000. A file that claims more is damaged."""

_MOST_REAL = 1e30


def whole(raw: Mapping[str, Any], key: str, default: int | None = None, least: int = 1) -> int:
    """A whole number of at least `least`."""
    value = default if raw.get(key) is None else raw[key]
    most = MOST.get(key, 1_000_000)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise DamagedFile(f"config: {key} is {clipped(value)}; it must be a whole number from {least} to {most}")
    return value


def real(raw: Mapping[str, Any], key: str, default: float | None = None, least: float = 1e-30) -> float:
    """A number from `least` to 1e30."""
    value = default if raw.get(key) is None else raw[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= _MOST_REAL:
        raise DamagedFile(f"config: {key} is {clipped(value)}; it must be a number from {least:g} to {_MOST_REAL:g}")
    return float(value)


def flag(raw: Mapping[str, Any], key: str, default: bool) -> bool:
    """True or false."""
    value = default if raw.get(key) is None else raw[key]
    if not isinstance(value, bool):
        raise DamagedFile(f"config: {key} is {clipped(value)}; it must be true or false")
    return value


def choice(raw: Mapping[str, Any], key: str, default: str, valid: tuple[str, ...]) -> str:
    """One of `valid`."""
    value = default if raw.get(key) is None else raw[key]
    if value not in valid:
        raise DamagedFile(f"config: {key} is {clipped(value)}; the supported values are {', '.join(valid)}")
    return str(value)
