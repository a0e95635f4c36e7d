"""Protocols that an agent can follow, as MCP prompts: what to call, what is a control, what to conclude and what not.

A prompt is a function of texts to a text, in which a call is written as `tool {arguments}`. Words in capitals stand for
what an earlier step found.
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

from server.prompts.changing import steer_and_audit, transplant_kv_cache
from server.prompts.locating import find_induction_heads, where_is_it_computed
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
"""A call in a prompt's text: the tool and its arguments as JSON."""


def add_prompts(server: MCPServer[Any], offered: Collection[str]) -> None:
    """Register the prompts whose tools are all offered."""
    functions = [function for function in PROMPTS if _tools(function) <= set(offered)]
    for function in functions:
        server.prompt(title=function.__name__.replace("_", " ").capitalize())(function)
    server.middleware.append(Checked(server))


def _tools(function: Callable[..., str]) -> set[str]:
    return {tool for tool, _ in CALL.findall(function(**dict.fromkeys(_arguments(function), "x")))}


def _arguments(function: Callable[..., str]) -> dict[str, bool]:
    """Names of arguments, and whether they are required."""
    parameters = inspect.signature(function).parameters.values()
    return {parameter.name: parameter.default is parameter.empty for parameter in parameters}


class Checked:
    """A middleware: unknown prompts and arguments that do not fit are told, where the MCP library says nothing.

    An argument that is empty counts as left out: clients send what a form holds.
    """

    def __init__(self, server: MCPServer[Any]) -> None:
        self._server = server

    async def __call__(self, ctx: ServerRequestContext[Any, Any], call_next: CallNext) -> HandlerResult:
        if ctx.method == "prompts/get" and ctx.params is not None:
            given = ctx.params.get("arguments") or {}
            if isinstance(given, Mapping):
                given = {name: text for name, text in given.items() if text != ""}
                _check(await self._server.list_prompts(), ctx.params.get("name"), given)
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
