"""Where the variants of a sweep leave the base run, and how they are dealt out: `forks_of`, `shares_of`.

Variant         what one variant changes: interventions, or keys and values that its last row reads
Fork            a variant with its first layer and first row
forks_of        where each variant forks from a prompt's run
shares_of       forks by thread, in slices that fit the budget
layers_entered, rows_entered, held_by    what the slices take
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from engine.config import Config
from engine.cost import pattern_bytes, working_bytes
from engine.edits import Edit, rows_in_scope
from engine.errors import InputError, LayerError
from engine.interventions import Intervention, compile_interventions
from engine.network import Network, Tokens
from engine.ops import Array
from engine.shares import dealt, most_shares, pays

FEEDS_ROWS = ("embed", "resid_pre", "k", "v")
"""Points of a layer that come before the rows part from keys and values."""

COPIES_EDITED = 3
"""Of one variant's pattern, beside it, while an edit changes it."""

Slice = list["Fork"]
"""Variants that run together."""


@dataclass(frozen=True)
class Variant:
    """One changed run.

    `kv` is {layer: (keys, values)}, each (kv_heads, seq - 1, d_head) after rotary: what the last row reads there in
    place of the base run's. Interventions beside it may change the last row only.
    """

    interventions: tuple[Intervention, ...] = ()
    kv: Mapping[int, tuple[Array, Array]] = field(default_factory=dict)


@dataclass(frozen=True)
class Fork:
    """A variant: the first layer that it runs itself, and its first row."""

    index: int
    edits: list[Edit]
    kv: Mapping[int, tuple[Array, Array]]
    layer: int
    start: int

    def ends_whole(self, last: int) -> bool:
        """Whether it changes rows after the keys and values of the last layer: then all its rows go to the end."""
        if self.layer > last:
            return any(e.point == "final_norm" for e in self.edits)
        return any(e.point == "final_norm" or (e.layer == last and e.point not in FEEDS_ROWS) for e in self.edits)

    def made_at_entry(self) -> Iterable[Edit]:
        """Edits between the layer before the first and the first: they change what the fork copies."""
        return (e for e in self.edits if e.point == "embed" or (_enters(e) == self.layer and e.point == "resid_post"))


def forks_of(model: Network, tokens: Tokens, variants: Sequence[Variant]) -> tuple[int, list[Fork]]:
    """The prompt's length, and where each variant forks from it."""
    ids = model.token_batch(tokens)
    if len(ids) != 1:
        raise InputError(f"a sweep varies one prompt, not {len(ids)}")
    length = ids.shape[1]
    return length, [_fork(model, index, variant, length) for index, variant in enumerate(variants)]


def shares_of(model: Network, forks: Sequence[Fork], length: int, budget: int) -> list[list[Slice]]:
    """Each thread's slices; one share where threads would not pay, or must not be."""
    cfg, threads = model.config, most_shares(model)
    if threads > 1:
        parts = dealt(_in_order(forks), lambda fork: 1 + rows_entered(cfg, [fork], length), threads)
        shares = [_slices(cfg, part, length, budget // threads) for part in parts]
        if pays([rows_entered(cfg, part, length) for part in parts], layers_entered(cfg, shares)):
            return shares
    return [_slices(cfg, forks, length, budget)]


def layers_entered(cfg: Config, shares: Sequence[Sequence[Slice]]) -> int:
    """Each slice's layers, from its first fork's on."""
    return sum(cfg.n_layers - forks[0].layer for share in shares for forks in share)


def rows_entered(cfg: Config, forks: Sequence[Fork], length: int) -> int:
    """Rows of forks that go through a layer."""
    return sum((cfg.n_layers - fork.layer) * (length - fork.start) for fork in forks)


def held_by(cfg: Config, shares: Sequence[Sequence[Slice]], length: int) -> int:
    """Bytes that the largest slice of each share needs, all at one time."""
    every = [fork for share in shares for forks in share for fork in forks]
    whole = _change_patterns(every)
    of_slices = ([sum(_needs(cfg, fork, length, whole) for fork in forks) for forks in share] for share in shares)
    edited = max((_pattern(cfg, length - fork.start, length) for fork in every), default=0) if whole else 0
    return COPIES_EDITED * len(shares) * edited + sum(max(needed, default=0) for needed in of_slices)


def _slices(cfg: Config, forks: Sequence[Fork], length: int, budget: int) -> list[Slice]:
    """Forks by first layer, cut where the budget is full."""
    slices: list[Slice] = []
    held, whole = 0, _change_patterns(forks)
    for fork in _in_order(forks):
        needed = _needs(cfg, fork, length, whole)
        if not slices or held + needed > budget:
            slices.append([])
            held = 0
        slices[-1].append(fork)
        held += needed
    return slices


def _in_order(forks: Sequence[Fork]) -> list[Fork]:
    return sorted(forks, key=lambda fork: (fork.layer, fork.start))


def _needs(cfg: Config, fork: Fork, length: int, whole: bool) -> int:
    """Bytes of a living variant; one that lives in the last layer alone hardly has more than its last row.

    `whole`: patterns are, as they are made and as they are changed, because some variant beside it changes its own.
    """
    last = cfg.n_layers - 1
    rows = length - fork.start if fork.layer < last or fork.ends_whole(last) else 1
    return working_bytes(cfg, rows, length) + (2 * _pattern(cfg, rows, length) if whole else 0)


def _pattern(cfg: Config, rows: int, length: int) -> int:
    """Bytes of so many rows of one layer's attention pattern."""
    return pattern_bytes(cfg, length) * rows // length


def _change_patterns(forks: Iterable[Fork]) -> bool:
    return any(edit.point == "attn_pattern" for fork in forks for edit in fork.edits)


def _fork(model: Network, index: int, variant: Variant, length: int) -> Fork:
    edits = compile_interventions(model, variant.interventions, length).edits
    layers = [*map(_enters, edits), *variant.kv]
    starts = [_first_row(edit, length) for edit in edits]
    if variant.kv:
        _check_kv(model, variant.kv, length)
        if any(start < length - 1 for start in starts):
            raise InputError("interventions beside a changed cache may only change the last row")
        starts.append(length - 1)
    return Fork(index, edits, variant.kv, min(layers, default=model.config.n_layers), min(starts, default=length - 1))


def _enters(edit: Edit) -> int:
    """The first layer whose computation differs; the number of layers when only what follows them does."""
    return edit.layer + (edit.point in ("resid_post", "final_norm"))


def _first_row(edit: Edit, length: int) -> int:
    rows = rows_in_scope(edit.scope, np.arange(length), length)
    return int(rows[0])


def _check_kv(model: Network, kv: Mapping[int, tuple[Array, Array]], length: int) -> None:
    cfg = model.config
    wanted = (cfg.n_kv_heads, length - 1, cfg.d_head)
    for layer, (keys, values) in kv.items():
        if not 0 <= layer < cfg.n_layers:
            raise LayerError(f"layer {layer} does not exist; valid: 0 to {cfg.n_layers - 1}")
        if keys.shape != wanted or values.shape != wanted:
            raise InputError(f"layer {layer}: keys {keys.shape} and values {values.shape} must both be {wanted}")
