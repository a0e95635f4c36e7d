"""`report`: results as tables, one per group, as they come."""

import time
from collections.abc import Iterable
from itertools import groupby

from oracle.measure import Result
from rich.console import Console
from rich.table import Table


def report(console: Console, results: Iterable[Result]) -> list[Result]:
    """Print a table per group as it is done."""
    kept: list[Result] = []
    began = time.monotonic()
    for group, rows in groupby(results, key=lambda result: result.group):
        table = Table("check", title=group, title_justify="left", expand=True)
        for heading in ("compared", "error", "allowed", "share", "control", ""):
            table.add_column(heading, justify="right", no_wrap=True)
        for result in rows:
            kept.append(result)
            table.add_row(*_cells(result), style=None if result.passed else "bold red")
        table.caption, began = f"{time.monotonic() - began:.0f} s", time.monotonic()
        console.print(table)
    return kept


def _cells(result: Result) -> list[str]:
    m = result.measure
    return [
        f"{result.name} {result.note}".strip(),
        f"{m.rows:,}",
        f"{m.error:.1e}",
        f"{m.allowed:.1e}",
        f"{m.share:.2f}",
        "" if result.control is None else f"{result.control:.1e}",
        "ok" if result.passed else "FAILED",
    ]
