"""Two runs side by side: compare."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from engine import Model, trace_forward
from engine.cost import Cost, of_pass
from engine.distribution import kl_divergence
from engine.errors import InputError
from engine.lens import lens_logits
from engine.ops import Array
from schemas.arguments import Layers, ModelRef, Prompt
from schemas.reading import Comparison, LayerComparison
from server.call import Call, layer_list, probabilities
from server.lab import LoadedModel
from server.residuals import held_places, held_residuals, held_rows, own_answer, read_point
from server.store import Record
from server.tools.effects import SHOWN

DIVERGED = 0.1
"""Nats of KL between two lenses from which layers count as different."""

Side = Annotated[Prompt, Field(description="a prompt, act: handle or model: handle")]


@dataclass(frozen=True)
class _Side:
    """What is compared, before anything runs: a prompt's ids or a capture, and where it is read."""

    name: str
    loaded: LoadedModel
    point: str
    layers: list[int]
    position: int
    ids: list[int]
    record: Record | None

    @property
    def model(self) -> Model:
        return self.loaded.model


def compare(
    call: Call,
    a: Side,
    b: Side,
    prompt: Annotated[Prompt | None, Field(description="what both run, when a and b are models")] = None,
    layers: Layers = "all",
    position: Annotated[int, Field(description="-1 is each one's last")] = -1,
    model: ModelRef = None,
) -> Comparison:
    """Compare two runs layer by layer: residuals' cosine and distance over a's norm, KL of b's lens from a's.

    Two prompts on one model, two captures, or two models on one prompt. What makes the difference? Patch one into the
    other with causal_trace.
    """
    first, second = (_side(call, side, prompt, layers, position, model) for side in (a, b))
    if prompt is not None and not all(map(_is_model, (a, b))):
        raise InputError("prompt is for comparing two models: give a and b as model: handles")
    if first.model.config.d_vocab != second.model.config.d_vocab:
        raise InputError("the two models have different vocabularies, so what they say cannot be compared")
    shared = [layer for layer in first.layers if layer in second.layers]
    if not shared:
        raise InputError(f"no layer is in both: {sorted(first.layers)} and {sorted(second.layers)}")
    runs = (first, second)
    _expect(call, runs, len(shared))
    residuals = [_residuals(call, side) for side in runs]
    lenses = [
        {layer: lens_logits(run.model, held[layer]) for layer in shared}
        for run, held in zip(runs, residuals, strict=True)
    ]
    rows = [_row(layer, *(held[layer] for held in residuals), *(lens[layer] for lens in lenses)) for layer in shared]
    top_a, top_b = (probabilities(run.model, lens[shared[-1]], SHOWN) for run, lens in zip(runs, lenses, strict=True))
    return Comparison(
        model=first.loaded.handle,
        notice=_notices(first, second),
        a=first.name,
        b=second.name,
        rows=rows,
        own_answer=_own_answer(call, runs, shared),
        top_layer=shared[-1],
        top_a=top_a,
        top_b=top_b,
        first_divergence=next((row.layer for row in rows if row.kl > DIVERGED), None),
    )


def _notices(a: _Side, b: _Side) -> str | None:
    """What is said of either side, once where it is the same."""
    told = {"a": a.loaded.notice, "b": b.loaded.notice}
    if told["a"] == told["b"]:
        return told["a"]
    return ". ".join(f"{side}: {notice}" for side, notice in told.items() if notice)


def _own_answer(call: Call, runs: Sequence[_Side], layers: list[int]) -> int | None:
    """The layer whose lens is both sides' own answer."""
    if len({run.point for run in runs}) > 1:
        call.note(" and ".join(f"{side} is {run.point}" for side, run in zip("ab", runs, strict=True)))
    found = {own_answer(call, run.model, layers, run.point) for run in runs}
    return found.pop() if len(found) == 1 else None


def _expect(call: Call, sides: Sequence[_Side], layers: int) -> None:
    """A pass of each side that is not a capture, as far as the last layer that is compared; both lenses."""
    cost, cfg = Cost(), sides[0].model.config
    for side in sides:
        if side.record is None:
            cost += of_pass(side.model.config, len(side.ids), max(side.layers) + 1)
    shown = 4 * 2 * layers * cfg.d_vocab
    longest = max(len(side.ids) for side in sides)
    call.expect(sides[0].model, cost.holding(shown + 6 * 8 * cfg.d_vocab), max(longest, 1))


def _is_model(side: str | Sequence[int]) -> bool:
    return isinstance(side, str) and side.startswith("model:")


def _is_capture(side: str | Sequence[int]) -> bool:
    return isinstance(side, str) and side.startswith("act:")


def _side(call: Call, side: Any, prompt: Any, layers: list[int] | str, position: int, model: str | None) -> _Side:
    if _is_model(side) and prompt is None:
        raise InputError("to compare models, give the prompt that both run")
    loaded = call.loaded(side if _is_model(side) else model)
    engine = loaded.model
    if _is_capture(side):
        record = call.record(side, "act", engine)
        held = held_rows(record)
        place = engine.resolve_position(position, held["prompt_length"])
        point = read_point(call, held["points"], record.handle)
        chosen, _ = held_places(record, point, layers, [place], engine)
        assert point is not None
        return _Side(side, loaded, point, chosen, place, [], record)
    ids = call.ids(engine, prompt if _is_model(side) else side)
    place = engine.resolve_position(position, len(ids))
    name = side if _is_model(side) else f"{engine.tokenizer.decode(ids[: place + 1])!r}"
    return _Side(name, loaded, "resid_post", sorted(layer_list(engine, layers)), place, ids, None)


def _residuals(call: Call, side: _Side) -> dict[int, Array]:
    """{layer: (d_model,)}"""
    if side.record is not None:
        kept = held_residuals(call, side.record, side.point, side.layers, [side.position], side.model)
    else:
        kept = trace_forward(
            side.model, side.ids, capture_layers=side.layers, stop=side.layers[-1] + 1, positions=[side.position],
            tick=call.tick,
        ).residuals  # fmt: skip
    return {layer: rows[0] for layer, rows in kept.items()}


def _row(layer: int, a: Array, b: Array, lens_a: Array, lens_b: Array) -> LayerComparison:
    x, y = a.astype(np.float64), b.astype(np.float64)
    size = float(np.linalg.norm(x))
    comparable = x.shape == y.shape and size > 0 and np.linalg.norm(y) > 0
    return LayerComparison(
        layer=layer,
        cosine=float(x @ y / size / np.linalg.norm(y)) if comparable else None,
        distance=float(np.linalg.norm(x - y) / size) if comparable else None,
        kl=kl_divergence(lens_b, lens_a),
    )
