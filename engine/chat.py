"""Chat templates: turns of a conversation -> the text that a model was trained to answer, by its own Jinja template.

A template comes with the model, so it is not trusted: it runs in Jinja's sandbox, with a limit on time and on what it
writes. The environment is the one transformers gives to templates (utils/chat_template_utils.py): trimmed blocks, loop
controls, `tojson`, `raise_exception`, `strftime_now`, and `generation` blocks, which only mark text.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import DamagedFile, InputError, clipped
from engine.weights import read_json

if TYPE_CHECKING:
    import jinja2

Read = Callable[[], "ChatTemplate | None"]
"""Reads a template when it is first asked for."""

Message = Mapping[str, str]
"""One turn: {"role": ..., "content": ...}."""

SECONDS = 2.0
"""A template may take. Templates of real models take milliseconds."""

MOST_TEXT, MOST_SOURCE = 1_000_000, 1_000_000
"""Characters that a template may write, and have."""


BROKEN = (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)
"""What a template can raise besides Jinja's own errors; a macro without end is a RuntimeError."""

WIDENING = frozenset({"center", "expandtabs", "format", "format_map", "indent", "ljust", "rjust", "wordwrap", "zfill"})
"""Filters and methods that write as much as a number says."""


class _Refused(Exception):
    """The template's own `raise_exception`, or a limit."""


@dataclass(frozen=True)
class ChatTemplate:
    """A template's source, and the special tokens' texts that it may write."""

    source: str
    bos: str = ""
    eos: str = ""

    def render(self, messages: Sequence[Message]) -> str:
        """The conversation with the assistant's turn opened.

        Raises `InputError` for messages that the template does not take, `DamagedFile` for one that cannot be used.
        """
        from jinja2 import TemplateError

        said = {"messages": [dict(m) for m in messages], "add_generation_prompt": True, "tools": None}
        try:
            with _deadline(SECONDS):
                return _joined(self._template.generate(**said, bos_token=self.bos, eos_token=self.eos))
        except _Refused as error:
            raise InputError(f"the model's chat template refuses these messages: {clipped(str(error))}") from None
        except (TemplateError, *BROKEN) as error:
            raise DamagedFile(
                f"the model's chat template cannot be used ({type(error).__name__}: {clipped(str(error))}); "
                "write the prompt as the model expects it, without chat"
            ) from None

    @cached_property
    def _template(self) -> "jinja2.Template":
        return _environment().from_string(self.source)


def from_directory(directory: Path) -> ChatTemplate | None:
    """chat_template.jinja, or the default of tokenizer_config.json, which also has the special tokens."""
    path, beside = directory / "tokenizer_config.json", directory / "chat_template.jinja"
    settings = read_json(path) if path.exists() else {}
    source = beside.read_text("utf-8", "replace") if beside.exists() else settings.get("chat_template")
    if isinstance(source, list):
        named = {item.get("name"): item.get("template") for item in source if isinstance(item, dict)}
        source = named.get("default")
    return template_from(source, settings.get("bos_token"), settings.get("eos_token"))


def template_from(source: object, bos: object, eos: object) -> ChatTemplate | None:
    """A template from what files say; None when they have none. A token is its text, or has it as `content`."""
    if not isinstance(source, str):
        return None
    if len(source) > MOST_SOURCE:
        raise DamagedFile(f"the model's chat template has {len(source)} characters; at most {MOST_SOURCE} are read")
    texts = [token.get("content") if isinstance(token, dict) else token for token in (bos, eos)]
    return ChatTemplate(source, *(text if isinstance(text, str) else "" for text in texts))


def _joined(parts: Iterator[str]) -> str:
    text: list[str] = []
    size = 0
    for part in parts:
        size += len(part)
        if size > MOST_TEXT:
            raise _Refused(f"it writes more than {MOST_TEXT} characters")
        text.append(part)
    return "".join(text)


@contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """Stop this thread's Python code when its time is over: a sandbox does not keep a loop from going on for ever."""
    until, before = time.monotonic() + seconds, sys.gettrace()

    def watch(frame: Any, event: str, argument: Any) -> Any:
        if time.monotonic() > until:
            raise _Refused(f"it takes longer than {seconds:g} seconds")
        return watch

    sys.settrace(watch)
    try:
        yield
    finally:
        sys.settrace(before)


def _environment() -> "jinja2.Environment":
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError
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
        """No arithmetic that makes something huge in one step."""

        def wrap_str_format(self, value: Any) -> None:
            """Let `is_safe_attribute` decide on str.format too."""

        def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
            return attr not in WIDENING and super().is_safe_attribute(obj, attr, value)

        intercepted_binops = frozenset({"*", "**", "%"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "**" or not all(isinstance(side, int | float) for side in (left, right)):
                raise SecurityError(f"{operator} of {type(left).__name__} and {type(right).__name__} is not allowed")
            return left * right if operator == "*" else left % right

    made = Bounded(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    for name in WIDENING & made.filters.keys():
        del made.filters[name]
    made.filters["tojson"] = _tojson
    made.globals |= {"raise_exception": _raise, "strftime_now": _now}
    return made


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, sort_keys: bool = False) -> str:
    """Jinja's own escapes HTML, which no model was trained on."""
    deep = None if indent is None else min(indent, 8)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=deep, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise _Refused(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)
