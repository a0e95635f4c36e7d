"""The sandbox that chat templates run in: Jinja's, with a bound on everything that a template makes.

`environment()` is what transformers gives to templates (utils/chat_template_utils.py): trimmed blocks, loop controls,
`tojson`, `raise_exception`, `strftime_now`, and `generation` blocks, which only mark text. Jinja's own sandbox lets a
template ask for a gigabyte in one step: paddings, formats and products are measured before they are made, and what
comes of every call, filter, operator, block and literal is measured after it. A list is as large as its text would be:
what it holds twice counts twice, so whatever a template has in hand can be written, compared and hashed.
"""

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from datetime import datetime
from functools import partial, wraps
from itertools import chain, compress
from operator import is_
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jinja2.compiler
    import jinja2.utils

MOST_TEXT = 1_000_000
"""Characters of a text, or of a list as it is written, that a template makes."""

MOST_NESTED = 100
"""Lists within lists: texts of deep ones are made without a limit on the stack."""

MOST_MADE = 100_000_000
"""Characters that one step may make on the way there."""

MOST_BITS = 10_000
"""Of a whole number."""

MOST_DATE = 1_000
"""Characters of the form of a date."""

MOST_INDENT = 32
"""Characters before a line of JSON, and of what separates its parts."""

STRETCHING = frozenset(
    {"batch", "center", "expandtabs", "indent", "join", "ljust", "replace", "rjust", "round", "slice", "sum",
     "to_bytes", "translate", "truncate", "wordwrap", "zfill"}
)  # fmt: skip
"""Filters and methods that write as much as an argument says, for each part of what they are given."""

_PERCENT = re.compile(r"%(?:\([^)]*\))?[-+ #0]*(\*|\d*)(?:\.(\*|\d*))?")
_NUMBER = 20
_PARTED = 2
"""Characters between two parts, or around a list."""


class Refused(Exception):
    """The template's own `raise_exception`, or a limit."""


