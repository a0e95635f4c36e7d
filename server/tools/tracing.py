"""Where is it computed: causal_trace."""

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from engine import Metric, Model, Scan, patching_grid
from engine.metrics import recovered, rounding, saturating
from engine.scans import grid_cells, patching_grid_cost
from schemas.arguments import Layers, MetricName, ModelRef, PointRef, Prompt, TokenRef
from schemas.base import Integers
from schemas.scans import CausalTrace, GridCell, TokenPair
from server.call import Call, layer_list, token_id
from server.lab import LoadedModel
from server.tools.effects import joined, recovered_notice
from server.twins import tell_twins

MOST_DIFFERENCES = 20


def causal_trace(
    call: Call,
    clean: Annotated[Prompt, Field(description="gives the answer; its rows are put in")],
    corrupt: Annotated[Prompt, Field(description="as many tokens, another answer; is patched")],
    token: Annotated[TokenRef | None, Field(description="the clean prompt's answer; not for kl")] = None,
    against: Annotated[TokenRef | None, Field(description="the corrupt prompt's answer")] = None,
    point: PointRef = "resid_post",
    metric: MetricName | None = None,
    by: Annotated[
        Literal["position", "head", "head_position"],
        Field(description="a cell: a position, a head at all positions, or a head at a position"),
    ] = "position",
    layers: Layers = "all",
    positions: Annotated[Integers | None, Field(min_length=1, description="left out: all")] = None,
    k: Annotated[int, Field(ge=1, le=50, description="cells listed at each end")] = 10,
    model: ModelRef = None,
) -> CausalTrace:
    """Find where an answer is computed: patch a clean run's activations into a corrupt one, cell by cell.

    Both prompts need the same number of tokens (see tokenize). resid_post shows where the information is; attn_out,
    mlp_out or z with by=head show what moves it. Follow up with patch_activations on one cell. The metric is the logit,
    or its difference to against, which shows suppressors too.
    """
    loaded = call.loaded(model)
    engine = loaded.model
    ids, donor = call.ids(engine, corrupt), call.ids(engine, clean)
    wanted = _metric(engine, metric, token, against)
    cells = point, by, layer_list(engine, layers), positions
    kept = 4 * grid_cells(engine, donor, ids, *cells)
    call.expect(engine, patching_grid_cost(engine, donor, ids, *cells), len(ids), keeps=kept)
    grid = patching_grid(engine, donor, ids, wanted, *cells, tick=call.tick)
    assert grid.donor_logits is not None
    tell_twins(call, engine, [wanted.token, wanted.against], grid.donor_logits, grid.logits)
    raised, lowered = ([_cell(engine, grid, *cell) for cell in end] for end in grid.ends(k))
    return CausalTrace(
        model=loaded.handle,
        notice=joined(loaded.notice, *_notices(grid, k, [*raised, *lowered])),
        metric=_named(engine, wanted),
        clean=_of_donor(grid),
        corrupt=grid.baseline,
        axes={name: list(labels) for name, labels in grid.axes.items()},
        top=raised,
        bottom=lowered,
        differs=_pairs(engine, donor, ids)[:MOST_DIFFERENCES],
        cells=grid.values.size,
        identical_cells=int(grid.identical.sum()),
        applied=grid.applied,
        layer_rows=grid.layer_rows,
        handle=_kept(call, loaded, grid, point, wanted.kind, ids, donor),
    )


def _metric(model: Model, kind: Any, token: str | int | None, against: str | int | None) -> Metric:
    ids = [None if text is None else token_id(model, text) for text in (token, against)]
    made = Metric(kind or ("logit" if against is None else "logit_difference"), *ids)
    made.check(model)
    return made


def _named(model: Model, metric: Metric) -> str:
    shown = [repr(model.tokenizer.piece(t)) for t in (metric.token, metric.against) if t is not None]
    return f"{metric.kind} of {' against '.join(shown)}" if shown else "KL(patched || corrupt) in nats"


def _of_donor(grid: Scan) -> float:
    assert grid.donor is not None
    return grid.donor


def _cell(model: Model, grid: Scan, place: tuple[Any, ...], value: float) -> GridCell:
    at = dict(zip(grid.axes, place, strict=True))
    readers = list(model.config.query_heads(at["kv_head"])) if "kv_head" in at else None
    part = recovered(grid.metric.kind, value, grid.baseline, _of_donor(grid))
    return GridCell(**at, query_heads=readers, value=value, change=value - grid.baseline, recovered=part)


def _notices(grid: Scan, k: int, listed: Sequence[GridCell]) -> Iterator[str | None]:
    """What is not listed, what `recovered` means where it is odd, and whether the metric could move at all."""
    kind, clean = grid.metric.kind, _of_donor(grid)
    small = int((~grid.identical & (abs(grid.changes) < grid.floor)).sum())
    if small and len(listed) < 2 * k:
        yield (
            f"{small} cells that change the metric by less than {grid.floor:.2g} are not listed: that is "
            f"{'rounding' if grid.floor == rounding(grid.metric, grid.logits) else 'a hundredth of clean - corrupt'}"
        )
    if more := sum(map(len, grid.ends(grid.values.size))) - len(listed):
        yield f"{more} more cells change it: name layers or positions, or raise k, to see them"
    if kind != "kl" and clean < grid.baseline:
        yield "clean is below corrupt: the token is no answer of clean's, and what moves corrupt to clean is in bottom"
    yield recovered_notice(kind, [cell.recovered for cell in listed], grid.baseline, clean)
    for name, logits in (("corrupt", grid.logits), ("clean", grid.donor_logits)):
        if logits is not None and (p := saturating(grid.metric, logits)) is not None:
            which = "leading token" if kind == "kl" else "token"
            moves = "moves" if kind == "kl" else "lowers" if p < 0.5 else "raises"
            yield (
                f"{kind} is saturated in the {name} run, where the {which} has {p:.6g}: what {moves} its logit hardly "
                "shows. Metric logit, or logit_difference with against, shows it"
            )
            return


def _pairs(model: Model, clean: list[int], corrupt: list[int]) -> list[TokenPair]:
    return [
        TokenPair(position=i, clean=model.tokenizer.piece(a), corrupt=model.tokenizer.piece(b))
        for i, (a, b) in enumerate(zip(clean, corrupt, strict=True))
        if a != b
    ]


def _kept(
    call: Call, loaded: LoadedModel, grid: Scan, point: str, metric: str, ids: list[int], donor: list[int]
) -> str:
    return call.lab.store.put(
        "act",
        f"trace-{point}-{metric}",
        call.owner,
        {"grid": np.ascontiguousarray(grid.values)},
        {
            "about": f"{metric} after patching {point}, by {' and '.join(grid.axes)}",
            "model": loaded.handle,
            "fingerprint": loaded.model.fingerprint,
            "prompt_ids": ids,
            "donor_ids": donor,
            "axes": {name: list(labels) for name, labels in grid.axes.items()},
        },
    )
