"""How prompts are written: arguments they share, `call`, `protocol`."""

import json
from typing import Annotated, Any

from pydantic import Field

Text = Annotated[str, Field(description="a prompt for the model under study")]
Answer = Annotated[str, Field(description="one token, with its leading space, such as ' Paris'")]
Rival = Annotated[str, Field(description="another token that the model might say, such as ' London'")]
ModelName = Annotated[str | None, Field(description="a model name or handle; left out: the one that is loaded")]

READING = """\
Follow the steps in order and report the numbers they return. What stands in backticks is a call: a tool and its
arguments. Put what you found in place of words in capitals, such as LAYER."""


def call(tool: str, /, **arguments: Any) -> str:
    """A call as prompts show it; arguments that are None are left out."""
    return f"`{tool} {json.dumps(_given(arguments), ensure_ascii=False)}`"


def start(tool: str, /, **arguments: Any) -> str:
    """The same call as a job."""
    return call("start_job", tool=tool, arguments=_given(arguments))


def _given(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if value is not None}


def protocol(question: str, steps: list[str], conclude: str, beware: str) -> str:
    """The whole text of a prompt."""
    numbered = "\n".join(f"{number}. {step}" for number, step in enumerate(steps, 1))
    return f"{question}\n\n{READING}\n\n{numbered}\n\nConclude: {conclude}\n\nDo not conclude: {beware}"


def loading(model: str | None) -> str:
    """The first step of every protocol."""
    return f"{call('load_model', model=model)}: returns at once when it is loaded. Note n_layers and n_heads."
