"""An intervention as data -> edits of a run: `Intervention`, `compile_interventions`.

The same description means the same in a forward pass and at every step of generation. Kinds:

    zero            rows become zeros
    mean            rows become the vector `rows` (a mean over other prompts)
    scale           rows * factor
    steer           rows + alpha * vector
    set_component   h += (c - h.u) u for the unit vector u along `vector`
    project_out     set_component with c = 0
    patch           rows become the vector `rows` (a donor's)
    knockout        attention from the rows to `keys` is cut, the rest renormalised (point attn_pattern)
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from engine.errors import InputError, PointError, VectorError
from engine.hooks import (
    Edit,
    EditFunction,
    EditHook,
    Scope,
    knocked_out,
    plus,
    replaced_by,
    resolve_positions,
    times,
    zeroed,
)
from engine.network import Network
from engine.ops import Array, IntArray
from engine.points import ONCE, point

Kind = Literal["zero", "mean", "scale", "steer", "set_component", "project_out", "patch", "knockout"]
KINDS: tuple[str, ...] = get_args(Kind)


@dataclass(frozen=True)
class Intervention:
    """One intervention at one point of some layers.

    `positions` is a `Scope`; `heads` limits it to some heads (key-value heads at k and v). `value` is the factor,
    alpha or component; `vector` the direction or replacement; `keys` the absolute positions a knockout hides.
    """

    kind: Kind
    layers: tuple[int, ...]
    point: str = "resid_post"
    positions: Scope = "all"
    heads: tuple[int, ...] | None = None
    value: float = 0.0
    vector: Array | None = None
    keys: tuple[int, ...] = ()


def compile_interventions(
    model: Network, interventions: Iterable[Intervention], prompt_length: int, new_tokens: int = 0
) -> EditHook:
    """One hook with an `Edit` per intervention and layer, in order; checks everything against the model.

    Positions may reach into the `new_tokens` to be generated. Each edit's `fired` counts its rows as it runs.
    """
    edits: list[Edit] = []
    for item in interventions:
        name = point(item.point).name
        model.check_point(name)
        heads = None if item.heads is None else _heads(model, name, item.heads)
        scope = _scope(item.positions, prompt_length, new_tokens)
        function = _function(model, item, prompt_length, new_tokens)
        layers = model.resolve_layers(item.layers)
        if not layers:
            raise InputError(f"the intervention {item.kind!r} names no layer")
        if name in ONCE:
            layers = [0 if name == "embed" else model.config.n_layers - 1]
        edits += [Edit(name, layer, function, scope, heads) for layer in layers]
    return EditHook(edits)


def _heads(model: Network, name: str, heads: Sequence[int]) -> tuple[int, ...]:
    if not heads:
        raise InputError("heads is an empty list; leave it out to mean all heads")
    return tuple(dict.fromkeys(model.resolve_head(head, key_value=name in ("k", "v")) for head in heads))


def _scope(positions: Scope, prompt_length: int, new_tokens: int) -> Scope:
    if isinstance(positions, str):
        return positions
    resolved = resolve_positions(positions, prompt_length)
    last = prompt_length + max(new_tokens - 1, 0) - 1  # the last generated token is never fed back
    if not resolved or max(resolved) > last:
        raise InputError(f"positions {list(positions)}: this run computes positions 0 to {last}")
    return resolved


def _function(model: Network, item: Intervention, prompt_length: int, new_tokens: int) -> EditFunction:
    if not np.isfinite(item.value):
        raise InputError(f"{item.kind}: the number {item.value} is not finite")
    if item.kind == "zero":
        return zeroed
    if item.kind == "scale":
        return times(item.value)
    if item.kind in ("mean", "patch"):
        return replaced_by(_vector(model, item))
    if item.kind == "knockout":
        return knocked_out(_hidden_keys(item, prompt_length, new_tokens))
    if item.kind not in KINDS:
        raise InputError(f"there is no intervention {item.kind!r}; valid: {', '.join(KINDS)}")
    vector = _vector(model, item)
    if item.kind == "steer":
        return plus(vector, item.value)
    return component_set(vector, item.value if item.kind == "set_component" else 0.0)


def _hidden_keys(item: Intervention, prompt_length: int, new_tokens: int) -> list[int]:
    if item.point != "attn_pattern" or not item.keys:
        raise InputError("knockout acts at attn_pattern and needs `keys`, the positions that are hidden")
    return [int(key) for key in _scope(item.keys, prompt_length, new_tokens)]


def _vector(model: Network, item: Intervention) -> Array:
    """The vector, as wide as a row of the point; `mean` and `patch` also take one for each of the heads."""
    feature = point(item.point).axes[-1]
    if feature == "key":
        raise PointError(f"{item.kind} does not act at {item.point}; zero, scale and knockout do")
    width: int = getattr(model.config, feature)
    vector: Array = np.asarray(() if item.vector is None else item.vector, np.float32)
    shapes: list[tuple[int, ...]] = [(width,)]
    if item.kind in ("mean", "patch") and point(item.point).head_axis is not None:
        all_heads = model.config.n_kv_heads if item.point in ("k", "v") else model.config.n_heads
        shapes.append((all_heads if item.heads is None else len(item.heads), width))
    if vector.shape not in shapes or not np.isfinite(vector).all():
        raise VectorError(f"{item.kind} at {item.point} needs a vector of {width} finite numbers, not {vector.shape}")
    return vector


def component_set(vec: Array, component: float) -> EditFunction:
    """An edit function: the component along vec's direction becomes `component`, h += (c - h.u) u."""
    length = float(np.linalg.norm(vec))
    if length == 0:
        raise VectorError("a zero vector has no direction")
    unit = vec / np.float32(length)

    def function(rows: Array, pos: IntArray, key_pos: IntArray | None) -> Array:
        return rows + (np.float32(component) - rows @ unit)[..., None] * unit

    return function
