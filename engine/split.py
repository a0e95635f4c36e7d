"""`by_parts`: the rows of one operation in parts, each on a thread of its own.

The BLAS has threads for a product; what lies between products numpy does on one. And after a product the library's
threads look for more work for some 30 ms, on the processors that others need: so long products are in parts here, too,
and the library has one thread meanwhile.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import cache
from itertools import pairwise

from engine import blas

ROWS_WORTH_A_THREAD = 256
"""Rows from which on a thread of their own pays. Fewer wait for the weights, which every thread reads, and a product's
own threads read each weight once.
"""

Work = Callable[[slice], object]


def by_parts(work: Work, n: int, rows: int = 1) -> None:
    """Call `work` with slices that cover range(n), each of which stands for `rows` rows: on as many threads as products
    have now if there are rows enough, else once.

    Returns when all are done; raises what the first of them raised.
    """
    parts = min(blas.threads_now(), n)
    if parts < 2 or n * rows < ROWS_WORTH_A_THREAD * parts:
        work(slice(0, n))
        return
    ends = [n * part // parts for part in range(parts + 1)]
    first, *others = (slice(*ends) for ends in pairwise(ends))
    with blas.single_threaded():
        running = [_pool().submit(copy_context().run, work, part) for part in others]  # numpy's errstate is in there
        try:
            work(first)
        finally:
            failed = [error for part in running if (error := part.exception()) is not None]  # waits
        for error in failed:
            raise error


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="mechscope-rows")


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has none of its parent's threads
