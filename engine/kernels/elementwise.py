"""What is done to each number or each row: activations, `softcap`, `softmax`, `rms_norm`, `rotate`."""

from typing import Any

import numpy as np
from numba import njit, prange
from numba import types as t

from engine.kernels.arithmetic import HALF, ONE, ZERO, erf, exp, tanh
from engine.kernels.calls import (
    ONE_AT_A_TIME,
    STRICT,
    SUMS,
    batch,
    compiled,
    f32,
    heads,
    in_rows,
    matrix,
    seen_batch,
    seen_matrix,
    seen_vector,
    stepped,
)
from engine.matrices import Array

_CUBIC, _ROOT_2_OVER_PI, _ROOT_HALF = (np.float32(x) for x in (0.044715, np.sqrt(2 / np.pi), np.sqrt(0.5)))


@njit(fastmath=STRICT, error_model="numpy")
def capped(row: Any, cap: Any) -> None:
    """Row = cap * tanh(row / cap)."""
    for j in range(len(row)):
        row[j] = cap * tanh(row[j] / cap)


@njit(fastmath=SUMS, error_model="numpy")
def softmax_between(x: Any, start: Any, end: Any) -> None:
    """Softmax of x[start:end], zeros elsewhere; zeros throughout if all is minus infinity."""
    x[:start] = 0
    x[end:] = 0
    row = x[start:end]  # of loops from 0 on alone LLVM makes vectors
    peak = np.finfo(np.float32).min
    for j in range(len(row)):
        peak = max(peak, row[j])
    total = ZERO
    for j in range(len(row)):
        e = exp(row[j] - peak)
        row[j] = e
        total += e
    factor = ONE / max(total, np.finfo(np.float32).tiny)
    for j in range(len(row)):
        row[j] *= factor


_activation = t.void(seen_matrix, seen_matrix, matrix)
"""Of x, and of no rows or of those that the result is multiplied by."""


@njit(fastmath=STRICT, error_model="numpy")
def _times(row: Any, rows: Any, at: Any) -> None:
    if len(rows):
        other = rows[at]
        for j in range(len(row)):
            row[j] *= other[j]


@compiled(_activation, STRICT)  # type: ignore[untyped-decorator]
def _silu(x: Any, up: Any, out: Any) -> None:
    for row in prange(len(out)):
        ours, given = out[row], x[row]
        for j in range(len(ours)):
            ours[j] = given[j] / (ONE + exp(-given[j]))
        _times(ours, up, row)


@compiled(_activation, STRICT)  # type: ignore[untyped-decorator]
def _gelu_tanh(x: Any, up: Any, out: Any) -> None:
    for row in prange(len(out)):
        ours, given = out[row], x[row]
        for j in range(len(ours)):
            g = given[j]
            ours[j] = HALF * g * (ONE + tanh(_ROOT_2_OVER_PI * (g + _CUBIC * g * g * g)))
        _times(ours, up, row)


@compiled(_activation, STRICT)  # type: ignore[untyped-decorator]
def _gelu(x: Any, up: Any, out: Any) -> None:
    for row in prange(len(out)):
        ours, given = out[row], x[row]
        for j in range(len(ours)):
            ours[j] = HALF * given[j] * (ONE + erf(given[j] * _ROOT_HALF))
        _times(ours, up, row)


_ACTIVATIONS = {
    "gelu": _gelu,
    "gelu_fast": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "gelu_python": _gelu,
    "gelu_pytorch_tanh": _gelu_tanh,
    "silu": _silu,
    "swish": _silu,
}


@compiled(t.void(matrix, f32), STRICT)  # type: ignore[untyped-decorator]
def _softcap(x: Any, cap: Any) -> None:
    for row in prange(len(x)):
        capped(x[row], cap)


@compiled(t.void(matrix), SUMS)  # type: ignore[untyped-decorator]
def _softmax(x: Any) -> None:
    for row in prange(len(x)):
        softmax_between(x[row], 0, x.shape[1])


@compiled(t.void(seen_batch, seen_vector, f32, batch), SUMS)  # type: ignore[untyped-decorator]
def _rms_norm(x: Any, weight: Any, eps: Any, out: Any) -> None:
    rows, width = x.shape[0] * x.shape[1], x.shape[2]
    given, ours, gains = x.reshape(rows, width), out.reshape(rows, width), weight.reshape(-1, width)
    for row in prange(rows):
        total = ZERO
        for j in range(width):
            total += given[row, j] * given[row, j]
        root = np.sqrt(total / f32(width) + eps)
        gain = gains[row % len(gains)]
        for j in range(width):
            ours[row, j] = given[row, j] / root * gain[j]


@compiled(t.void(seen_matrix, seen_matrix, seen_matrix, heads), STRICT)  # type: ignore[untyped-decorator]
def _rotate(x: Any, cos: Any, sin: Any, out: Any) -> None:
    batch, n_heads, seq, width = out.shape
    half = cos.shape[1]
    for place in prange(batch * seq):
        i, s = place // seq, place % seq
        c, d = cos[s], sin[s]
        for head in range(n_heads):
            turned, given = out[i, head, s], x[place, head * width : (head + 1) * width]
            a, b, first, second = given[:half], given[half : 2 * half], turned[:half], turned[half : 2 * half]
            for j in range(half):
                first[j] = a[j] * c[j] - b[j] * d[j]
                second[j] = b[j] * c[j] + a[j] * d[j]
            turned[2 * half :] = given[2 * half :]


def activated(activation: str, x: Array, up: Array | None) -> Array | None:
    """As `ops.activated`; None for what numpy must do."""
    if activation not in _ACTIVATIONS:
        return None
    out = np.empty(x.shape, np.float32)
    flat = (-1, x.shape[-1])
    ups = np.empty((0, 0), np.float32) if up is None else stepped(up.reshape(flat))
    with ONE_AT_A_TIME:
        _ACTIVATIONS[activation](stepped(x.reshape(flat)), ups, out.reshape(flat))
    return out


def softcap(x: Array, cap: float) -> bool:
    """As `ops.softcap`; False for arrays that numpy must do."""
    if not x.flags.carray or not x.size:
        return False
    with ONE_AT_A_TIME:
        _softcap(x.reshape(-1, x.shape[-1]), cap)
    return True


def softmax(x: Array) -> bool:
    """Over the last axis, in place; False for arrays that numpy must do."""
    if not x.flags.carray or not x.size:
        return False
    with ONE_AT_A_TIME:
        _softmax(x.reshape(-1, x.shape[-1]))
    return True


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """As `ops.rms_norm`."""
    out = np.empty(x.shape, np.float32)
    with ONE_AT_A_TIME:
        _rms_norm(in_rows(x), weight.ravel(), eps, in_rows(out))
    return out


def rotate(x: Array, cos: Array, sin: Array) -> Array | None:
    """As `ops.rotate`, of (batch, heads, seq, d_head); None for arrays that numpy must do."""
    if x.ndim != 4:
        return None
    batch, n_heads, seq, d_head = x.shape
    out = np.empty(x.shape, np.float32)
    with ONE_AT_A_TIME:
        _rotate(stepped(x.swapaxes(1, 2).reshape(batch * seq, n_heads * d_head)), cos, sin, out)
    return out
