"""Compiled kernels: the `fast` extra (numba). `engine.fast` imports this and hands it to `engine.ops`.

product         rows times a matrix
inner           rows times the rows of a matrix
attend          causal attention
activated       SiLU and GELU, times the other branch of a gate
softcap         cap * tanh(x / cap)
softmax         over the last axis
rms_norm        over the last axis
rotate          rotary embedding

Each computes what the numpy function of the same name in `ops` does, in float32; tests/engine/test_kernels.py says how
near. Importing compiles them, or takes them from numba's cache. While they are in use the BLAS has one thread
(`engine.fast`): its own threads spin long after a product, on the processors that the kernels need. What kernels
need of it they call on threads of theirs: `_by_library`.
"""

from math import prod
from threading import Lock
from typing import Any

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba import njit, prange
from numba import types as t
from numba.extending import intrinsic

from engine.blas import AS_IT_IS, ROW_MAJOR, TRANSPOSED, library, rows_in_order
from engine.matrices import Array, IntArray, Matrix, Packed, Panels
from engine.ops import ERF_EVEN, ERF_ODD
from engine.tile import AHEAD, FEATURES, ROWS, WIDTH, tile

TOGETHER = 16 * ROWS
"""Rows that pass all panels before the next do: they stay in the L2 cache meanwhile."""
QUERIES = 64
"""Queries of a head per unit of attention: keys later than the last of them are never multiplied."""

