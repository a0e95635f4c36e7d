"""`build_server`: a lab and the tools -> an MCP server."""

from importlib.metadata import version
from typing import Any

from mcp.server import MCPServer
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.exceptions import ToolError
from mcp.server.mcpserver.tools import Tool
from mcp.types import CallToolResult, InputRequiredResult

from engine.errors import clipped
from server.completions import add_completions
from server.jobs import Jobs
from server.lab import Lab
from server.prompts import add_prompts
from server.resources import add_resources
from server.toolbox import instrument
from server.tools import KEEPING, NEVER_JOBS, TOOLS, TOOLSETS
from server.unreadable import answer_unreadable
from server.watch import Watch

INSTRUCTIONS = """\
A microscope for language models. Load a model with load_model, then look inside it: tokenize shows positions,
logit_lens and track_token read the residual stream, forward_ablate, forward_steer and patch_activations change a run
and report the effect, generate_with_hooks writes text under interventions, prefill_inject and kv_inject_test move
key-value cache from one prompt into another. Results hold handles (act:, kv:, run:, model:) that other tools take.
Work that may take longer than 30 seconds runs as a job: start_job returns a run: handle at once, get_job its progress
and result, cancel_job stops it. The prompts are protocols with controls: recalling a fact, locating a computation,
induction heads, steering, comparing prompts, transplanting a cache. The resources mechscope://models and
mechscope://session show what is loaded and held. Every number is computed in the call that returns it. A prompt is
text or token ids; positions are absolute, layers count from 0, negative ones from the end; a token given as text must
be exactly one token: mind the leading space. model may be left out when one is loaded. chat=true puts texts into the
model's own chat template; chat="The answer is" also begins the answer, whose next token is then read.
"""


class Microscope(MCPServer[None]):
    """An MCP server whose error for an unknown tool lists the tools there are."""

    async def call_tool(
        self, name: str, arguments: dict[str, Any], context: Context[None, Any] | None = None
    ) -> CallToolResult | InputRequiredResult:
        try:
            return await super().call_tool(name, arguments, context)
        except ToolError as error:
            names = [tool.name for tool in await self.list_tools()]
            if name in names:
                raise
            raise ToolError(f"there is no tool {clipped(name)} here; there are {', '.join(names)}") from error


def build_server(
    lab: Lab | None = None, toolset: str = "all", read_only: bool = False, watch: Watch | None = None
) -> MCPServer[None]:
    """A server with a toolset on one lab. `watch` admits, counts and logs its calls."""
    lab = Lab() if lab is None else lab
    watch = Watch(lab) if watch is None else watch
    offered = TOOLSETS[toolset]
    jobs = Jobs(lab.store, watch.gate, watch.count)
    tools = [instrument(lab, jobs, f, KEEPING.get(f, ()) if read_only else ()) for f in offered]
    jobs.offer(tool for tool in tools if tool.name not in {f.__name__ for f in NEVER_JOBS})
    server = Microscope(
        "mechscope",
        title="mechscope",
        version=version("mechscope"),
        instructions=INSTRUCTIONS + _missing({f.__name__ for f in TOOLS} - {f.__name__ for f in offered}),
        tools=list[Tool](tools),
        log_level="WARNING",
    )
    server.middleware.append(watch)
    answer_unreadable(server)
    add_resources(server, lab)
    add_prompts(server, lab, [tool.name for tool in tools])
    add_completions(server, lab)
    return server


def _missing(names: set[str]) -> str:
    return f"Not offered by this server: {', '.join(sorted(names))}.\n" if names else ""
