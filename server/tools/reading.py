"""Looking without touching: capture_residuals, logit_lens, track_token, track_race."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated

import numpy as np
from pydantic import Field

from engine import Model, RecordHook, forward, trace_forward
from engine.cost import Cost, of_capture, of_pass
from engine.distribution import rank_of, softmax_of, top_k
from engine.errors import InputError
from engine.lens import READ_AT_ONCE, emergence_layer, lens_cost, lens_logits
from engine.ops import Array, softmax
from engine.points import ONCE, POINTS, only_layer
from schemas.arguments import Layers, ModelRef, PointName, Positions, Prompt, ResidualName, TokenRef, TopK
from schemas.reading import Capture, Crossing, Lens, LensRow, PointNorm, Race, RaceRow, Track, TrackRow
from server.call import Call, label, layer_list, position_list, require_one, token_id, token_shown
from server.lab import LoadedModel
from server.residuals import check_entries, held_places, held_residuals, held_rows, lens_rows, own_answer, read_point
from server.tools.effects import joined
from server.twins import tell_twins

MOST_CHARACTERS = 7700
"""Of a capture in one answer, beyond which its lens lists fewer tokens of each row, but one at least: with a hundred
rows or fewer the answer stays under 2,000 tokens with the notice, with `MOST_ENTRIES` rows it takes 10,000.
"""

TOO_FLAT = (
    "The token ends on top of a distribution too flat for a lead: some token always is on top. It leads where it has "
    "at least 1 / sqrt(d_vocab) of the probability"
)
TOO_CLOSE = "The token ends on top, but ahead of another by no more than rounding can make, which is no lead"


def capture_residuals(
    call: Call,
    prompt: Prompt,
    layers: Layers = "all",
    points: Annotated[list[PointName], Field(fail_fast=True, min_length=1)] = ["resid_post"],  # noqa: B006
    positions: Positions = "last",
    lens_k: Annotated[int, Field(ge=0, le=10, description="read each row with the lens, top k")] = 0,
    model: ModelRef = None,
) -> Capture:
    """Run a prompt and keep named activations under an act: handle, with their norms.

    Use the handle in logit_lens(tensor=...), as a steering vector, in embedding_neighbors, or page with read_tensor.
    """
    loaded = call.loaded(model)
    engine = loaded.model
    ids = call.ids(engine, prompt)
    chosen, rows = layer_list(engine, layers), position_list(engine, positions, len(ids))
    names: list[str] = list(dict.fromkeys(points))
    for name in names:
        engine.check_point(name)
    at = {name: [only] if (only := only_layer(name, engine.config.n_layers)) is not None else chosen for name in names}
    there = list(dict.fromkeys(layer for layers in at.values() for layer in layers))
    if lens_k:
        check_entries(len(chosen), len(rows), lens_k)
    held = of_capture(engine.config, len(ids), names, len(there), len(rows))
    work = of_pass(engine.config, len(ids)) + (lens_cost(engine, len(rows)) if lens_k else Cost())
    call.expect(engine, work.beside(held), len(ids), keeps=held.growing)
    kept = _recorded(call, engine, ids, chosen, names, rows)
    tensors = {f"{name}.{layer}": array for name, by_layer in kept.items() for layer, array in by_layer.items()}
    lens, own = _lens_of_capture(call, engine, kept, rows, lens_k) if lens_k else (None, None)
    about = f"{', '.join(names)} of {len(there)} layers at {len(rows)} positions"
    handle = call.lab.store.put(
        "act",
        label(engine, ids, f"L{there[0]}-{there[-1]}"),
        call.owner,
        tensors,
        {
            "about": about,
            "model": loaded.handle,
            "fingerprint": engine.fingerprint,
            "prompt_ids": ids,
            "rows": {"points": names, "layers": there, "positions": rows, "prompt_length": len(ids)},
        },
    )
    made = Capture(
        model=loaded.handle,
        notice=". ".join(filter(None, [loaded.notice, _once(at, chosen)])) or None,
        handle=handle,
        prompt_tokens=len(ids),
        points=names,
        layers=there,
        positions=rows,
        shape=list(next(iter(tensors.values())).shape),
        bytes=sum(array.nbytes for array in tensors.values()),
        norms=[norm for name, by_layer in kept.items() for norm in _norms(name if len(names) > 1 else None, by_layer)],
        lens=lens,
        own_answer=own,
    )
    return _fitting(call, made, lens_k)


def _recorded(
    call: Call, model: Model, ids: list[int], layers: list[int], points: list[str], rows: list[int]
) -> dict[str, dict[int, Array]]:
    """{point: {layer: rows}} of one pass."""
    record = RecordHook.for_layers(layers, points=points, positions=sorted(rows))
    forward(model, ids, hook=record, logits_at="none", tick=call.tick)
    return {name: _ordered(record.get(name), name, rows) for name in points}


def _once(at: dict[str, list[int]], asked: list[int]) -> str | None:
    """Of points that exist once per pass: where they are, unless just that was asked for."""
    told = [f"{name} exists once, at layer {layers[0]}" for name, layers in at.items() if name in ONCE]
    return "; ".join(told) if told and any(layers != asked for layers in at.values()) else None


def _ordered(by_layer: dict[int, Array], point: str, rows: list[int]) -> dict[int, Array]:
    """Position first (then heads, if any), rows in the order asked for."""
    axis = POINTS[point].seq_axis - 1
    order = [sorted(rows).index(row) for row in rows]
    return {layer: np.take(np.moveaxis(array, axis, 0), order, 0) for layer, array in by_layer.items()}


def _norms(point: str | None, by_layer: dict[int, Array]) -> list[PointNorm]:
    norms = {layer: np.linalg.norm(array.astype(np.float64), axis=-1) for layer, array in by_layer.items()}
    return [
        PointNorm(point=point, layer=layer, mean_norm=float(n.mean()), max_norm=float(n.max()) if n.size > 1 else None)
        for layer, n in norms.items()
    ]


def _fitting(call: Call, made: Capture, k: int) -> Capture:
    """With as many of the k tokens in each row of the lens as one answer holds beside the norms, and one at least."""
    if made.lens is None:
        return made
    listed, shown = k, made
    while listed > 1 and len(shown.model_dump_json(exclude_defaults=True)) > MOST_CHARACTERS:
        listed -= 1
        rows = [row.model_copy(update={"top": row.top[:listed]}) for row in made.lens]
        shown = made.model_copy(update={"lens": rows})
    if listed < k:
        call.note(
            f"the lens lists {listed} of {k} tokens of each row, as many as an answer holds; logit_lens reads the "
            "others from the handle"
        )
    return shown


def _lens_of_capture(
    call: Call, model: Model, kept: dict[str, dict[int, Array]], rows: list[int], k: int
) -> tuple[list[LensRow] | None, int | None]:
    """The lens of the point that it can read, and which layer is the model's own answer."""
    point = read_point(call, [*kept], "the points captured")
    if point is None:
        return None, None
    return lens_rows(model, kept[point], rows, k), own_answer(call, model, kept[point], point)


