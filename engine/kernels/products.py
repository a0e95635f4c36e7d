"""Products: `product` by tiles, or by the library for a matrix that is not in panels, and `inner`."""

from typing import Any

import numpy as np
from numba import njit, prange
from numba import types as t

from engine.kernels.arithmetic import ZERO
from engine.kernels.calls import (
    ONE_AT_A_TIME,
    STRICT,
    SUMS,
    batch,
    compiled,
    f32,
    i64,
    in_rows,
    seen_batch,
    seen_matrix,
    seen_vector,
    vector,
)
from engine.kernels.library import THREADS, by_library
from engine.kernels.tile import AHEAD, FEATURES, ROWS, WIDTH, tile
from engine.matrices import Array, Matrix, Packed, Panels

TOGETHER = 16 * ROWS
"""Rows that pass all panels before the next do: they stay in the L2 cache meanwhile."""


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


@compiled(_products, STRICT)  # type: ignore[untyped-decorator]
def _product(x: Any, laid: Any, panels: Any, scales: Any, minima: Any, shift: Any, out: Any, block: Any) -> None:
    """Out = x @ w: each thread has some panels, and sums up `block` of their rows at a time.

    `laid` is room for x: ROWS of its rows feature by feature, then the next ROWS; one row needs none. Of levels,
    2 ** `shift` rows of a panel share a scale and a minimum; of other numbers `scales` and `minima` are not read.
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
                        scales, minima, (panel * scales.shape[1] << shift) + k, shift,
                    )  # fmt: skip
                    soon += soon_step * block


def product(x: Array, w: Matrix, block: int) -> Array | None:
    """The product x @ w of (..., in) with (in, out), summing up at most `block` features at a time; None for arrays
    that numpy must do.
    """
    if isinstance(w, Panels):
        return _by_panels(x, w, _NONE, _NONE, 0, block)
    if isinstance(w, Packed):
        if not (isinstance(w.levels, Panels) and isinstance(w.scales, Panels) and isinstance(w.minima, Panels)):
            return None
        if x.shape[-1] != w.shape[0]:
            return None
        shift = (w.group // _FEATURES[w.levels.numbers.dtype]).bit_length() - 1
        return _by_panels(x, w.levels, w.scales.numbers, w.minima.numbers, shift, block)
    if by_library is None or w.dtype == np.uint32 or not w.flags.c_contiguous or x.shape[-1] != len(w) or not len(w):
        return None
    flat = np.ascontiguousarray(x).reshape(-1, x.shape[-1])
    out = np.empty((len(flat), w.shape[1]), np.float32)
    with ONE_AT_A_TIME:
        by_library(flat, w, out, block, False, THREADS)
    return out.reshape(*x.shape[:-1], w.shape[1])


def _by_panels(x: Array, w: Panels, scales: Array, minima: Array, shift: int, block: int) -> Array | None:
    features = _FEATURES[w.numbers.dtype]
    panels, steps, width = w.numbers.shape
    if width != WIDTH or -(-x.shape[-1] // features) != steps or not steps:
        return None
    if x.shape[-1] % features:
        x = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 1)])  # a word's second feature is read, too, though it is zero
    out = np.empty((*x.shape[:-1], WIDTH * panels), np.float32)
    laid = np.empty(x.size, np.float32) if x.size > x.shape[-1] else _NOTHING
    with ONE_AT_A_TIME:
        _product(in_rows(x), laid, w.numbers, scales, minima, shift, in_rows(out), block // features)
    return out if out.shape[-1] == w.shape[1] else np.ascontiguousarray(out[..., : w.shape[1]])


@compiled(t.void(seen_matrix, seen_vector, vector), SUMS)  # type: ignore[untyped-decorator]
def _times_vector(w: Any, x: Any, out: Any) -> None:
    for row in prange(len(w)):
        total = ZERO
        for j in range(len(x)):
            total += w[row, j] * x[j]
        out[row] = total


def inner(x: Array, w: Array) -> Array | None:
    """The product x @ w.T; None for arrays that numpy must do."""
    if not (w.flags.c_contiguous and x.flags.c_contiguous) or (len(x) > 1 and by_library is None):
        return None
    if x.shape[1] != w.shape[1] or not x.size:
        return None
    out = np.empty((len(x), len(w)), np.float32)
    with ONE_AT_A_TIME:
        if len(x) == 1:
            _times_vector(w, x[0], out[0])
        else:
            by_library(x, w, out, x.shape[1], True, THREADS)
    return out
