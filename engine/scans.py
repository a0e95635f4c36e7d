"""The named sweeps: what is varied, as lists of variants for `sweep`.

patching_grid     a donor's activations into a run, cell by cell (Meng et al. 2022; Heimersheim & Nanda 2024);
                  patching_grid_cost says what it will take
ablation_scan     zero, mean or resample ablation by layer, component or head
knockout_scan     attention cut, by layer and head or key (Geva et al. 2023)
alpha_sweep       one steering vector at many strengths
Scan              the result: one number per cell
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from engine.cost import Cost, row_shape
from engine.decoder import Tick
from engine.edits import Scope, Unit
from engine.errors import InputError, PointError, PromptError, clipped
from engine.forks import Variant
from engine.hooks import RecordHook
from engine.interventions import Intervention
from engine.metrics import Metric, recovered, rounding
from engine.network import Network, Tokens
from engine.ops import Array
from engine.patching import by_position
from engine.points import ONCE
from engine.points import point as point_named
from engine.pools import pooled_points, pooled_rows_cost
from engine.replacements import Match, matched_scope, replacement
from engine.shares import Progress
from engine.sweep import BUDGET, Base, base_run, sweep, sweep_cost

GridBy = Literal["position", "head", "head_position"]
AblateBy = Literal["layer", "component", "head"]
AblateMode = Literal["zero", "mean", "resample"]
KnockoutBy = Literal["key", "head"]

Axes = dict[str, Sequence[Any]]

Pools = Mapping[str, Mapping[int, list[Array]]]
"""{point: {layer: of each prompt (seq, [heads,] width)}}."""

Cell = tuple[tuple[Any, ...], float]
"""A cell's labels, one of each axis, and its value."""

COMPONENTS = ("attn_out", "mlp_out")
"""What a layer adds to the residual."""


@dataclass(frozen=True)
class Scan:
    """One number per cell of a grid.

    `axes` is {name: what it runs over}, such as {"layer": (0, 1), "position": (0, 1, 2)}; values: the metric in each
    cell, an array with these axes. `baseline` is the metric of the unchanged run, `donor` the donor's, where there is
    one; `logits` and `donor_logits` are those runs' (d_vocab,). identical: True where donor and recipient are the same
    by construction, so that nothing was run. `applied` counts the rows that interventions changed; `layer_rows` those
    that went through a layer in the sweep. `source` says what mean or resample ablation put in.
    """

    metric: Metric
    axes: dict[str, tuple[Any, ...]]
    values: Array
    baseline: float
    donor: float | None
    logits: Array
    donor_logits: Array | None
    identical: npt.NDArray[np.bool_]
    applied: int
    layer_rows: int
    slices: int
    source: str = ""

    def recovered(self) -> Array | None:
        """`metrics.recovered` of each cell: above 1 past the donor, below 0 away from it; None without a donor that
        differs.
        """
        return None if self.donor is None else recovered(self.metric.kind, self.values, self.baseline, self.donor)

    @property
    def changes(self) -> Array:
        """Value - baseline of each cell."""
        out: Array = self.values - np.float32(self.baseline)
        return out

    @property
    def floor(self) -> float:
        """Smaller changes are no findings: a hundredth of the gap to the donor, or what rounding can do."""
        gap = 0.0 if self.donor is None else abs(self.donor - self.baseline)
        return max(gap / 100, rounding(self.metric, self.logits))

    def ends(self, k: int) -> tuple[list[Cell], list[Cell]]:
        """The k cells that raise the metric most, and the k that lower it most, as (labels, value), each from the
        largest change on; cells that change it by less than `floor`, or not at all, are in neither.
        """
        cells, changes, floor = list(product(*self.axes.values())), self.changes.ravel(), self.floor
        order = np.argsort(-changes, kind="stable")
        found = [(cells[i], float(self.values.flat[i])) for i in order if abs(changes[i]) >= floor and changes[i]]
        raised = [cell for cell in found if cell[1] > self.baseline]
        return raised[:k], found[len(raised) :][::-1][:k]

    def largest(self, k: int) -> list[Cell]:
        """The k cells that lie farthest from the baseline, as (labels, value), farthest first."""
        distance = np.abs(self.changes).ravel()
        order = np.argsort(-distance, kind="stable")[:k]
        cells = list(product(*self.axes.values()))
        return [(cells[i], float(self.values.flat[i])) for i in order]


