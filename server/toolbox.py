"""A function -> an MCP tool: strict arguments, a worker thread, one error boundary, compact results.

A tool is a plain function `(call: Call, ...) -> Result`; its docstring is the description, its annotations the
schemas. `instrument(lab, function)` makes the `Tool` that the server registers.
"""

import functools
import inspect
import secrets
from collections.abc import Callable, Collection
from contextlib import AsyncExitStack
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import anyio.to_thread
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.exceptions import ToolError
from mcp.server.mcpserver.tools import Tool
from mcp.server.mcpserver.utilities.func_metadata import FuncMetadata
from mcp.types import CallToolResult, TextContent, ToolAnnotations
from pydantic import BaseModel, ByteSize, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from engine.cost import seconds
from engine.errors import EngineError
from schemas.arguments import Chat
from schemas.base import Result
from schemas.jobs import Estimate
from server import published
from server.auth import principal
from server.call import Call, Costed
from server.complaints import MOST_FIELDS, crowded, explain
from server.jobs import DryRun, Jobs
from server.lab import Lab, Slot
from server.logs import log
from server.metrics import count_fault
from server.progress import Teller
from server.store import StoreError

PROMPTS = frozenset({"a", "clean", "prompt", "recipient", "text"})
"""An argument of one of these names is a prompt, so the tool takes `chat`: texts go through the chat template."""

ToolFunction = Callable[..., Any]
"""Returns a result model, or as a coroutine function awaits one."""


def instrument(lab: Lab, jobs: Jobs, function: ToolFunction, without: Collection[str] = ()) -> "StrictTool":
    """The tool that runs `function`; arguments in `without` are not offered and keep their defaults.

    A plain function runs on a worker thread, a coroutine function on the event loop.
    """
    signature = inspect.signature(function, eval_str=True)
    own = [p for p in signature.parameters.values() if p.name not in ("call", *without)]
    if any(p.name in PROMPTS for p in own):
        own.insert(
            -1, inspect.Parameter("chat", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=False, annotation=Chat)
        )

    async def run(ctx: Context[Any, Any], chat: bool | str = False, **arguments: Any) -> BaseModel:
        teller = Teller(ctx.report_progress)
        call = Call(lab, teller, jobs, principal(), isinstance(ctx, DryRun), chat)
        work = functools.partial(function, call, **arguments)
        try:
            async with AsyncExitStack() as turns:
                for slot in _worked_with(lab, arguments) if uses_model else ():
                    if slot.taken and not call.dry:
                        teller.tell(0, None, f"waiting for {slot.known.name}: another call or job has it")
                    await turns.enter_async_context(slot.turn())
                if call.dry:
                    return await anyio.to_thread.run_sync(_estimated, work)
                result: BaseModel = await (work() if on_loop else anyio.to_thread.run_sync(work))
            await call.tell_last()
            return _noticed(result, *call.notes, call.as_read())
        except ToolError:
            raise
        except (EngineError, StoreError) as error:
            raise ToolError(str(error)) from error
        except MemoryError as error:
            raise ToolError(_out_of_memory(function.__name__, call.needs, str(error))) from error
        except Exception as error:
            fault = secrets.token_hex(4)
            log.exception("fault %s in %s", fault, function.__name__)
            count_fault()
            raise ToolError(
                f"{function.__name__} failed inside mechscope ({type(error).__name__}, fault {fault} in the server's "
                "log); this is a defect: nothing was computed and nothing was lost"
            ) from error
        finally:
            teller.drop()
            lab.memory.give_back(call)

    on_loop = inspect.iscoroutinefunction(function)
    uses_model = "model" in signature.parameters and function.__name__ not in ("load_model", "tokenize")
    run.__signature__ = signature.replace(parameters=own)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in own} | {"return": signature.return_annotation}
    run.__name__, run.__doc__ = function.__name__, inspect.getdoc(function)
    made = Tool.from_function(run, context_kwarg="ctx", annotations=_annotations(function), title=_title(function))
    return StrictTool.of(made)


def _out_of_memory(tool: str, needs: int | None, said: str) -> str:
    """How much was needed, as far as anyone knows; numpy says what did not fit."""
    known = [] if needs is None else [f"about {ByteSize(needs).human_readable()} beside the weights"]
    known += [said[:1].lower() + said[1:]] if said else []
    return (
        f"{tool} needs more memory than there is: {'; '.join(known) or 'how much is not known'}. Nothing was kept; ask "
        "for fewer layers, points or positions, or give a shorter prompt"
    )


def _noticed(result: BaseModel, *more: str | None) -> BaseModel:
    if not isinstance(result, Result) or not any(more):
        return result
    return result.model_copy(update={"notice": ". ".join(filter(None, [result.notice, *more]))})