_ROW_MAJOR, _AS_IT_IS, _TRANSPOSED = (np.int32(n) for n in (ROW_MAJOR, AS_IT_IS, TRANSPOSED))
f32: Any = t.float32
i32: Any = t.int32
i64: Any = t.int64
address: Any = t.uintp
THREADS = numba.get_num_threads()
_ONE_AT_A_TIME = Lock()  # numba's workqueue, the threading layer that is always there, admits one caller

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
_HALF, _ONE, _TWO, _FOUR, _ZERO, _SMALL = (np.float32(x) for x in (0.5, 1, 2, 4, 0, 0.625))
_CUBIC, _ROOT_2_OVER_PI, _ROOT_HALF = (np.float32(x) for x in (0.044715, np.sqrt(2 / np.pi), np.sqrt(0.5)))
_ERF_ODD, _ERF_EVEN = (tuple(np.float32(c) for c in polynomial) for polynomial in (ERF_ODD, ERF_EVEN))
_EXP = tuple(
    np.float32(c)
    for c in (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
)
"""The polynomial of Cephes' expf: 2 ulp."""
_TANH = tuple(
    np.float32(c) for c in (-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1)
)
"""The polynomial of Cephes' tanhf, up to `_SMALL`."""


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


batch, matrix, vector = f32[:, :, ::1], f32[:, ::1], f32[::1]
seen_batch, seen, seen_vector = (t.Array(f32, axes, "C", readonly=True) for axes in (3, 2, 1))  # mapped weights, say
any_heads, heads = t.Array(f32, 4, "A", readonly=True), f32[:, :, :, ::1]
places = t.Array(t.int64, 1, "C", readonly=True)


@njit(inline="always")
def _tanh(x: Any) -> Any:
    """Cephes' tanhf: 2 ulp."""
    size, square = abs(x), x * x
    p = _TANH[0]
    p = p * square + _TANH[1]
    p = p * square + _TANH[2]
    p = p * square + _TANH[3]
    p = p * square + _TANH[4]
    large = _ONE - _TWO / (_exp(size + size) + _ONE)
    return x + x * square * p if size < _SMALL else np.copysign(large, x)


@njit(inline="always")
def _erf(x: Any) -> Any:
    """As `ops.erf`."""
    x = max(-_FOUR, min(_FOUR, x)) if x == x else x
    square = x * x
    above, below = _ERF_ODD[0], _ERF_EVEN[0]
    for i in range(1, len(_ERF_ODD)):
        above = above * square + _ERF_ODD[i]
    for i in range(1, len(_ERF_EVEN)):
        below = below * square + _ERF_EVEN[i]
    return x * above / below


@njit(fastmath=_STRICT, error_model="numpy")
def _capped(row: Any, cap: Any) -> None:
    """Row = cap * tanh(row / cap)."""
    for j in range(len(row)):
        row[j] = cap * _tanh(row[j] / cap)


@njit(fastmath=_SUMS, error_model="numpy")
def _softmax_between(x: Any, start: Any, end: Any) -> None:
    """Softmax of x[start:end], zeros elsewhere; zeros throughout if all is minus infinity."""
    x[:start] = 0
    x[end:] = 0
    row = x[start:end]  # of loops from 0 on alone LLVM makes vectors
    peak = np.finfo(np.float32).min
    for j in range(len(row)):
        peak = max(peak, row[j])
    total = _ZERO
    for j in range(len(row)):
        e = _exp(row[j] - peak)
        row[j] = e
        total += e
    factor = _ONE / max(total, np.finfo(np.float32).tiny)
    for j in range(len(row)):
        row[j] *= factor


# --- products -----------------------------------------------------------------------------------------------------


@njit(error_model="numpy")
def _lay_out(x: Any, out: Any) -> None:
    """The rows of x, (rows, n), feature by feature: as a tile reads them."""
    rows, n = x.shape
    for row in range(rows):
        numbers, laid = x[row], out[row:]
        for j in range(n):
            laid[j * rows] = numbers[j]


_FEATURES = {np.dtype(str(kind)): features for kind, features in FEATURES.items()}
_NONE, _NOTHING = np.empty((0, 0, 0), np.float32), np.empty(0, np.float32)
_in_panels = {kind: t.Array(kind, 3, "C", readonly=True) for kind in FEATURES}
_steps = _in_panels[f32]
_products = [t.void(seen_batch, vector, panels, _steps, _steps, i64, batch, i64) for panels in _in_panels.values()]


@_compiled(_products, _STRICT)  # type: ignore[untyped-decorator]
def _product(x: Any, laid: Any, panels: Any, scales: Any, minima: Any, group: Any, out: Any, block: Any) -> None:
    """Out = x @ w: each thread has some panels, and sums up `block` of their rows at a time.

    `laid` is room for x: ROWS of its rows feature by feature, then the next ROWS; one row needs none. Of levels,
    2 ** `group` rows of a panel share a scale and a minimum; of other numbers `scales` and `minima` are not read.
    """
    rows, n, width = x.shape[0] * x.shape[1], x.shape[2], out.shape[2]
    steps = panels.shape[1]
    features = n // steps  # in a row of a panel: 2 in words
    flat = x.reshape(rows, n)
    if 1 < rows <= ROWS:
        _lay_out(flat, laid)
    elif rows > ROWS:
        for tile_of_x in prange((rows + ROWS - 1) // ROWS):
            some = slice(tile_of_x * ROWS, min(rows, (tile_of_x + 1) * ROWS))
            _lay_out(flat[some], laid[some.start * n : some.stop * n])
    from_x, to = laid.ctypes.data if rows > 1 else x.ctypes.data, out.ctypes.data
    for first in range(0, rows, TOGETHER):
        last = min(rows, first + TOGETHER)
        tiles = (last - first + ROWS - 1) // ROWS
        soon_step = (WIDTH + tiles - 1) // tiles  # several tiles fetch the next block between them, while this is read
        for panel in prange(len(panels)):
            for k in range(0, steps, block):
                w = (panel * steps + k) * WIDTH
                soon = w + (AHEAD * 4 // panels.itemsize if tiles == 1 else block) * WIDTH
                for row in range(first, last, ROWS):
                    count = min(ROWS, last - row)
                    x_at, at = from_x + 4 * (row * n + features * k * count), to + 4 * (row * width + panel * WIDTH)
                    tile(
                        count, x_at, panels, w, at, width, min(block, steps - k), k > 0, soon, soon_step,
                        scales, minima, (panel * scales.shape[1] << group) + k, group,
                    )  # fmt: skip
                    soon += soon_step * block


def product(x: Array, w: Matrix, block: int) -> Array | None:
    """The product x @ w of (..., in) with (in, out), summing up at most `block` features at a time; None for arrays
    that numpy must do.
    """
    if isinstance(w, Panels):
        return _by_panels(x, w, _NONE, _NONE, 2, block)
    if isinstance(w, Packed):
        if not (isinstance(w.levels, Panels) and isinstance(w.scales, Panels) and isinstance(w.minima, Panels)):
            return None
        if x.shape[-1] != w.shape[0]:
            return None
        return _by_panels(x, w.levels, w.scales.numbers, w.minima.numbers, w.group, block)
    if _by_library is None or w.dtype == np.uint32 or not w.flags.c_contiguous or x.shape[-1] != len(w) or not len(w):
        return None
    flat = np.ascontiguousarray(x).reshape(-1, x.shape[-1])
    out = np.empty((len(flat), w.shape[1]), np.float32)
    with _ONE_AT_A_TIME:
        _by_library(flat, w, out, block, False, THREADS)
    return out.reshape(*x.shape[:-1], w.shape[1])


def _by_panels(x: Array, w: Panels, scales: Array, minima: Array, group: int, block: int) -> Array | None:
    features = _FEATURES[w.numbers.dtype]
    panels, steps, width = w.numbers.shape
    if width != WIDTH or -(-x.shape[-1] // features) != steps or not steps:
        return None
    if x.shape[-1] % features:
        x = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 1)])  # a word's second feature is read, too, though it is zero
    out = np.empty((*x.shape[:-1], WIDTH * panels), np.float32)
    laid = np.empty(x.size, np.float32) if x.size > x.shape[-1] else _NOTHING
    rows = (group // features).bit_length() - 1
    with _ONE_AT_A_TIME:
        _product(_in_rows(x), laid, w.numbers, scales, minima, rows, _in_rows(out), block // features)
    return out if out.shape[-1] == w.shape[1] else np.ascontiguousarray(out[..., : w.shape[1]])


def _in_rows(x: Array) -> Array:
    """(..., width) -> (batch, rows, width), in order in memory."""
    x = np.ascontiguousarray(x)
    return x if x.ndim == 3 else x.reshape(1, prod(x.shape[:-1]), x.shape[-1])


_BLAS = library()
_by_library: Any = None
_attend: Any = None
if _BLAS is not None and _BLAS.set_threads:
    _size = t.int64 if _BLAS.bits == 64 else t.int32
    llvmlite.binding.add_symbol("mechscope_sgemm", _BLAS.address)
    _sgemm: Any = t.ExternalFunction(
        "mechscope_sgemm",
        t.void(i32, i32, i32, _size, _size, _size, f32, address, _size, address, _size, f32, address, _size),
    )

    @_compiled(t.void(seen, seen, matrix, i64, t.boolean, i64), _STRICT)  # type: ignore[untyped-decorator]
    def _by_library(x: Any, w: Any, out: Any, block: Any, transposed: Any, threads: Any) -> None:
        """Out = x @ w, or x @ w.T: each thread has a share of the columns, and sums up `block` features at a time."""
        (rows, n), columns, w_step = x.shape, out.shape[1], w.shape[1]
        width = ((columns + threads - 1) // threads + 15) // 16 * 16
        from_x, from_w, to = x.ctypes.data, w.ctypes.data, out.ctypes.data
        for thread in prange(threads):
            a = thread * width
            if a < columns:
                for k in range(0, n, block):
                    w_at = from_w + 4 * (a * w_step + k if transposed else k * w_step + a)
                    _sgemm(
                        _ROW_MAJOR, _AS_IT_IS, _TRANSPOSED if transposed else _AS_IT_IS,
                        rows, min(width, columns - a), min(block, n - k),
                        _ONE, from_x + 4 * k, n, w_at, w_step, _ONE if k else _ZERO, to + 4 * a, columns,
                    )  # fmt: skip

    _to_attend = t.void(any_heads, any_heads, any_heads, places, places, f32, f32, i64, heads, heads)

    @_compiled(_to_attend, _SUMS)  # type: ignore[untyped-decorator]
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
            _sgemm(
                _ROW_MAJOR, _AS_IT_IS, _TRANSPOSED, last - first, high - low, width,
                scale, q[i, h, first:].ctypes.data, q_step, k[i, h // group, low:].ctypes.data, k_step,
                _ZERO, weights.ctypes.data, high - low,
            )  # fmt: skip
            for row in range(last - first):
                start, end = starts[first + row] - low, ends[first + row] - low
                if cap > 0:
                    _capped(weights[row, start:end], cap)
                _softmax_between(weights[row], start, end)
            if pattern.size:
                pattern[i, h, first:last, low:high] = weights
            _sgemm(
                _ROW_MAJOR, _AS_IT_IS, _AS_IT_IS, last - first, v.shape[3], high - low,
                _ONE, weights.ctypes.data, high - low, v[i, h // group, low:].ctypes.data, v_step,
                _ZERO, z[i, first:, h].ctypes.data, n_heads * v.shape[3],
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
    with _ONE_AT_A_TIME:
        _attend(q, k, v, pos, key_pos, scale, cap or 0, 1 << 40 if window is None else window, z, kept)
    return z


@_compiled(t.void(seen, seen_vector, vector), _SUMS)  # type: ignore[untyped-decorator]
def _times_vector(w: Any, x: Any, out: Any) -> None:
    for row in prange(len(w)):
        total = _ZERO
        for j in range(len(x)):
            total += w[row, j] * x[j]
        out[row] = total


def inner(x: Array, w: Array) -> Array | None:
    """The product x @ w.T; None for arrays that numpy must do."""
    if not (w.flags.c_contiguous and x.flags.c_contiguous) or (len(x) > 1 and _by_library is None):
        return None
    if x.shape[1] != w.shape[1] or not x.size:
        return None
    out = np.empty((len(x), len(w)), np.float32)
    with _ONE_AT_A_TIME:
        if len(x) == 1:
            _times_vector(w, x[0], out[0])
        else:
            _by_library(x, w, out, x.shape[1], True, THREADS)
    return out


# --- elementwise --------------------------------------------------------------------------------------------------


def _stepped(x: Array) -> Array:
    """(rows, width) whose rows lie apart -> (rows, step): a row's own numbers, then what must not be read."""
    if x.flags.c_contiguous:  # as a row by itself always is
        return x
    flat = x if rows_in_order(x) else np.ascontiguousarray(x)
    step = flat.strides[0] // 4
    return np.lib.stride_tricks.as_strided(flat, (len(flat), step), (4 * step, 4), writeable=False)


_activation = t.void(seen, seen, matrix)
"""Of x, and of no rows or of those that the result is multiplied by."""


@njit(fastmath=_STRICT, error_model="numpy")
def _times(row: Any, rows: Any, at: Any) -> None:
    if len(rows):
        other = rows[at]
        for j in range(len(row)):
            row[j] *= other[j]


@_compiled(_activation, _STRICT)  # type: ignore[untyped-decorator]
def _silu(x: Any, up: Any, out: Any) -> None:
    for row in prange(len(out)):
        ours, given = out[row], x[row]
        for j in range(len(ours)):
            ours[j] = given[j] / (_ONE + _exp(-given[j]))
        _times(ours, up, row)


@_compiled(_activation, _STRICT)  # type: ignore[untyped-decorator]
def _gelu_tanh(x: Any, up: Any, out: Any) -> None:
    for row in prange(len(out)):
        ours, given = out[row], x[row]
        for j in range(len(ours)):
            g = given[j]
            ours[j] = _HALF * g * (_ONE + _tanh(_ROOT_2_OVER_PI * (g + _CUBIC * g * g * g)))
        _times(ours, up, row)


@_compiled(_activation, _STRICT)  # type: ignore[untyped-decorator]
def _gelu(x: Any, up: Any, out: Any) -> None:
    for row in prange(len(out)):
        ours, given = out[row], x[row]
        for j in range(len(ours)):
            ours[j] = _HALF * given[j] * (_ONE + _erf(given[j] * _ROOT_HALF))
        _times(ours, up, row)


_ACTIVATIONS = {
    "gelu": _gelu,
    "gelu_fast": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "silu": _silu,
    "swish": _silu,
}


@_compiled(t.void(matrix, f32), _STRICT)  # type: ignore[untyped-decorator]
def _softcap(x: Any, cap: Any) -> None:
    for row in prange(len(x)):
        _capped(x[row], cap)


@_compiled(t.void(matrix), _SUMS)  # type: ignore[untyped-decorator]
def _softmax(x: Any) -> None:
    for row in prange(len(x)):
        _softmax_between(x[row], 0, x.shape[1])


@_compiled(t.void(seen_batch, seen_vector, f32, batch), _SUMS)  # type: ignore[untyped-decorator]
def _rms_norm(x: Any, weight: Any, eps: Any, out: Any) -> None:
    rows, width = x.shape[0] * x.shape[1], x.shape[2]
    given, ours, gains = x.reshape(rows, width), out.reshape(rows, width), weight.reshape(-1, width)
    for row in prange(rows):
        total = _ZERO
        for j in range(width):
            total += given[row, j] * given[row, j]
        root = np.sqrt(total / f32(width) + eps)
        gain = gains[row % len(gains)]
        for j in range(width):
            ours[row, j] = given[row, j] / root * gain[j]


@_compiled(t.void(seen, seen, seen, heads), _STRICT)  # type: ignore[untyped-decorator]
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
    ups = np.empty((0, 0), np.float32) if up is None else _stepped(up.reshape(flat))
    with _ONE_AT_A_TIME:
        _ACTIVATIONS[activation](_stepped(x.reshape(flat)), ups, out.reshape(flat))
    return out


def softcap(x: Array, cap: float) -> bool:
    """As `ops.softcap`; False for arrays that numpy must do."""
    if not x.flags.carray or not x.size:
        return False
    with _ONE_AT_A_TIME:
        _softcap(x.reshape(-1, x.shape[-1]), cap)
    return True


def softmax(x: Array) -> bool:
    """Over the last axis, in place; False for arrays that numpy must do."""
    if not x.flags.carray or not x.size:
        return False
    with _ONE_AT_A_TIME:
        _softmax(x.reshape(-1, x.shape[-1]))
    return True


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """As `ops.rms_norm`."""
    out = np.empty(x.shape, np.float32)
    with _ONE_AT_A_TIME:
        _rms_norm(_in_rows(x), weight.ravel(), eps, _in_rows(out))
    return out


def rotate(x: Array, cos: Array, sin: Array) -> Array | None:
    """As `ops.rotate`, of (batch, heads, seq, d_head); None for arrays that numpy must do."""
    if x.ndim != 4:
        return None
    batch, n_heads, seq, d_head = x.shape
    out = np.empty(x.shape, np.float32)
    with _ONE_AT_A_TIME:
        _rotate(_stepped(x.swapaxes(1, 2).reshape(batch * seq, n_heads * d_head)), cos, sin, out)
    return out
