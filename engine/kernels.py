"""Compiled kernels: the `fast` extra (numba). `engine.fast` imports this and hands it to `engine.ops`.

product         rows times a matrix: few by loops over its columns, more by numpy's BLAS on a share for each thread
inner           rows times the rows of a matrix
attend          causal attention
gated_silu      SiLU of a gate, times the other branch
softmax         over the last axis
rms_norm        over the last axis
rotate          rotary embedding

Each computes what the numpy function of the same name in `ops` does, in float32; tests/engine/test_kernels.py says how
near. Importing compiles them, or takes them from numba's cache. While they are in use the BLAS has one thread
(`engine.fast`): its own threads look for more work long after a product, on the processors that the kernels need.
"""

from threading import Lock
from typing import Any

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba import njit, prange
from numba import types as t
from numba.extending import intrinsic, overload

from engine.blas import Matrix, library

FEW = 6
"""Rows up to which loops are faster than the library, which packs the matrix first."""
QUERIES = 64
"""Queries of a head per unit of attention: keys later than the last of them are never multiplied."""
PANEL = 768
"""Columns of a few rows that a thread works on at a time: eight rows of the matrix stay in the first cache."""

f32: Any = t.float32
i32: Any = t.int32
i64: Any = t.int64
address: Any = t.uintp
THREADS = numba.get_num_threads()
_ONE_AT_A_TIME = Lock()  # numba's simplest pool of threads admits one caller

# --- what the kernels are made of ---------------------------------------------------------------------------------


def _bits_as_float(_: Any, bits: Any) -> Any:
    """The float32 that has these bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return f32(i32), generate


_as_float: Any = intrinsic(_bits_as_float)
_STRICT = {"contract", "nsz"}  # fused multiply-add is allowed; NaN and infinity keep their meaning
_SUMS = {*_STRICT, "reassoc"}  # and sums in any order
_LOWEST, _HIGHEST = np.float32(-87.3), np.float32(88.7)
_LOG2E, _LN2_HIGH, _LN2_LOW = np.float32(1.44269504), np.float32(0.693359375), np.float32(-2.12194440e-4)
_HALF, _ONE, _ZERO = np.float32(0.5), np.float32(1), np.float32(0)
_EXP = tuple(
    np.float32(c)
    for c in (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
)
"""The polynomial of Cephes' expf: 2 ulp."""


@njit(inline="always")
def _exp(x: Any) -> Any:
    """E to the x; 0 below -87.3, where float32 leaves its normal range. NaN stays NaN."""
    small = x < _LOWEST
    x = _HIGHEST if x > _HIGHEST else (_LOWEST if small else x)
    n = np.floor(x * _LOG2E + _HALF)
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    p = _EXP[0]
    p = p * r + _EXP[1]
    p = p * r + _EXP[2]
    p = p * r + _EXP[3]
    p = p * r + _EXP[4]
    p = p * r + _EXP[5]
    p = p * r * r + r + _ONE
    two_to_n = _as_float(i32((i32(n) + i32(127)) << i32(23)))
    return _ZERO if small else p * two_to_n


def _compiled(signature: Any, flags: set[str]) -> Any:
    """Compiled for one signature at import, for all threads, and kept in numba's cache."""
    return njit(signature, parallel=True, cache=True, nogil=True, error_model="numpy", fastmath=flags)


matrix, vector = f32[:, ::1], f32[::1]
seen, seen_vector, seen_heads = (t.Array(f32, axes, "C", readonly=True) for axes in (2, 1, 4))  # mapped weights, say
heads, any_heads = f32[:, :, :, ::1], t.Array(f32, 4, "A", readonly=True)
places = t.Array(t.int64, 1, "C", readonly=True)
seen_pairs = t.Array(t.uint32, 2, "C", readonly=True)


@njit(fastmath=_SUMS, error_model="numpy")
def _softmax_between(x: Any, start: Any, end: Any) -> None:
    """Softmax of x[start:end], zeros elsewhere; zeros throughout if all is minus infinity."""
    x[:start] = 0
    x[end:] = 0
    peak = np.finfo(np.float32).min
    for j in range(start, end):
        peak = max(peak, x[j])
    total = _ZERO
    for j in range(start, end):
        e = _exp(x[j] - peak)
        x[j] = e
        total += e
    factor = _ONE / max(total, np.finfo(np.float32).tiny)
    for j in range(start, end):
        x[j] *= factor


# --- products -----------------------------------------------------------------------------------------------------


@njit(inline="always")
def _lower(pair: Any) -> Any:
    """The bfloat16 in the lower half of a word."""
    return _as_float(i32(pair << np.uint32(16)))


