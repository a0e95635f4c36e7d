"""`build_server`: a lab and the tools -> an MCP server."""

from importlib.metadata import version

from mcp.server import MCPServer

from server.lab import Lab
from server.toolbox import instrument
from server.tools import TOOLS

INSTRUCTIONS = """\
A microscope for language models. Load a model with load_model, then look inside it: tokenize shows positions,
logit_lens and track_token read the residual stream, forward_ablate, forward_steer and patch_activations change a run
and report the effect, generate_with_hooks writes text under interventions, prefill_inject and kv_inject_test move
key-value cache from one prompt into another. Results hold handles (act:, vec:, kv:, model:) that other tools take.
Every number is computed in the call that returns it. Positions are absolute, layers count from 0, a token given as
text must be exactly one token: mind the leading space.
"""


def build_server(lab: Lab | None = None) -> MCPServer[None]:
    """A server with every tool on one lab."""
    lab = Lab() if lab is None else lab
    return MCPServer(
        "mechscope",
        title="mechscope",
        version=version("mechscope"),
        instructions=INSTRUCTIONS,
        tools=[instrument(lab, function) for function in TOOLS],
        log_level="WARNING",
    )
