"""Causal attention as one kernel: `attend`."""

from typing import Any

import numpy as np
from numba import prange
from numba import types as t

from engine.blas import rows_in_order
from engine.kernels.arithmetic import ONE, ZERO
from engine.kernels.calls import ONE_AT_A_TIME, SUMS, compiled, f32, heads, i64, seen_heads
from engine.kernels.elementwise import capped, softmax_between
from engine.kernels.library import AS_IT_IS, ROW_MAJOR, TRANSPOSED, sgemm
from engine.matrices import Array, IntArray

QUERIES = 64
"""Queries of a head per unit of work: keys later than the last of them are never multiplied."""

_places = t.Array(t.int64, 1, "C", readonly=True)
_signature = t.void(seen_heads, seen_heads, seen_heads, _places, _places, f32, f32, i64, heads, heads)
_attend: Any = None
if sgemm is not None:

    @compiled(_signature, SUMS)  # type: ignore[untyped-decorator]
    def _attend(
        q: Any, k: Any, v: Any, pos: Any, key_pos: Any, scale: Any, cap: Any, window: Any, z: Any, pattern: Any
    ) -> None:
        """Each unit of work is a block of one head's queries; weights go to `pattern` unless that is empty. A `cap` of
        0 is none.
        """
        batch, n_heads, queries, width = q.shape
        group, blocks = n_heads // k.shape[1], (queries + QUERIES - 1) // QUERIES
        starts = np.searchsorted(key_pos, pos - window, side="right")
        ends = np.searchsorted(key_pos, pos, side="right")
        q_step, k_step, v_step = q.strides[2] // 4, k.strides[2] // 4, v.strides[2] // 4
        for unit in prange(batch * n_heads * blocks):
            i, h, first = unit // (n_heads * blocks), unit // blocks % n_heads, unit % blocks * QUERIES
            last = min(queries, first + QUERIES)
            low, high = starts[first], ends[last - 1]
            if low >= high:
                z[i, first:last, h] = 0  # and there is no weights[0, 0]
                continue
            weights = np.empty((last - first, high - low), np.float32)
            sgemm(
                ROW_MAJOR, AS_IT_IS, TRANSPOSED, last - first, high - low, width,
                scale, q[i, h, first:].ctypes.data, q_step, k[i, h // group, low:].ctypes.data, k_step,
                ZERO, weights.ctypes.data, high - low,
            )  # fmt: skip
            for row in range(last - first):
                start, end = starts[first + row] - low, ends[first + row] - low
                if cap > 0:
                    capped(weights[row, start:end], cap)
                softmax_between(weights[row], start, end)
            if pattern.size:
                pattern[i, h, first:last, low:high] = weights
            sgemm(
                ROW_MAJOR, AS_IT_IS, AS_IT_IS, last - first, v.shape[3], high - low,
                ONE, weights.ctypes.data, high - low, v[i, h // group, low:].ctypes.data, v_step,
                ZERO, z[i, first:, h].ctypes.data, n_heads * v.shape[3],
            )  # fmt: skip
            weights[0, 0] = 0  # numba frees an array after its last use, and reading its address does not count as one


def attend(
    q: Array,
    k: Array,
    v: Array,
    pos: IntArray,
    key_pos: IntArray,
    scale: float,
    window: int | None,
    cap: float | None,
    pattern: Array | None,
) -> Array | None:
    """As `ops.attend`; fills `pattern` if there is one. None for arrays that numpy must do."""
    if _attend is None or not all(map(rows_in_order, (q, k, v))) or not len(q) == len(k) == len(v):
        return None
    z = np.empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3]), np.float32)
    kept = np.empty((0, 0, 0, 0), np.float32) if pattern is None else pattern
    with ONE_AT_A_TIME:
        _attend(q, k, v, pos, key_pos, scale, cap or 0, 1 << 40 if window is None else window, z, kept)
    return z