@njit(inline="always")
def _upper(pair: Any) -> Any:
    return _as_float(i32(pair & np.uint32(0xFFFF0000)))


def _add_eight(y: Any, f: Any, w: Any, k: Any, a: Any) -> None:
    """To y add eight features times the eight rows of w from k on, in the columns from a on."""


@overload(_add_eight, inline="always")
def _add_eight_of_any(y: Any, f: Any, w: Any, k: Any, a: Any) -> Any:
    def of_numbers(y: Any, f: Any, w: Any, k: Any, a: Any) -> None:
        b = a + len(y)
        w0, w1, w2, w3 = w[k, a:b], w[k + 1, a:b], w[k + 2, a:b], w[k + 3, a:b]
        w4, w5, w6, w7 = w[k + 4, a:b], w[k + 5, a:b], w[k + 6, a:b], w[k + 7, a:b]
        f0, f1, f2, f3, f4, f5, f6, f7 = f[0], f[1], f[2], f[3], f[4], f[5], f[6], f[7]
        for j in range(len(y)):
            first = (f0 * w0[j] + f1 * w1[j]) + (f2 * w2[j] + f3 * w3[j])
            y[j] += first + ((f4 * w4[j] + f5 * w5[j]) + (f6 * w6[j] + f7 * w7[j]))

    def of_pairs(y: Any, f: Any, w: Any, k: Any, a: Any) -> None:
        b, p = a + len(y), k // 2
        w0, w1, w2, w3 = w[p, a:b], w[p + 1, a:b], w[p + 2, a:b], w[p + 3, a:b]
        f0, f1, f2, f3, f4, f5, f6, f7 = f[0], f[1], f[2], f[3], f[4], f[5], f[6], f[7]
        for j in range(len(y)):
            first = (f0 * _lower(w0[j]) + f1 * _upper(w0[j])) + (f2 * _lower(w1[j]) + f3 * _upper(w1[j]))
            more = (f4 * _lower(w2[j]) + f5 * _upper(w2[j])) + (f6 * _lower(w3[j]) + f7 * _upper(w3[j]))
            y[j] += first + more

    return of_pairs if w.dtype == t.uint32 else of_numbers


_few = [t.void(seen, weights, f32[:, :, ::1], i64) for weights in (seen, seen_pairs)]


@_compiled(_few, _STRICT)  # type: ignore[untyped-decorator]
def _few_rows(x: Any, w: Any, sums: Any, block: Any) -> None:
    """The product x @ w of each `block` of features, into a matrix of `sums`."""
    n, columns = x.shape[1], w.shape[1]
    panel = columns if len(x) == 1 else PANEL
    for part in prange(len(sums)):
        total = sums[part]
        total[:] = 0
        for k in range(part * block, min(n, (part + 1) * block), 8):
            for a in range(0, columns, panel):
                for row in range(len(x)):
                    _add_eight(total[row, a : min(columns, a + panel)], x[row, k : k + 8], w, k, a)


