"""The numerics of the decoder, float32 in and float32 out.

`linear`, `inner`, `rms_norm`, `layer_norm`, `rotate`, `attend`, `softmax`, `softcap`, `activated`. numpy reads matrices
as (in, out), so every product is `x @ W`: with few rows this is also the layout OpenBLAS is fastest at.
"""

from collections.abc import Callable, Iterable
from functools import cache

import numpy as np
import numpy.typing as npt

from engine import fast
from engine.activations import ACTIVATIONS
from engine.blas import WORTH_A_CALL, product
from engine.matrices import WIDENED_AT_ONCE, Bfloat16, Matrix, Packed, Table, columns, halves, is_rounded, widened
from engine.matrices import Array as Array
from engine.matrices import IntArray as IntArray
from engine.split import by_parts

LARGEST = 1e15
"""What vectors and changed rows may hold: a norm squares them, and float32 ends at 3e38."""

QUERY_BLOCK = 64
"""Query rows per block of attention: keys later than the block's last row are never multiplied. Narrower blocks
multiply less and cost more calls.
"""

SUM_BLOCK = 144
"""Features summed in one matrix product. OpenBLAS adds up an element in one chain, whose rounding grows with its
length: over 1536 features SmolLM2 is up to 4 times as far from float64 as torch's float32 run, in blocks about as far.
"""

ROWS_BY_HALVES = 32
"""Rows up to which a rounded matrix is multiplied by halves: with more, two products take longer than widening it."""

ROWS_ALONE = 2
"""Rows that `inner` multiplies one by one: for several the library packs all of the matrix, which pays from 3 on."""


def linear(x: Array, weight: Matrix, bias: Array | None = None) -> Array:
    """`x @ weight + bias`: (..., in) with (in, out) -> (..., out); float32 sums, however the weight is kept."""
    kernels = fast.kernels()
    made: Array | None = None if kernels is None else kernels.product(x, weight, SUM_BLOCK)
    if made is None:
        flat = x.reshape(-1, x.shape[-1])  # one 2-d product: numpy would loop over a batch axis
        made = _product_however_kept(flat, weight).reshape(*x.shape[:-1], weight.shape[1])
    if bias is not None:
        made += bias
    return made


def inner(x: Array, weight: Table) -> Array:
    """`x @ weight.T`: (..., in) with (out, in) -> (..., out)."""
    if isinstance(weight, Packed):
        return linear(x, weight)
    flat = x.reshape(-1, x.shape[-1])
    kernels = fast.kernels()
    made: Array | None = None if kernels is None else kernels.inner(flat, weight)
    if made is None:
        few = 0 < len(flat) <= ROWS_ALONE
        made = np.stack([weight @ row for row in flat]) if few else flat @ weight.T
    return made.reshape(*x.shape[:-1], len(weight))


def _product_however_kept(x: Array, weight: Matrix) -> Array:
    """(rows, in) @ (in, out)."""
    if len(x) <= ROWS_BY_HALVES and is_rounded(weight) and (made := _product_by_halves(x, weight)) is not None:
        return made
    if isinstance(weight, Packed):
        return _product_by_columns(x, weight)
    return _product(x, widened(weight, x.shape[-1]))


