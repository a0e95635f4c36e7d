"""Chat templates: turns of a conversation -> the text that a model was trained to answer, by its own Jinja template.

A template comes with the model, so it is not trusted: it runs in `sandbox.py`, with a limit on time and on what it
writes. What it is given is what transformers gives it.
"""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from engine.errors import DamagedFile, InputError, clipped
from engine.sandbox import Refused, environment, joined

if TYPE_CHECKING:
    import jinja2

Read = Callable[[], "ChatTemplate | None"]
"""Reads a template when it is first asked for."""

Message = Mapping[str, Any]
"""One turn: {"role": ..., "content": ...}."""

SECONDS = 2.0
"""A template may take. Templates of real models take milliseconds."""

MOST_SOURCE = 1_000_000
"""Characters that a template may have."""

BROKEN = (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, SyntaxError, TypeError, ValueError)
"""What a template can raise besides Jinja's own errors: a macro without end is a RuntimeError, a hundred ifs in each
other a SyntaxError of the Python that Jinja makes of them."""

REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names of what was thought before an answer; templates read the first two."""


@dataclass(frozen=True)
class ChatTemplate:
    """A template's source, the special tokens' texts by name (bos_token), and templates for other uses by theirs."""

    source: str | None
    tokens: Mapping[str, str] = field(default_factory=dict)
    others: Mapping[str, str] = field(default_factory=dict)

    def render(
        self,
        messages: Sequence[Message],
        template: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **more: Any,
    ) -> str:
        """The conversation with the assistant's turn opened; `more` is for the template, as enable_thinking.

        `template` names one of `others`; left out, `tools` take "tool_use" where there is one. Raises `InputError` for
        messages that the template does not take, `DamagedFile` for one that cannot be used.
        """
        from jinja2 import TemplateError

        source = self._chosen(template, tools is not None)
        said = {"messages": list(map(_plain, messages)), "tools": tools, "documents": documents}
        given = {**self.tokens, "add_generation_prompt": True, **more, **said}
        try:
            with _deadline(SECONDS):
                return joined(self._compiled(source).generate(**given))
        except Refused as error:
            raise InputError(f"the model's chat template refuses these messages: {clipped(str(error))}") from None
        except (TemplateError, *BROKEN) as error:
            raise DamagedFile(
                f"the model's chat template cannot be used ({type(error).__name__}: {clipped(str(error))}); "
                "write the prompt as the model expects it, without chat"
            ) from None

    def _chosen(self, name: str | None, tools: bool) -> str:
        if name is None and tools and "tool_use" in self.others:
            name = "tool_use"
        found = self.source if name in (None, "default") else self.others.get(name or "")
        if found is None:
            asked = "none by default" if name is None else f"none called {clipped(name)}"
            raise InputError(
                f"this model has {asked} among its chat templates; it has {', '.join(self.others) or 'one'}"
            )
        return found

    def _compiled(self, source: str) -> "jinja2.Template":
        if source not in self._templates:
            self._templates[source] = environment().from_string(source)
        return self._templates[source]

    @cached_property
    def _templates(self) -> "dict[str, jinja2.Template]":
        return {}


def _plain(message: Message) -> dict[str, Any]:
    """A turn without what is None, its reasoning under the names that templates read."""
    said = {key: value for key, value in message.items() if value is not None}
    thought = next((said[key] for key in REASONING if key in said), None)
    return said if thought is None else {"thinking": thought, **said, "reasoning_content": thought}


def template_from(sources: Mapping[str, object], tokens: Mapping[str, str]) -> ChatTemplate | None:
    """A template from what files say by name, the usual one as "default"; None when they have none."""
    texts = {name: source for name, source in sources.items() if isinstance(source, str)}
    if any(len(source) > MOST_SOURCE for source in texts.values()):
        size = max(map(len, texts.values()))
        raise DamagedFile(f"the model's chat template has {size} characters; at most {MOST_SOURCE} are read")
    default = texts.pop("default", None)
    return ChatTemplate(default, tokens, texts) if default is not None or texts else None


@contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """Stop this thread's Python code when its time is over: a sandbox does not keep a loop from going on for ever."""
    until, before = time.monotonic() + seconds, sys.gettrace()

    def watch(frame: Any, event: str, argument: Any) -> Any:
        if time.monotonic() > until:
            raise Refused(f"it takes longer than {seconds:g} seconds")
        return watch

    sys.settrace(watch)
    try:
        yield
    finally:
        sys.settrace(before)
