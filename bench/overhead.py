"""What looking costs: `make overhead`. Paired runs of mechscope against itself, in turns; no assertion, only a report.

hooks     decoding without a hook against a decoder compiled without its hook calls
steering  decoding with one SteerHook against decoding without
stdio     a trivial tool call over stdio, from a client in another process; beside it the SDK alone, with an echo

The first two are ratios of a pair's times; their median comes with a 95% bootstrap interval.
"""

import ast
import asyncio
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from mcp import Client, StdioServerParameters

from engine import POINTS, KVCache, LayerHook, RecordHook, SteerHook, decoder, forward, load_model

PAIRS, TOKENS, CALLS = 40, 20, 500


class _WithoutHooks(ast.NodeTransformer):
    """`hooks.fire(point, layer, x)` -> `x`; `hooks.wanted(...)` -> `False`."""

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        if name not in ("fire", "wanted"):
            return node
        return node.args[2] if name == "fire" else ast.Constant(False)


def forward_without_hooks() -> Callable[..., Any]:
    """`forward` of a decoder whose hook calls are taken out of its source."""
    assert decoder.__file__ is not None
    source = ast.parse(Path(decoder.__file__).read_text("utf-8"))
    tree = ast.fix_missing_locations(_WithoutHooks().visit(source))
    module = ModuleType("decoder_without_hooks")
    exec(compile(tree, decoder.__file__, "exec"), module.__dict__)
    made: Callable[..., Any] = module.forward
    return made


def seconds(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def paired(one: Callable[[], float], other: Callable[[], float]) -> str:
    """Median of one / other over pairs whose order alternates, and its interval."""
    ratios = []
    for pair in range(-1, PAIRS):
        first, second = (one, other) if pair % 2 else (other, one)
        a, b = first(), second()
        ratios.append(a / b if pair % 2 else b / a)
    drawn = np.random.default_rng(0).choice(ratios[1:], (2000, PAIRS))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    return f"{statistics.median(ratios[1:]):.4f}, 95% interval {low:.4f} to {high:.4f}, {PAIRS} pairs"


ECHO = """
from mcp.server import MCPServer
server = MCPServer("echo")
@server.tool()
def tokenize(text: str) -> dict[str, str]:
    return {"text": text}
server.run("stdio")
"""


async def stdio() -> dict[str, str]:
    """Two servers asked in turns."""
    script, env = str(Path(sys.executable).with_name("mechscope")), dict(os.environ)
    ours = StdioServerParameters(command=script, args=["serve", "--log-level", "error"], env=env)
    alone = StdioServerParameters(command=sys.executable, args=["-c", ECHO], env=env)
    took: dict[str, list[float]] = {"mechscope": [], "the SDK alone": []}
    async with Client(ours) as client, Client(alone) as echo:
        await client.call_tool("load_model", {"model": "synthetic"})
        for _ in range(CALLS):
            for who, asked in zip(took, (client, echo), strict=True):
                began = time.perf_counter()
                await asked.call_tool("tokenize", {"text": "hello"})
                took[who].append(time.perf_counter() - began)
    return {who: _told(times) for who, times in took.items()}


def _told(took: list[float]) -> str:
    middle, slow = statistics.median(took), statistics.quantiles(took, n=20)[-1]
    return f"median {1000 * middle:.2f} ms, 95% below {1000 * slow:.2f} ms, {CALLS} calls"


def main() -> None:
    model = load_model("smollm2-135m-instruct")
    ids = list(range(1000, 1008 + TOKENS))
    steer = SteerHook().add(15, np.ones(model.config.d_model, np.float32), 0.1)

    bare, deaf = forward_without_hooks(), RecordHook.for_layers(range(model.config.n_layers), points=POINTS)
    bare(model, ids[:2], hook=deaf)
    assert not any(deaf.get(name) for name in POINTS), "no call is left"

    def decode(hook: LayerHook | None = None, run: Callable[..., Any] = forward) -> float:
        """Seconds of TOKENS cached steps after a prompt of 8."""
        cache = KVCache.with_layers(model.config.n_layers)
        run(model, ids[:8], cache=cache)
        return seconds(lambda: [run(model, [token], hook=hook, cache=cache) for token in ids[8:]])

    print("no hook / hook calls taken out:", paired(decode, lambda: decode(run=bare)))
    print("one SteerHook / no hook:", paired(lambda: decode(steer), decode))
    for who, told in asyncio.run(stdio()).items():
        print(f"a trivial tool over stdio, {who}:", told)


if __name__ == "__main__":
    main()
