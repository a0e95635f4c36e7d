"""An intervention as data -> edits of a run: `Intervention`, `compile_interventions`.

One description means the same in a forward pass, at every step of generation and in a sweep. Kinds:

    zero            rows become zeros
    mean            rows become a mean over other prompts (`replacements` makes it): `rows` {position: row}, and
                    `vector` at positions that `rows` lacks
    resample        the same with several rows (n, ...) in place of each, of which `seed` and position draw one
    scale           rows * value
    steer           rows + value * vector, in one of three units (`edits.Unit`)
    set_component   h += (value - h.u) u for the unit vector u along `vector`
    project_out     set_component with value 0
    patch           rows become a donor's: `rows` {position: row}, or `vector` everywhere in `positions`
    knockout        attention from the rows to `keys` is cut, the rest renormalised (point attn_pattern)
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, get_args

import numpy as np

from engine.edits import (
    Edit,
    EditFunction,
    Scope,
    Unit,
    check_order,
    component_set,
    drawn,
    knocked_out,
    placed,
    plus,
    resolve_positions,
    rows_in_scope,
    times,
    zeroed,
)
from engine.errors import HookError, InputError, PointError, VectorError, clipped
from engine.heads import heads_by_layer, name_layers
from engine.hooks import EditHook
from engine.network import Network, check_numbers
from engine.ops import LARGEST, Array
from engine.points import only_layer, point

Kind = Literal["zero", "mean", "resample", "scale", "steer", "set_component", "project_out", "patch", "knockout"]
KINDS: tuple[str, ...] = get_args(Kind)
UNITS: tuple[str, ...] = get_args(Unit)

SETS = ("zero", "mean", "resample", "patch", "set_component", "project_out")
"""Kinds after which it makes no difference what was there before; scale by 0 is another."""

DIRECTED = ("steer", "set_component", "project_out")
"""Kinds that change a row along a direction alone."""

BY_HEAD = ("mean", "resample", "patch")
"""Kinds whose rows may differ between heads."""


@dataclass(frozen=True)
class Intervention:
    """One intervention at one point of some layers.

    `positions` is a `Scope`. `heads` limits it to some heads (key-value heads at k and v): numbers mean those heads of
    each of the layers, pairs (layer, head) name their layers, and `layers` is () then. `neurons` limits it to some
    neurons (point mlp_act). `value` is the factor, alpha or component; `vector` the direction or replacement, as wide
    as a row of the point; `rows` what takes a row's place by absolute position (a patch then needs no `positions`);
    `keys` the absolute positions that a knockout hides; `source` says in words where the rows come from.
    """

    kind: Kind
    layers: tuple[int, ...]
    point: str = "resid_post"
    positions: Scope = "all"
    heads: tuple[int, ...] | tuple[tuple[int, int], ...] | None = None
    neurons: tuple[int, ...] | None = None
    value: float = 0.0
    unit: Unit = "raw"
    vector: Array | None = None
    rows: Mapping[int, Array] | None = None
    keys: tuple[int, ...] = ()
    seed: int = 0
    source: str = ""


def compile_interventions(
    model: Network, interventions: Iterable[Intervention], prompt_length: int, new_tokens: int = 0
) -> EditHook:
    """One hook with an `Edit` per intervention and layer, in order; checks everything against the model.

    Positions may reach into the `new_tokens` to be generated. Each edit's `fired` counts its rows as it runs. Raises
    `InputError` for one that no row would meet, and for one that later ones leave nothing of (`EditHook`).
    """
    edits: list[Edit] = []
    rows = np.arange(_computed(prompt_length, new_tokens))
    for item in interventions:
        name = point(item.point).name
        model.check_point(name)
        neurons = None if item.neurons is None else _neurons(model, item.neurons)
        positions = item.positions if item.kind != "patch" or item.rows is None else list(item.rows)
        scope = _scope(positions, prompt_length, new_tokens)
        for heads, layers in _by_heads(model, item, name).items():
            part = item if heads is None else replace(item, heads=heads, layers=tuple(layers))
            function = _function(model, part, prompt_length, new_tokens)
            along = np.asarray(item.vector, np.float32) if item.kind in DIRECTED else None
            made = partial(Edit, function=function, scope=scope, heads=heads, neurons=neurons, kind=item.kind)
            sets = item.kind in SETS or function is zeroed
            edits += [made(name, layer, sets=sets, along=along) for layer in layers]
        if not len(rows_in_scope(scope, rows, prompt_length)):
            raise InputError(_never(item, name, scope, len(rows)))
    check_order(edits, rows, prompt_length)
    return EditHook(edits)


def _never(item: Intervention, name: str, scope: Scope, rows: int) -> str:
    shown = scope if isinstance(scope, str) else list(scope)
    return (
        f"the intervention {item.kind} at {name}, layers {clipped([*item.layers])}, never fires: positions {shown} "
        f"name no row of a run that computes positions 0 to {rows - 1}"
    )


def _computed(prompt_length: int, new_tokens: int) -> int:
    """Rows of a run: the last generated token is never fed back."""
    return prompt_length + max(new_tokens - 1, 0)


def _by_heads(model: Network, item: Intervention, name: str) -> dict[tuple[int, ...] | None, list[int]]:
    """{heads: the layers in which it is these}."""
    if not item.layers and not name_layers(item.heads):
        raise InputError(f"the intervention {item.kind!r} names no layer")
    groups: dict[tuple[int, ...] | None, list[int]] = {}
    for layer, heads in heads_by_layer(model, item.layers, item.heads, key_value=name in ("k", "v")).items():
        groups.setdefault(heads, []).append(layer)
    only = only_layer(name, model.config.n_layers)
    return groups if only is None else {heads: [only] for heads in groups}


def _neurons(model: Network, neurons: Sequence[int]) -> tuple[int, ...]:
    n = model.config.d_mlp
    wrong = [i for i in neurons if isinstance(i, bool) or not isinstance(i, int | np.integer) or not -n <= i < n]
    if wrong or not neurons:
        named = f"neuron {wrong[0]!r} does not exist" if wrong else "neurons is an empty list"
        raise InputError(f"{named}; valid: 0 to {n - 1}, or leave it out to mean all")
    return tuple(dict.fromkeys(int(i) % n for i in neurons))


def _scope(positions: Scope, prompt_length: int, new_tokens: int) -> Scope:
    if isinstance(positions, str):
        return positions
    resolved = resolve_positions(positions, prompt_length)
    last = _computed(prompt_length, new_tokens) - 1
    if not resolved or max(resolved) > last:
        raise InputError(f"positions {clipped(list(positions))}: this run computes positions 0 to {last}")
    return resolved


def _function(model: Network, item: Intervention, prompt_length: int, new_tokens: int) -> EditFunction:
    if item.kind not in KINDS:
        raise InputError(f"there is no intervention {clipped(item.kind)}; valid: {', '.join(KINDS)}")
    if not abs(item.value) <= LARGEST:
        told = "larger than the layers can compute with" if np.isfinite(item.value) else "not finite"
        raise InputError(f"{item.kind}: the number {item.value} is {told}; valid: -{LARGEST:.0e} to {LARGEST:.0e}")
    match item.kind:
        case "zero":
            return zeroed
        case "scale":
            return times(item.value)
        case "knockout":
            return knocked_out(_hidden_keys(item, prompt_length, new_tokens))
        case "mean" | "resample" | "patch":
            return placed(_row_of(model, item, prompt_length))
    return _with_vector(item, *_vectors(model, item, [item.vector]))


def _with_vector(item: Intervention, vector: Array) -> EditFunction:
    match item.kind:
        case "steer":
            return plus(vector, item.value, _unit(item.unit))
        case "set_component":
            return component_set(vector, item.value)
    return component_set(vector, 0.0)


def _unit(unit: Unit) -> Unit:
    if unit not in UNITS:
        raise InputError(f"unit is {clipped(unit)}; valid: {', '.join(UNITS)}")
    return unit


def _hidden_keys(item: Intervention, prompt_length: int, new_tokens: int) -> list[int]:
    if item.point != "attn_pattern" or not item.keys:
        raise InputError("knockout acts at attn_pattern and needs `keys`, the positions that are hidden")
    return [int(key) for key in _scope(item.keys, prompt_length, new_tokens)]


def _row_of(model: Network, item: Intervention, prompt_length: int) -> Callable[[int], Array]:
    """What the row at a position becomes: what `rows` has for it, else `vector`; of several rows the one drawn."""
    rows = item.rows or {}
    places = resolve_positions(rows, prompt_length)
    if len({*places}) < len(places):
        twice = next(p for p in places if places.count(p) > 1)
        raise InputError(f"{item.kind} gives position {twice} two rows, as {list(rows)}; give one for each")
    given = [*rows.values(), *([item.vector] if item.vector is not None or not rows else [])]
    made = (_pools if item.kind == "resample" else _vectors)(model, item, given)
    at, other = dict(zip(places, made, strict=False)), made[len(places) :]

    def row(position: int) -> Array:
        if position not in at and not other:
            raise HookError(f"{item.kind} at {item.point} has no row for position {position}; it has {sorted(at)}")
        found = at[position] if position in at else other[0]
        return drawn(found, item.seed, position) if item.kind == "resample" else found

    return row


def _pools(model: Network, item: Intervention, given: Iterable[Array | None]) -> list[Array]:
    """The rows that resample draws from, each (n, [heads,] width)."""
    pools = [np.asarray(() if pool is None else pool, np.float32) for pool in given]
    for pool in pools:
        if pool.ndim < 2 or not len(pool):
            raise VectorError(f"resample needs rows to draw from, (n, width), not {pool.shape}")
    _vectors(model, item, [row for pool in pools for row in pool])
    return pools


def _vectors(model: Network, item: Intervention, given: Iterable[Array | None]) -> list[Array]:
    """Vectors as wide as a row of the point; kinds in `BY_HEAD` also take one for each of the heads."""
    feature = point(item.point).axes[-1]
    if feature == "key":
        raise PointError(f"{item.kind} does not act at {item.point}; zero, scale and knockout do")
    width: int = getattr(model.config, feature)
    shapes: list[tuple[int, ...]] = [(width,)]
    if item.kind in BY_HEAD and point(item.point).head_axis is not None:
        all_heads = model.config.n_kv_heads if item.point in ("k", "v") else model.config.n_heads
        shapes.append((all_heads if item.heads is None else len(item.heads), width))
    vectors = [np.asarray(() if vector is None else vector, np.float32) for vector in given]
    for vector in vectors:
        if vector.shape not in shapes:
            where = "" if item.heads is None else f", layers {[*item.layers]}, heads {[*item.heads]},"
            wanted = " or ".join(map(str, shapes[1:]))
            raise VectorError(
                f"{item.kind} at {item.point}{where} needs a vector of {width} finite numbers"
                f"{wanted and ', or ' + wanted}, not {vector.shape}"
            )
    check_numbers(np.concatenate([vector.ravel() for vector in vectors]), f"the vector of {item.kind}")
    return vectors
