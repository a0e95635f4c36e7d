"""How a matrix of weights is kept: its (in, out) float32 numbers, or what stands for them.

Bfloat16                    words of two rounded numbers each
Packed                      whole numbers with scales and minima: blocks of a GGUF file
Panels                      one of these, in the order in which compiled products read it
rounded, packed, panelled   make these
is_rounded                  whether it is an array of words
halves                      the numbers in words, even features and odd ones apart
widened                     the (in, out) float32 numbers, however they are kept
columns                     some columns, likewise
rows_of, stretches          rows of a table of tokens
"""

import mmap
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeGuard, overload

import numpy as np
import numpy.typing as npt

from engine.levels import Array as Array
from engine.levels import Levels, levels_of, numbers_of

IntArray = npt.NDArray[np.int64]
Bfloat16 = npt.NDArray[np.uint32]
"""A (in, out) matrix in bfloat16: (in / 2, out) words of two features each, the even one in the lower half."""


@dataclass(frozen=True, slots=True, eq=False)
class Panels:
    """A matrix cut into panels of some columns, each with all its features beside each other in memory.

    numbers: (panels, in, width) as in the matrix; the last panel ends in zeros.
    shape: that of the matrix as it was: (in, out), or (in / 2, out) where two features share a number.
    """

    numbers: npt.NDArray[Any]
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        return self.numbers.nbytes


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """A matrix whose numbers are level * scale + minimum, the last two shared by `group` features of a column.

    levels: (in, out), or (in / 2, out) where two features share a byte. scales, minima: (in / group, out). All three
    may be in panels. shape: (in, out).
    """

    levels: Levels | Panels
    scales: Array | Panels
    minima: Array | Panels
    shape: tuple[int, int]
    group: int

    @property
    def nbytes(self) -> int:
        return self.levels.nbytes + self.scales.nbytes + self.minima.nbytes


Matrix = Array | Bfloat16 | Packed | Panels
Table = Array | Packed
"""A row for each token: (d_vocab, d_model), or packed its transpose, the matrix of a product."""


