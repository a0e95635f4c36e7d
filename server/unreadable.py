"""Messages that cannot be read, such as half a surrogate, are answered with an error and the id that they name: without
it their sender would wait.

answer_unreadable   stdio and SSE: `Answering` streams
NameIds             Streamable HTTP: ASGI middleware

A request whose id is neither a text nor a whole number is one of them: the MCP library takes it for a notification,
which nobody answers, so that every transport reads messages with `MESSAGES`.
"""

import json
from http import HTTPStatus
from typing import Annotated, Any

import mcp.server.streamable_http
import mcp_types
from anyio.abc import ObjectReceiveStream
from mcp.server import MCPServer
from mcp.shared.message import SessionMessage
from mcp.types import INVALID_REQUEST, PARSE_ERROR, ErrorData, JSONRPCError, JSONRPCMessage
from pydantic import BeforeValidator, TypeAdapter, ValidationError
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MOST_DIGITS = 18
"""Of an id that is a number."""


def _identified(message: Any) -> Any:
    """Raise `ValueError` for an id that no answer can name."""
    found = message.get("id") if isinstance(message, dict) else None
    if found is not None and (isinstance(found, bool) or not isinstance(found, int | str)):
        raise ValueError("an id is a text or a whole number")
    return message


MESSAGES: TypeAdapter[Any] = TypeAdapter(Annotated[JSONRPCMessage, BeforeValidator(_identified)])


class Answering(ObjectReceiveStream[Any]):
    """The messages that can be read; errors for the others go to `answers`."""

    def __init__(self, messages: Any, answers: Any) -> None:
        self._messages, self._answers = messages, answers

    @property
    def last_context(self) -> Any:
        """The context that the last message was sent in, for the MCP library."""
        return getattr(self._messages, "last_context", None)

    async def receive(self) -> Any:
        while isinstance(item := await self._messages.receive(), Exception):
            if isinstance(item, ValidationError) and (error := _refusal(item)) is not None:
                await self._answers.send(SessionMessage(error))
        return item

    async def aclose(self) -> None:
        await self._messages.aclose()


def answer_unreadable(server: MCPServer[Any]) -> None:
    """Let every stream that the server is run on be an answering one."""
    low_level = server._lowlevel_server
    run = low_level.run

    async def run_answering(messages: Any, answers: Any, *others: Any, **named: Any) -> None:
        await run(Answering(messages, answers), answers, *others, **named)

    low_level.run = run_answering  # type: ignore  # of the transports only stdio and SSE call it
    for module in (mcp_types, mcp.server.streamable_http):  # where the transports look it up
        module.jsonrpc_message_adapter = MESSAGES  # type: ignore[attr-defined]


def _refusal(unread: ValidationError) -> JSONRPCError | None:
    """The error for what a transport could not read; none for an empty line."""
    errors = unread.errors(include_url=False, include_context=False)
    if errors[0]["type"] != "json_invalid":
        whole = next((error["input"] for error in errors if error["type"] == "missing"), None)
        why = errors[0]["msg"].removeprefix("Value error, ") if errors[0]["type"] == "value_error" else None
        said = f"Invalid request: {why or 'this is JSON, but no message of JSON-RPC 2.0'}"
        return JSONRPCError(jsonrpc="2.0", id=_id_in(whole), error=ErrorData(code=INVALID_REQUEST, message=said))
    text, said = errors[0]["input"], f"Parse error: {errors[0]['msg']}"
    if "escape" in said:
        said += "; half a surrogate pair, such as \\ud800, is no text"
    if not text.strip():
        return None
    return JSONRPCError(jsonrpc="2.0", id=id_of(text), error=ErrorData(code=PARSE_ERROR, message=said))


def id_of(text: str | bytes) -> int | str | None:
    """The id of a request, read more leniently than the request; None where there is none to be found."""
    try:
        return _id_in(json.loads(text, parse_int=lambda digits: int(digits[: MOST_DIGITS + 1])))
    except (ValueError, RecursionError):
        return None


def _id_in(message: Any) -> int | str | None:
    found = message.get("id") if isinstance(message, dict) else None
    return found if isinstance(found, str) or (type(found) is int and abs(found) < 10**MOST_DIGITS) else None


class NameIds:
    """Errors about the body of a request name its id."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        body = bytearray()
        start: list[Message] = []

        async def read() -> Message:
            message = await receive()
            body.extend(message.get("body", b""))
            return message

        async def answer(message: Message) -> None:
            if message.get("status") == HTTPStatus.BAD_REQUEST:
                start.append(message)
            elif not start:
                await send(message)
            else:  # an error is sent whole
                named = {**message, "body": _with_id(message["body"], bytes(body))}
                MutableHeaders(raw=start[0]["headers"])["content-length"] = str(len(named["body"]))
                await send(start.pop())
                await send(named)

        await self.app(scope, read, answer)


def _with_id(error: bytes, request: bytes) -> bytes:
    """A JSON-RPC error with the id of the request, if it has none; anything else as it is."""
    try:
        told = json.loads(error)
    except ValueError:
        return error
    if not isinstance(told, dict) or told.get("id", ...) is not None:
        return error
    return json.dumps(told | {"id": id_of(request)}).encode()
