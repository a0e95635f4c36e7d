"""Runs with captures and patches: `trace_forward`, `capture_donor_state`, `patch_and_trace`, `map_pre_o_head`.

Causal tracing and activation patching after Meng et al. 2022 (ROME) and Heimersheim & Nanda 2024.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from engine.decoder import Tick, forward
from engine.edits import Edit, Scope, replaced_by
from engine.errors import HookError, InputError, LayerError, PositionError
from engine.hooks import CompositeHook, EditHook, LayerHook, RecordHook
from engine.network import Network, Tokens
from engine.ops import Array, IntArray
from engine.params import LayerParams
from engine.points import only_layer
from engine.points import point as point_named

HeadFunction = Callable[[Array], Array]
"""(rows, d_head) -> the same shape."""


@dataclass(frozen=True)
class Trace:
    """residuals: {layer: (seq, d_model)} `resid_post` (with a batch axis for a batch of prompts).
    logits: (d_vocab,) after the last position, None when the run stopped early.
    """

    residuals: dict[int, Array]
    logits: Array | None


@dataclass(frozen=True)
class DonorState:
    """Rows of one point of a donor's run: {(layer, position): array}, positions resolved."""

    point: str
    rows: dict[tuple[int, int], Array]

    def only(self, layer: int, position: int) -> "DonorState":
        """One of the rows."""
        return DonorState(self.point, {(layer, position): self.rows[layer, position]})


def trace_forward(
    model: Network,
    tokens: Tokens,
    *,
    hook: LayerHook | None = None,
    capture_layers: Iterable[int] = (),
    stop: int | None = None,
    positions: Scope = "all",
    tick: Tick | None = None,
) -> Trace:
    """One pass; `resid_post` of `capture_layers` as it is after `hook`.

    All layers below `stop` run and all hooks fire, whatever is captured.
    """
    layers = model.resolve_layers(capture_layers)
    if stop is not None and layers and max(layers) >= stop:
        raise InputError(f"layer {max(layers)} cannot be captured in a run that stops before layer {stop}")
    record = RecordHook.for_layers(layers, points=["resid_post"], positions=positions)
    both = CompositeHook([record] if hook is None else [hook, record])
    result = forward(model, tokens, hook=both, stop=stop, tick=tick)
    logits = None if result.logits is None else result.logits[:, -1]
    if logits is not None and len(logits) == 1:
        logits = logits[0]
    return Trace(record.post_layer, logits)


def capture_donor_state(
    model: Network,
    tokens: Tokens,
    targets: Iterable[tuple[int, int]],
    point: str = "resid_post",
    tick: Tick | None = None,
) -> DonorState:
    """The donor's rows at [(layer, position), ...]; negative layers and positions count from the end."""
    name, resolved = point_named(point).name, donor_places(model, model.token_batch(tokens).shape[1], targets, point)
    layers = {layer for layer, _ in resolved}
    places = sorted({pos for _, pos in resolved})
    record = RecordHook.for_layers(layers, points=[name], positions=places)
    forward(model, tokens, hook=record, stop=max(layers) + 1, logits_at="none", tick=tick)
    kept = record.get(name)
    axis = point_named(name).seq_axis - 1  # without the batch axis
    rows = {(layer, pos): np.take(kept[layer], places.index(pos), axis) for layer, pos in resolved}
    return DonorState(name, rows)


def donor_places(
    model: Network, length: int, targets: Iterable[tuple[int, int]], point: str = "resid_post"
) -> list[tuple[int, int]]:
    """[(layer, position), ...] of a point, resolved in a donor of `length` tokens; raises `InputError` for none."""
    name = point_named(point).name
    model.check_point(name)
    resolved = [(model.resolve_layer(layer), model.resolve_position(pos, length)) for layer, pos in targets]
    if not resolved:
        raise InputError("name at least one (layer, position) to capture")
    only = only_layer(name, model.config.n_layers)
    if only is not None and {layer for layer, _ in resolved} != {only}:
        raise LayerError(f"{name} exists once, at layer {only}; ask for it there")
    return resolved


def by_position(rows: Array, point: str) -> Array:
    """What was recorded of one prompt with its positions first: (seq, [heads,] width)."""
    out: Array = np.moveaxis(rows, point_named(point).seq_axis - 1, 0)
    return out


