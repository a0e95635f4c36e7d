"""What blocks of GGUF files are made of: a weight is a whole number times a scale, plus a minimum.

steps    scales and minima of blocks: one of each for GROUP weights beside each other
KINDS    the types of blocks that are such

Layouts: ggml-common.h of github.com/ggml-org/ggml; arithmetic: gguf-py's quants.py, whose numbers these give.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from engine.levels import GROUP, Array

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Steps = tuple[Array, Array]


def steps(raw: Bytes, kind: str, weights: int) -> Steps:
    """(blocks, bytes of one) -> scales and minima, each (blocks, weights of one / GROUP)."""
    scales, minima = np.broadcast_arrays(*KINDS[kind](raw))
    times = weights // GROUP // scales.shape[1]
    return np.repeat(scales, times, axis=1), np.repeat(minima, times, axis=1)


_NONE = np.zeros((1, 1), np.float32)


def _half(raw: Bytes, at: int) -> Array:
    """(blocks, 1): the float16 that begins at a byte of each block."""
    return np.ascontiguousarray(raw[:, at : at + 2]).view("<f2").astype(np.float32)


def _four_bits(raw: Bytes) -> Steps:
    """Levels 0 to 15, of which 8 stands for 0."""
    d = _half(raw, 0)
    return d, -8 * d


def _signed(raw: Bytes) -> Steps:
    return _half(raw, 0), _NONE


def _with_minimum(raw: Bytes) -> Steps:
    return _half(raw, 0), _half(raw, 2)


def _affine_k(raw: Bytes) -> Steps:
    """Q4_K and Q5_K: 8 sub-blocks with scales and minima of six bits."""
    from gguf.quants import Q4_K

    scales, minima = Q4_K.get_scale_min(raw[:, 4:16])
    return _half(raw, 0) * scales, -_half(raw, 2) * minima


def _affine_2_bits(raw: Bytes) -> Steps:
    """Q2_K: 16 sub-blocks with scales and minima of four bits."""
    return _half(raw, 80) * (raw[:, :16] & 15), -_half(raw, 82) * (raw[:, :16] >> 4)


def _signed_3_bits(raw: Bytes) -> Steps:
    """Q3_K: 16 sub-blocks with signed scales of six bits, 8 bytes of lower and 4 of upper halves."""
    lower, upper = raw[:, 96:104], raw[:, 104:108]
    low = np.concatenate([lower & 15, lower >> 4], axis=1)
    high = np.concatenate([upper >> shift & 3 for shift in (0, 2, 4, 6)], axis=1)
    return _half(raw, 108) * _six_bits(low, high), _NONE


def _signed_6_bits(raw: Bytes) -> Steps:
    """Q6_K: 16 sub-blocks with signed scales."""
    return _half(raw, 208) * np.ascontiguousarray(raw[:, 192:208]).view(np.int8), _NONE


def _by_table(raw: Bytes) -> Steps:
    """IQ4_XS: 8 sub-blocks with signed scales of six bits, two bytes of upper and 4 of lower halves."""
    upper, lower = np.ascontiguousarray(raw[:, 2:4]).view("<u2"), raw[:, 4:8]
    low = np.stack([lower & 15, lower >> 4], axis=2).reshape(len(raw), 8)
    high = (upper >> np.arange(0, 16, 2).astype(np.uint16) & 3).astype(np.uint8)
    return _half(raw, 0) * _six_bits(low, high), _NONE


def _six_bits(low: Bytes, high: Bytes) -> Array:
    return (low | high << 4).astype(np.float32) - np.float32(32)


KINDS: dict[str, Callable[[Bytes], Steps]] = {
    "Q4_0": _four_bits,
    "Q4_1": _with_minimum,
    "Q5_0": _signed,
    "Q5_1": _with_minimum,
    "Q8_0": _signed,
    "Q2_K": _affine_2_bits,
    "Q3_K": _signed_3_bits,
    "Q4_K": _affine_k,
    "Q5_K": _affine_k,
    "Q6_K": _signed_6_bits,
    "IQ4_NL": _signed,
    "IQ4_XS": _by_table,
}
