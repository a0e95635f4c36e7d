"""What a person sees of a long load: `Follower`, `following`, and `bar`.

A caller with functions of its own follows with them. Otherwise a terminal shows a bar until the load is done, and
anything else (a notebook, a log) gets a line for each part of a load that takes more than a second. Both are on stderr.
"""

import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

Tell = Callable[[int, int, str], None]
"""Called as tell(done, total, what)."""
Show = Callable[[float, float | None, str | None], None]

QUIET = 1.0
"""Seconds of a load without a line."""


@dataclass(frozen=True)
class Follower:
    """`tick` hears of layers, `progress` of bytes, `say` of what is about to take long; None for who does not care."""

    tick: Tell | None = None
    progress: Tell | None = None
    say: Callable[[str], None] | None = None


@contextmanager
def following(what: str, tick: Tell | None, progress: Tell | bool | None) -> Iterator[Follower]:
    """The caller's functions if there are any, nothing for `progress=False`, else the bar or lines of this module."""
    if tick is not None or callable(progress):
        say = None if tick is None else partial(tick, 0, 1)
        yield Follower(tick, progress if callable(progress) else None, say)
    elif progress is False:
        yield Follower()
    elif sys.stderr is not None and sys.stderr.isatty():
        from rich.console import Console

        with bar(Console(stderr=True), what, transient=True) as show:
            yield Follower(show, show, partial(show, 0, None))
    else:
        lines = _Lines(what)
        yield Follower(lines.tell, lines.tell, lines.say)


@contextmanager
def bar(console: "Console", what: str, transient: bool = False) -> Iterator[Show]:
    """A progress bar for the length of a `with` block; call what it yields as show(done, total, message)."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<42}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=transient) as progress:
        task = progress.add_task(what, total=None)

        def show(done: float, total: float | None, message: str | None) -> None:
            progress.update(task, completed=done, total=total, description=f"{what} {message or ''}".strip())

        yield show
        progress.update(task, completed=1, total=1, description=what)


class _Lines:
    """A line for each part of a load, from its first second on."""

    def __init__(self, what: str) -> None:
        self._what, self._part, self._started = what, "", time.monotonic()

    def say(self, part: str) -> None:
        print(f"{self._what}: {part}", file=sys.stderr, flush=True)

    def tell(self, done: int, total: int, what: str) -> None:
        part = re.sub(r" \d+$", "s", what)  # of a layer's number
        if part != self._part and time.monotonic() - self._started > QUIET:
            self._part = part
            self.say(part)
