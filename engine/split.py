"""Long passes: the rows of each operation in parts, each part on a thread of its own.

in_parts    whether what is done meanwhile is done in parts
by_parts    do one operation
parts_of    how many parts so many rows have

The BLAS has threads for a product, but what lies between products numpy does on one. And after a product the library's
threads spin for some 30 ms, on the processors that others need: so products are in parts here, too, and the library has
one thread meanwhile.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext, suppress
from contextvars import ContextVar, copy_context
from functools import cache
from itertools import pairwise
from threading import Lock

from engine import blas

ROWS_OF_A_PART = 256
"""Rows that each thread must have: every part of a product reads and packs the whole weight."""

Work = Callable[[slice], object]

_parts: ContextVar[int] = ContextVar("parts", default=1)


def parts_of(rows: int, threads: int | None = None) -> int:
    """One part for each thread, or one in all where a thread would have fewer rows than ROWS_OF_A_PART.

    `threads` are those that products have now, unless given.
    """
    threads = min(blas.threads_now() if threads is None else threads, os.cpu_count() or 1)
    return threads if rows >= threads * ROWS_OF_A_PART else 1


@contextmanager
def in_parts(rows: int) -> Iterator[None]:
    """What this thread does with so many rows in a `with` block is done in parts, if that pays."""
    parts = parts_of(rows)
    before = _parts.set(parts)
    try:
        with blas.single_threaded() if parts > 1 else nullcontext():
            yield
    finally:
        _parts.reset(before)


class _Part:
    """A part of some work, which is done once however often it is called; who calls meanwhile waits."""

    def __init__(self, work: Work, at: slice) -> None:
        self._work, self._at, self._lock, self._done = work, at, Lock(), False

    def __call__(self) -> None:
        with self._lock:
            if not self._done:
                self._work(self._at)
                self._done = True


def by_parts(work: Work, n: int) -> None:
    """Call `work` with slices that cover range(n): one, or within `in_parts` one for each thread.

    Returns when all are done; raises what one of them raised.
    """
    parts = min(_parts.get(), n)
    if parts < 2:
        work(slice(0, n))
        return
    first, *others = (_Part(work, slice(*ends)) for ends in pairwise(n * part // parts for part in range(parts + 1)))
    running: list[Future[None]] = []
    with suppress(RuntimeError):  # the process ends, or may have no more threads: a part may be queued all the same
        for part in others:
            in_context = copy_context().run  # numpy's errstate is in it
            running.append(_pool().submit(in_context, part))
    try:
        for part in (first, *others[len(running) :]):
            part()
    finally:
        wait(running)
    try:
        while running:
            running.pop().result()
    finally:
        running.clear()  # an error's traceback leads here: a circle that would keep the arrays


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), "mechscope-rows")


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has none of its parent's threads
