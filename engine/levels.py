"""Numbers of a matrix as whole ones: level * scale + minimum, the last two shared by a group of features of a column.

levels_of     the levels that give a matrix again, if there are such
numbers_of    the matrix

Where a minimum is added the product is exact (a level has 8 bits, a scale of a GGUF file at most 17), so it makes no
difference whether a processor rounds it.
"""

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Levels = npt.NDArray[np.int8] | npt.NDArray[np.uint8]
"""(in, out) int8; or (in / 2, out) uint8 of two features each, 0 to 15, the even one in the lower half."""

GROUP = 16
"""Features of a column that share scale and minimum, at least."""

_STRETCH = 1024
"""Columns looked at together: what is needed beside the result is small then."""


def levels_of(dense: Array, scales: Array, minima: Array) -> Levels | None:
    """The levels of an (in, out) matrix by scales and minima, each (in / GROUP, out).

    None if they would not give equal numbers, or do not fit 8 bits.
    """
    n, width = dense.shape
    if n != GROUP * len(scales):
        return None
    whole = np.empty((n, width), np.int8)
    for start in range(0, width, _STRETCH):
        at = slice(start, start + _STRETCH)
        levels = _rounded(dense[:, at], scales[:, at], minima[:, at])
        if levels is None:
            return None
        whole[:, at] = levels
    if whole.min(initial=0) < 0 or whole.max(initial=0) > 15:
        return whole
    halves = whole.view(np.uint8)
    return halves[::2] | halves[1::2] << 4


def _rounded(dense: Array, scales: Array, minima: Array) -> Array | None:
    grouped = dense.reshape(len(scales), GROUP, -1)
    levels = grouped - minima[:, None]
    levels /= np.where(scales == 0, np.float32(1), scales)[:, None]
    np.rint(levels, out=levels)
    if levels.min(initial=0) < -128 or levels.max(initial=0) > 127:
        return None
    same = np.array_equal(levels * scales[:, None] + minima[:, None], grouped)
    return levels.reshape(dense.shape) if same else None


def numbers_of(levels: Levels, scales: Array, minima: Array) -> Array:
    """(in, out) float32; scales and minima (in / group, out) for groups of any size."""
    n, width = levels.shape
    if levels.dtype == np.uint8:
        whole = np.empty((2 * n, width), np.float32)
        whole[::2], whole[1::2] = levels & 15, levels >> 4
    else:
        whole = levels.astype(np.float32)
    grouped = whole.reshape(len(scales), -1, width)
    grouped *= scales[:, None]
    grouped += minima[:, None]
    return whole