_BLAS = library()
_many_rows: Any = None
_inner: Any = None
_attend: Any = None
if _BLAS is not None and _BLAS.set_threads:
    _size = t.int64 if _BLAS.bits == 64 else t.int32
    llvmlite.binding.add_symbol("mechscope_sgemm", _BLAS.address)
    _sgemm: Any = t.ExternalFunction(
        "mechscope_sgemm",
        t.void(i32, i32, i32, _size, _size, _size, f32, address, _size, address, _size, f32, address, _size),
    )

    @_compiled(t.void(seen, seen, matrix, i64, i64), _STRICT)  # type: ignore[untyped-decorator]
    def _many_rows(x: Any, w: Any, out: Any, block: Any, threads: Any) -> None:
        """Out = x @ w: each thread has a share of the rows or columns, and sums up `block` features at a time."""
        rows, n = x.shape
        columns = w.shape[1]
        by_rows = rows > columns
        width = (((rows if by_rows else columns) + threads - 1) // threads + 15) // 16 * 16
        from_x, from_w, to = x.ctypes.data, w.ctypes.data, out.ctypes.data
        for thread in prange(threads):
            first, a = (thread * width, 0) if by_rows else (0, thread * width)
            height, wide = (
                min(width, rows - first) if by_rows else rows,
                columns if by_rows else min(width, columns - a),
            )
            if height > 0 and wide > 0:
                for k in range(0, n, block):
                    _sgemm(
                        i32(101), i32(111), i32(111), height, wide, min(block, n - k),
                        _ONE, from_x + 4 * (first * n + k), n, from_w + 4 * (k * columns + a), columns,
                        _ZERO if k == 0 else _ONE, to + 4 * (first * columns + a), columns,
                    )  # fmt: skip

    @_compiled(t.void(seen, seen, matrix, i64), _STRICT)  # type: ignore[untyped-decorator]
    def _inner(x: Any, w: Any, out: Any, threads: Any) -> None:
        """Out = x @ w.T: each thread has a share of the columns."""
        (rows, n), columns = x.shape, len(w)
        width = ((columns + threads - 1) // threads + 15) // 16 * 16
        from_x, from_w, to = x.ctypes.data, w.ctypes.data, out.ctypes.data
        for thread in prange(threads):
            a = thread * width
            if a < columns:
                _sgemm(
                    i32(101), i32(111), i32(112), rows, min(width, columns - a), n,
                    _ONE, from_x, n, from_w + 4 * a * n, n, _ZERO, to + 4 * a, columns,
                )  # fmt: skip

    _to_attend = t.void(any_heads, any_heads, any_heads, places, places, f32, i64, heads, heads)

    @_compiled(_to_attend, _SUMS)  # type: ignore[untyped-decorator]
    def _attend(q: Any, k: Any, v: Any, pos: Any, key_pos: Any, scale: Any, window: Any, z: Any, pattern: Any) -> None:
        """Each unit of work is a block of one head's queries; weights go to `pattern` unless that is empty."""
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
            _sgemm(
                i32(101), i32(111), i32(112), last - first, high - low, width,
                scale, q[i, h, first:].ctypes.data, q_step, k[i, h // group, low:].ctypes.data, k_step,
                _ZERO, weights.ctypes.data, high - low,
            )  # fmt: skip
            for row in range(last - first):
                _softmax_between(weights[row], starts[first + row] - low, ends[first + row] - low)
            if pattern.size:
                pattern[i, h, first:last, low:high] = weights
            _sgemm(
                i32(101), i32(111), i32(111), last - first, v.shape[3], high - low,
                _ONE, weights.ctypes.data, high - low, v[i, h // group, low:].ctypes.data, v_step,
                _ZERO, z[i, first:, h].ctypes.data, n_heads * v.shape[3],
            )  # fmt: skip
            weights[0, 0] = 0  # a last use: numba frees an array after that, and an address is none


@_compiled(t.void(seen_pairs, matrix), _STRICT)  # type: ignore[untyped-decorator]
def _widen(pairs: Any, out: Any) -> None:
    for p in prange(len(pairs)):
        for j in range(pairs.shape[1]):
            out[2 * p, j] = _lower(pairs[p, j])
            out[2 * p + 1, j] = _upper(pairs[p, j])


def widened(pairs: Any) -> Matrix:
    """A bfloat16 matrix in float32."""
    out = np.empty((2 * len(pairs), pairs.shape[1]), np.float32)
    with _ONE_AT_A_TIME:
        _widen(pairs, out)
    return out


def product(x: Matrix, w: Any, block: int) -> Matrix | None:
    """The product x @ w, summing up at most `block` features at a time; None for what numpy must do.

    w may be bfloat16: few rows widen it as they go, more have it widened first.
    """
    if not (x.flags.c_contiguous and w.flags.c_contiguous):
        return None
    if len(x) <= FEW and x.shape[1] % 8 == block % 8 == 0:
        return _product_of_few(x, w, block)
    if _many_rows is None:
        return None
    if w.dtype != np.float32:
        w = widened(w)[: x.shape[1]]
    out = np.empty((len(x), w.shape[1]), np.float32)
    with _ONE_AT_A_TIME:
        _many_rows(x, w, out, block, THREADS)
    return out


def _product_of_few(x: Matrix, w: Any, block: int) -> Matrix:
    """As many parts for each thread, and none of more than `block` features."""
    parts = -(-x.shape[1] // block // THREADS) * THREADS
    sums = np.empty((parts, len(x), w.shape[1]), np.float32)
    with _ONE_AT_A_TIME:
        _few_rows(x, w, sums, -(-x.shape[1] // parts // 8) * 8)
    out: Matrix = np.add.reduce(sums)
    return out


def attend(
    q: Matrix, k: Matrix, v: Matrix, pos: Any, key_pos: Any, scale: float, window: int | None, pattern: Matrix | None
) -> Matrix | None:
    """As `ops.attend`, without a cap; fills `pattern` if there is one. None for arrays that numpy must do."""
    in_order = all(x.strides[3] == 4 and x.strides[2] % 4 == 0 for x in (q, k, v))
    if _attend is None or not in_order or not len(q) == len(k) == len(v):
        return None
    z = np.empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3]), np.float32)
    kept = np.empty((0, 0, 0, 0), np.float32) if pattern is None else pattern
    with _ONE_AT_A_TIME:
        _attend(q, k, v, pos, key_pos, scale, 1 << 40 if window is None else window, z, kept)
    return z


@_compiled(t.void(seen, seen_vector, vector), _SUMS)  # type: ignore[untyped-decorator]
def _times_vector(w: Any, x: Any, out: Any) -> None:
    for row in prange(len(w)):
        total = _ZERO
        for j in range(len(x)):
            total += w[row, j] * x[j]
        out[row] = total


def inner(x: Matrix, w: Matrix) -> Matrix | None:
    """The product x @ w.T; None for arrays that numpy must do."""
    if not (w.flags.c_contiguous and x.flags.c_contiguous) or (len(x) > 1 and _inner is None):
        return None
    out = np.empty((len(x), len(w)), np.float32)
    with _ONE_AT_A_TIME:
        if len(x) == 1:
            _times_vector(w, x[0], out[0])
        else:
            _inner(x, w, out, THREADS)
    return out


# --- elementwise --------------------------------------------------------------------------------------------------


@_compiled(t.void(vector, seen_vector), _STRICT)  # type: ignore[untyped-decorator]
def _gated_silu(gate: Any, up: Any) -> None:
    for i in prange(len(gate)):
        g = gate[i]
        gate[i] = g / (_ONE + _exp(-g)) * up[i]


@_compiled(t.void(matrix), _SUMS)  # type: ignore[untyped-decorator]
def _softmax(x: Any) -> None:
    for row in prange(len(x)):
        _softmax_between(x[row], 0, x.shape[1])


@_compiled(t.void(seen, seen, f32, matrix), _SUMS)  # type: ignore[untyped-decorator]
def _rms_norm(x: Any, weight: Any, eps: Any, out: Any) -> None:
    width = x.shape[1]
    for row in prange(len(x)):
        total = _ZERO
        for j in range(width):
            total += x[row, j] * x[row, j]
        root = np.sqrt(total / f32(width) + eps)
        gain = weight[row % len(weight)]
        for j in range(width):
            out[row, j] = x[row, j] / root * gain[j]


@_compiled(t.void(seen_heads, seen, seen, f32[:, :, :, ::1]), _STRICT)  # type: ignore[untyped-decorator]
def _rotate(x: Any, cos: Any, sin: Any, out: Any) -> None:
    batch, seq, heads, width = x.shape
    half = cos.shape[1]
    for place in prange(batch * seq):
        i, s = place // seq, place % seq
        for head in range(heads):
            for j in range(half):
                a, b = x[i, s, head, j], x[i, s, head, j + half]
                out[i, head, s, j] = a * cos[s, j] - b * sin[s, j]
                out[i, head, s, j + half] = b * cos[s, j] + a * sin[s, j]
            for j in range(2 * half, width):
                out[i, head, s, j] = x[i, s, head, j]


def gated_silu(gate: Matrix, up: Matrix) -> bool:
    """SiLU(gate) * up, into `gate`; False for arrays that numpy must do."""
    if not (gate.flags.carray and up.flags.c_contiguous):
        return False
    with _ONE_AT_A_TIME:
        _gated_silu(gate.reshape(-1), up.reshape(-1))
    return True


def softmax(x: Matrix) -> bool:
    """Over the last axis, in place; False for arrays that numpy must do."""
    if not x.flags.carray or not x.size:
        return False
    with _ONE_AT_A_TIME:
        _softmax(x.reshape(-1, x.shape[-1]))
    return True


def rms_norm(x: Matrix, weight: Matrix, eps: float) -> Matrix | None:
    """As `ops.rms_norm`; None for arrays that numpy must do."""
    if not (x.flags.c_contiguous and weight.flags.c_contiguous):
        return None
    out = np.empty(x.shape, np.float32)
    flat = (-1, x.shape[-1])
    with _ONE_AT_A_TIME:
        _rms_norm(x.reshape(flat), weight.reshape(flat), eps, out.reshape(flat))
    return out


def rotate(x: Matrix, cos: Matrix, sin: Matrix) -> Matrix | None:
    """As `ops.rotate`, of (batch, heads, seq, d_head) that lies in memory as (batch, seq, heads, d_head)."""
    if x.ndim != 4 or not (turned := x.swapaxes(1, 2)).flags.c_contiguous:
        return None
    out = np.empty(x.shape, np.float32)
    with _ONE_AT_A_TIME:
        _rotate(turned, cos, sin, out)
    return out
