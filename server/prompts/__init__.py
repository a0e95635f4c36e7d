"""Protocols that an agent can follow, as MCP prompts: what to call, what is a control, what to conclude and what not.

A prompt is a function of texts to a text, in which a call is written as `tool {arguments}`. Words in capitals stand for
what an earlier step found. Where the model that is meant is in memory, a prompt fits it: tokens must be its tokens.
"""

import inspect
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mcp import MCPError
from mcp.server import MCPServer
from mcp.server.context import CallNext, HandlerResult, ServerRequestContext
from mcp.types import INVALID_PARAMS, Prompt

from engine import Model
from engine.errors import TokenError
from server.lab import Lab
from server.prompts.changing import steer_and_audit, transplant_kv_cache
from server.prompts.induction import find_induction_heads
from server.prompts.locating import where_is_it_computed
from server.prompts.reading import compare_prompts, factual_recall

PROMPTS: tuple[Callable[..., str], ...] = (
    factual_recall,
    where_is_it_computed,
    find_induction_heads,
    steer_and_audit,
    compare_prompts,
    transplant_kv_cache,
)

CALL = re.compile(r"`(\w+) (\{.*?\})`")
"""A call in a prompt's text: the tool and its arguments, as JSON but for words in capitals."""

TOKENS = ("answer", "rival", "toward", "away")
"""Arguments of prompts that are one token."""


def add_prompts(server: MCPServer[Any], lab: Lab, offered: Collection[str]) -> None:
    """Register the prompts whose tools are all offered."""
    functions = [function for function in PROMPTS if _tools(function) <= set(offered)]
    for function in functions:
        server.prompt(title=function.__name__.replace("_", " ").capitalize())(_fitted(function, lab))
    server.middleware.append(Checked(server, lab))


def _fitted(function: Callable[..., str], lab: Lab) -> Callable[..., str]:
    """The prompt as clients see it; it is given the model that they mean."""

    def fitted(**arguments: Any) -> str:
        return function(_known(lab, arguments.get("model")), **arguments)

    signature = inspect.signature(function)
    (known, *own) = signature.parameters.values()
    fitted.__name__, fitted.__doc__ = function.__name__, function.__doc__
    fitted.__signature__ = signature.replace(parameters=own)  # type: ignore[attr-defined]
    fitted.__annotations__ = {name: kind for name, kind in function.__annotations__.items() if name != known.name}
    return fitted


def _known(lab: Lab, model: str | None) -> Model | None:
    meant = lab.present(model)
    return None if meant is None else meant.model


def _tools(function: Callable[..., str]) -> set[str]:
    """The tools whose calls a prompt shows."""
    known, *own = inspect.signature(function).parameters.values()
    texts = {parameter.name: "x" for parameter in own if parameter.default is parameter.empty}
    return {tool for tool, _ in CALL.findall(function(**{known.name: None}, **texts))}


class Checked:
    """A middleware: unknown prompts and arguments that do not fit are told, where the MCP library says nothing.

    An argument that is empty counts as left out: clients send what a form holds.
    """

    def __init__(self, server: MCPServer[Any], lab: Lab) -> None:
        self._server, self._lab = server, lab

    async def __call__(self, ctx: ServerRequestContext[Any, Any], call_next: CallNext) -> HandlerResult:
        if ctx.method == "prompts/get" and ctx.params is not None:
            given = ctx.params.get("arguments") or {}
            if isinstance(given, Mapping):
                given = {name: text for name, text in given.items() if text != ""}
                _check(await self._server.list_prompts(), ctx.params.get("name"), given)
                _check_tokens(_known(self._lab, given.get("model")), given)
                ctx = replace(ctx, params={**ctx.params, "arguments": given})
        return await call_next(ctx)


def _check(prompts: Sequence[Prompt], name: object, given: Mapping[str, Any]) -> None:
    known = {prompt.name: {a.name: bool(a.required) for a in prompt.arguments or ()} for prompt in prompts}
    if name not in known:
        raise MCPError(INVALID_PARAMS, f"there is no prompt {name!r}; valid: {', '.join(known)}")
    arguments = known[str(name)]
    wrong = [f"{argument} is required" for argument, needed in arguments.items() if needed and argument not in given]
    wrong += [f"{argument} is unknown" for argument in given if argument not in arguments]
    if wrong:
        valid = ", ".join(argument if needed else f"{argument} (optional)" for argument, needed in arguments.items())
        raise MCPError(INVALID_PARAMS, f"{name}: {'; '.join(wrong)}; its arguments: {valid}")


def _check_tokens(known: Model | None, given: Mapping[str, Any]) -> None:
    """Text that is several tokens of the model would end its protocol early."""
    if known is None:
        return
    texts = {name: given[name] for name in TOKENS if isinstance(given.get(name), str)}
    for name, text in texts.items():
        try:
            known.tokenizer.single(text)
        except TokenError as error:
            raise MCPError(INVALID_PARAMS, f"{name}: {error}") from None
