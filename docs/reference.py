"""docs/tools.md: every tool with its arguments and result fields, and every type that they name, from the code."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Le, MaxLen, MinLen
from library import cell
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from schemas.arguments import Chat, PointName
from schemas.interventions import NEEDS, TAKES, Intervention

INTRO = """\
# Tools

Written by `make docs` from the code; the order is the one agents see. The [types](#types) that arguments and results
name are at the end.

`model` is a `model:` handle or a model's readable name; it may be left out when exactly one is loaded. A prompt is
text or a list of token ids; with `chat` true, a text is the user's turn in the model's own chat template, with a text
as `chat` that begins the answer, too; the notice of the result shows exactly what the model read. `layers` are
numbers from 0, negative ones from the end. An argument whose default is not shown may be left out. A result field
that is null by default is left out when it has nothing to say."""

WORDS = {str: "string", int: "integer", float: "number", bool: "boolean", NoneType: "null", Any: "any"}
POINT = "[point](concepts.md#points)"
ADDED = {"chat": Chat}
"""Arguments that the server adds to functions."""
SENT = ("schemas.arguments", "schemas.interventions")
"""Modules of the types that agents send: which of their fields are required matters."""


def tools_page(tools: Iterable[Any], functions: Iterable[Callable[..., Any]]) -> str:
    """The page; `tools` as a client lists them, `functions` what they run."""
    types, by_name, parts = Types(), {f.__name__: f for f in functions}, [INTRO]
    for tool in tools:
        parts += [f"## {tool.name}", tool.description.strip(), *_tables(types, tool, by_name[tool.name])]
    return "\n\n".join([*parts, "## Types", *types.sections()]) + "\n"


def _tables(types: "Types", tool: Any, function: Callable[..., Any]) -> tuple[str, str]:
    """Arguments, in the order and with the defaults that are published; result fields."""
    hints = ADDED | get_type_hints(function, include_extras=True)
    published, required = tool.input_schema["properties"], tool.input_schema.get("required", ())
    rows = [
        types.row(name, _without_null(hints[name]), _description(hints[name]), _given(name, field, required))
        for name, field in published.items()
    ]
    return _table("argument", rows) if rows else "No arguments.", types.fields("result", hints["return"])


def _given(name: str, field: Mapping[str, Any], required: Iterable[str]) -> str:
    return "required" if name in required else f"default `{field['default']}`" if "default" in field else ""


class Types:
    """Annotations in words. Models that are named get a section each."""

    def __init__(self) -> None:
        self._named: dict[str, type[BaseModel]] = {}

    def shown(self, annotation: Any) -> str:
        """One annotation, with links to the models in it."""
        origin, inner = get_origin(annotation), get_args(annotation)
        if annotation == PointName:
            return POINT
        if origin is Annotated:
            return self.shown(inner[0])
        if origin is Literal:
            return ", ".join(f"`{value}`" for value in inner)
        if origin in (Union, UnionType):
            return " or ".join(dict.fromkeys(self.shown(part) for part in inner))
        if origin in (list, tuple):
            return f"list of {self.shown(inner[0])}"
        if origin is dict:
            return "object" if inner[1] is Any else f"object of {self.shown(inner[1])}"
        return WORDS[annotation] if annotation in WORDS else self._linked(annotation)

    def _linked(self, model: type[BaseModel]) -> str:
        self._named.setdefault(model.__name__, model)
        return f"[{model.__name__}](#{model.__name__.lower()})"

    def row(self, name: str, annotation: Any, *notes: str) -> str:
        """A row of a table."""
        told = "; ".join(filter(None, [*notes[:-1], _limits(annotation), notes[-1]]))
        return f"| `{name}` | {self.shown(annotation)} | {cell(told)} |".replace("|  |", "| |")

    def fields(self, heading: str, model: type[BaseModel]) -> str:
        """The table of a model's fields."""
        hints, sent = get_type_hints(model, include_extras=True), model.__module__ in SENT
        rows = []
        for name, field in model.model_fields.items():
            kind = _without_null(hints[name]) if sent else hints[name]
            described = _description(hints[name]) or field.description or ""
            rows.append(self.row(name, kind, described, "required" if sent and field.is_required() else ""))
        return _table(heading, rows)

    def sections(self) -> list[str]:
        """One for each model named so far, and for those that these name."""
        made: dict[str, str] = {}
        while rest := [name for name in self._named if name not in made]:
            model = self._named[rest[0]]
            parts = [f"### {rest[0]}", inspect.getdoc(model) or "", self.fields("field", model)]
            made[rest[0]] = "\n\n".join([*parts, _kinds()] if model is Intervention else parts)
        return [made[name] for name in sorted(made)]


def _kinds() -> str:
    """Which fields each kind of intervention takes beside those that all have."""
    rows = [f"| `{kind}` | {_names(NEEDS[kind])} | {_names(TAKES.get(kind, ()))} |" for kind in NEEDS]
    return "\n".join(["| kind | needs | may have |", "|---|---|---|", *rows]).replace("|  ", "| ")


def _names(fields: Iterable[str]) -> str:
    return ", ".join(f"`{field}`" for field in fields)


def _table(heading: str, rows: list[str]) -> str:
    return "\n".join([f"| {heading} | type | |", "|---|---|---|", *rows])


def _without_null(annotation: Any) -> Any:
    """An argument of null is one that was left out."""
    if get_origin(annotation) is Annotated:
        kind, *rest = get_args(annotation)
        return Annotated[(_without_null(kind), *rest)]
    if get_origin(annotation) not in (Union, UnionType):
        return annotation
    return Union[tuple(part for part in get_args(annotation) if part is not NoneType)]  # noqa: UP007


def _infos(annotation: Any) -> list[FieldInfo]:
    """What `Field(...)` says of an annotation, the outermost first; of the options of a union, too."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return [item for item in reversed(inner[1:]) if isinstance(item, FieldInfo)] + _infos(inner[0])
    return [info for part in inner for info in _infos(part)] if origin in (Union, UnionType) else []


def _description(annotation: Any) -> str:
    return next((info.description for info in _infos(annotation) if info.description), "")


def _limits(annotation: Any) -> str:
    """Bounds of a number, and of a list's or text's length, where they hold for every form of it."""
    found: dict[type, Any] = {}
    while get_origin(annotation) is Annotated:
        annotation, *said = get_args(annotation)
        inner = [item for info in said if isinstance(info, FieldInfo) for item in info.metadata]
        found = {type(item): item for item in inner} | found
    numbers = _span(found.get(Ge), "ge", found.get(Le), "le", "")
    return numbers or _span(found.get(MinLen), "min_length", found.get(MaxLen), "max_length", " long")


def _span(least: Any, low: str, most: Any, high: str, unit: str) -> str:
    if least is not None and most is not None:
        first, last = getattr(least, low), getattr(most, high)
        return f"{first} to {last}{unit}" if first < last else f"{first}{unit}"
    return (
        ""
        if least is most
        else f"at least {getattr(least, low)}{unit}"
        if least
        else f"at most {getattr(most, high)}{unit}"
    )