def _estimated(work: Callable[[], Any]) -> Estimate:
    """Run a tool up to its first forward pass, and say what the passes would take. Some need none."""
    try:
        work()
    except Costed as end:
        return Estimate(
            forwards=end.cost.passes(end.model.config, end.length),
            seconds=seconds(end.model, end.cost, end.length),
            bytes=end.cost.nbytes,
        )
    return Estimate(forwards=0, seconds=0, bytes=0)


def _worked_with(lab: Lab, arguments: dict[str, Any]) -> list[Slot]:
    """The models a call works with, in an order of their own: those it names, or else the only one loaded."""
    sides = [side for side in (arguments.get("a"), arguments.get("b")) if str(side).startswith("model:")]
    named = [*sides, *([] if arguments["model"] is None else [arguments["model"]])]
    return sorted({lab.find(name) for name in named or [None]}, key=lambda slot: slot.handle)


def _title(function: ToolFunction) -> str:
    return function.__name__.replace("_", " ").capitalize()


def _annotations(function: ToolFunction) -> ToolAnnotations:
    name = function.__name__
    makes = name in ("capture_residuals", "causal_trace", "prefill_inject", "start_job")  # a handle at every call
    ends = name in ("release", "cancel_job")
    read_only = not makes and not ends and name != "load_model"
    return ToolAnnotations(
        read_only_hint=read_only,
        destructive_hint=None if read_only else ends,
        idempotent_hint=None if read_only else not makes,  # says something of a tool that writes only
        open_world_hint=name in ("load_model", "start_job"),
    )


class AsSent(FuncMetadata):
    """Arguments as their sender means them: text is text, null leaves out what has a default.

    Some clients send a list or an object as a text of JSON. The library reads every such text so; here it is read only
    where an argument takes no text, because a prompt may look like JSON.
    """

    def pre_parse_json(self, data: dict[str, Any]) -> dict[str, Any]:
        fields = self.arg_model.model_fields
        left_out = {name for name, value in data.items() if value is None and _has_default(fields.get(name))}
        text = {name for name in data if name in fields and takes_text(fields[name].annotation)}
        read = super().pre_parse_json({name: value for name, value in data.items() if name not in left_out | text})
        return {name: read.get(name, value) for name, value in data.items() if name not in left_out}


def _has_default(field: FieldInfo | None) -> bool:
    return field is not None and not field.is_required()


def takes_text(kind: Any) -> bool:
    """Whether any text is a value of the type, as an option of a union too."""
    if get_origin(kind) is Annotated:
        return takes_text(get_args(kind)[0])
    return kind is str or (get_origin(kind) in (Union, UnionType) and any(map(takes_text, get_args(kind))))


class StrictTool(Tool):
    """Refuses unknown and mistyped arguments, with an error that says what is valid."""

    @classmethod
    def of(cls, tool: Tool) -> "StrictTool":
        arguments = tool.fn_metadata.arg_model
        arguments.model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid", strict=True)
        arguments.model_rebuild(force=True)
        metadata = AsSent(
            arg_model=arguments,
            output_schema=published.result(tool.fn_metadata.output_schema or {}),
            output_model=tool.fn_metadata.output_model,
        )
        schema = published.arguments(arguments.model_json_schema(by_alias=True))
        fields = {name: getattr(tool, name) for name in type(tool).model_fields}
        return cls(**(fields | {"fn_metadata": metadata, "parameters": schema}))

    async def run(self, arguments: dict[str, Any], context: Context[Any, Any], convert_result: bool = False) -> Any:
        arguments = self._as_meant(arguments)
        try:
            result = await super().run(arguments, context, convert_result=False)
        except ToolError as error:
            cause = error.__cause__
            if isinstance(cause, ToolError):
                raise cause from None
            if isinstance(cause, ValidationError):
                raise self._refusal(cause, arguments) from cause
            raise
        return self._compact(result) if convert_result else result

    def check(self, arguments: dict[str, Any]) -> None:
        """Raise what `run` would raise for arguments that do not fit the schema."""
        arguments = self._as_meant(arguments)
        try:
            self.fn_metadata.validate_arguments(arguments)
        except ValidationError as error:
            raise self._refusal(error, arguments) from error

    def _as_meant(self, arguments: dict[str, Any]) -> dict[str, Any]:
        meant = self.fn_metadata.pre_parse_json(arguments)
        if (place := crowded(meant)) is not None:
            raise ToolError(f"{self.name} was not run. {place}: more than {MOST_FIELDS} fields, which nothing has")
        return meant

    def _refusal(self, error: ValidationError, arguments: dict[str, Any]) -> ToolError:
        return ToolError(explain(self.name, error, arguments, list(self.parameters["properties"])))

    def _compact(self, result: BaseModel) -> CallToolResult:
        """Structured content, and the same as one line of JSON for clients that only read text."""
        text = result.model_dump_json(exclude_defaults=True)
        return CallToolResult(
            content=[TextContent(type="text", text=text)], structured_content=published.content(result)
        )
