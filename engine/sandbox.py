"""The sandbox that chat templates run in: Jinja's, with a bound on everything that a template makes.

`environment()` is what transformers gives to templates (utils/chat_template_utils.py): trimmed blocks, loop controls,
`tojson`, `raise_exception`, `strftime_now`, and `generation` blocks, which only mark text. Jinja's own sandbox lets a
template ask for a gigabyte in one step: paddings, formats and products are measured before they are made, and what
comes of every call, filter, operator and block is measured after it.
"""

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from datetime import datetime
from functools import wraps
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jinja2

MOST_TEXT = 1_000_000
"""Characters of a text, or items of a list, that a template makes."""

MOST_MADE = 100_000_000
"""Characters that one step may make on the way there."""

MOST_BITS = 10_000
"""Of a whole number."""

MOST_INDENT = 32
"""Characters before a line of JSON, and of what separates its parts."""

STRETCHING = frozenset(
    {"batch", "center", "expandtabs", "indent", "join", "ljust", "replace", "rjust", "round", "slice", "to_bytes",
     "translate", "truncate", "wordwrap", "zfill"}
)  # fmt: skip
"""Filters and methods that write as much as an argument says, for each part of what they are given."""

_PERCENT = re.compile(r"%(?:\([^)]*\))?[-+ #0]*(\*|\d*)(?:\.(\*|\d*))?")
_NUMBER = 20


class Refused(Exception):
    """The template's own `raise_exception`, or a limit."""


def environment() -> "jinja2.Environment":
    """Made anew: a template's own."""
    from jinja2 import nodes
    from jinja2.compiler import CodeGenerator, Frame
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

    class Measured(CodeGenerator):
        """The operator ~ as a method of the environment."""

        def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802
            self.write("environment.concat(map(str, (")
            for part in node.nodes:
                self.visit(part, frame)
                self.write(", ")
            self.write(")))")

    class Bounded(ImmutableSandboxedEnvironment):
        """Every operator, call and block measured."""

        code_generator_class = Measured
        intercepted_binops = frozenset({"*", "**", "%", "+"})
        concat = staticmethod(joined)

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            _check_operator(operator, left, right)
            return measured(super().call_binop(context, operator, left, right))

        def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
            method = getattr(obj, "__wrapped__", obj)
            name, subject = getattr(method, "__name__", ""), getattr(method, "__self__", None)
            held = [*map(_held, args)] if name in STRETCHING else args
            if name in ("format", "format_map"):
                _check_braces(str(subject), [*held, *kwargs.values()])
            _check_stretch(name, subject, [*held, *kwargs.values()])
            return measured(super().call(context, obj, *held, **kwargs))

    made = Bounded(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = _tojson
    made.filters = {name: _bounded(name, function) for name, function in made.filters.items()}
    made.globals |= {"raise_exception": _raise, "strftime_now": _now}
    return made


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
    if isinstance(made, Collection) and not isinstance(made, range) and len(made) > MOST_TEXT:
        raise _forbidden(f"a {type(made).__name__} of {len(made)} parts")
    return made


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
        return measured(function(*held, **kwargs))

    return bounded


def _held(value: Any) -> Any:
    return list(value) if isinstance(value, Iterator) else value


def _length(value: Any) -> int:
    """Characters that a value takes when it is written, about."""
    if isinstance(value, str | bytes | range):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_length, value.keys())) + sum(map(_length, value.values()))
    return sum(map(_length, value)) if isinstance(value, Collection) else _NUMBER


def _check_stretch(name: str, subject: Any, arguments: list[Any]) -> None:
    if name not in STRETCHING or not arguments:
        return
    if name == "replace" and len(arguments) > 1 and all(isinstance(a, str) for a in (subject, *arguments[:2])):
        size = subject.count(arguments[0]) * len(arguments[1])
    else:
        size = max(1, _length(subject)) * max(abs(a) if isinstance(a, int) else _length(a) for a in arguments)
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
    if (size := widths + fields * max(map(_length, arguments), default=0)) > MOST_MADE or widths > MOST_TEXT:
        raise _forbidden(f"{size} characters by formatting")


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Jinja's own escapes HTML, which no model was trained on."""
    for part in (indent, *(separators or ())):
        if part is not None and (part if isinstance(part, int) else len(part)) > MOST_INDENT:
            raise _forbidden("JSON of wide spaces")
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators and tuple(separators),
        sort_keys=sort_keys,
    )


def _raise(message: str) -> None:
    raise Refused(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)
