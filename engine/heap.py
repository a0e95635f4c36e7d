"""`keep_freed_memory`: what one pass frees serves the next, and is not given back for new pages, until `give_back`.

A pass makes and frees some fifteen arrays per layer. The GNU C library gives large ones back at once and clears new
pages for the next: an eighth of the time of a pass of 128 tokens, about a fifth when every point is recorded. It also
gives threads heaps of their own, each of which would keep what its passes freed: one heap serves all.
"""

import ctypes
from functools import cache

KEPT = 128 << 20
"""Bytes of freed memory that stay with the process at most."""
LARGEST = 32 << 20
"""Bytes of an array that is still kept: the library's own limit."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # malloc.h


@cache
def keep_freed_memory() -> bool:
    """Ask for it once; returns whether it was granted. Other C libraries than GNU's do not know the request."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
        wanted = {_TRIM_THRESHOLD: KEPT, _MMAP_THRESHOLD: LARGEST, _ARENA_MAX: 1}
        granted = [mallopt(name, value) for name, value in wanted.items()]
        return all(granted)
    except (AttributeError, OSError, TypeError):  # no such function, no such library, Windows
        return False


def give_back() -> bool:
    """Return freed memory to the system now; whether there was any. Other C libraries than GNU's keep none."""
    try:
        return bool(ctypes.CDLL(None).malloc_trim(0))
    except (AttributeError, OSError, TypeError):
        return False
