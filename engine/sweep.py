"""Many variants of one run in one pass: `sweep`.

A variant equals the base run up to the first layer it changes, and a causal model leaves the rows before its first
changed row alone for ever. So the base run is computed once; each variant forks from it at its first changed layer and
carries only the rows from its first changed row on. Earlier keys and values are the base run's. All living variants of
a layer go through it as one batch of rows, or one of each thread's.

sweep       base run and variants -> what `read` takes from each one's next-token logits
sweep_cost  what that will take
Sweep       the result
base_run    the base run by itself, with other prompts beside it
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from engine.cache import KVCache
from engine.config import Rope
from engine.cost import Cost, of_pass
from engine.decoder import Pass, Tick, block, forward, masked_attention, norm, unembed
from engine.edits import Edit
from engine.errors import InputError
from engine.forks import FEEDS_ROWS, Fork, Variant, forks_of, held_by, layers_entered, rows_entered, shares_of
from engine.hooks import CompositeHook, LayerHook, Listeners, RecordHook
from engine.network import Network, Tokens
from engine.ops import Array, IntArray
from engine.points import POINTS
from engine.shares import Progress, side_by_side

Read = Callable[[Array, Array], Array]
"""(n, d_vocab) next-token logits of variants, (d_vocab,) of the base run -> (n, ...): what is kept of each variant."""

BUDGET = 128 * 2**20
"""Bytes that the variants of one slice may need together, about: as much as `heap` keeps from one layer to the next."""

READ_AT_ONCE = 32 * 2**20
"""Bytes of logits that exist at one time, about: the unembedding is read once for all variants that fit."""


@dataclass(frozen=True)
class Sweep:
    """values: (variants, ...) and baseline: (...), as `read` made them; logits: (d_vocab,) of the base run.

    edits: each variant's, whose `fired` counts the rows they changed. layer_rows: rows that went through a layer, the
    base run's included; slices: batches of variants.
    """

    baseline: Array
    values: Array
    logits: Array
    edits: list[list[Edit]]
    layer_rows: int
    slices: int


def chosen(logits: Array, only: Sequence[int] | None) -> Array:
    """The logits (..., d_vocab) of some tokens, in their order; all by default."""
    return logits if only is None else logits[..., list(only)]


def logits_of(logits: Array, baseline: Array) -> Array:
    """The `Read` that keeps the logits themselves."""
    return logits


def sweep(
    model: Network,
    tokens: Tokens,
    variants: Sequence[Variant],
    read: Read = logits_of,
    *,
    only: Sequence[int] | None = None,
    budget: int = BUDGET,
    base: "Base | None" = None,
    tick: Tick | None = None,
) -> Sweep:
    """Run `tokens` once unchanged and once for each variant, and read the logits after the last token.

    Results equal runs one by one. `only` names tokens: `read` gets their logits alone, in this order. `budget` bounds
    the bytes of the variants that run at one time; more than fit run one slice after another. `base` is the unchanged
    run, where there is one. Where it pays, threads share the variants: `read` is called in several of them then, `tick`
    in the calling one alone. Raises `InputError` for an intervention that no row of the prompt meets, and for a base
    run of another prompt.
    """
    cfg = model.config
    length, forks = forks_of(model, tokens, variants)
    shares = shares_of(model, forks, length, budget)
    progress = Progress(tick, layers_entered(cfg, shares) + (cfg.n_layers if base is None else 0))
    first = min((fork.layer for fork in forks), default=cfg.n_layers)
    if base is None:
        base = base_run(model, tokens, first, tick=progress)
    _check_base(base, model.token_batch(tokens), first)
    baseline = read(chosen(base.logits[None], only), chosen(base.logits, only))[0]
    values = np.empty((len(forks), *np.shape(baseline)), np.float32)
    rows = [cfg.n_layers * length]

    def run(slices: Sequence[Sequence[Fork]], tick: Tick) -> None:
        rows.extend(_Slice(model, base, part, only).run(read, values, tick) for part in slices)

    side_by_side([partial(run, slices) for slices in shares], progress)
    edits = [fork.edits for fork in forks]
    return Sweep(np.asarray(baseline), values, base.logits, edits, sum(rows), sum(map(len, shares)))


def sweep_cost(
    model: Network, tokens: Tokens, variants: Sequence[Variant], budget: int = BUDGET, prompts: int = 1
) -> Cost:
    """What base run and `sweep` will take; `prompts` are in the base run. Nothing is run; of vectors, rows, keys and
    values only the shapes matter.
    """
    cfg = model.config
    length, forks = forks_of(model, tokens, variants)
    shares = shares_of(model, forks, length, budget)
    kept = 4 * cfg.n_layers * length * (cfg.d_model + 2 * cfg.n_kv_heads * cfg.d_head)
    base = Cost(cfg.n_layers, prompts * cfg.n_layers * length, 0, prompts * (kept + of_pass(cfg, length).nbytes))
    return base + Cost(
        layers_entered(cfg, shares), rows_entered(cfg, forks, length), 0, kept + held_by(cfg, shares, length)
    )


# --- the base run ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Base:
    """A prompt's unchanged run.

    ids: (seq,). inputs: {layer: (seq, d_model)}, and under n_layers the last layer's output. cache: keys and values of
    this prompt alone. logits: (d_vocab,) after the last token; `beside_logits`: (n, d_vocab) those of the prompts that
    ran with it. tables: of every position.
    """

    ids: IntArray
    inputs: dict[int, Array]
    cache: KVCache
    logits: Array
    beside_logits: Array
    pos: IntArray
    tables: dict[Rope, tuple[Array, Array]]


def base_run(
    model: Network,
    tokens: Tokens,
    first: int = 0,
    *,
    beside: Sequence[Tokens] = (),
    hook: LayerHook | None = None,
    cache: KVCache | None = None,
    tick: Tick | None = None,
) -> Base:
    """Run `tokens`, one prompt, for variants that leave it at layer `first` or later.

    `beside` are other prompts: one batch takes less time than one after the other. `hook` sees the batch, this prompt
    last; `cache`, an empty one, is filled with all of it. Raises `InputError` unless all have as many tokens.
    """
    n, batch = model.config.n_layers, _batch(model, [*beside, tokens])
    record = RecordHook(range(first, n), ["resid_pre"])
    cache = KVCache.with_layers(n) if cache is None else cache
    both = record if hook is None else CompositeHook([hook, record])
    result = forward(model, batch.tolist(), hook=both, cache=cache, tick=tick)
    assert result.logits is not None
    inputs = record.get("resid_pre") | {n: result.residual if len(batch) > 1 else result.residual[0]}
    if len(batch) > 1:
        inputs, cache = {layer: x[-1].copy() for layer, x in inputs.items()}, cache.sequence(-1)
    pos = np.arange(batch.shape[1])
    tables = {rope: rope.table(pos, len(pos)) for rope in {*model.config.ropes} if rope is not None}
    return Base(batch[-1], inputs, cache, result.logits[-1, -1], result.logits[:-1, -1], pos, tables)


def _batch(model: Network, prompts: Iterable[Tokens]) -> IntArray:
    """(n, seq)."""
    batches = [model.token_batch(prompt) for prompt in prompts]
    shapes = [batch.shape for batch in batches]
    if {*shapes} != {(1, shapes[0][1])}:
        raise InputError(f"a base run takes one prompt, and others of the same length beside it; these are {shapes}")
    return np.concatenate(batches)


def _check_base(base: Base, ids: IntArray, first: int) -> None:
    if not np.array_equal(base.ids[None], ids):
        raise InputError("the base run is that of another prompt")
    if first not in base.inputs:
        raise InputError(f"a variant leaves the base run at layer {first}, which was kept from {min(base.inputs)} on")


# --- the variants ---------------------------------------------------------------------------------------------


@dataclass
class _Group:
    """The living variants that start at one row. x: (members, rows, d_model).

    `at`: their rows in the batch. `on`: where those are that go on once keys and values are made, which are all but in
    the last layer; from there on the last row of each is enough, unless they are `whole`.
    """

    start: int
    whole: bool
    members: list[Fork]
    x: Array
    at: slice = field(default_factory=lambda: slice(0))
    on: slice = field(default_factory=lambda: slice(0))

    @property
    def kept(self) -> range:
        """The rows of the batch that go on in the last layer."""
        n = self.x.shape[1]
        return range(self.at.start, self.at.stop) if self.whole else range(self.at.start + n - 1, self.at.stop, n)

    def join(self, forks: Sequence[Fork], rows: Sequence[Array]) -> None:
        self.members += forks
        self.x = np.concatenate([self.x, *rows])

    def rows_at(self, place: int, at: slice) -> slice:
        """The rows of one member among those of the group, which are `at`."""
        n = (at.stop - at.start) // len(self.members)
        return slice(at.start + place * n, at.start + (place + 1) * n)

    def split(self, x: Array, at: slice) -> Array:
        """(1, heads, rows, d_head) -> (members, heads, rows of each, d_head) of this group's rows `at`."""
        heads, d_head = x.shape[1], x.shape[3]
        return x[0, :, at].reshape(heads, len(self.members), -1, d_head).swapaxes(0, 1)


