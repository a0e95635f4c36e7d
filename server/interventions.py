"""Interventions as an agent describes them -> the engine's."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from engine import Intervention, Model, capture_donor_state, replacements
from engine.config import Config
from engine.cost import Cost, of_capture, of_pass, pattern_bytes
from engine.edits import Scope, Unit
from engine.errors import InputError
from engine.interventions import Kind
from engine.ops import Array
from engine.patching import destinations, donor_places
from engine.points import point as point_named
from engine.pools import pooled_rows_cost
from engine.replacements import Match, matched_scope
from schemas import interventions as described
from server.call import Call, head_list

Pairs = tuple[tuple[int, int], ...]
"""Heads as (layer, head)."""

PATTERNS = 4
"""Of one layer, while one is changed: as it was, as it becomes, and what is between; a second change adds one."""

RENORMALISED = (
    "knockout: of each row the weights that are left are scaled to the sum of 1, as if the hidden keys had never been "
    "there, so the rest is attended to more, and a row with nothing left becomes zero; zero or scale at attn_pattern "
    "leaves the rest as it was"
)


def described_interventions(
    call: Call, model: Model, items: Iterable[described.Intervention] | None, length: int
) -> list[Intervention]:
    """The engine's interventions for a prompt of `length` tokens; runs the donors and the prompts that are averaged."""
    return [made for item in items or () for made in _made(call, model, item, length)]


def planned_interventions(
    call: Call, model: Model, items: Iterable[described.Intervention] | None, length: int
) -> list[Intervention]:
    """The same with zeros for the rows that a run would have to make: to be checked before any runs."""
    return [made for item in items or () for made in _planned(call, model, item, length)]


def _planned(call: Call, model: Model, item: described.Intervention, length: int) -> Iterator[Intervention]:
    point = _point(item)
    if item.over is not None:
        lengths = [len(call.ids(model, prompt)) for prompt in item.over]
        layers, heads = named(_which(model, item))
        at = layers, heads, point, scope(item.positions or "all")
        neurons = None if item.neurons is None else tuple(item.neurons)
        yield replace(blank_ablation(model, item.kind, length, at, lengths, item.match), neurons=neurons)
    elif item.donor is not None:
        donor = call.ids(model, item.donor)
        places, targets = _donor_targets(model, item, _which(model, item), len(donor), length)
        donor_places(model, len(donor), targets, point)
        layers, heads = named(_which(model, item))
        yield blank_patch(model, layers, point, [to for _, to in places], heads)
    else:
        yield from _made(call, model, item, length)


def blank_ablation(
    model: Model,
    kind: Kind,
    length: int,
    at: tuple[tuple[int, ...], Pairs | None, str, Scope],
    lengths: Sequence[int],
    match: Match | None,
) -> Intervention:
    """A mean or resample over prompts of these lengths, of zeros; `at` is layers, heads, a point and positions."""
    layers, heads, point, positions = at
    where = matched_scope(kind, length, lengths, positions, match or "position")
    row = np.zeros(point_width(model, point), np.float32)
    return Intervention(kind, layers, point, where, heads, vector=row[None] if kind == "resample" else row)


def blank_patch(
    model: Model, layers: tuple[int, ...], point: str, positions: Iterable[int], heads: Pairs | None = None
) -> Intervention:
    """A patch of zeros."""
    row = np.zeros(point_width(model, point), np.float32)
    return Intervention("patch", layers, point, heads=heads, rows=dict.fromkeys(positions, row))


def described_cost(
    call: Call, model: Model, items: Iterable[described.Intervention] | None, length: int, point: str | None = None
) -> Cost:
    """What the donors and the prompts that are averaged take, and changed patterns of a prompt of `length` tokens.

    `point` is changed beside them. One layer's patterns are held at one time, however many change.
    """
    cfg, listed = model.config, list(items or ())
    changes = [point, *map(_point, listed)].count("attn_pattern")
    cost = Cost(nbytes=(PATTERNS + (changes > 1)) * pattern_bytes(cfg, length) if changes else 0)
    for item in listed:
        if item.over is not None:
            cost += replacements_cost(call, model, item.over, [*_which(model, item)], _point(item))
        if item.donor is not None:
            donor, layers = len(call.ids(model, item.donor)), [*_which(model, item)]
            taken = len(_pairs(item, donor, length))
            rows = donor_rows_cost(cfg, donor, _point(item), layers, taken)
            cost = cost.beside(of_pass(cfg, donor, max(layers) + 1).beside(rows))
    return cost


