"""How a matrix of weights is kept: its (in, out) float32 numbers, or what stands for them.

Bfloat16            words of two rounded numbers each
Panels              either, in the order in which compiled products read it
rounded, panelled   make these
is_rounded          whether it is an array of words
halves              the numbers in words, even features and odd ones apart
widened             the (in, out) float32 numbers, however they are kept
columns             some columns, likewise
"""

import mmap
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
Bfloat16 = npt.NDArray[np.uint32]
"""A (in, out) matrix in bfloat16: (in / 2, out) words of two features each, the even one in the lower half."""


@dataclass(frozen=True, slots=True, eq=False)
class Panels:
    """A matrix cut into panels of some columns, each with all its features beside each other in memory.

    numbers: (panels, in, width) float32 or (panels, in / 2, width) words of bfloat16; the last panel ends in zeros.
    shape: that of the matrix as it was, (in, out) or (in / 2, out).
    """

    numbers: Array | Bfloat16
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        return self.numbers.nbytes


Matrix = Array | Bfloat16 | Panels


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


def panelled(x: Matrix, width: int) -> Panels:
    """The same in panels of `width` columns: a copy, unless it is in panels already. Pages of a mapped file are given
    back.
    """
    if isinstance(x, Panels):
        return x
    n, columns = x.shape
    numbers = np.zeros((-(-columns // width), n, width), x.dtype)
    for panel, start in zip(numbers, range(0, columns, width), strict=True):
        part = x[:, start : start + width]
        panel[:, : part.shape[1]] = part
    _give_back_pages(x)
    return Panels(numbers, (n, columns))


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
    if isinstance(x, Panels):
        flat: Any = x.numbers.swapaxes(0, 1).reshape(len(x.numbers[0]), -1)
        return widened(np.ascontiguousarray(flat[:, : x.shape[1]]), features)
    if not is_rounded(x):
        return x.view(np.float32)
    bits = np.empty((2 * len(x), *x.shape[1:]), np.uint32)
    halves(x, bits[::2], bits[1::2])
    made = bits.view(np.float32)
    return made[:features] if features == len(made) - 1 else made


def columns(x: Matrix, at: slice) -> Array | Bfloat16:
    """Some columns by themselves: a view, or of panels a copy in float32, where words were widened."""
    return widened(x)[:, at] if isinstance(x, Panels) else x[..., at]