def patch_and_trace(
    model: Network,
    tokens: Tokens,
    donor: DonorState,
    capture_layers: Iterable[int] = (),
    to: Mapping[int, int] | None = None,
    tick: Tick | None = None,
) -> Trace:
    """Write the donor's rows into a run of `tokens`, at the same positions or at `to[position]`."""
    return trace_forward(
        model, tokens, hook=patch_hook(model, tokens, donor, to), capture_layers=capture_layers, tick=tick
    )


def patch_hook(model: Network, tokens: Tokens, donor: DonorState, to: Mapping[int, int] | None = None) -> EditHook:
    """The hook that writes the donor's rows; raises `PositionError` for rows the recipient does not have, and for two
    that would go to one place.
    """
    length = model.token_batch(tokens).shape[1]
    place = to or {}
    moves = [(layer, pos, model.resolve_position(place.get(pos, pos), length)) for layer, pos in donor.rows]
    return EditHook(
        Edit(donor.point, layer, replaced_by(donor.rows[layer, source]), [dest], kind="patch", sets=True)
        for (layer, dest), source in destinations(moves).items()
    )


def destinations(moves: Iterable[tuple[int, int, int]]) -> dict[tuple[int, int], int]:
    """[(layer, donor position, recipient position), ...], resolved, as {(layer, recipient position): donor position}.

    Raises `PositionError` for two donor rows that would go to one place.
    """
    sources: dict[tuple[int, int], int] = {}
    for layer, source, dest in moves:
        if (first := sources.setdefault((layer, dest), source)) != source:
            raise PositionError(
                f"layer {layer}: the donor's positions {first} and {source} both go to position {dest}; one row fits"
            )
    return sources


def map_pre_o_head(
    model: Network, prompt: str | Tokens, layer: int, head: int, fn: HeadFunction, capture_layers: Iterable[int] = ()
) -> Trace:
    """A full pass in which `fn` maps the (seq, d_head) output of one head, before W_O."""
    hook = _head_hook(model, model.resolve_layer(layer), head, fn)
    return trace_forward(model, model.encode(prompt), hook=hook, capture_layers=capture_layers)


def run_layer_with_mapped_pre_o_head(
    model: Network,
    layer: int,
    residual: Array,
    head: int,
    fn: HeadFunction,
    positions: IntArray | None = None,
    shared_kv: object | None = None,
    ple: object | None = None,
) -> Array:
    """One layer on its input `residual` (seq, d_model), one head mapped by `fn`; returns (seq, d_model).

    `positions` are the rows' absolute positions, 0 to seq-1 by default. `shared_kv` and `ple` belong to
    architectures that share keys between layers or add per-layer embeddings; others refuse them.
    """
    if shared_kv is not None or ple is not None:
        raise InputError(f"{model.config.family} shares no keys between layers and has no per-layer embeddings")
    index = model.resolve_layer(layer)
    hook = _head_hook(model, index, head, fn)
    rows = model.check_vector(residual)
    result = forward(
        model, None, hook=hook, residual=rows, start=index, stop=index + 1, positions=positions, logits_at="none"
    )
    out: Array = result.residual[0]
    return out


def _head_hook(model: Network, layer: int, head: int, fn: HeadFunction) -> EditHook:
    index = model.resolve_head(head)

    def mapped(rows: Array, pos: IntArray, key_pos: IntArray | None) -> Array:
        out = [np.asarray(fn(sequence[:, 0])) for sequence in rows]  # rows: (b, seq, 1, d_head)
        if any(x.shape != (rows.shape[1], rows.shape[3]) for x in out):
            raise HookError(f"the function returned {out[0].shape}; it must keep {(rows.shape[1], rows.shape[3])}")
        return np.stack(out)[:, :, None]

    return EditHook([Edit("z", layer, mapped, "all", (index,))])


@contextmanager
def scoped_layer(model: Network, layer: int) -> Iterator[LayerParams]:
    """Keep one layer's weights dense for the length of a `with` block (they stay quantised on disk otherwise)."""
    with model.params.pinned(model.resolve_layer(layer)) as params:
        yield params
