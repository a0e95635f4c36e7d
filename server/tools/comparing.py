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
from server.residuals import held_residuals, held_rows, own_answer, read_point
from server.tools.effects import SHOWN

DIVERGED = 0.1
"""Nats of KL between two lenses from which layers count as different."""

Side = Annotated[Prompt, Field(description="a prompt, act: handle or model: handle")]


@dataclass(frozen=True)
class _Run:
    """One side: residuals {layer: (d_model,)} at one position, of one model."""

    name: str
    handle: str
    notice: str | None
    model: Model
    point: str
    residuals: dict[int, Array]


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
    _expect(call, [a, b], prompt, layers, model)
    runs = [_run(call, side, prompt, layers, position, model) for side in (a, b)]
    if prompt is not None and not all(map(_is_model, (a, b))):
        raise InputError("prompt is for comparing two models: give a and b as model: handles")
    first, second = runs
    if first.model.config.d_vocab != second.model.config.d_vocab:
        raise InputError("the two models have different vocabularies, so what they say cannot be compared")
    shared = [layer for layer in first.residuals if layer in second.residuals]
    if not shared:
        raise InputError(f"no layer is in both: {sorted(first.residuals)} and {sorted(second.residuals)}")
    lenses = [{layer: lens_logits(run.model, run.residuals[layer]) for layer in shared} for run in runs]
    rows = [_row(layer, first, second, lenses[0][layer], lenses[1][layer]) for layer in shared]
    top_a, top_b = (probabilities(run.model, lens[shared[-1]], SHOWN) for run, lens in zip(runs, lenses, strict=True))
    return Comparison(
        model=first.handle,
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


def _notices(a: _Run, b: _Run) -> str | None:
    """What is said of either side, once where it is the same."""
    if a.notice == b.notice:
        return a.notice
    return ". ".join(f"{side}: {run.notice}" for side, run in (("a", a), ("b", b)) if run.notice)


def _own_answer(call: Call, runs: Sequence[_Run], layers: list[int]) -> int | None:
    """The layer whose lens is both sides' own answer."""
    if len({run.point for run in runs}) > 1:
        call.note(" and ".join(f"{side} is {run.point}" for side, run in zip("ab", runs, strict=True)))
    found = {own_answer(call, run.model, layers, run.point) for run in runs}
    return found.pop() if len(found) == 1 else None


def _expect(call: Call, sides: Sequence[Any], prompt: Any, layers: list[int] | str, model: str | None) -> None:
    """A pass of each side that is not a capture, as far as the last layer that is compared."""
    cost, longest = Cost(), 1
    for side in sides:
        engine = call.loaded(side if _is_model(side) else model).model
        text = prompt if _is_model(side) else side
        if text is not None and not _is_capture(side):
            length = len(call.ids(engine, text))
            cost += of_pass(engine.config, length, max(layer_list(engine, layers)) + 1)
            longest = max(longest, length)
    shown = 4 * 2 * len(layer_list(engine, layers)) * engine.config.d_vocab
    call.expect(engine, cost.holding(shown + 6 * 8 * engine.config.d_vocab), longest)


def _is_model(side: str | Sequence[int]) -> bool:
    return isinstance(side, str) and side.startswith("model:")


def _is_capture(side: str | Sequence[int]) -> bool:
    return isinstance(side, str) and side.startswith("act:")


def _run(call: Call, side: Any, prompt: Any, layers: list[int] | str, position: int, model: str | None) -> _Run:
    if _is_model(side) and prompt is None:
        raise InputError("to compare models, give the prompt that both run")
    loaded = call.loaded(side if _is_model(side) else model)
    if _is_capture(side):
        record = call.record(side, "act", loaded.model)
        place = loaded.model.resolve_position(position, held_rows(record)["prompt_length"])
        point = read_point(call, held_rows(record)["points"], record.handle)
        kept = held_residuals(record, point, layers, [place], loaded.model)
        assert point is not None
        rows = {layer: row[0] for layer, row in kept.items()}
        return _Run(side, loaded.handle, loaded.notice, loaded.model, point, rows)
    ids = call.ids(loaded.model, prompt if _is_model(side) else side)
    place = loaded.model.resolve_position(position, len(ids))
    chosen = sorted(layer_list(loaded.model, layers))
    trace = trace_forward(
        loaded.model, ids, capture_layers=chosen, stop=chosen[-1] + 1, positions=[place], tick=call.tick
    )
    name = side if _is_model(side) else f"{loaded.model.tokenizer.decode(ids[: place + 1])!r}"
    residuals = {layer: rows[0] for layer, rows in trace.residuals.items()}
    return _Run(name, loaded.handle, loaded.notice, loaded.model, "resid_post", residuals)


def _row(layer: int, a: _Run, b: _Run, lens_a: Array, lens_b: Array) -> LayerComparison:
    x, y = a.residuals[layer].astype(np.float64), b.residuals[layer].astype(np.float64)
    size = float(np.linalg.norm(x))
    comparable = x.shape == y.shape and size > 0 and np.linalg.norm(y) > 0
    return LayerComparison(
        layer=layer,
        cosine=float(x @ y / size / np.linalg.norm(y)) if comparable else None,
        distance=float(np.linalg.norm(x - y) / size) if comparable else None,
        kl=kl_divergence(lens_b, lens_a),
    )