def logit_lens(
    call: Call,
    prompt: Prompt | None = None,
    tensor: Annotated[str | None, Field(description="act: handle of residuals")] = None,
    layers: Layers = "all",
    positions: Positions = "last",
    k: TopK = 3,
    point: ResidualName | None = None,
    model: ModelRef = None,
) -> Lens:
    """Read the residual stream after each layer as next-token probabilities: what would the model say here?

    The last layer equals the model's own distribution; identity_error shows it.
    """
    require_one(prompt=prompt, tensor=tensor)
    loaded = call.loaded(model)
    if tensor is not None:
        return _lens_of_handle(call, loaded, tensor, point, layers, positions, k)
    assert prompt is not None
    return _lens_of_prompt(call, loaded, prompt, point or "resid_post", layers, positions, k)


def _lens_of_prompt(
    call: Call,
    loaded: LoadedModel,
    prompt: str | list[int],
    point: str,
    layers: list[int] | str,
    positions: str | list[int],
    k: int,
) -> Lens:
    engine = loaded.model
    engine.check_point(point)
    ids = call.ids(engine, prompt)
    rows, last = position_list(engine, positions, len(ids)), engine.config.n_layers - 1
    chosen = [0] if point in ONCE else layer_list(engine, layers)
    check_entries(len(chosen), len(rows), k)
    compared = point == "resid_post" and last in chosen
    call.expect(engine, _lens_cost(engine, point, len(ids), len(chosen), len(rows), compared), len(ids))
    record = RecordHook.for_layers(chosen, points=[point], positions=sorted(rows))
    own = forward(engine, ids, hook=record, logits_at=rows if compared else "none", tick=call.tick).logits
    residuals = _ordered(record.get(point), point, rows)
    return Lens(
        model=loaded.handle,
        notice=loaded.notice,
        rows=lens_rows(engine, {layer: residuals[layer] for layer in chosen}, rows, k),
        point=point,
        own_answer=own_answer(call, engine, chosen, point),
        identity_error=None if own is None else _identity_error(engine, residuals[last], own[0]),
    )


