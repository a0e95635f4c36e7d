"""A set of heads as a caller names it -> the heads of each layer: `heads_by_layer`, `name_layers`."""

from collections.abc import Iterable, Sequence

import numpy as np

from engine.errors import InputError, clipped
from engine.network import Network
from engine.ops import IntArray

Heads = Sequence[int | Sequence[int]] | IntArray
"""Numbers mean those heads of each of the layers beside them, pairs (layer, head), or an array (n, 2), one head of one
layer each."""


def name_layers(heads: Heads | None) -> bool:
    """Whether some are pairs."""
    return any(isinstance(head, Sequence) for head in _plain(heads if heads is not None else ()))


def _plain(heads: Heads) -> list[int | Sequence[int]]:
    return [head.tolist() if isinstance(head, np.ndarray) else head for head in heads]


def heads_by_layer(
    model: Network, layers: Iterable[int], heads: Heads | None, key_value: bool = False
) -> dict[int, tuple[int, ...] | None]:
    """{layer: its heads, None for all}; key-value heads when `key_value`.

    Pairs name their layers: `layers` is empty then, or the same layers. Raises `InputError`.
    """
    chosen = model.resolve_layers(layers)
    if not chosen and not name_layers(heads):
        raise InputError("layers is an empty list: it names no layer")
    if heads is None:
        return dict.fromkeys(chosen)
    if not len(heads):
        raise InputError("heads is an empty list; leave it out to mean all heads")
    heads = _plain(heads)
    pairs = [head for head in heads if isinstance(head, Sequence)]
    if not pairs:
        which = tuple(dict.fromkeys(model.resolve_head(head, key_value) for head in heads))  # type: ignore[arg-type]
        return dict.fromkeys(chosen, which)
    if len(pairs) < len(heads):
        raise InputError(
            f"heads {clipped(list(heads))} mixes numbers and pairs; give [layer, head] for each, or numbers"
        )
    by_layer = _paired(model, pairs, key_value)
    if chosen and {*chosen} != {*by_layer}:
        raise InputError(
            f"heads names pairs in layers {sorted(by_layer)}, but layers says {sorted(chosen)}: leave layers out, "
            "[layer, head] pairs name their own"
        )
    return {layer: tuple(dict.fromkeys(which)) for layer, which in by_layer.items()}


def _paired(model: Network, pairs: Iterable[Sequence[int]], key_value: bool) -> dict[int, list[int]]:
    by_layer: dict[int, list[int]] = {}
    for pair in pairs:
        if len(pair) != 2:
            raise InputError(f"a head is a number or a pair [layer, head], not {clipped(list(pair))}")
        layer, head = pair
        by_layer.setdefault(model.resolve_layer(layer), []).append(model.resolve_head(head, key_value))
    return by_layer
