"""`product`: x @ weight, features summed up in blocks. `single_threaded`: products that leave a processor free.

The BLAS that numpy came with adds a product to a matrix in one call; numpy's own product only overwrites, so a second
pass has to add. The call is the library's C interface (Netlib's cblas_sgemm), found through numpy's extension module.
"""

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from threading import Lock
from typing import Any

import numpy as np

from engine.matrices import Array

NAMES = (
    ("scipy_cblas_sgemm64_", ctypes.c_int64, "scipy_openblas_{}_num_threads64_"),  # numpy's wheels
    ("cblas_sgemm64_", ctypes.c_int64, "openblas_{}_num_threads64_"),
    ("cblas_sgemm", ctypes.c_int32, "openblas_{}_num_threads"),  # distributions
)
"""What the function may be called, the type of its sizes, and what sets and gets the number of threads in OpenBLAS."""
WORTH_A_CALL = 1 << 13
"""Numbers in a result from which on adding blocks in a second pass costs more than the way to the library."""
ROW_MAJOR, AS_IT_IS, TRANSPOSED = 101, 111, 112  # cblas.h


@dataclass(frozen=True)
class Library:
    """`sgemm`, its address and the width of its sizes; what gets and sets its number of threads, where known."""

    sgemm: Callable[..., None]
    address: int
    bits: int
    get_threads: Callable[[], int] | None
    set_threads: Callable[[int], None] | None


def product(x: Array, weight: Array, block: int, out: Array) -> Array:
    """(rows, n) @ (n, columns) -> (rows, columns): the sum of the products of `block` features each, in `out`, which is
    contiguous.
    """
    found = library() if out.size >= WORTH_A_CALL else None
    readable = x.shape[1] == len(weight) and rows_in_order(x) and rows_in_order(weight)
    if found is None or not readable:
        return _by_numpy(x, weight, block, out)
    _add_blocks(found.sgemm, out, x, weight, block)
    return out


def _by_numpy(x: Array, weight: Array, block: int, out: Array) -> Array:
    np.matmul(x[:, :block], weight[:block], out=out)  # numpy refuses matrices that do not fit
    for start in range(block, max(x.shape[1], len(weight)), block):
        out += x[:, start : start + block] @ weight[start : start + block]
    return out


def _add_blocks(sgemm: Callable[..., None], out: Array, x: Array, weight: Array, block: int) -> None:
    """Fill a contiguous `out`; the first block overwrites what is there."""
    (rows, n), columns = x.shape, weight.shape[1]
    x_step, w_step = x.strides[0] // 4, weight.strides[0] // 4
    x_at, w_at, out_at = x.ctypes.data, weight.ctypes.data, out.ctypes.data
    for start in range(0, n, block):
        features, before = min(block, n - start), 1.0 if start else 0.0
        sgemm(
            ROW_MAJOR, AS_IT_IS, AS_IT_IS, rows, columns, features,
            1.0, x_at + 4 * start, x_step, w_at + 4 * start * w_step, w_step, before, out_at, columns,
        )  # fmt: skip


class _Single:
    """Who wants products of one thread just now, and how many threads products had before."""

    def __init__(self) -> None:
        self._lock, self._wanted, self._before = Lock(), 0, 1

    def threads(self) -> int:
        found = library()
        if found is None or found.get_threads is None:
            return 1
        with self._lock:
            return self._before if self._wanted else found.get_threads()

    def want(self, change: int) -> None:
        """One more (1) or less (-1) wants it."""
        found = library()
        if found is None or found.get_threads is None or found.set_threads is None:
            return
        with self._lock:
            if self._wanted == 0:
                self._before = found.get_threads()
            self._wanted = max(0, self._wanted + change)
            found.set_threads(1 if self._wanted else self._before)

    def forget(self) -> None:
        """In a forked process: whoever wanted it is not there, and whoever held the lock neither."""
        wanted, self._wanted, self._lock = self._wanted, 0, Lock()
        found = library()
        if wanted and found is not None and found.set_threads is not None:
            found.set_threads(self._before)


_single = _Single()
want_single_threaded = _single.want
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_single.forget)


def most_threads() -> int:
    """How many threads a product has while nobody wants one thread; 1 where that is unknown or cannot be changed."""
    return _single.threads()


def threads_now() -> int:
    """How many threads a product has now; 1 where that is unknown or cannot be changed."""
    found = library()
    return 1 if found is None or found.get_threads is None or found.set_threads is None else found.get_threads()


@contextmanager
def single_threaded() -> Iterator[None]:
    """Products of the whole process have one thread for a `with` block. Blocks may overlap, in several threads."""
    _single.want(1)
    try:
        yield
    finally:
        _single.want(-1)


def rows_in_order(x: Array) -> bool:
    """Whether rows lie one after the other, their numbers beside each other: what calls for matrices can read."""
    step = x.strides[-2]
    return x.dtype == np.float32 and x.strides[-1] == 4 and step >= 4 * x.shape[-1] and step % 4 == 0


@cache
def library() -> Library | None:
    """The library, if it can be had and computes what numpy does."""
    module = find_spec("numpy._core._multiarray_umath")
    if module is None or module.origin is None:
        return None
    try:
        loaded = ctypes.CDLL(module.origin)  # numpy has loaded it: this is the same one, with what it depends on
    except OSError:
        return None
    for name, size, threads in NAMES:
        entry, setter, getter = (getattr(loaded, n, None) for n in (name, threads.format("set"), threads.format("get")))
        if entry is not None and _agrees(declared := _declared(entry, size)):
            known = (None, None) if setter is None or getter is None else (getter, setter)
            return Library(declared, _address(entry), 8 * ctypes.sizeof(size), *known)
    return None


def _address(function: Any) -> int:
    return int(ctypes.cast(function, ctypes.c_void_p).value or 0)


def _declared(entry: Any, size: Any) -> Callable[..., None]:
    enum, number, matrix = ctypes.c_int, ctypes.c_float, ctypes.c_void_p
    entry.argtypes = [
        enum, enum, enum, size, size, size, number, matrix, size, matrix, size, number, matrix, size,
    ]  # fmt: skip
    entry.restype = None
    declared: Callable[..., None] = entry
    return declared


def _agrees(sgemm: Callable[..., None]) -> bool:
    """Whether a small product comes out as numpy's."""
    x = np.arange(6, dtype=np.float32).reshape(2, 3)[:, :2]
    weight, out = x.T.copy() + 1, np.full((2, 2), np.nan, np.float32)
    _add_blocks(sgemm, out, x, weight, 1)
    return bool((out == x @ weight).all())