@dataclass(frozen=True)
class _VariantPass(Pass):
    """One layer of all living variants: rows of many runs side by side, each attending within its own."""

    groups: Sequence[_Group] = ()
    base: Base | None = None

    def attend(self, layer: int, q: Array, k: Array, v: Array) -> Array:
        assert self.base is not None
        z = np.empty((1, *q.shape[2:0:-1], v.shape[-1]), np.float32)
        for group in self.groups:
            keys, values = self._all_keys(layer, group, group.split(k, group.at), group.split(v, group.at))
            on_weights = partial(_edit_patterns, layer, group, self.base.pos) if _knocks(layer, group) else None
            at = group.on
            pos = self.base.pos[-((at.stop - at.start) // len(group.members)) :]
            mixed = masked_attention(self.cfg, layer, group.split(q, at), keys, values, pos, self.base.pos, on_weights)
            z[0, at] = mixed.reshape(-1, *mixed.shape[2:])
        return z

    def _all_keys(self, layer: int, group: _Group, k: Array, v: Array) -> tuple[Array, Array]:
        """The base run's rows before the group's first, or what a member reads in their place, then its own."""
        assert self.base is not None
        early = self.base.cache.layer(layer).filled()[:2]
        out = []
        for which, own in enumerate((k, v)):
            full = np.empty((*own.shape[:2], len(self.base.pos), own.shape[3]), np.float32)
            full[:, :, : group.start] = early[which][:, :, : group.start]
            full[:, :, group.start :] = own
            for place, fork in enumerate(group.members):
                if layer in fork.kv:
                    full[place, :, : group.start] = fork.kv[layer][which]
            out.append(full)
        return out[0], out[1]


def _knocks(layer: int, group: _Group) -> bool:
    return any(e.point == "attn_pattern" and e.layer == layer for fork in group.members for e in fork.edits)


def _edit_patterns(layer: int, group: _Group, pos: IntArray, weights: Array) -> Array:
    """Each member's edits of its own (1, heads, rows, keys) pattern."""
    edited = weights.copy()
    for place, fork in enumerate(group.members):
        for edit in fork.edits:
            if edit.point == "attn_pattern" and edit.layer == layer:
                one = slice(place, place + 1)
                changed = edit(edited[one], pos[group.start :], pos, len(pos))
                edited[one] = edited[one] if changed is None else changed
    return edited


class _VariantEdits(LayerHook):
    """The edits of all variants of a slice; each changes its own variant's rows of the batch."""

    def __init__(self, forks: Iterable[Fork], length: int) -> None:
        self._length = length
        self._edits: dict[tuple[str, int], list[tuple[Fork, Edit]]] = {}
        for fork in forks:
            for edit in fork.edits:
                if edit.point not in ("attn_pattern", "embed", "final_norm"):
                    self._edits.setdefault((edit.point, edit.layer), []).append((fork, edit))
        self.places: dict[int, tuple[_Group, int]] = {}
        """Of each living variant: its group and its place there."""

    def wants(self, point: str, layer: int) -> bool:
        return any(fork.index in self.places for fork, _ in self._edits.get((point, layer), ()))

    def at(self, point: str, layer: int, x: Array, pos: IntArray, key_pos: IntArray | None = None) -> Array:
        out = x if x.flags.writeable else x.copy()
        for fork, edit in self._edits[point, layer]:
            if fork.index in self.places:
                group, place = self.places[fork.index]
                rows = group.rows_at(place, group.at if point in FEEDS_ROWS else group.on)
                mine = (*[slice(None)] * POINTS[point].seq_axis, rows)
                changed = edit(out[mine], np.arange(fork.start, self._length), key_pos, self._length)
                out[mine] = out[mine] if changed is None else changed
        return out


class _Slice:
    """Variants that run together, from the first one's first layer to the logits."""

    def __init__(self, model: Network, base: Base, forks: Sequence[Fork], only: Sequence[int] | None) -> None:
        self._model, self._base, self._forks, self._only = model, base, forks, only
        self._hook = _VariantEdits(forks, len(base.pos))
        self._groups: dict[tuple[int, bool], _Group] = {}

    def run(self, read: Read, values: Array, tick: Tick) -> int:
        """Fill the variants' places in `values`; returns how many rows went through a layer."""
        n, rows = self._model.config.n_layers, 0
        for layer in range(self._forks[0].layer, n):
            tick(0, 0, f"layer {layer}")
            self._join(layer)
            rows += self._layer(layer)
        self._join(n)
        together = max(1, READ_AT_ONCE // self._base.logits.nbytes)
        for group in self._groups.values():
            for start in range(0, len(group.members), together):
                some = slice(start, start + together)
                logits = unembed(self._model, self._normed(group.members[some], group.x[some]), self._only)
                values[[fork.index for fork in group.members[some]]] = read(
                    logits, chosen(self._base.logits, self._only)
                )
        return rows

    def _join(self, layer: int) -> None:
        n, joining = self._model.config.n_layers, [fork for fork in self._forks if fork.layer == layer]
        for start, whole in dict.fromkeys((fork.start, fork.ends_whole(n - 1)) for fork in joining):
            forks = [fork for fork in joining if (fork.start, fork.ends_whole(n - 1)) == (start, whole)]
            rows = [self._rows(fork)[:, 0 if whole or layer < n else -1 :] for fork in forks]
            group = self._groups.setdefault((start, whole), _Group(start, whole, [], rows[0][:0]))
            self._hook.places |= {fork.index: (group, len(group.members) + i) for i, fork in enumerate(forks)}
            group.join(forks, rows)

    def _rows(self, fork: Fork) -> Array:
        """(1, rows, d_model) that the fork begins with."""
        x = self._base.inputs[fork.layer][None, fork.start :]
        for edit in fork.made_at_entry():
            changed = edit(x, self._base.pos[fork.start :], None, len(self._base.pos))
            x = x if changed is None else changed
        return x

    def _layer(self, layer: int) -> int:
        """All living variants through one layer, as one batch of rows."""
        base, groups = self._base, list(self._groups.values())
        last = self._model.config.n_layers - 1
        kept = self._place(groups, layer == last)
        which = np.concatenate([np.tile(base.pos[group.start :], len(group.members)) for group in groups])
        hooks = Listeners(self._hook, range(layer, layer + 1), last, which)
        tables = {rope: (cos[which], sin[which]) for rope, (cos, sin) in base.tables.items()}
        run = _VariantPass(self._model.config, hooks, which, tables, None, kept, groups, base)
        rows = [group.x.reshape(1, -1, group.x.shape[2]) for group in groups]
        x = np.concatenate(rows, 1) if len(rows) > 1 else rows[0]
        x = block(x, self._model.params.layer(layer), layer, run)
        for group in groups:
            group.x = x[0, group.on].reshape(len(group.members), -1, x.shape[2])
        return len(which)

    def _place(self, groups: Iterable[_Group], last: bool) -> IntArray | None:
        """Say where each group's rows are; returns which go on, in the last layer."""
        start = on = 0
        for group in groups:
            group.at = slice(start, start + group.x.shape[0] * group.x.shape[1])
            group.on = slice(on, on + len(group.kept)) if last else group.at
            start, on = group.at.stop, group.on.stop
        return np.concatenate([group.kept for group in groups]) if last else None

    def _normed(self, forks: Sequence[Fork], x: Array) -> Array:
        """(n, d_model): the final norm of each variant's last row, as its edits at `final_norm` leave it."""
        cfg, gain = self._model.config, self._model.params.final_norm
        last = norm(x[:, -1], gain, cfg)
        for place, fork in enumerate(forks):
            if edits := [edit for edit in fork.edits if edit.point == "final_norm"]:
                rows = norm(x[place : place + 1], gain, cfg)
                for edit in edits:
                    changed = edit(rows, self._base.pos[fork.start :], None, len(self._base.pos))
                    rows = rows if changed is None else changed
                last[place] = rows[0, -1]
        return last