def environment() -> "jinja2.Environment":
    """Made anew: a template's own."""
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks what the assistant says, for training; here it is only its content."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            body: list[nodes.Node] = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return body

    class Bounded(ImmutableSandboxedEnvironment):
        """Every operator, call and block measured."""

        code_generator_class = _generator()
        intercepted_binops = frozenset({"*", "**", "%", "+"})
        concat = staticmethod(joined)
        measured = staticmethod(measured)

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            _check_operator(operator, left, right)
            return measured(super().call_binop(context, operator, left, right))

        def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
            method = getattr(obj, "__wrapped__", obj)
            name, subject = getattr(method, "__name__", ""), getattr(method, "__self__", None)
            held = [*map(_held, args)] if name in STRETCHING else args
            measured([*held, *kwargs.values()])
            if name in ("format", "format_map"):
                _check_braces(str(subject), [*held, *kwargs.values()])
            _check_stretch(name, subject, [*held, *kwargs.values()])
            return measured(super().call(context, obj, *held, **kwargs))

    made = Bounded(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = _tojson
    made.filters = {name: _bounded(name, function) for name, function in made.filters.items()}
    made.globals |= {"raise_exception": _raise, "strftime_now": _now, "namespace": _namespace()}
    return made


def _generator() -> "type[jinja2.compiler.CodeGenerator]":
    from jinja2 import nodes
    from jinja2.compiler import CodeGenerator, Frame

    class Measured(CodeGenerator):
        """The operator ~ and what is in brackets, by methods of the environment."""

        def _measure(self, visit: Callable[..., None], node: nodes.Expr, frame: Frame) -> None:
            self.write("environment.measured(")
            visit(node, frame)
            self.write(")")

        def visit_List(self, node: nodes.List, frame: Frame) -> None:  # noqa: N802
            self._measure(super().visit_List, node, frame)

        def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:  # noqa: N802
            self._measure(super().visit_Dict, node, frame)

        def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:  # noqa: N802
            if node.ctx == "load":
                self._measure(super().visit_Tuple, node, frame)
            else:  # names to assign to
                super().visit_Tuple(node, frame)

        def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802
            self.write("environment.concat(map(str, (")
            for part in node.nodes:
                self.visit(part, frame)
                self.write(", ")
            self.write(")))")

    return Measured


def _namespace() -> "type[jinja2.utils.Namespace]":
    from jinja2.utils import Namespace

    class Unwritten(Namespace):
        """A namespace, which can come to hold itself: its text has no bound."""

        def __repr__(self) -> str:
            raise _forbidden("a text of a namespace")

    return Unwritten


def joined(parts: Iterable[str]) -> str:
    """Parts of a text as one; raises `Refused` beyond `MOST_TEXT`."""
    text: list[str] = []
    size = 0
    for part in parts:
        size += len(part)
        if size > MOST_TEXT:
            raise Refused(f"it writes more than {MOST_TEXT} characters")
        text.append(part)
    return "".join(text)


def measured(made: Any) -> Any:
    """What a step made, if it is small."""
    if isinstance(made, int) and made.bit_length() > MOST_BITS:
        raise _forbidden(f"a number of {made.bit_length()} bits")
    _size(made)
    return made


def _size(value: Any) -> int:
    """Characters that a value takes when it is written, about; refuses more than `MOST_TEXT` before it counts on."""
    size, depth, level = 0, 0, [value]
    while level:
        parts: list[Any] = []
        for kind, some in _by_kind(level):
            size += _own_size(kind, some)
            if size > MOST_TEXT:
                raise _forbidden(f"a {type(value).__name__} of more than {MOST_TEXT} characters")
            if _has_parts(kind):
                parts.extend(chain.from_iterable(some))
            if issubclass(kind, dict):
                parts.extend(chain.from_iterable(map(dict.values, some)))
        level, depth = parts, depth + 1
        if depth > MOST_NESTED:
            raise _forbidden(f"a {type(value).__name__} nested more than {MOST_NESTED} deep")
    return size


def _by_kind(values: list[Any]) -> Iterator[tuple[type, list[Any]]]:
    """Values of each type; no step of Python for each, as every one is watched."""
    kinds = [*map(type, values)]
    for kind in {*kinds}:
        yield kind, [*compress(values, map(partial(is_, kind), kinds))]


def _own_size(kind: type, values: list[Any]) -> int:
    """Of values of one type, without their parts."""
    if issubclass(kind, int):
        return len(values) + sum(map(int.bit_length, values)) // 3
    if not issubclass(kind, Collection):
        return _NUMBER * len(values)
    return sum(map(len, values)) * (_PARTED if _has_parts(kind) else 1) + _PARTED * len(values)


def _has_parts(kind: type) -> bool:
    return issubclass(kind, Collection) and not issubclass(kind, str | bytes | range)


def _forbidden(what: str) -> Exception:
    from jinja2.exceptions import SecurityError

    return SecurityError(f"it makes {what}, which is too much for a chat template")


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter, its work measured before and after."""
    given = int(hasattr(function, "jinja_pass_arg"))  # Jinja's own argument stands before the value

    @wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        held = [*map(_held, args)] if name in STRETCHING else args
        arguments = [*held[given + 1 :], *kwargs.values()]
        if name == "format":
            _check_percent(str(held[given]), arguments)
        _check_stretch(name, held[given], arguments)
        made = function(*held, **kwargs)
        return iter(measured(_collected(made))) if isinstance(made, Iterator) else measured(made)

    return bounded


def _held(value: Any) -> Any:
    return list(value) if isinstance(value, Iterator) else value


def _collected(parts: Iterable[Any]) -> list[Any]:
    """What comes out one by one, measured as it comes."""
    found: list[Any] = []
    size = 0
    for part in parts:
        size += _PARTED + _size(part)
        if size > MOST_TEXT:
            raise _forbidden(f"parts of more than {MOST_TEXT} characters")
        found.append(part)
    return found


def _check_stretch(name: str, subject: Any, arguments: list[Any]) -> None:
    if name not in STRETCHING or not arguments:
        return
    if name == "replace" and len(arguments) > 1 and all(isinstance(a, str) for a in (subject, *arguments[:2])):
        size = subject.count(arguments[0]) * len(arguments[1])
    elif name == "sum":  # of lists: each sum is a new one
        size = len(subject) * _size(subject) if any(isinstance(a, Collection) for a in arguments) else 0
    else:
        size = max(1, _size(subject)) * max(abs(a) if isinstance(a, int) else _size(a) for a in arguments)
    if size > MOST_MADE:
        raise _forbidden(f"{size} characters by {name}")


def _check_operator(operator: str, left: Any, right: Any) -> None:
    size = bits = 0
    if operator == "%" and isinstance(left, str):
        _check_percent(left, [right])
    elif operator in ("+", "*") and any(isinstance(side, Collection) for side in (left, right)):
        sizes = [len(side) if isinstance(side, Collection) else abs(side) for side in (left, right)]
        size = sum(sizes) if operator == "+" else sizes[0] * sizes[1]
    elif operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() + right.bit_length() if operator == "*" else left.bit_length() * abs(right)
    if size > MOST_TEXT or bits > MOST_BITS:
        raise _forbidden(f"{size} parts" if size else f"a number of {bits} bits")


def _check_percent(form: str, arguments: list[Any]) -> None:
    found = [number for pair in _PERCENT.findall(form) for number in pair if number]
    _check_format(form.count("%"), found, arguments)


def _check_braces(form: str, arguments: list[Any]) -> None:
    fields = re.findall(r"\{[^{}]*", form.replace("{{", ""))
    nested = ["*"] if re.search(r"\{[^{}]+\{", form.replace("{{", "")) else []
    _check_format(len(fields), [*nested, *re.findall(r"\d+", "".join(f"{field} " for field in fields))], arguments)


def _check_format(fields: int, numbers: list[str], arguments: list[Any]) -> None:
    if "*" in numbers:
        raise _forbidden("a text as wide as an argument says")
    widths = sum(int(number) if len(number) < 10 else MOST_MADE for number in numbers)
    if (size := widths + fields * max(map(_size, arguments), default=0)) > MOST_MADE or widths > MOST_TEXT:
        raise _forbidden(f"{size} characters by formatting")


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Jinja's own escapes HTML, which no model was trained on."""
    for part in (indent, *(separators or ())):
        if part is not None and (part if isinstance(part, int) else len(part)) > MOST_INDENT:
            raise _forbidden("JSON of wide spaces")
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators and tuple(separators),
        sort_keys=sort_keys,
    )
    return encoder.encode(measured(value)) if indent is None else joined(encoder.iterencode(measured(value)))


def _raise(message: str) -> None:
    raise Refused(message)


def _now(form: str) -> str:
    if len(form) > MOST_DATE:
        raise _forbidden(f"a date of {len(form)} characters")
    return datetime.now().strftime(form)
