"""numpy's own BLAS for kernels: `sgemm`, and `by_library`, a product on the kernels' threads.

Both are None where the library is unknown, or where it cannot be told to leave threads to the kernels.
"""

from typing import Any

import llvmlite.binding
import numba
import numpy as np
from numba import prange
from numba import types as t

from engine import blas
from engine.kernels.arithmetic import ONE, ZERO
from engine.kernels.calls import STRICT, compiled, f32, i32, i64, matrix, seen_matrix

THREADS = numba.get_num_threads()
ROW_MAJOR, AS_IT_IS, TRANSPOSED = (np.int32(n) for n in (blas.ROW_MAJOR, blas.AS_IT_IS, blas.TRANSPOSED))

_BLAS = blas.library()
sgemm: Any = None
by_library: Any = None
if _BLAS is not None and _BLAS.set_threads:
    _NAME = "mechscope_sgemm"
    _size, _at = t.int64 if _BLAS.bits == 64 else t.int32, t.uintp
    llvmlite.binding.add_symbol(_NAME, _BLAS.address)
    sgemm = t.ExternalFunction(
        _NAME, t.void(i32, i32, i32, _size, _size, _size, f32, _at, _size, _at, _size, f32, _at, _size)
    )

    @compiled(t.void(seen_matrix, seen_matrix, matrix, i64, t.boolean, i64), STRICT)  # type: ignore[untyped-decorator]
    def by_library(x: Any, w: Any, out: Any, block: Any, transposed: Any, threads: Any) -> None:
        """Out = x @ w, or x @ w.T: each thread has a share of the columns, and sums up `block` features at a time."""
        (rows, n), columns, w_step = x.shape, out.shape[1], w.shape[1]
        width = ((columns + threads - 1) // threads + 15) // 16 * 16
        from_x, from_w, to = x.ctypes.data, w.ctypes.data, out.ctypes.data
        for thread in prange(threads):
            a = thread * width
            if a < columns:
                for k in range(0, n, block):
                    w_at = from_w + 4 * (a * w_step + k if transposed else k * w_step + a)
                    sgemm(
                        ROW_MAJOR, AS_IT_IS, TRANSPOSED if transposed else AS_IT_IS,
                        rows, min(width, columns - a), min(block, n - k),
                        ONE, from_x + 4 * k, n, w_at, w_step, ONE if k else ZERO, to + 4 * a, columns,
                    )  # fmt: skip
