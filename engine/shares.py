"""Parts of one piece of work, each on a thread of its own.

most_shares     how many parts there may be
dealt           work in so many even parts
pays            whether they are worth threads
side_by_side    do them
Progress        layers of many passes, counted for one `tick`

numpy and the BLAS work without Python's lock. A product that is split between threads leaves what lies between two
products to one of them; parts that need nothing from each other keep all threads busy all the time.
"""

from collections.abc import Callable, Iterable, Sequence
from contextvars import copy_context
from queue import SimpleQueue
from threading import Thread
from typing import TypeVar

from engine import blas, fast
from engine.decoder import Tick
from engine.network import Network

Item = TypeVar("Item")

ROWS_WORTH_A_THREAD = 256
"""Rows of a batch, on average, from which on threads of their own pay. Fewer wait for the weights, which every thread
reads, and a product's own threads read each weight once.
"""

MOST_UNEVEN = 1.1
"""How much more than the mean a thread may have to do: the others are idle meanwhile, and its products are its own."""

Share = Callable[[Tick], None]
"""A part of some work. It calls what it is given before each layer and ends at once when that raises."""


def most_shares(model: Network) -> int:
    """One where threads must not be: scoped weights are loaded and dropped by one thread at a time, and compiled
    kernels have threads of their own.
    """
    alone = fast.kernels() is not None or model.params.keep < model.config.n_layers
    return 1 if alone else blas.most_threads()


def dealt(items: Iterable[Item], size: Callable[[Item], int], shares: int) -> list[list[Item]]:
    """Items in their order, each to the share that has the least so far."""
    parts: list[list[Item]] = [[] for _ in range(shares)]
    held = [0] * shares
    for item in items:
        least = held.index(min(held))
        parts[least].append(item)
        held[least] += size(item)
    return parts


def pays(rows: Sequence[int], batches: int) -> bool:
    """Whether shares with so many rows each, in so many batches in all, take less time on threads."""
    even = len(rows) * max(rows) <= MOST_UNEVEN * sum(rows)
    return even and sum(rows) >= ROWS_WORTH_A_THREAD * max(batches, 1)


class Progress:
    """Counts the layers that all passes have entered for the caller's tick: 1, 2, ... to the total."""

    def __init__(self, tick: Tick | None, total: int) -> None:
        self._tick, self._total, self._done = tick, total, 0

    def __call__(self, done: int, total: int, what: str) -> None:
        self._done += 1
        if self._tick is not None:
            self._tick(self._done, self._total, what)


def side_by_side(shares: Sequence[Share], tick: Tick) -> None:
    """Do all shares, the first in the calling thread. None of their threads outlives the call.

    `tick` is called in the calling thread alone, once for each layer that any share enters. When it or a share raises,
    the others stop before their next layer; then that exception is raised.
    """
    if len(shares) == 1:
        shares[0](tick)
        return
    with blas.single_threaded():
        others = _Others()
        try:
            for share in (shares[0], *others.start(shares[1:])):
                share(others.ticking(tick))
            others.follow(tick)
        finally:
            others.stop()


class _Stopped(Exception):
    """Ends a share that nobody waits for any more."""


class _Others:
    """The shares on other threads, and what the calling thread hears of them."""

    def __init__(self) -> None:
        self._threads: list[Thread] = []
        self._heard: SimpleQueue[str | BaseException | None] = SimpleQueue()
        """A layer that was entered, what a share raised, or None for a share that is done."""
        self._running = 0
        self._stopping = False

    def start(self, shares: Sequence[Share]) -> Sequence[Share]:
        """Returns those that got no thread: the process may have no more."""
        for i, share in enumerate(shares):
            thread = Thread(target=copy_context().run, args=(self._work, share))  # numpy's errstate is in the context
            try:
                thread.start()
            except RuntimeError:
                return shares[i:]
            self._threads.append(thread)
            self._running += 1
        return ()

    def ticking(self, tick: Tick) -> Tick:
        """`tick` for the calling thread's own share: it tells of the others' layers, too."""

        def both(done: int, total: int, what: str) -> None:
            while not self._heard.empty():
                self._hear(tick)
            tick(done, total, what)

        return both

    def follow(self, tick: Tick) -> None:
        """Wait until all are done."""
        while self._running:
            self._hear(tick)

    def stop(self) -> None:
        """Let none enter another layer, and wait."""
        self._stopping = True
        for thread in self._threads:
            thread.join()
        self._heard = SimpleQueue()  # an error's traceback leads here: a circle that would keep the share's arrays

    def _work(self, share: Share) -> None:
        try:
            share(self._enter)
            self._heard.put(None)
        except _Stopped:
            pass
        except BaseException as error:
            self._heard.put(error)

    def _enter(self, done: int, total: int, what: str) -> None:
        if self._stopping:
            raise _Stopped
        self._heard.put(what)

    def _hear(self, tick: Tick) -> None:
        heard = self._heard.get()
        if isinstance(heard, BaseException):
            try:
                raise heard
            finally:
                del heard  # its traceback leads here: a circle that would keep the share's arrays
        if heard is None:
            self._running -= 1
        else:
            tick(0, 0, heard)