def patching_grid(
    model: Network,
    donor: Tokens,
    recipient: Tokens,
    metric: Metric,
    point: str = "resid_post",
    by: GridBy = "position",
    layers: Iterable[int] | None = None,
    positions: Iterable[int] | None = None,
    budget: int = BUDGET,
    tick: Tick | None = None,
) -> Scan:
    """Put the donor's rows of a point into the recipient's run, one cell at a time.

    `by` says what a cell is: one position of a layer (all its heads), one head (at all `positions` together), or one
    head at one position; at k and v heads are key-value heads, and their axis is called kv_head. Both prompts must have
    the same number of tokens; cells before the first token that differs are answered without a run.
    """
    places = None if positions is None else list(positions)
    axes, cells = _grid(model, donor, recipient, point, by, layers, places)
    _check(model, metric, axes)
    cost = patching_grid_cost(model, donor, recipient, point, by, axes["layer"], places, budget)  # checks each cell
    tick = Progress(tick, cost.layers)
    record = RecordHook.for_layers(axes["layer"], points=[point])
    beside = _beside(model, donor, recipient)
    base = base_run(model, recipient, min(axes["layer"]), beside=beside, hook=record, tick=tick)
    rows = {i: by_position(x[0], point).copy() for i, x in record.get(point).items()} if beside else {}
    return _scan(model, recipient, metric, axes, cells(rows), budget, tick, base)


def _beside(model: Network, donor: Tokens, recipient: Tokens) -> list[Tokens]:
    """The donor, if it needs a run: rows of one batch may differ in their last bits even where the tokens are equal."""
    same = np.array_equal(model.token_batch(donor), model.token_batch(recipient))
    return [] if same else [donor]


def patching_grid_cost(
    model: Network,
    donor: Tokens,
    recipient: Tokens,
    point: str = "resid_post",
    by: GridBy = "position",
    layers: Iterable[int] | None = None,
    positions: Iterable[int] | None = None,
    budget: int = BUDGET,
) -> Cost:
    """What `patching_grid` will take."""
    axes, cells = _grid(model, donor, recipient, point, by, layers, positions)
    length = model.token_batch(donor).shape[1]
    blank = np.broadcast_to(np.float32(0), (length, *row_shape(model.config, point, length)))
    variants = [cell for cell in cells(dict.fromkeys(axes["layer"], blank)) if cell is not None]
    cost = sweep_cost(model, recipient, variants, budget, 1 + len(_beside(model, donor, recipient)))
    return cost.holding(4 * 2 * len(axes["layer"]) * blank.size)


def grid_cells(
    model: Network,
    donor: Tokens,
    recipient: Tokens,
    point: str = "resid_post",
    by: GridBy = "position",
    layers: Iterable[int] | None = None,
    positions: Iterable[int] | None = None,
) -> int:
    """How many numbers `patching_grid` will give."""
    axes, _ = _grid(model, donor, recipient, point, by, layers, positions)
    return math.prod(map(len, axes.values()))


def _grid(
    model: Network,
    donor: Tokens,
    recipient: Tokens,
    point: str,
    by: GridBy,
    layers: Iterable[int] | None,
    positions: Iterable[int] | None,
) -> tuple[Axes, Callable[[Mapping[int, Array]], list[Variant | None]]]:
    """The axes of a grid, and its cells once the donor's rows {layer: (seq, ...)} are known."""
    ids, theirs = model.token_batch(recipient)[0], model.token_batch(donor)[0]
    if len(ids) != len(theirs):
        raise PromptError(
            f"the donor has {len(theirs)} tokens, the recipient {len(ids)}: a grid patches each position from the same "
            "position, so both need the same number; reword one, or patch chosen pairs of positions instead"
        )
    places = [model.resolve_position(p, len(ids)) for p in (range(len(ids)) if positions is None else positions)]
    axes = _grid_axes(model, point, by, _grid_layers(model, point, layers), places)
    first = next((i for i, (mine, other) in enumerate(zip(ids, theirs, strict=True)) if mine != other), len(ids))

    def cell(rows: Mapping[int, Array], layer: int, *, position: int | None = None, **heads: int) -> Variant | None:
        head = next(iter(heads.values()), None)  # of a head or kv_head axis
        moved = [p for p in (places if position is None else [position]) if p >= first]
        which = {p: rows[layer][p] if head is None else rows[layer][p, [head]] for p in moved}
        only = None if head is None else (head,)
        return Variant((Intervention("patch", (layer,), point, heads=only, rows=which),)) if moved else None

    def cells(rows: Mapping[int, Array]) -> list[Variant | None]:
        return [cell(rows, **dict(zip(axes, place, strict=True))) for place in product(*axes.values())]

    return axes, cells


