"""The README's demo block: what `make demo` prints of some of its calls, made anew on the real model."""

import io
import re
from collections import defaultdict
from typing import Any

import anyio
from mcp import Client
from rich.console import Console

from server import report
from server.app import build_server
from server.demo import FRANCE, investigate

MODEL = "smollm2-135m-instruct"
SHOWN = ("tokenize", "track_race", "forward_steer", "patch_activations", "prefill_inject", "kv_inject_test")
HANDLE = re.compile(r"\n[a-z]+:\S+-[0-9a-f]{32}(?=\n)")
"""A line with a handle: its end is random."""


def demo_block() -> str:
    """As it stands in the README."""
    printed = io.StringIO()
    anyio.run(_play, Console(file=printed, width=110, highlight=False))
    lines = "".join(f"{line.rstrip()}\n" for line in printed.getvalue().splitlines())
    return f"```text\n{HANDLE.sub('', lines).strip()}\n```"


async def _play(console: Console) -> None:
    async with Client(build_server()) as client:

        async def call(tool: str, /, **arguments: Any) -> Any:
            """Calls that are not shown are not made; nothing that is shown needs their handles."""
            if tool not in SHOWN:
                return defaultdict(str)
            answer = (await client.call_tool(tool, arguments)).structured_content
            assert answer is not None
            report.show(console, tool, arguments, answer)
            return answer

        loaded = (await client.call_tool("load_model", {"model": MODEL})).structured_content
        assert loaded is not None
        await investigate(call, FRANCE, loaded["n_layers"])
