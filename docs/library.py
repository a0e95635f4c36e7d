"""docs/python.md: the engine's public names, for scripts and notebooks."""

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterable
from itertools import groupby
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np

import engine
from engine import POINTS, EngineError

INTRO = """\
# The engine from Python

Written by `make docs` from the code. In an environment of its own (`make demo` makes one, or `pip install .` in a fresh
one) scripts and notebooks can use the engine without the server: `from engine import ...`. Docstrings have shapes,
units and errors. Guides that the tests run: [lens](guides/lens.md), [hooks](guides/hooks.md),
[interventions](guides/interventions.md), [patching](guides/patching.md), [ablation](guides/ablation.md),
[heads](guides/heads.md), [KV surgery](guides/kv-surgery.md), [traces](guides/traces.md),
[planted circuits](guides/circuits.md)."""

CLASSES = """\
Fields, then methods, of the classes above and of those that they hold, take or return, such as `Config`, `Params` and
`Tokenizer` of a `Model`. A hook has the methods of `LayerHook`, too."""


def python_page() -> str:
    """The points of a pass, every public name by the module that it comes from, and what is inside the classes."""
    names = [(name, getattr(engine, name)) for name in engine.__all__ if name != "POINTS"]
    by_module = sorted(names, key=lambda named: named[1].__module__)
    parts = [INTRO, "## Points", _points()]
    for module, members in groupby(by_module, key=lambda named: named[1].__module__):
        parts += [f"## {module}", _rows(members)]
    parts += ["## Errors", "All are `EngineError`s, from `engine.errors`.", _rows(_errors(EngineError))]
    parts += ["## Inside the classes", CLASSES]
    return "\n\n".join([*parts, *(_class(kind) for kind in _classes(value for _, value in names))]) + "\n"


def _points() -> str:
    rows = [f"| `{p.name}` | {', '.join(p.axes)} | `{p.callback}` | {cell(p.meaning)} |" for p in POINTS.values()]
    return "\n".join(["| point | axes | callback of a `LayerHook` | |", "|---|---|---|---|", *rows])


def _errors(kind: type) -> list[tuple[str, type]]:
    return [found for error in kind.__subclasses__() for found in [(error.__name__, error), *_errors(error)]]


# --- classes ------------------------------------------------------------------------------------------------------


def _classes(public: Iterable[Any]) -> list[type]:
    """The classes among the public names and those that these take, hold or return, by name; none for its errors."""
    found: set[Any] = set()
    todo = [value for value in public if callable(value)]
    while todo:
        value = todo.pop()
        if value not in found:
            found.add(value)
            todo += [kind for function in (value, *_functions(value)) for kind in _named_by(function)]
    classes = [kind for kind in found if isinstance(kind, type) and not issubclass(kind, Exception)]
    named = {kind for kind in classes if kind.__name__ in engine.__all__}
    bases = {base for kind in named for base in kind.__mro__[1:]} - named
    return sorted((kind for kind in classes if kind not in bases and _members(kind)), key=lambda kind: kind.__name__)


def _functions(value: Any) -> list[Any]:
    members = [member for _, member in _members(value)] if isinstance(value, type) else []
    return [inspect.unwrap(getattr(m, "__func__", getattr(m, "fget", m))) for m in members]


def _named_by(value: Any) -> list[type]:
    """The engine's classes in an object's annotations."""
    hints = get_type_hints(inspect.unwrap(value)) if callable(value) else {}
    kinds = (kind for name, hint in hints.items() for kind in _parts(hint) if not name.startswith("_"))
    return [kind for kind in kinds if isinstance(kind, type) and kind.__module__.startswith("engine")]


def _parts(hint: Any) -> list[Any]:
    inner = hint if isinstance(hint, list) else get_args(hint)
    return [hint, *(part for item in inner for part in _parts(item))]


def _class(kind: type) -> str:
    return "\n\n".join([f"### {kind.__name__}", first_sentence(inspect.getdoc(kind) or ""), _rows(_members(kind))])


def _members(kind: type) -> list[tuple[str, Any]]:
    """Fields, then properties and methods; without those of tuples and of other public classes."""
    hints = get_type_hints(kind)
    fields = [(f"{name}: {_hint(hints[name])}", None) for name in _fields(kind) if not name.startswith("_")]
    members = inspect.getmembers(kind, lambda member: inspect.isroutine(member) or isinstance(member, property))
    elsewhere = [base for base in kind.__mro__[1:] if base is tuple or base.__name__ in engine.__all__]
    own = [(name, member) for name, member in members if not any(hasattr(base, name) for base in elsewhere)]
    return [*fields, *((name, member) for name, member in own if not name.startswith("_"))]


def _fields(kind: type) -> Iterable[str]:
    return (
        [f.name for f in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else getattr(kind, "_fields", ())
    )


def _hint(hint: Any) -> str:
    """An annotation as it is written, the same in every version of Python; arrays of any type are arrays."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is np.ndarray:
        return "Array"
    if origin in (Union, UnionType):
        return " | ".join(map(_hint, inner))
    if origin is Literal:
        return " | ".join(map(repr, inner))
    if isinstance(hint, list):
        return f"[{', '.join(map(_hint, hint))}]"
    if origin is not None:
        return f"{getattr(origin, '__name__', origin)}[{', '.join(map(_hint, inner))}]"
    return {NoneType: "None", ...: "..."}.get(hint) or str(getattr(hint, "__name__", hint))


def _rows(members: Iterable[tuple[str, Any]]) -> str:
    told = ((name, member, (inspect.getdoc(member) or "") if member else "") for name, member in members)
    rows = [f"| `{cell(name)}{_arguments(member)}` | {cell(first_sentence(text))} |" for name, member, text in told]
    return "\n".join(["| name | |", "|---|---|", *rows]).replace("|  |", "| |")


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


def between(path: Path, what: str, made: str) -> str:
    """The text of a page with `made` between its two markers."""
    begin, end = f"<!-- {what}: written by `make docs` -->", f"<!-- end of {what} -->"
    before, rest = path.read_text("utf-8").split(begin)
    return f"{before}{begin}\n{made}\n{end}{rest.split(end)[1]}"
