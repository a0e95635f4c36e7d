"""Hooks and runs that many tests use.

everything     {(point, layer): array without the batch axis} of one full pass
Calls          listens everywhere (or to chosen points) and remembers each call
Replace        answers one point of one layer with a function of what it is given
uneven         an edit that no norm undoes
cached         logits at every position from token-by-token passes over a cache
"""

from collections.abc import Callable, Iterable

import numpy as np
from declared import points_of

from engine import POINTS, KVCache, LayerHook, Model, RecordHook, forward


def everything(model: Model, ids: list[int], hook: LayerHook | None = None) -> dict[tuple[str, int], np.ndarray]:
    from engine import CompositeHook

    names = points_of(model)
    record = RecordHook.for_layers(range(model.config.n_layers), points=names)
    forward(model, ids, hook=CompositeHook([hook, record] if hook else [record]))
    return {(name, layer): array for name in names for layer, array in record.get(name).items()}


class Calls(LayerHook):
    """`seen`: (point, layer, shape, positions, key positions) of every call."""

    def __init__(self, points: Iterable[str] = POINTS) -> None:
        self.points = tuple(points)
        self.seen: list[tuple[str, int, tuple[int, ...], list[int], list[int] | None]] = []

    def wants(self, point: str, layer: int) -> bool:
        return point in self.points

    def at(self, point, layer, x, pos, key_pos=None):
        self.seen.append((point, layer, x.shape, pos.tolist(), None if key_pos is None else key_pos.tolist()))


class Replace(LayerHook):
    """At (point, layer) the array becomes function(array)."""

    def __init__(self, point: str, layer: int, function: Callable) -> None:
        self.where, self.function = (point, layer), function

    def wants(self, point: str, layer: int) -> bool:
        return (point, layer) == self.where

    def at(self, point, layer, x, pos, key_pos=None):
        return self.function(x)


def uneven(x: np.ndarray) -> np.ndarray:
    """Every second feature x 3. A norm that follows would undo a scaling of the whole row."""
    return x * (1 + 2 * (np.arange(x.shape[-1]) % 2)).astype(np.float32)


def cached(
    model: Model, ids: list[int], sizes: Iterable[int], hook: LayerHook | None = None, prompt: int | None = None
):
    """Feed `ids` in chunks of `sizes`; (s, d_vocab) logits of every position, and the cache."""
    cache, rows, start = KVCache.with_layers(model.config.n_layers), [], 0
    for size in sizes:
        chunk = ids[start : start + size]
        result = forward(
            model, chunk, hook=hook, cache=cache, logits_at="all", prompt_length=len(ids) if prompt is None else prompt
        )
        rows.append(result.logits[0])
        start += size
    assert start == len(ids)
    return np.concatenate(rows), cache