def rounded(x: Array) -> Bfloat16:
    """(in, out) to the nearest bfloat16, ties to even; an odd last feature is paired with zeros.

    Pages of a mapped file are given back.
    """
    bits = x.view(np.uint32)
    upper = (bits + ((bits >> 16) & 1) + 0x7FFF) & np.uint32(0xFFFF0000)
    words: Bfloat16 = upper[::2] >> np.uint32(16)
    words[: len(x) // 2] |= upper[1::2]
    _give_back_pages(x)
    return words


def is_rounded(x: Matrix) -> TypeGuard[Bfloat16]:
    """Whether these are words, and not in panels."""
    return isinstance(x, np.ndarray) and x.dtype == np.uint32


def halves(x: Bfloat16, even: Bfloat16 | None = None, odd: Bfloat16 | None = None) -> tuple[Array, Array]:
    """The even features and the odd ones: each (in / 2, out), in the memory that is given or in new."""
    lower, upper = np.left_shift(x, 16, out=even), np.bitwise_and(x, 0xFFFF0000, out=odd)
    return lower.view(np.float32), upper.view(np.float32)


def packed(dense: Array, scales: Array, minima: Array) -> Packed | None:
    """(in, out) float32 numbers as levels of these scales and minima, each (in / GROUP, out): see `levels.py`.

    None if that would not give equal numbers again.
    """
    levels = levels_of(dense, scales, minima)
    if levels is None:
        return None
    if len(scales) % 2 == 0 and all(np.array_equal(part[::2], part[1::2]) for part in (scales, minima)):
        scales, minima = scales[::2], minima[::2]
    group = len(dense) // len(scales)
    return Packed(levels, np.ascontiguousarray(scales), np.ascontiguousarray(minima), dense.shape, group)


@overload
def panelled(x: Packed, width: int) -> Packed: ...
@overload
def panelled(x: Array | Bfloat16 | Panels, width: int) -> Panels: ...
def panelled(x: Matrix, width: int) -> Packed | Panels:
    """The same in panels of `width` columns: a copy, unless it is in panels already. Pages of a mapped file are given
    back.
    """
    if isinstance(x, Packed):
        levels, scales, minima = (_in_panels(part, width) for part in (x.levels, x.scales, x.minima))
        return replace(x, levels=levels, scales=scales, minima=minima)
    return _in_panels(x, width)


def _in_panels(x: npt.NDArray[Any] | Panels, width: int) -> Panels:
    if isinstance(x, Panels):
        return x
    n, columns = x.shape
    numbers = np.zeros((-(-columns // width), n, width), x.dtype)
    for panel, start in zip(numbers, range(0, columns, width), strict=True):
        part = x[:, start : start + width]
        panel[:, : part.shape[1]] = part
    _give_back_pages(x)
    return Panels(numbers, (n, columns))


def _flat(x: npt.NDArray[Any] | Panels) -> npt.NDArray[Any]:
    """What panels were made of; an array of rows is itself."""
    if not isinstance(x, Panels):
        return x
    rows = x.numbers.swapaxes(0, 1).reshape(x.shape[0], -1)
    return np.ascontiguousarray(rows[:, : x.shape[1]])


def _give_back_pages(x: npt.NDArray[Any]) -> None:
    """If x lies in a mapped file: what was read of it need not stay in memory."""
    base: Any = x
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
        with suppress(OSError):  # pages that are locked into memory
            base.madvise(mmap.MADV_DONTNEED)


def widened(x: Matrix, features: int | None = None) -> Array:
    """(in, out) in float32 again; an array of that is itself.

    Of a matrix that was rounded `in` is even, unless `features` says that the last one only fills a word: words do not
    tell.
    """
    if isinstance(x, Packed):
        return numbers_of(*(_flat(part) for part in (x.levels, x.scales, x.minima)))
    x = _flat(x)
    if not is_rounded(x):
        return x.view(np.float32)
    bits = np.empty((2 * len(x), *x.shape[1:]), np.uint32)
    halves(x, bits[::2], bits[1::2])
    made = bits.view(np.float32)
    return made[:features] if features == len(made) - 1 else made


def columns(x: Matrix, at: slice | IntArray) -> Array:
    """Some columns by themselves in float32: a view of an array that is, a copy of what is kept otherwise."""
    if isinstance(x, Packed):
        return numbers_of(*(_some(part, at) for part in (x.levels, x.scales, x.minima)))
    return widened(_some(x, at))


def _some(x: npt.NDArray[Any] | Panels, at: slice | IntArray) -> npt.NDArray[Any]:
    if not isinstance(x, Panels):
        return x[..., at]
    numbers, width = np.arange(x.shape[1])[at] if isinstance(at, slice) else at, x.numbers.shape[2]
    return np.ascontiguousarray(x.numbers[numbers // width, :, numbers % width].T)


def rows_of(x: Table, at: IntArray | None = None) -> Array:
    """The rows of some tokens, (..., d_model), a copy; or of all tokens, where an array is itself."""
    if not isinstance(x, Packed):
        return x if at is None else x[at]
    tokens = np.arange(x.shape[1]) if at is None else at
    some = columns(x, tokens.reshape(-1)).T
    return np.ascontiguousarray(some, np.float32).reshape(*tokens.shape, -1)


WIDENED_AT_ONCE = 8192
"""Columns of a packed matrix, or rows of a table, where not all are needed at once."""


def stretches(x: Table) -> Iterator[Array]:
    """All rows in order, (some, d_model) at a time."""
    size, step = x.shape[1] if isinstance(x, Packed) else len(x), WIDENED_AT_ONCE
    return (rows_of(x, np.arange(start, min(size, start + step))) for start in range(0, size, step))