def ablation_scan(
    model: Network,
    prompt: Tokens,
    metric: Metric,
    by: AblateBy = "component",
    mode: AblateMode = "zero",
    over: Iterable[Tokens] | None = None,
    match: Match = "position",
    layers: Iterable[int] | None = None,
    positions: Scope = "all",
    seed: int = 0,
    budget: int = BUDGET,
    tick: Tick | None = None,
) -> Scan:
    """Take parts of the model away, one at a time.

    A part is a layer (what its attention and its MLP add), a component (one of the two), or a head (its z). `mode`
    says what takes its place: zeros, the mean over the prompts `over`, or rows drawn from them; `match` how their rows
    are matched with the prompt's (`replacements`).
    """
    _one_of("by", by, AblateBy)
    chosen = _layers(model, layers)
    names = ("z",) if by == "head" else COMPONENTS
    length, prompts = model.token_batch(prompt).shape[1], _prompts(model, mode, over)
    scope = positions if mode == "zero" else matched_scope(mode, length, [*map(len, prompts)], positions, match)
    axes: Axes = {"layer": chosen}
    if by == "component":
        axes["component"] = COMPONENTS
    elif by == "head":
        axes["head"] = range(model.config.n_heads)

    def without(pools: Pools | None, layer: int, component: str | None = None, head: int | None = None) -> Variant:
        only = None if head is None else (head,)

        def away(name: str) -> Intervention:
            if pools is None:
                return Intervention("zero", (layer,), name, scope, only)
            rows = pools[name][layer]
            made = replacement(mode, length, name, layer, rows, positions=positions, heads=only, match=match)
            return replace(made, seed=seed)

        return Variant(tuple(map(away, names if component is None else (component,))))

    def variants(pools: Pools | None) -> list[Variant]:
        return [without(pools, **dict(zip(axes, place, strict=True))) for place in product(*axes.values())]

    cells = variants(None)
    if prompts:
        if tick is not None:
            pooling = pooled_rows_cost(model, prompts, chosen, names[0])
            tick = Progress(tick, pooling.layers + sweep_cost(model, prompt, cells, budget).layers)
        cells = variants(pooled_points(model, prompts, chosen, names, tick=tick))
    scan = _scan(model, prompt, metric, axes, cells, budget, tick)
    sources = dict.fromkeys(item.source for cell in cells for item in cell.interventions if item.source)
    return replace(scan, source=". ".join(sources))


def knockout_scan(
    model: Network,
    prompt: Tokens,
    metric: Metric,
    keys: Iterable[int] | None = None,
    queries: Scope = "last",
    by: KnockoutBy = "key",
    layers: Iterable[int] | None = None,
    width: int = 1,
    budget: int = BUDGET,
    tick: Tick | None = None,
) -> Scan:
    """Cut attention from the rows `queries` to `keys`: one key of all heads at a time, or all keys of one head.

    `keys` are all positions by default. A cell cuts `width` layers from its own upwards, as far as there are any.
    """
    _one_of("by", by, KnockoutBy)
    n, length = model.config.n_layers, model.token_batch(prompt).shape[1]
    hidden = [model.resolve_position(key, length) for key in (range(length) if keys is None else keys)]
    if width < 1:
        raise InputError(f"width is {width}; it must be at least 1 layer")

    def cut(layer: int, key: int | None = None, head: int | None = None) -> Variant:
        span, only = tuple(range(layer, min(layer + width, n))), None if head is None else (head,)
        which = tuple(hidden) if key is None else (key,)
        return Variant((Intervention("knockout", span, "attn_pattern", queries, only, keys=which),))

    axes: Axes = {"layer": _layers(model, layers), by: hidden if by == "key" else range(model.config.n_heads)}
    variants = [cut(**dict(zip(axes, place, strict=True))) for place in product(*axes.values())]
    return _scan(model, prompt, metric, axes, variants, budget, tick)