def _made(call: Call, model: Model, item: described.Intervention, length: int) -> Iterator[Intervention]:
    point, which = _point(item), _which(model, item)
    layers, heads = named(which)
    shared: dict[str, Any] = {
        "kind": item.kind,
        "point": point,
        "positions": scope(item.positions or ("last" if item.kind == "steer" else "all")),
        "neurons": None if item.neurons is None else tuple(item.neurons),
        "value": item.value or 0.0,
        "unit": item.unit or "raw",
        "keys": tuple(item.keys or ()),
        "seed": item.seed or 0,
    }
    if item.kind == "knockout":
        call.note(RENORMALISED)
    if item.over is not None:
        over = [call.ids(model, prompt) for prompt in item.over]
        yield from replacements(
            model, length, item.kind, over, layers, point, positions=shared["positions"], heads=heads,
            neurons=shared["neurons"], seed=shared["seed"], match=item.match or "position", tick=call.tick,
        )  # fmt: skip
    elif item.donor is not None:
        for layer, by_position in _donor_rows(call, model, item, point, which, length).items():
            yield Intervention(layers=(layer,), heads=which[layer], rows=by_position, **shared)
    else:
        if item.vector is not None:
            vector, unit = _vector(call, model, item, point_width(model, point))
            shared |= {"vector": vector, "unit": unit}
        yield Intervention(layers=layers, heads=heads, **shared)


def _which(model: Model, item: described.Intervention) -> dict[int, tuple[int, ...] | None]:
    """{layer: its heads, None for all}."""
    return head_list(model, item.layers, item.heads, _point(item))


def named(which: Mapping[int, tuple[int, ...] | None]) -> tuple[tuple[int, ...], Pairs | None]:
    """{layer: its heads} as the layers and heads of an `Intervention`."""
    pairs = tuple((layer, head) for layer, heads in which.items() for head in heads or ())
    return ((), pairs) if pairs else (tuple(which), None)


def _vector(call: Call, model: Model, item: described.Intervention, width: int) -> tuple[Array, Unit]:
    """The vector, and what alpha counts in."""
    if item.kind != "steer":
        return call.vector(model, item.vector, width), "raw"
    vector, unit = call.step(model, item.vector, width)
    if unit == "row" and item.unit not in (None, "row"):
        raise InputError(
            f"norm_of 'row' makes alpha count in rows' norms, unit {item.unit} does not: give one of the two"
        )
    return vector, item.unit or unit


def sources(items: Iterable[Intervention], generating: bool = False) -> str | None:
    """What mean and resample put in, each told once."""
    told = dict.fromkeys(item.source for item in items if item.source)
    beyond = generating and any(item.source and item.rows for item in items)
    return ". ".join([*told, *["New tokens' rows: over all rows but each prompt's first"] * beyond]) or None


def donor_rows_cost(cfg: Config, length: int, point: str, layers: Sequence[int], positions: int) -> Cost:
    """Rows of a donor beside its pass: as they are recorded, and by position."""
    rows = of_capture(cfg, length, [point], len(layers), positions)
    return rows.holding(rows.growing)


def _point(item: described.Intervention) -> str:
    return item.point or ("attn_pattern" if item.kind == "knockout" else "resid_post")


def scope(positions: Any) -> Scope:
    """A positions argument as the engine takes it."""
    return positions if isinstance(positions, str) else tuple(positions)  # type: ignore[return-value]


def point_width(model: Model, point: str) -> int:
    """The length of a vector at a point; that of the residual where rows have no fixed length."""
    feature = point_named(point).axes[-1]
    width: int = model.config.d_model if feature == "key" else getattr(model.config, feature)
    return width


def replacements_cost(call: Call, model: Model, prompts: Iterable[Any], layers: list[int], point: str) -> Cost:
    """What running the prompts that rows are taken from will take."""
    return pooled_rows_cost(model, [call.ids(model, prompt) for prompt in prompts], layers, point)


def _donor_rows(
    call: Call,
    model: Model,
    item: described.Intervention,
    point: str,
    which: Mapping[int, tuple[int, ...] | None],
    length: int,
) -> dict[int, dict[int, Array]]:
    """{layer: {position in the recipient: the donor's row}}."""
    assert item.donor is not None
    donor = call.ids(model, item.donor)
    places, targets = _donor_targets(model, item, which, len(donor), length)
    rows = capture_donor_state(model, donor, targets, point, call.tick).rows
    by_head = point_named(point).head_axis is not None

    def row(layer: int, source: int) -> Array:
        heads, whole = which[layer], rows[layer, source]
        return whole if heads is None or not by_head else whole[list(heads)]

    return {layer: {to: row(layer, source) for source, to in places} for layer in which}


def _donor_targets(
    model: Model, item: described.Intervention, layers: Iterable[int], donor: int, length: int
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """[(donor position, position)] of a patch, one for each place, and the donor's [(layer, position)]."""
    pairs = _pairs(item, donor, length)
    places = [(model.resolve_position(a, donor), model.resolve_position(b, length)) for a, b in pairs]
    destinations((next(iter(layers)), *pair) for pair in places)
    return places, [(layer, source) for layer in layers for source, _ in places]


def _pairs(item: described.Intervention, donor_length: int, length: int) -> Sequence[Sequence[int]]:
    """[donor position, position] of a patch: as given, or the same position in both."""
    if item.pairs is not None:
        return item.pairs
    if item.positions == "last":
        return [(-1, -1)]
    if not isinstance(item.positions, str) and item.positions is not None:
        return [(p, p) for p in item.positions]
    if donor_length != length:
        raise InputError(
            f"patch: the donor has {donor_length} tokens, the prompt {length}; give pairs, such as [[-1, -1]], to say "
            "which row goes where"
        )
    return [(p, p) for p in range(length)]
