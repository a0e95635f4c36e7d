"""A function -> an MCP tool: strict arguments, a worker thread, one error boundary, compact results.

A tool is a plain function `(call: Call, ...) -> Result`; its docstring is the description, its annotations the
schemas. `instrument(lab, function)` makes the `Tool` that the server registers.
"""

import functools
import inspect
import secrets
from collections.abc import Callable, Collection
from contextlib import AsyncExitStack
from typing import Any

import anyio.to_thread
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.exceptions import ToolError
from mcp.server.mcpserver.tools import Tool
from mcp.types import CallToolResult, TextContent, ToolAnnotations
from pydantic import BaseModel, ConfigDict, ValidationError

from engine.errors import EngineError
from server import published
from server.auth import principal
from server.call import Call
from server.complaints import MOST_FIELDS, crowded, explain
from server.lab import Lab, LoadedModel
from server.logs import log
from server.metrics import count_fault
from server.store import UnknownHandle

ToolFunction = Callable[..., BaseModel]


def instrument(lab: Lab, function: ToolFunction, without: Collection[str] = ()) -> Tool:
    """The tool that runs `function`; arguments in `without` are not offered and keep their defaults."""
    signature = inspect.signature(function, eval_str=True)
    own = [p for p in signature.parameters.values() if p.name not in ("call", *without)]

    async def run(ctx: Context[Any, Any], **arguments: Any) -> BaseModel:
        call = Call(lab, ctx, principal())
        work = functools.partial(function, call, **arguments)
        try:
            async with AsyncExitStack() as turns:
                for item in _worked_with(lab, arguments) if uses_model else ():
                    await turns.enter_async_context(item.limiter)
                return await anyio.to_thread.run_sync(work)
        except (EngineError, UnknownHandle) as error:
            raise ToolError(str(error)) from error
        except Exception as error:
            fault = secrets.token_hex(4)
            log.exception("fault %s in %s", fault, function.__name__)
            count_fault()
            raise ToolError(
                f"{function.__name__} failed inside mechscope ({type(error).__name__}, fault {fault} in the server's "
                "log); this is a defect: nothing was computed and nothing was lost"
            ) from error

    uses_model = "model" in signature.parameters and function.__name__ != "load_model"
    run.__signature__ = signature.replace(parameters=own)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in own} | {"return": signature.return_annotation}
    run.__name__, run.__doc__ = function.__name__, inspect.getdoc(function)
    made = Tool.from_function(run, context_kwarg="ctx", annotations=_annotations(function), title=_title(function))
    return StrictTool.of(made)


def _worked_with(lab: Lab, arguments: dict[str, Any]) -> list[LoadedModel]:
    """The models a call works with, in an order of their own: those it names, or else the only one loaded."""
    sides = [side for side in (arguments.get("a"), arguments.get("b")) if str(side).startswith("model:")]
    named = [*sides, *([] if arguments["model"] is None else [arguments["model"]])]
    return sorted({lab.model(name) for name in named or [None]}, key=lambda item: item.handle)


def _title(function: ToolFunction) -> str:
    return function.__name__.replace("_", " ").capitalize()


def _annotations(function: ToolFunction) -> ToolAnnotations:
    changes = function.__name__ == "release"
    return ToolAnnotations(
        read_only_hint=not changes,
        destructive_hint=True if changes else None,
        idempotent_hint=True,
        open_world_hint=function.__name__ == "load_model",
    )


class StrictTool(Tool):
    """Refuses unknown and mistyped arguments, with an error that says what is valid."""

    @classmethod
    def of(cls, tool: Tool) -> "StrictTool":
        arguments = tool.fn_metadata.arg_model
        arguments.model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid", strict=True)
        arguments.model_rebuild(force=True)
        tool.fn_metadata.output_schema = published.result(tool.fn_metadata.output_schema or {})
        fields = {name: getattr(tool, name) for name in type(tool).model_fields}
        return cls(**(fields | {"parameters": published.arguments(arguments.model_json_schema(by_alias=True))}))

    async def run(self, arguments: dict[str, Any], context: Context[Any, Any], convert_result: bool = False) -> Any:
        if (place := crowded(arguments)) is not None:
            raise ToolError(f"{self.name} was not run. {place}: more than {MOST_FIELDS} fields, which nothing has")
        try:
            result = await super().run(arguments, context, convert_result=False)
        except ToolError as error:
            cause = error.__cause__
            if isinstance(cause, ToolError):
                raise cause from None
            if isinstance(cause, ValidationError):
                raise ToolError(explain(self.name, cause, arguments, list(self.parameters["properties"]))) from cause
            raise
        return self._compact(result) if convert_result else result

    def _compact(self, result: BaseModel) -> CallToolResult:
        """Structured content, and the same as one line of JSON for clients that only read text."""
        structured = result.model_dump(mode="json", exclude_defaults=True)
        text = result.model_dump_json(exclude_defaults=True)
        return CallToolResult(content=[TextContent(type="text", text=text)], structured_content=structured)
