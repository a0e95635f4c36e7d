"""How prompts are written: arguments they share, `call`, `protocol`, and what to find out on the way.

The first parameter of a prompt is not the client's: the model that is meant, so that the text fits it, or None while it
is not in memory.
"""

import json
import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from engine import Model

Text = Annotated[str, Field(description="a prompt for the model under study")]
Answer = Annotated[str, Field(description="one token, with its leading space, such as ' Paris'")]
Rival = Annotated[str, Field(description="another token that the model might say, such as ' London'")]
ModelName = Annotated[str | None, Field(description="a model name or handle; left out: the one that is loaded")]

READING = """\
Follow the steps in order and report the numbers they return. What stands in backticks is a call: a tool and its
arguments. Put the numbers and handles that you found in place of words in capitals, such as LAYER."""


@dataclass(frozen=True)
class Found:
    """A number, or a list of numbers, that an earlier step finds: a word in capitals, without quotes."""

    name: str


LAYER, POSITION, HEAD = Found("LAYER"), Found("POSITION"), Found("HEAD")

_MARK = "\ue000"
"""Stands before a word in capitals until the quotes are taken off; no text has it, it is of private use."""

_QUOTED = re.compile(f'"{_MARK}([A-Z_]+)"')


def call(tool: str, /, **arguments: Any) -> str:
    """A call as prompts show it; arguments that are None are left out."""
    text = json.dumps(_given(arguments), ensure_ascii=False, default=lambda found: f"{_MARK}{found.name}")
    return f"`{tool} {_QUOTED.sub(lambda found: found[1], text)}`"


def start(tool: str, /, **arguments: Any) -> str:
    """The same call as a job."""
    return call("start_job", tool=tool, arguments=_given(arguments))


def _given(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if value is not None}


def protocol(question: str, steps: list[str], conclude: str, beware: str) -> str:
    """The whole text of a prompt; a step that is empty is left out."""
    numbered = "\n".join(f"{number}. {step}" for number, step in enumerate(filter(None, steps), 1))
    return f"{question}\n\n{READING}\n\n{numbered}\n\nConclude: {conclude}\n\nDo not conclude: {beware}"


def loading(known: Model | None, model: str | None) -> str:
    """The first step of every protocol."""
    if known is not None:
        cfg = known.config
        return f"The model is {known.name}, which is loaded: it has {cfg.n_layers} layers, {cfg.n_heads} heads in each."
    return f"{call('load_model', model=model)}: returns at once when it is loaded. Note n_layers and n_heads."
