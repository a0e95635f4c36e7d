"""What the command line shows while it works: progress bars."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from engine.catalog import fetch
from engine.errors import EngineError

Show = Callable[[float, float | None, str | None], None]


@contextmanager
def bar(console: Console, what: str) -> Iterator[Show]:
    """A progress bar for the length of a `with` block; call what it yields as show(done, total, message)."""
    columns = (TextColumn("{task.description:<42}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task(what, total=None)

        def show(done: float, total: float | None, message: str | None) -> None:
            progress.update(task, completed=done, total=total, description=f"{what} {message or ''}".strip())

        yield show
        progress.update(task, completed=1, total=1, description=what)


def fetch_with_bar(name: str) -> int:
    """Fetch a catalogue model; returns the exit code."""
    console = Console(stderr=True)
    try:
        path = fetched(console, name)
    except EngineError as error:
        console.print(f"[red]{error}[/red]", highlight=False, soft_wrap=True)
        return 1
    console.print(f"{name} is at {path}", highlight=False, soft_wrap=True)
    return 0


def fetched(console: Console, name: str) -> Path:
    """The file of a catalogue model, with a bar while it downloads."""
    with bar(console, f"fetching {name}") as show:
        return fetch(name, lambda done, total, what: show(done, total, None))
