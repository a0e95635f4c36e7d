"""Rotary frequencies by kind: `rope_from`, as transformers' modeling_rope_utils.py computes them, in float64.

default    Su et al. 2021            linear     positions divided by a factor (Chen et al. 2023)
llama3     Llama 3.1, by wavelength  yarn       Peng et al. 2023
dynamic    base grows with length    longrope   Ding et al. 2024, other factors beyond the original context
proportional    a part of the pairs, at the frequencies of the whole head (Gemma 4)
divided    by a divisor for each frequency, as GGUF files store llama3's scaling
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from engine.config import Rope
from engine.errors import DamagedFile, clipped
from engine.families._read import choice, real, whole

Settings = Mapping[str, Any]


def rope_from(settings: Settings, width: int, n_ctx: int) -> Rope:
    """One layer's rotary embedding.

    `settings` holds rope_theta and what the rope_type needs; `width` is the number of rotated features, `n_ctx` the
    config's max_position_embeddings.
    """
    kind = settings.get("rope_type", settings.get("type"))
    name = choice({"rope_type": kind}, "rope_type", "default", tuple(_KINDS))
    return _KINDS[name](settings, width, n_ctx)


def _theta(settings: Settings) -> float:
    return real(settings, "rope_theta", 10_000.0, least=1.0)


def _default(settings: Settings, width: int, n_ctx: int) -> Rope:
    return Rope.plain(_theta(settings), width)


def _linear(settings: Settings, width: int, n_ctx: int) -> Rope:
    factor = real(settings, "factor")
    return Rope(tuple(f / factor for f in _default(settings, width, n_ctx).inv_freq))


def _llama3(settings: Settings, width: int, n_ctx: int) -> Rope:
    factor = real(settings, "factor")
    low, high = real(settings, "low_freq_factor"), real(settings, "high_freq_factor")
    context = whole(settings, "original_max_position_embeddings", n_ctx)
    if low >= high:
        raise DamagedFile(f"config: low_freq_factor {low} must be below high_freq_factor {high}")

    def scaled(frequency: float) -> float:
        turns = context * frequency / (2 * math.pi)  # of this pair within the original context
        if turns > high:
            return frequency
        if turns < low:
            return frequency / factor
        smooth = (turns - low) / (high - low)
        return (1 - smooth) * frequency / factor + smooth * frequency

    return Rope(tuple(map(scaled, _default(settings, width, n_ctx).inv_freq)))


def _yarn(settings: Settings, width: int, n_ctx: int) -> Rope:
    context = whole(settings, "original_max_position_embeddings", n_ctx)
    extended = settings.get("original_max_position_embeddings") is not None
    factor = real(settings, "factor", n_ctx / context if extended else None)
    theta = real(settings, "rope_theta", 10_000.0, least=1.001)  # its logarithm divides
    low, high = (
        width * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))
        for turns in (real(settings, "beta_fast", 32), real(settings, "beta_slow", 1))
    )
    if settings.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    high = high + 0.001 if low == high else high

    def scaled(index: int, frequency: float) -> float:
        ramp = min(max((index - low) / (high - low), 0), 1)
        return frequency / factor * ramp + frequency * (1 - ramp)

    plain = _default(settings, width, n_ctx).inv_freq
    return Rope(tuple(scaled(i, f) for i, f in enumerate(plain)), _yarn_scale(settings, factor))


def _yarn_scale(settings: Settings, factor: float) -> float:
    if settings.get("attention_factor") is not None:
        return real(settings, "attention_factor")

    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1

    if settings.get("mscale") and settings.get("mscale_all_dim"):
        return magnitude(real(settings, "mscale")) / magnitude(real(settings, "mscale_all_dim"))
    return magnitude(1.0)


def _dynamic(settings: Settings, width: int, n_ctx: int) -> Rope:
    if width < 4:
        raise DamagedFile(f"config: dynamic rotary scaling needs at least 4 rotated features per head, not {width}")
    return Rope(_default(settings, width, n_ctx).inv_freq, dynamic=(_theta(settings), real(settings, "factor"), n_ctx))


def _longrope(settings: Settings, width: int, n_ctx: int) -> Rope:
    context = whole(settings, "original_max_position_embeddings", n_ctx, least=2)  # its logarithm divides
    factor = real(settings, "factor", n_ctx / context)
    scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(context))
    plain = _default(settings, width, n_ctx).inv_freq
    short, long = (
        tuple(f / s for f, s in zip(plain, _factors(settings, key, width), strict=True))
        for key in ("short_factor", "long_factor")
    )
    return Rope(short, real(settings, "attention_factor", scale), long=(context, long))


def _proportional(settings: Settings, width: int, n_ctx: int) -> Rope:
    """The head's own frequencies for a part of its pairs, no rotation for the others."""
    factor, turned = real(settings, "factor", 1.0), int(real(settings, "partial_rotary_factor", 1.0) * width // 2)
    plain = _default(settings, width, n_ctx).inv_freq
    return Rope(tuple(f / factor if i < turned else 0.0 for i, f in enumerate(plain)))


def _divided(settings: Settings, width: int, n_ctx: int) -> Rope:
    plain = _default(settings, width, n_ctx).inv_freq
    return Rope(tuple(f / d for f, d in zip(plain, _factors(settings, "divisors", width), strict=True)))


def _factors(settings: Settings, key: str, width: int) -> list[float]:
    values = settings.get(key)
    if not isinstance(values, list) or len(values) != width // 2:
        raise DamagedFile(f"config: {key} must be a list of {width // 2} numbers, not {clipped(values)}")
    return [real({key: value}, key) for value in values]


_KINDS: dict[str, Callable[[Settings, int, int], Rope]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "proportional": _proportional,
    "divided": _divided,
}