def alpha_sweep(
    model: Network,
    prompt: Tokens,
    layer: int,
    vector: Array,
    alphas: Sequence[float],
    metric: Metric,
    unit: Unit = "raw",
    positions: Scope = "last",
    point: str = "resid_post",
    budget: int = BUDGET,
    tick: Tick | None = None,
) -> Scan:
    """Steer with alpha * vector for each of `alphas`."""
    at = (model.resolve_layer(layer),)
    steer = partial(Intervention, "steer", at, point, positions, unit=unit, vector=vector)
    variants = [Variant((steer(value=alpha),)) for alpha in alphas]
    return _scan(model, prompt, metric, {"alpha": alphas}, variants, budget, tick)


# --- shared ---------------------------------------------------------------------------------------------------


def _scan(
    model: Network,
    prompt: Tokens,
    metric: Metric,
    axes: Axes,
    cells: Sequence[Variant | None],
    budget: int,
    tick: Tick | None,
    base: Base | None = None,
) -> Scan:
    """Sweep the cells that need a run; the others have the baseline's value. `base` is a donor's and the prompt's."""
    _check(model, metric, axes)
    read, only = metric.narrowed()
    variants = [v for v in cells if v is not None]
    run = sweep(model, prompt, variants, read, only=only, budget=budget, base=base, tick=tick)
    identical = np.array([v is None for v in cells])
    values = np.full(len(cells), run.baseline, np.float32)
    values[~identical] = run.values
    shape = [len(labels) for labels in axes.values()]
    donor = None if base is None else (*base.beside_logits, base.logits)[0]
    return Scan(
        metric=metric,
        axes={name: tuple(labels) for name, labels in axes.items()},
        values=values.reshape(shape),
        baseline=float(run.baseline),
        donor=None if donor is None else float(metric(donor[None], run.logits)[0]),
        logits=run.logits,
        donor_logits=donor,
        identical=identical.reshape(shape),
        applied=sum(edit.fired for edits in run.edits for edit in edits),
        layer_rows=run.layer_rows,
        slices=run.slices,
    )


def _check(model: Network, metric: Metric, axes: Axes) -> None:
    metric.check(model)
    if empty := [name for name, labels in axes.items() if not len(labels)]:
        raise InputError(f"the grid has no cells; name at least one {empty[0]}")


def _one_of(name: str, value: str, valid: Any) -> None:
    if value not in get_args(valid):
        raise InputError(f"{name} is {clipped(value)}; valid: {', '.join(get_args(valid))}")


def _layers(model: Network, layers: Iterable[int] | None) -> list[int]:
    return model.resolve_layers(range(model.config.n_layers) if layers is None else layers)


def _grid_layers(model: Network, point: str, layers: Iterable[int] | None) -> list[int]:
    """The layers asked for; the one layer of a point that exists once."""
    model.check_point(point_named(point).name)
    only = {"embed": 0, "final_norm": model.config.n_layers - 1}
    return [only[point]] if point in ONCE else _layers(model, layers)


def _grid_axes(model: Network, point: str, by: GridBy, layers: list[int], places: list[int]) -> Axes:
    _one_of("by", by, GridBy)
    if by == "position":
        return {"layer": layers, "position": places}
    if point_named(point).head_axis is None:
        raise PointError(f"{point} has no heads; points with heads are q, k, v and z")
    shared = point in ("k", "v")
    heads: Axes = {"kv_head": range(model.config.n_kv_heads)} if shared else {"head": range(model.config.n_heads)}
    return {"layer": layers, **heads} | ({"position": places} if by == "head_position" else {})


def _prompts(model: Network, mode: AblateMode, over: Iterable[Tokens] | None) -> list[list[int]]:
    """The ids of the prompts `over`; none for zero ablation."""
    _one_of("mode", mode, AblateMode)
    prompts = [model.token_batch(prompt)[0].tolist() for prompt in over or ()]
    if (mode == "zero") == bool(prompts):
        raise InputError(f"mode {mode} {'takes no' if prompts else 'needs'} prompts in `over`")
    return prompts
