"""What work will take, before it is done: `Cost`, in rows through layers; `seconds`, from passes timed now.

of_pass          a forward pass
of_generation    prefill and decode
what_fits        how much of the work there would be room for
sweeps, grids, pools and injections say theirs beside themselves: sweep_cost, patching_grid_cost, pooled_rows_cost,
kv_inject_cost
"""

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise

from engine import blas, fast
from engine.cache import KVCache
from engine.config import Config
from engine.decoder import forward
from engine.network import Network
from engine.ops import QUERY_BLOCK
from engine.points import ONCE
from engine.points import point as point_named
from engine.split import parts_of

MOST_TIMED, LONG = 256, 1024
"""Rows of the pass that is timed, at most: in larger batches a row takes about as long. In prompts beyond LONG it takes
longer by what attention adds, as much for each token as it adds from the one to the other.
"""


@dataclass(frozen=True)
class Cost:
    """What some work takes.

    layers: layers entered, which is how often `tick` is called; rows: rows that go through a layer with others; steps:
    rows that go through one alone, as in decoding; nbytes: of arrays held at one time, about, beside the weights, of
    which `growing` grow with each of the numbers `by`, such as {"layers": 30, "positions": 2001}.
    """

    layers: int = 0
    rows: int = 0
    steps: int = 0
    nbytes: int = 0
    growing: int = 0
    by: Mapping[str, int] = field(default_factory=dict)

    def __add__(self, other: "Cost") -> "Cost":
        """One after the other."""
        layers, rows, steps = self.layers + other.layers, self.rows + other.rows, self.steps + other.steps
        return replace(max(self, other, key=lambda cost: cost.nbytes), layers=layers, rows=rows, steps=steps)

    def __mul__(self, times: int) -> "Cost":
        """So many times over."""
        return replace(self, layers=self.layers * times, rows=self.rows * times, steps=self.steps * times)

    def holding(self, nbytes: int, **by: int) -> "Cost":
        """The same with so many bytes more held, which grow with each of the numbers `by`."""
        growing = self.growing + (nbytes if by else 0)
        return replace(self, nbytes=self.nbytes + nbytes, growing=growing, by={**self.by, **by})

    def beside(self, other: "Cost") -> "Cost":
        """Both at one time."""
        both, growing = self + other, self.growing + other.growing
        return replace(both, nbytes=self.nbytes + other.nbytes, growing=growing, by={**self.by, **other.by})

    def passes(self, cfg: Config, length: int) -> float:
        """In forward passes of a prompt of `length` tokens; a decoded token is one too."""
        return (self.rows / length + self.steps) / cfg.n_layers


def of_pass(cfg: Config, length: int, stop: int | None = None) -> Cost:
    """A forward pass of `length` tokens, up to layer `stop`."""
    layers = cfg.n_layers if stop is None else stop
    alone = length == 1
    rows = layers * length
    parts = 1 if fast.kernels() is not None else parts_of(length, blas.most_threads())
    return Cost(layers, 0 if alone else rows, rows if alone else 0, working_bytes(cfg, length, length, parts))


def of_generation(cfg: Config, length: int, max_new_tokens: int) -> Cost:
    """A prompt of `length` tokens and at most so many new ones; the last of them is never fed back.

    Where rotary frequencies change with the length, everything so far is fed again.
    """
    lengths = range(length, length + max_new_tokens)
    ropes = {rope for rope in cfg.ropes if rope is not None}
    frequencies = [[rope.frequencies(n) for rope in ropes] for n in lengths]
    cost = of_pass(cfg, length)
    for n, (before, now) in zip(lengths[1:], pairwise(frequencies), strict=True):
        cost += of_pass(cfg, 1 if now == before else n)
    return cost.holding(cache_bytes(cfg, length + max_new_tokens))


def cache_bytes(cfg: Config, positions: int) -> int:
    """Of keys and values of so many positions in all layers."""
    return 8 * cfg.n_layers * cfg.n_kv_heads * cfg.d_head * positions


def working_bytes(cfg: Config, rows: int, length: int, parts: int = 1) -> int:
    """About what so many rows of a prompt need inside a block: activations, all keys and values, a pattern.

    Each of the `parts` that it attends in has a block of the pattern.
    """
    heads = cfg.n_heads * cfg.d_head
    by_row = 6 * cfg.d_model + 3 * cfg.d_mlp + 4 * heads
    keys = 3 * length * cfg.n_kv_heads * cfg.d_head
    at_once = min(rows, QUERY_BLOCK * parts)
    return 4 * (rows * by_row + keys + 2 * cfg.n_heads * at_once * length)


def pattern_bytes(cfg: Config, length: int) -> int:
    """Of one layer's attention pattern, which is whole while anyone listens to it: every head, row and key."""
    return 4 * cfg.n_heads * length * length


def what_fits(cost: Cost, length: int, room: int) -> str:
    """In words: how much of the work, on a prompt of `length` tokens, so many bytes are enough for."""
    rest = cost.nbytes - cost.growing
    share = (room - rest) / cost.growing if cost.growing else 0.0
    fitting = {what: int(number * share) for what, number in cost.by.items()}
    told = [f"{number} {what}" for what, number in fitting.items() if number > 0]
    tokens = length * room // max(cost.nbytes, 1)  # bytes grow with tokens at least in proportion
    return " or ".join(told) or (f"a prompt of {tokens} tokens" if tokens > 0 else "nothing of this kind")


def of_capture(cfg: Config, length: int, points: Iterable[str], layers: int, positions: int) -> Cost:
    """What recording takes beside the pass: rows at so many positions of each point and layer."""
    rows = sum(4 * positions * row_size(cfg, name, length) * (1 if name in ONCE else layers) for name in points)
    whole = 2 * pattern_bytes(cfg, length) if "attn_pattern" in points else 0
    return Cost().holding(whole).holding(rows, layers=layers, positions=positions)


def row_shape(cfg: Config, point: str, length: int) -> tuple[int, ...]:
    """([heads,] width) of one position at a point, in a prompt of `length` tokens."""
    feature = point_named(point).axes[-1]
    width = length if feature == "key" else getattr(cfg, feature)
    if point_named(point).head_axis is None:
        return (width,)
    return (cfg.n_kv_heads if point in ("k", "v") else cfg.n_heads, width)


def row_size(cfg: Config, point: str, length: int) -> int:
    """Numbers in one position's row."""
    return math.prod(row_shape(cfg, point, length))


def seconds(model: Network, cost: Cost, length: int = 1) -> float:
    """About how long the work on prompts of `length` tokens will take: passes of its kind are timed now, on this
    machine, and scaled.
    """
    layers, total = model.config.n_layers, 0.0
    if cost.rows:
        together = max(2, min(cost.rows // max(cost.layers, 1), MOST_TIMED, model.config.n_ctx))
        by_row = _timed(model, together) / together
        if length > LONG:
            more = _timed(model, LONG) / LONG - _timed(model, MOST_TIMED) / MOST_TIMED
            by_row += max(more, 0.0) * (length - together) / (LONG - MOST_TIMED)
        total += cost.rows * by_row / layers
    if cost.steps:
        total += cost.steps * _timed(model, 1) / layers
    return total


def _timed(model: Network, length: int) -> float:
    """Seconds of a pass of so many tokens, the better of two."""
    taken = []
    for _ in range(2):
        started = time.perf_counter()
        forward(model, [[0] * length], cache=KVCache.with_layers(model.config.n_layers))
        taken.append(time.perf_counter() - started)
    return min(taken)
