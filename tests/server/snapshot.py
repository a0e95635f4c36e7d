"""Write tools_list.json, the snapshot that test_contract.py compares with: `make snapshot`."""

import json
from pathlib import Path

import anyio
from mcp import Client

from server.app import build_server


async def main() -> None:
    async with Client(build_server()) as client:
        tools = (await client.list_tools()).tools
    rows = [tool.model_dump(mode="json", by_alias=True, exclude_none=True) for tool in tools]
    path = Path(__file__).with_name("tools_list.json")
    path.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    anyio.run(main)
