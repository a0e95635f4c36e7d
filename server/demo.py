"""`mechscope demo`: a real client starts the real server over stdio and makes one investigation.

`FRANCE` and `BYTES` say what is asked of which model, `investigate` makes the calls, `server.report` prints answers.
"""

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
from mcp import Client, MCPError
from mcp.client.stdio import StdioServerParameters
from rich.console import Console

from engine.catalog import CATALOGUE, SYNTHETIC
from engine.errors import EngineError
from engine.progress import bar
from server import report
from server.console import fetched

Answer = dict[str, Any]


@dataclass(frozen=True)
class Story:
    """One investigation: two prompts that differ in one place, and what is expected of them."""

    prompt: str
    donor: str
    answer: str
    rival: str
    donor_answer: str
    differs_at: int
    steer_layer: int
    steer_alpha: float
    patch_layer: int


FRANCE = Story("The capital of France is", "The capital of Italy is", " Paris", " London", " Rome", 3, 25, 40.0, 15)
BYTES = Story("abcabcabcab", "abdabdabdab", "c", "x", "d", 2, 2, 20.0, 1)


class Failed(Exception):
    """A tool answered with an error."""


def run(model: str) -> int:
    """The whole demo; returns the exit code."""
    console = Console(highlight=False)
    stopped: list[Exception] = []
    try:
        if model in CATALOGUE:
            fetched(console, model)
        with tempfile.TemporaryDirectory() as workspace:
            anyio.run(_drive, console, model, workspace)
    except* (EngineError, Failed, MCPError, OSError) as group:
        stopped += _leaves(group)
    except* SystemExit:  # the reader of a pipe went away
        stopped.append(Failed("nobody reads the output any more"))
    for error in stopped:
        Console(stderr=True).print(f"[red]The demo stopped: {error}[/red]", highlight=False)
    return 1 if stopped else 0


def _leaves(group: BaseExceptionGroup[Any]) -> list[Exception]:
    """The exceptions of nested groups: task groups wrap what their tasks raise."""
    inner = (_leaves(e) if isinstance(e, BaseExceptionGroup) else [e] for e in group.exceptions)
    return [error for errors in inner for error in errors]


def _server(workspace: str) -> StdioServerParameters:
    """The `mechscope` script of this installation, with the caller's environment (cache and index settings)."""
    beside = Path(sys.executable).with_name("mechscope")
    command = str(beside) if beside.exists() else shutil.which("mechscope")
    if command is None:
        raise Failed("the mechscope script is not on the PATH; install mechscope first")
    arguments = ["serve", "--log-level", "warning", "--workspace", workspace]
    return StdioServerParameters(command=command, args=arguments, env=dict(os.environ))


async def _drive(console: Console, model: str, workspace: str) -> None:
    started = time.perf_counter()
    async with Client(_server(workspace)) as client:
        tools = (await client.list_tools()).tools
        console.print(f"[bold]mechscope[/bold] over stdio: {len(tools)} tools, protocol {client.protocol_version}")
        with bar(console, f"loading {model}") as show:

            async def loading(progress: float, total: float | None, message: str | None) -> None:
                show(progress, total, message)

            loaded = await client.call_tool("load_model", {"model": model}, progress_callback=loading)
        info = _answer("load_model", loaded)
        report.show(console, "load_model", {"model": model}, info)

        async def call(tool: str, /, **arguments: Any) -> Answer:
            answer = _answer(tool, await client.call_tool(tool, arguments))
            report.show(console, tool, arguments, answer)
            return answer

        await investigate(call, BYTES if model == SYNTHETIC else FRANCE, info["n_layers"])
    console.print(f"\n[bold]{time.perf_counter() - started:.1f} s[/bold] from starting the server to the last answer")


def _answer(tool: str, result: Any) -> Answer:
    if result.is_error:
        raise Failed(f"{tool}: {result.content[0].text}")
    answer: Answer = result.structured_content
    return answer


async def investigate(call: Callable[..., Any], story: Story, n_layers: int) -> None:
    """Make the calls of a story; `call` takes a tool and its arguments, and returns the answer."""
    prompt, donor = story.prompt, story.donor
    layers = sorted({*range(0, n_layers, 3), n_layers - 1})
    towards = {
        "minus": [{"token": story.rival, "space": "unembed"}, {"token": story.answer, "space": "unembed"}],
    }
    steer = {"layer": story.steer_layer, "vector": towards, "alpha": story.steer_alpha}

    await call("tokenize", text=prompt)
    held = await call("capture_residuals", prompt=prompt, layers="all", positions="all")
    await call("logit_lens", tensor=held["handle"], layers=layers, positions="last", k=3)
    await call("track_race", prompt=prompt, tokens=[story.answer, story.rival])
    await call("track_token", prompt=prompt, token=story.answer)
    await call("embedding_neighbors", token=story.answer, k=5)
    await call("project_through_unembed", vector={"handle": held["handle"], "layer": -1, "position": -1}, k=5)
    await call("read_tensor", handle=held["handle"], count=4)
    asked = {"token": story.answer, "against": story.rival}
    await call("forward_ablate", prompt=prompt, layers=[0], point="mlp_out", **asked)
    await call("forward_steer", prompt=prompt, steers=[steer], token=story.rival, against=story.answer)
    await call(
        "patch_activations",
        donor=donor,
        recipient=prompt,
        targets=[{"layer": story.patch_layer, "position": story.differs_at}],
        token=story.donor_answer,
        against=story.answer,
    )
    trace = {"clean": donor, "corrupt": prompt, "token": story.donor_answer, "k": 5}
    await call("causal_trace", **trace)
    await call("causal_trace", **trace, point="z", by="head", metric="logit_difference", against=story.answer)
    await call("attention_pattern", prompt=prompt, layers=[story.patch_layer], k=2)
    await call("compare", a=prompt, b=donor)
    await call("generate_with_hooks", prompt=prompt, max_new_tokens=12, steers=[steer])
    await call("prefill_inject", recipient=prompt, donor=donor, max_new_tokens=12, keep=True)
    await call("kv_inject_test", recipient=prompt, donor=donor, target=story.donor_answer)
    await call("start_job", tool="causal_trace", arguments=trace, dry_run=True)
    started = await call("start_job", tool="causal_trace", arguments=trace)
    await call("get_job", run=started["run"], wait_seconds=20)
    await call("cancel_job", run=started["run"])
    await call("list_session")
    await call("release", handle=held["handle"])
