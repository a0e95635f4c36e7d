"""Residuals of runs and of captures, and what the lens reads from them: `lens_rows`, `held_residuals`, `own_answer`."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from engine import Model
from engine.errors import InputError, PointError
from engine.lens import most_probable
from engine.ops import Array
from schemas.reading import LensRow, LensToken
from server.call import Call, layer_list, layers_held, ranked
from server.store import Record

RESIDUALS = ("resid_post", "resid_mid", "resid_pre", "embed")
"""The points that the lens can read, best first."""

MOST_ENTRIES = 500
"""Tokens listed in one answer; more would not fit an agent's context."""


def lens_rows(model: Model, by_layer: Mapping[int, Array], rows: Sequence[int], k: int) -> list[LensRow]:
    """The k most probable tokens of {layer: (rows, d_model)}; `rows` are the positions."""
    return [
        LensRow(layer=layer, position=position, top=[LensToken(**dict(token)) for token in ranked(model, pairs)])
        for layer, array in by_layer.items()
        for position, pairs in zip(rows, most_probable(model, array, k), strict=True)
    ]


def check_entries(layers: int, positions: int, k: int) -> None:
    """Raise `InputError` for more than one answer lists."""
    if layers * positions * k > MOST_ENTRIES:
        raise InputError(
            f"{layers} layers x {positions} positions x {k} tokens are more than {MOST_ENTRIES} entries; "
            "ask for fewer layers or positions, or a smaller k"
        )


def own_answer(call: Call, model: Model, layers: Iterable[int], point: str = "resid_post") -> int | None:
    """The layer read whose lens is the model's own answer; without one a notice says where that is."""
    last = model.config.n_layers - 1
    if point == "resid_post" and last in layers:
        return last
    call.note(
        "no row here is the model's own answer, which the lens reads at resid_post of its last layer alone "
        f"(layer {last} of {model.name}): the others are what the rest of the model would be handed"
    )
    return None


def held_rows(record: Record) -> dict[str, Any]:
    """Which points, layers and positions a capture holds."""
    if "rows" not in record.provenance:
        raise InputError(f"{record.handle} holds {record.provenance['about']}, not activations; use read_tensor")
    held: dict[str, Any] = record.provenance["rows"]
    return held


def read_point(call: Call, points: Sequence[str], what: str, asked: str | None = None) -> str | None:
    """The point of several that the lens reads: the one asked for, or the best; None when it can read none of them.

    A notice names those that it leaves out. Raises `PointError` for one that is not among them.
    """
    if asked is not None and asked not in points:
        raise PointError(f"{what} holds {', '.join(points)}, not {asked}")
    point = next((name for name in RESIDUALS if name in ([asked] if asked else points)), None)
    others = [name for name in points if name != point]
    if asked is None and others:
        why = f"which {'is' if len(others) == 1 else 'are'} not the residual stream"
        if more := [name for name in others if name in RESIDUALS]:
            why = f"of which logit_lens with tensor and point reads {' and '.join(more)}"
        read = "nothing" if point is None else point
        call.note(f"of {what} the lens reads {read}, not {', '.join(others)}{', ' + why}")
    return point


def held_places(
    record: Record, point: str | None, layers: list[int] | str, rows: Sequence[int], model: Model
) -> tuple[list[int], list[int]]:
    """The layers of a capture that are meant, and where the rows are in it; raises `InputError` for what it lacks."""
    held = held_rows(record)
    if point not in RESIDUALS:
        raise InputError(
            f"{record.handle} holds {', '.join(held['points'])}; the lens reads the residual stream: "
            f"{', '.join(RESIDUALS)}"
        )
    there = layers_held(record, point)
    chosen = there if layers == "all" else layer_list(model, layers)
    missing = [f"layer {x}" for x in chosen if x not in there]
    missing += [f"position {x}" for x in rows if x not in held["positions"]]
    if missing:
        raise InputError(
            f"{', '.join(missing[:5])} not in {record.handle}, which holds {point} of layers {there}, "
            f"positions {held['positions']}"
        )
    return chosen, [held["positions"].index(row) for row in rows]


def held_residuals(
    call: Call, record: Record, point: str | None, layers: list[int] | str, rows: Sequence[int], model: Model
) -> dict[int, Array]:
    """{layer: (rows, d_model)} residuals of a capture."""
    chosen, where = held_places(record, point, layers, rows, model)
    tensors = call.tensors(record)
    return {layer: tensors[f"{point}.{layer}"][where] for layer in chosen}
