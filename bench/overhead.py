"""What looking costs: `make overhead`. Paired runs of mechscope against itself, in turns; no assertion, only a report.

hooks     decoding without a hook against a decoder whose hook calls are taken out
steering  decoding with one SteerHook against decoding without
stdio     a trivial tool call over stdio, from a client in another process; beside it the SDK alone, with an echo

The first two are ratios of a pair's times; their median comes with a 95% bootstrap interval.
"""

import asyncio
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from mcp import Client, StdioServerParameters

from engine import KVCache, LayerHook, SteerHook, forward, load_model
from engine.hooks import Listeners

PAIRS, TOKENS, CALLS = 40, 20, 500


@contextmanager
def calls_taken_out() -> Iterator[None]:
    """The decoder's hook calls hand back what they are given."""
    fire, wanted = Listeners.fire, Listeners.wanted
    Listeners.fire = lambda self, name, layer, x, *more: x  # type: ignore[method-assign]
    Listeners.wanted = lambda self, name, layer: False  # type: ignore[method-assign]
    try:
        yield
    finally:
        Listeners.fire, Listeners.wanted = fire, wanted  # type: ignore[method-assign]


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

    def decode(hook: LayerHook | None = None) -> float:
        """Seconds of TOKENS cached steps after a prompt of 8."""
        cache = KVCache.with_layers(model.config.n_layers)
        forward(model, ids[:8], cache=cache)
        return seconds(lambda: [forward(model, [token], hook=hook, cache=cache) for token in ids[8:]])

    def without_calls() -> float:
        with calls_taken_out():
            return decode()

    print("no hook / hook calls taken out:", paired(decode, without_calls))
    print("one SteerHook / no hook:", paired(lambda: decode(steer), decode))
    for who, told in asyncio.run(stdio()).items():
        print(f"a trivial tool over stdio, {who}:", told)


if __name__ == "__main__":
    main()
