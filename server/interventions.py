"""Interventions as an agent describes them -> the engine's."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from engine import Intervention, Model, capture_donor_state, replacements
from engine.config import Config
from engine.cost import Cost, of_capture, of_pass, pattern_bytes
from engine.edits import Scope
from engine.errors import InputError
from engine.ops import Array
from engine.patching import destinations
from engine.points import point as point_named
from engine.pools import pooled_rows_cost
from schemas import interventions as described
from server.call import Call, layer_list


def described_interventions(
    call: Call, model: Model, items: Iterable[described.Intervention] | None, length: int
) -> list[Intervention]:
    """The engine's interventions for a prompt of `length` tokens; runs the donors and the prompts that are averaged."""
    return [made for item in items or () for made in _made(call, model, item, length)]


def described_cost(call: Call, model: Model, items: Iterable[described.Intervention] | None, length: int) -> Cost:
    """What the donors and the prompts that are averaged take, and changed patterns of a prompt of `length` tokens."""
    cfg, cost = model.config, Cost()
    for item in items or ():
        if item.over is not None:
            cost += replacements_cost(call, model, item.over, layer_list(model, item.layers), _point(item))
        if item.donor is not None:
            donor, layers = len(call.ids(model, item.donor)), layer_list(model, item.layers)
            rows = donor_rows_cost(cfg, donor, _point(item), layers, len(item.pairs or range(donor)))
            cost = cost.beside(of_pass(cfg, donor, max(layers) + 1).beside(rows))
        cost = cost.beside(pattern_cost(cfg, _point(item), length))
    return cost


def _made(call: Call, model: Model, item: described.Intervention, length: int) -> Iterator[Intervention]:
    point = _point(item)
    layers = layer_list(model, item.layers)
    shared: dict[str, Any] = {
        "kind": item.kind,
        "point": point,
        "positions": scope(item.positions or ("last" if item.kind == "steer" else "all")),
        "heads": None if item.heads is None else tuple(item.heads),
        "neurons": None if item.neurons is None else tuple(item.neurons),
        "value": item.value or 0.0,
        "unit": item.unit or "raw",
        "keys": tuple(item.keys or ()),
        "seed": item.seed or 0,
    }
    if item.over is not None:
        over = [call.ids(model, prompt) for prompt in item.over]
        yield from replacements(
            model, length, item.kind, over, layers, point, positions=shared["positions"], heads=item.heads,
            neurons=shared["neurons"], seed=shared["seed"], match=item.match or "position", tick=call.tick,
        )  # fmt: skip
    elif item.donor is not None:
        for layer, by_position in _donor_rows(call, model, item, point, layers, length).items():
            yield Intervention(layers=(layer,), rows=by_position, **shared)
    else:
        vector = None if item.vector is None else call.vector(model, item.vector, point_width(model, point))
        yield Intervention(layers=tuple(layers), vector=vector, **shared)


def sources(items: Iterable[Intervention], generating: bool = False) -> str | None:
    """What mean and resample put in, each told once."""
    told = dict.fromkeys(item.source for item in items if item.source)
    beyond = generating and any(item.source and item.rows for item in items)
    return ". ".join([*told, *["New tokens' rows: over all rows but each prompt's first"] * beyond]) or None


def donor_rows_cost(cfg: Config, length: int, point: str, layers: Sequence[int], positions: int) -> Cost:
    """Rows of a donor beside its pass: as they are recorded, and by position."""
    rows = of_capture(cfg, length, [point], len(layers), positions)
    return rows.holding(rows.growing)


def pattern_cost(cfg: Config, point: str, length: int) -> Cost:
    """What changing a point holds beside the pass: attention patterns are whole then."""
    return Cost(nbytes=4 * pattern_bytes(cfg, length) if point == "attn_pattern" else 0)


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
    call: Call, model: Model, item: described.Intervention, point: str, layers: list[int], length: int
) -> dict[int, dict[int, Array]]:
    """{layer: {position in the recipient: the donor's row}}."""
    assert item.donor is not None
    donor = call.ids(model, item.donor)
    if item.pairs is None and len(donor) != length:
        raise InputError(
            f"patch: the donor has {len(donor)} tokens, the prompt {length}; give pairs, such as [[-1, -1]], to say "
            "which row goes where"
        )
    pairs = [(p, p) for p in range(length)] if item.pairs is None else item.pairs
    places = [(model.resolve_position(a, len(donor)), model.resolve_position(b, length)) for a, b in pairs]
    destinations((layers[0], *pair) for pair in places)  # one row for each place
    targets = [(layer, source) for layer in layers for source, _ in places]
    rows = capture_donor_state(model, donor, targets, point, call.tick).rows
    heads = slice(None) if item.heads is None else item.heads
    by_head = point_named(point).head_axis is not None
    return {
        layer: {to: rows[layer, source][heads] if by_head else rows[layer, source] for source, to in places}
        for layer in layers
    }
