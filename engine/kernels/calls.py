"""How kernels are compiled and called.

compiled, STRICT, SUMS      a kernel, and what LLVM may do with its arithmetic
vector, seen_vector, ...    the types of arrays that kernels write and read
in_rows, stepped            arrays as those types describe them
ONE_AT_A_TIME               held during each call
"""

from math import prod
from threading import Lock
from typing import Any

import numpy as np
from numba import njit
from numba import types as t

from engine.blas import rows_in_order
from engine.matrices import Array

STRICT = {"contract", "nsz"}
"""Fused multiply-add is allowed; NaN and infinity keep their meaning."""
SUMS = {*STRICT, "reassoc"}
"""And sums in any order."""
ONE_AT_A_TIME = Lock()
"""Numba's workqueue, the threading layer that is always there, admits one caller."""

f32: Any = t.float32
i32: Any = t.int32
i64: Any = t.int64
batch, matrix, vector = f32[:, :, ::1], f32[:, ::1], f32[::1]
seen_batch, seen_matrix, seen_vector = (t.Array(f32, axes, "C", readonly=True) for axes in (3, 2, 1))  # mapped, say
heads, seen_heads = f32[:, :, :, ::1], t.Array(f32, 4, "A", readonly=True)


def compiled(signature: Any, flags: set[str]) -> Any:
    """Compiled for one signature or several at import, for all threads, and kept in numba's cache."""
    return njit(signature, parallel=True, cache=True, nogil=True, error_model="numpy", fastmath=flags)


def in_rows(x: Array) -> Array:
    """(..., width) -> (batch, rows, width), in order in memory."""
    x = np.ascontiguousarray(x)
    return x if x.ndim == 3 else x.reshape(1, prod(x.shape[:-1]), x.shape[-1])


def stepped(x: Array) -> Array:
    """(rows, width) whose rows lie apart -> (rows, step): a row's own numbers, then what must not be read."""
    if x.flags.c_contiguous:  # as a row by itself always is
        return x
    flat = x if rows_in_order(x) else np.ascontiguousarray(x)
    step = flat.strides[0] // 4
    return np.lib.stride_tricks.as_strided(flat, (len(flat), step), (4 * step, 4), writeable=False)