def _identity_error(model: Model, residuals: Array, own: Array) -> float:
    """The largest difference of the lens of (rows, d_model) from (rows, d_vocab) logits, in probabilities; some rows
    at a time, as the lens reads them.
    """
    parts = [slice(start, start + READ_AT_ONCE) for start in range(0, len(residuals), READ_AT_ONCE)]
    return max(_apart(lens_logits(model, residuals[part]), own[part]) for part in parts)


def _apart(logits: Array, others: Array) -> float:
    """The largest difference in probabilities; the logits are used up."""
    apart = softmax(logits)
    apart -= softmax_of(others)
    return float(np.abs(apart, out=apart).max())


def _lens_cost(model: Model, point: str, length: int, layers: int, positions: int, compared: bool) -> Cost:
    """A pass, then the lens, beside what is read and, where it is compared, the model's own distributions."""
    held = of_capture(model.config, length, [point], layers, positions)
    read = lens_cost(model, positions)
    if compared:
        own = Cost().holding(4 * positions * model.config.d_vocab, positions=positions)
        read = read.beside(read).beside(own)
    return (of_pass(model.config, length) + read).beside(held)


def _lens_of_handle(
    call: Call,
    loaded: LoadedModel,
    handle: str,
    point: str | None,
    layers: list[int] | str,
    positions: str | list[int],
    k: int,
) -> Lens:
    record = call.record(handle, "act", loaded.model)
    held = held_rows(record)
    asked = position_list(loaded.model, positions, held["prompt_length"])
    rows = held["positions"] if positions == "all" else asked
    point = read_point(call, held["points"], record.handle, point)
    chosen, _ = held_places(record, point, layers, rows, loaded.model)
    check_entries(len(chosen), len(rows), k)
    assert point is not None
    taken = of_capture(loaded.model.config, 1, [point], len(chosen), len(rows))
    call.expect_read(record)
    call.expect(loaded.model, lens_cost(loaded.model, len(rows)).beside(taken), held["prompt_length"])
    kept = held_residuals(call, record, point, chosen, rows, loaded.model)
    return Lens(
        model=loaded.handle,
        notice=loaded.notice,
        rows=lens_rows(loaded.model, kept, rows, k),
        point=point,
        own_answer=own_answer(call, loaded.model, kept, point),
        identity_error=None,
    )


def _layer_logits(call: Call, model: Model, ids: list[int], layers: list[int], position: int) -> dict[int, Array]:
    """{layer: (d_vocab,)} lens logits at one position."""
    row = 4 * model.config.d_vocab
    shown = Cost().holding(len(layers) * row, layers=len(layers)).holding(4 * row)
    call.expect(model, of_pass(model.config, len(ids)) + shown, len(ids))
    trace = trace_forward(model, ids, capture_layers=layers, positions=[position], tick=call.tick)
    return {layer: lens_logits(model, rows)[0] for layer, rows in trace.residuals.items()}


