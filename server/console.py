"""`mechscope fetch`, and the demo's: a catalogue model with a bar while it downloads."""

from pathlib import Path

from rich.console import Console

from engine.catalog import fetch
from engine.errors import EngineError
from engine.progress import bar


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