def _product(x: Array, weight: Array) -> Array:
    """(rows, in) @ (in, out), summed up in blocks."""
    (rows, n), width = x.shape, weight.shape[1]
    if (rows == 1 or rows * width < WORTH_A_CALL) and (parts := _equal_parts(len(weight))) is not None:
        blocks: Array = x.reshape(rows, parts, n // parts).swapaxes(0, 1) @ weight.reshape(parts, -1, width)
        sums: Array = np.add.reduce(blocks)
        return sums
    out = np.empty((rows, width), np.float32)
    by_parts(lambda part: product(x[part], weight, SUM_BLOCK, out[part]), len(x))
    return out


def _product_by_halves(x: Array, words: Bfloat16) -> Array | None:
    """(rows, in) @ a rounded (in, out): even features and odd ones apart, as words hold them, and so many at a time
    that what is widened stays in the cache. None for matrices that do not fit.
    """
    if len(words) != -(-x.shape[1] // 2):
        return None
    out = np.zeros((len(x), words.shape[1]), np.float32)
    for start in range(0, len(words), SUM_BLOCK // 2):
        end = start + SUM_BLOCK // 2
        even, odd = x[:, 2 * start : 2 * end : 2], x[:, 2 * start + 1 : 2 * end : 2]
        lower, upper = halves(words[start:end])
        out += even @ lower
        out += odd @ upper[: odd.shape[1]]
    return out


def _product_by_columns(x: Array, weight: Packed) -> Array:
    """(rows, in) @ a packed (in, out), so many columns at a time that what is widened stays small."""
    starts = range(0, max(weight.shape[1], 1), WIDENED_AT_ONCE)
    parts = [_product(x, widened(columns(weight, slice(start, start + WIDENED_AT_ONCE)))) for start in starts]
    return np.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]


@cache
def _equal_parts(features: int) -> int | None:
    """How many blocks of one size, at most SUM_BLOCK, there may be: numpy multiplies those in one call."""
    least = -(-features // SUM_BLOCK)
    return next((parts for parts in range(least, 2 * least) if features % parts == 0), None)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """Root-mean-square norm over the last axis (Zhang & Sennrich 2019): x / sqrt(mean(x^2) + eps) * weight."""
    kernels = fast.kernels()
    made: Array = _rms_norm(x, weight, eps) if kernels is None else kernels.rms_norm(x, weight, eps)
    return made


def _rms_norm(x: Array, weight: Array, eps: float) -> Array:
    scale = np.vecdot(x, x)[..., None]
    scale *= np.float32(1 / x.shape[-1])
    scale += np.float32(eps)
    np.sqrt(scale, out=scale)
    out: Array = x / scale
    out *= weight
    return out


def layer_norm(x: Array, weight: Array, bias: Array | None, eps: float) -> Array:
    """Layer norm over the last axis (Ba et al. 2016)."""
    centred = x - x.mean(-1, keepdims=True)
    out = rms_norm(centred, weight, eps)
    if bias is not None:
        out += bias
    return out


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotary embedding (Su et al. 2021) in the half-split layout: pair i is (x[i], x[i + width/2]).

    x: (..., seq, d_head); cos, sin: (seq, width / 2). Features beyond `width` pass through.
    """
    kernels = fast.kernels()
    made: Array | None = None if kernels is None else kernels.rotate(x, cos, sin)
    return _rotate(x, cos, sin) if made is None else made


def _rotate(x: Array, cos: Array, sin: Array) -> Array:
    half = cos.shape[-1]
    rest, x = x[..., 2 * half :], np.ascontiguousarray(x[..., : 2 * half])  # each head's rows are one pass then
    out: Array = x * np.concatenate([cos, cos], 1)
    partners = np.concatenate([x[..., half:], x[..., :half]], -1)
    partners *= np.concatenate([-sin, sin], 1)
    out += partners
    return np.concatenate([out, rest], -1) if rest.shape[-1] else out


def softmax(x: Array) -> Array:
    """Softmax over the last axis, in place; a row that is all minus infinity becomes zeros."""
    kernels = fast.kernels()
    if kernels is not None and kernels.softmax(x):
        return x
    peak = x.max(-1, keepdims=True)
    np.maximum(peak, np.finfo(np.float32).min, out=peak)
    np.subtract(x, peak, out=x)
    np.exp(x, out=x)
    total = x.sum(-1, keepdims=True)
    x /= np.maximum(total, np.finfo(np.float32).tiny)
    return x


def softcap(x: Array, cap: float | None) -> Array:
    """`cap * tanh(x / cap)` in place (Gemma 2); None leaves x as it is."""
    kernels = fast.kernels()
    if cap is not None and not (kernels is not None and kernels.softcap(x, cap)):
        x /= np.float32(cap)
        np.tanh(x, out=x)
        x *= np.float32(cap)
    return x


def attend(
    q: Array,
    k: Array,
    v: Array,
    pos: IntArray,
    key_pos: IntArray,
    *,
    scale: float,
    window: int | None = None,
    cap: float | None = None,
    on_weights: Callable[[Array], Array] | None = None,
) -> Array:
    """Causal attention of (b, heads, s, d_head) queries on (b, kv_heads, s_kv, d_head) keys and values.

    A query at position p sees keys at positions in (p - window, p]. `on_weights` is given the whole
    (b, heads, s, s_kv) pattern and returns it, or a replacement. Returns (b, s, heads, d_head).
    """
    pattern = None if on_weights is None else np.zeros((*q.shape[:3], k.shape[2]), np.float32)
    kernels = fast.kernels()
    z = None if kernels is None else kernels.attend(q, k, v, pos, key_pos, scale, window, cap, pattern)
    if z is None:
        z = _attend_by_blocks(q * np.float32(scale), k, v, pos, key_pos, window, cap, pattern)
    if pattern is not None and on_weights is not None:
        replaced = on_weights(pattern)
        if replaced is not pattern:
            z[:] = _mix(replaced, v)
    return z


def _attend_by_blocks(
    q: Array,
    k: Array,
    v: Array,
    pos: IntArray,
    key_pos: IntArray,
    window: int | None,
    cap: float | None,
    pattern: Array | None,
) -> Array:
    """`attend` of scaled queries, some rows at a time; fills `pattern` if there is one."""
    z = np.empty((q.shape[0], q.shape[2], q.shape[1], q.shape[3]), np.float32)
    starts = range(0, len(pos), QUERY_BLOCK)
    paired = [start for pair in zip(starts, reversed(starts), strict=True) for start in pair]
    starts_of_parts = paired[: len(starts)]  # the first and the last, and so on: as many keys in each part

    def some(prompts: slice, starts: Iterable[int]) -> None:
        for start in starts:
            rows = slice(start, start + QUERY_BLOCK)
            keys = _visible_keys(pos[rows], key_pos, window)
            scores = _scores(q[prompts, :, rows], k[prompts, :, keys])
            softcap(scores, cap)
            _hide(scores, pos[rows], key_pos[keys], window)
            weights = softmax(scores)
            z[prompts, rows] = _mix(weights, v[prompts, :, keys])
            if pattern is not None:
                pattern[prompts, :, rows, keys] = weights

    if len(q) > 1:
        by_parts(lambda part: some(part, starts), len(q))
    else:
        by_parts(lambda part: some(slice(None), starts_of_parts[part]), len(starts))
    return z


def _visible_keys(pos: IntArray, key_pos: IntArray, window: int | None) -> slice:
    """The contiguous stretch of (ascending) keys that at least one of these queries may see."""
    start = 0 if window is None else int(np.searchsorted(key_pos, pos[0] - window, side="right"))
    return slice(start, int(np.searchsorted(key_pos, pos[-1], side="right")))


def _hide(scores: Array, pos: IntArray, key_pos: IntArray, window: int | None) -> None:
    """Minus infinity where a query may not see a key. Without a window only keys after the first query can be such."""
    first = 0 if window is not None else int(np.searchsorted(key_pos, pos[0], side="right"))
    np.copyto(scores[..., first:], -np.inf, where=_hidden(pos, key_pos[first:], window))


def _hidden(pos: IntArray, key_pos: IntArray, window: int | None) -> npt.NDArray[np.bool_]:
    """(s, s_kv): True where the key is in the query's future or has left its window."""
    distance = pos[:, None] - key_pos[None, :]
    hidden: npt.NDArray[np.bool_] = distance < 0
    if window is not None:
        hidden |= distance >= window
    return hidden


def _scores(q: Array, k: Array) -> Array:
    """(b, heads, s, d_head) x (b, kv_heads, s_kv, d_head) -> (b, heads, s, s_kv); head h reads kv head h // group."""
    b, heads, s, d_head = q.shape
    grouped = q.reshape(b, k.shape[1], -1, d_head)  # (b, kv_heads, group * s, d_head)
    return (grouped @ k.swapaxes(-1, -2)).reshape(b, heads, s, k.shape[2])


def _mix(weights: Array, v: Array) -> Array:
    """(b, heads, s, s_kv) x (b, kv_heads, s_kv, d_head) -> (b, s, heads, d_head)."""
    b, heads, s, s_kv = weights.shape
    mixed = weights.reshape(b, v.shape[1], -1, s_kv) @ v
    return mixed.reshape(b, heads, s, v.shape[3]).swapaxes(1, 2)


def activated(activation: str, x: Array, up: Array | None = None) -> Array:
    """act(x), times `up` where that is a gate's other branch; in memory of its own."""
    kernels = fast.kernels()
    made: Array | None = None if kernels is None else kernels.activated(activation, x, up)
    return _activated(activation, x, up) if made is None else made


def _activated(activation: str, x: Array, up: Array | None) -> Array:
    act, out = ACTIVATIONS[activation], np.empty(x.shape, np.float32)
    width = x.shape[-1]
    ours, given, ups = out.reshape(-1, width), x.reshape(-1, width), None if up is None else up.reshape(-1, width)

    def some(part: slice) -> None:
        if ups is None:
            ours[part] = act(given[part])
            return
        np.copyto(ours[part], given[part])  # rows that lie apart take numpy twice as long
        np.multiply(act(ours[part]), ups[part], out=ours[part])

    by_parts(some, len(ours))
    return out