def track_token(
    call: Call,
    prompt: Prompt,
    token: TokenRef,
    layers: Layers = "all",
    position: int = -1,
    model: ModelRef = None,
) -> Track:
    """Follow one token's probability, rank and logit through the layers. For several tokens use track_race."""
    loaded = call.loaded(model)
    engine = loaded.model
    ids, chosen, wanted = call.ids(engine, prompt), layer_list(engine, layers), token_id(engine, token)
    place = engine.resolve_position(position, len(ids))
    last = engine.config.n_layers - 1
    logits = _layer_logits(call, engine, ids, sorted({*chosen, last}), place)
    tell_twins(call, engine, [wanted], logits[last])
    rows = [
        TrackRow(
            layer=layer,
            probability=float(softmax_of(row)[wanted]),
            rank=rank_of(row, wanted),
            logit=float(row[wanted]),
        )
        for layer, row in logits.items()
        if layer in chosen
    ]
    since = emergence_layer({row.layer: logits[row.layer] for row in rows}, wanted)
    return Track(
        model=loaded.handle,
        notice=joined(loaded.notice, _no_lead(engine, rows[-1]) if since is None else None),
        token=token_shown(engine, wanted),
        position=place,
        rows=rows,
        own_answer=own_answer(call, engine, chosen),
        emergence_layer=since,
        peak_layer=max(rows, key=lambda row: row.probability).layer,
    )


def _no_lead(model: Model, end: TrackRow) -> str | None:
    """Why a token that ends on top does not lead there."""
    flat = end.probability < model.config.d_vocab**-0.5
    return None if end.rank else TOO_FLAT if flat else TOO_CLOSE


def track_race(
    call: Call,
    prompt: Prompt,
    tokens: Annotated[
        list[TokenRef] | None,
        Field(min_length=2, max_length=10, description="default: the five most probable"),
    ] = None,
    layers: Layers = "all",
    position: int = -1,
    model: ModelRef = None,
) -> Race:
    """Race several tokens against each other through the layers: who leads where, and where the lead changes hands."""
    loaded = call.loaded(model)
    engine = loaded.model
    ids, chosen = call.ids(engine, prompt), sorted(layer_list(engine, layers))
    wanted = None if tokens is None else list(dict.fromkeys(token_id(engine, t) for t in tokens))
    if wanted is not None and len(wanted) < 2:
        raise InputError("the tokens are all the same; a race needs two different ones")
    place = engine.resolve_position(position, len(ids))
    last = engine.config.n_layers - 1
    logits = _layer_logits(call, engine, ids, sorted({*chosen, last}), place)
    runners = [i for i, _ in top_k(logits[last], 5)] if wanted is None else wanted
    tell_twins(call, engine, wanted or (), logits[last])
    names = _names(engine, runners)
    rows = [_race_row(layer, softmax_of(logits[layer])[runners], names) for layer in chosen]
    return Race(
        model=loaded.handle,
        notice=loaded.notice,
        tokens=[token_shown(engine, i) for i in runners],
        position=place,
        rows=rows,
        own_answer=own_answer(call, engine, chosen),
        crossings=[
            Crossing(layer=b.layer, loses=a.leader, takes=b.leader) for a, b in pairwise(rows) if a.leader != b.leader
        ],
    )


def _names(model: Model, tokens: Sequence[int]) -> list[str]:
    """Their texts, with their ids where texts are alike: bytes that are part of a character show alike."""
    pieces = [model.tokenizer.piece(token) for token in tokens]
    return [
        piece if pieces.count(piece) == 1 else f"{piece} ({token})" for piece, token in zip(pieces, tokens, strict=True)
    ]


def _race_row(layer: int, scores: Array, names: list[str]) -> RaceRow:
    return RaceRow(layer=layer, probabilities=[float(p) for p in scores], leader=names[int(scores.argmax())])
