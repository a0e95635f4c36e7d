"""Real MCP clients for the server tests: in memory, and over stdio to a `mechscope serve` process.

connected   a client of a server or of a server process, in one of the protocol eras `ERAS`
ask         call a tool; its structured content, checked against its published schema
refused     call a tool that must answer with an error; the error's text
"""

import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import jsonschema
from mcp import Client
from mcp.client.stdio import StdioServerParameters

ERAS = ("auto", "legacy")
SCRIPT = Path(sys.executable).with_name("mechscope")
STDIO = StdioServerParameters(command=str(SCRIPT), args=["serve"], env=dict(os.environ))


@asynccontextmanager
async def connected(server: Any = STDIO, mode: str = "auto") -> AsyncIterator[Client]:
    async with Client(server, mode=mode) as client:
        yield client


async def ask(client: Client, tool: str, /, **arguments: Any) -> dict[str, Any]:
    result = await client.call_tool(tool, arguments)
    assert not result.is_error, f"{tool}: {result.content[0].text}"
    schema = next(t.output_schema for t in (await client.list_tools()).tools if t.name == tool)
    jsonschema.validate(result.structured_content, schema)
    json.dumps(result.structured_content, allow_nan=False)
    return result.structured_content


async def refused(client: Client, tool: str, /, **arguments: Any) -> str:
    result = await client.call_tool(tool, arguments)
    assert result.is_error, f"{tool} answered {result.structured_content}"
    assert result.structured_content is None
    text = result.content[0].text
    assert not text.startswith("Error executing tool"), text
    assert "failed inside mechscope" not in text, text
    return text
