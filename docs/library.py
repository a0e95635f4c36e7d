"""docs/python.md: the engine's public names, for scripts and notebooks."""

import inspect
import re
from collections.abc import Callable, Iterable
from itertools import groupby
from typing import Any

import engine
from engine import POINTS, Model

INTRO = """\
# The engine from Python

Written by `make docs` from the code. In an environment of its own (`make demo` makes one, or `pip install .` in a fresh
one) scripts and notebooks can use the engine without the server: `from engine import ...`. Docstrings have shapes,
units and errors. Guides that the tests run: [lens](guides/lens.md), [hooks](guides/hooks.md),
[interventions](guides/interventions.md), [patching](guides/patching.md), [ablation](guides/ablation.md),
[heads](guides/heads.md), [KV surgery](guides/kv-surgery.md), [traces](guides/traces.md),
[planted circuits](guides/circuits.md)."""


def python_page() -> str:
    """The points of a pass, the model's methods, and every public name by the module that it comes from."""
    names = [(name, getattr(engine, name)) for name in engine.__all__ if name not in ("POINTS", "Model")]
    by_module = sorted(names, key=lambda named: named[1].__module__)
    parts = [INTRO, "## Points", _points(), "## Model", "What `load_model` returns.", _rows(_methods(Model))]
    for module, members in groupby(by_module, key=lambda named: named[1].__module__):
        parts += [f"## {module}", _rows(members)]
    return "\n\n".join(parts) + "\n"


def _points() -> str:
    rows = [f"| `{p.name}` | {', '.join(p.axes)} | `{p.callback}` | {cell(p.meaning)} |" for p in POINTS.values()]
    return "\n".join(["| point | axes | callback of a `LayerHook` | |", "|---|---|---|---|", *rows])


def _methods(kind: type) -> list[tuple[str, Any]]:
    members = inspect.getmembers(kind, lambda member: callable(member) or isinstance(member, property))
    return [(name, member) for name, member in members if not name.startswith("_")]


def _rows(members: Iterable[tuple[str, Any]]) -> str:
    rows = [
        f"| `{name}{_arguments(member)}` | {cell(first_sentence(inspect.getdoc(member) or ''))} |"
        for name, member in members
    ]
    return "\n".join(["| name | |", "|---|---|", *rows])


def _arguments(member: Any) -> str:
    """Names and defaults; how a property or an error is made tells nothing."""
    if not callable(member) or (isinstance(member, type) and issubclass(member, Exception)):
        return ""
    shown = [_argument(p) for p in inspect.signature(member).parameters.values() if p.name not in ("self", "cls")]
    return f"({', '.join(shown)})"


def _argument(parameter: inspect.Parameter) -> str:
    stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    default = parameter.default
    if default is inspect.Parameter.empty:
        return f"{stars}{parameter.name}"
    return f"{parameter.name}={'...' if isinstance(default, Callable) or '<' in repr(default) else repr(default)}"


def first_sentence(text: str) -> str:
    """Dots within a range (`start .. stop`) end none."""
    return re.split(r"(?<=[^.][.?])\s", " ".join(text.split()), maxsplit=1)[0]


def cell(text: str) -> str:
    """As it stands in a table."""
    return text.replace("|", r"\|")
