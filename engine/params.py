"""The weights as the decoder reads them: `Linear`, `Joined`, `Norm`, one `LayerParams` per layer, and `Params`.

An absent part is None and means the identity (a norm) or nothing to add (a bias). `Params.layer(i)` gives a
layer's weights: kept in memory, or made from the file when the layer runs (`scoped`), where a budget says how many
layers stay. `in_bfloat16` rounds their matrices; `packed_by` keeps them in the blocks of their file, and what lies
outside the layers (embedding, unembedding), which is dense otherwise.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from engine.matrices import Array, Matrix, Packed, Table, columns, packed, panelled, rounded, rows_of, widened
from engine.vouched import Vouched


@dataclass(frozen=True, slots=True)
class Linear:
    """weight (in, out), however it is kept (`matrices.py`), bias (out,) or None."""

    weight: Matrix
    bias: Array | None = None


@dataclass(frozen=True, slots=True)
class Joined(Linear):
    """Matrices that read the same features, beside each other: one product is faster than one for each.

    weight (in, sum(widths)), bias (sum(widths),) or None.
    """

    widths: tuple[int, ...] = field(kw_only=True)

    @classmethod
    def of(cls, *parts: Linear) -> "Joined":
        """These float32 matrices, copied; where some have a bias, the others get zeros."""
        matrices = [widened(part.weight) for part in parts]
        widths = tuple(matrix.shape[1] for matrix in matrices)
        weight = np.empty((len(matrices[0]), sum(widths)), np.float32)  # in this order, whatever that of the parts
        np.concatenate(matrices, axis=1, out=weight)
        biases = [np.zeros(w, np.float32) if p.bias is None else p.bias for p, w in zip(parts, widths, strict=True)]
        bias = np.concatenate(biases) if any(part.bias is not None for part in parts) else None
        return cls(weight, bias, widths=widths)

    @classmethod
    def fused(cls, whole: Linear, *widths: int) -> "Joined":
        """A matrix whose parts lie beside each other already."""
        return cls(whole.weight, whole.bias, widths=widths)

    def parts(self) -> list[Linear]:
        """The matrices by themselves, in float32: views, or copies of what is kept otherwise."""
        biases = [None if self.bias is None else self.bias[at] for at in _columns(self.widths)]
        return [Linear(columns(self.weight, at), b) for at, b in zip(_columns(self.widths), biases, strict=True)]

    def split(self, x: Array) -> list[Array]:
        """What the product gave, (..., sum(widths)) -> what each matrix gives, (..., width): views."""
        return [x[..., at] for at in _columns(self.widths)]


@cache
def _columns(widths: tuple[int, ...]) -> tuple[slice, ...]:
    """Where parts of these widths lie beside each other."""
    return tuple(slice(end - width, end) for width, end in zip(widths, accumulate(widths), strict=True))


@dataclass(frozen=True, slots=True)
class Norm:
    """weight: what the normalised features are multiplied by; bias or None. The weight's length is the
    width of the groups that are normalised (a head's width for per-head query and key norms); a (heads, d_head)
    weight has a gain for each head.
    """

    weight: Array
    bias: Array | None = None


_NORMS = ("attn_norm", "mlp_norm", "q_norm", "k_norm", "attn_post_norm", "mlp_post_norm")
SINGLE = ("q", "k", "v", "o", "up", "down", "gate", *_NORMS)
"""Parts of a layer, joined ones by themselves. Fingerprints of models that never were in a file follow this order."""


@dataclass(frozen=True, slots=True)
class LayerParams:
    """One layer. `qkv` joins queries, keys and values; `gate_up` gate and up, in an MLP without gating up alone.

    `q`, `k`, `v`, `gate` (or None) and `up` are these by themselves, in float32.
    """

    qkv: Joined
    o: Linear
    gate_up: Joined
    down: Linear
    attn_norm: Norm | None = None
    mlp_norm: Norm | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    attn_post_norm: Norm | None = None
    mlp_post_norm: Norm | None = None

    @property
    def q(self) -> Linear:
        return self.qkv.parts()[0]

    @property
    def k(self) -> Linear:
        return self.qkv.parts()[1]

    @property
    def v(self) -> Linear:
        return self.qkv.parts()[2]

    @property
    def gate(self) -> Linear | None:
        return self.gate_up.parts()[0] if len(self.gate_up.widths) == 2 else None

    @property
    def up(self) -> Linear:
        return self.gate_up.parts()[-1]

    def with_matrices(self, change: Callable[[Matrix], Matrix]) -> "LayerParams":
        """The same with each matrix kept otherwise."""
        parts: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, part in parts.items():
            if isinstance(part, Linear):
                parts[name] = replace(part, weight=change(part.weight))
        return LayerParams(**parts)

    def packed_by(self, scales: "LayerParams", minima: "LayerParams") -> "LayerParams":
        """The same with each matrix packed by the scales and minima that stand in its place in the others; as it is
        where these do not give its numbers again.
        """
        parts: dict[str, Any] = {}
        for at in fields(self):
            kept, by, offset = (getattr(params, at.name) for params in (self, scales, minima))
            if isinstance(kept, Linear):
                dense = widened(kept.weight)
                parts[at.name] = replace(kept, weight=packed(dense, by.weight, offset.weight) or dense)
        return replace(self, **parts)

    def arrays(self) -> Iterator[tuple[str, Array]]:
        """(name, array) of every weight by itself, in float32: views, or copies of what is kept otherwise."""
        return ((name, columns(array, slice(None))) for name, array in self._named(SINGLE))

    def stored(self) -> Iterator[tuple[str, Matrix]]:
        """(name, array) of every weight as it lies in memory, in field order."""
        return self._named(field.name for field in fields(self))

    def _named(self, names: Iterable[str]) -> Iterator[tuple[str, Matrix]]:
        for name in names:
            part = getattr(self, name)
            if part is not None:
                yield name, part.weight
                if part.bias is not None:
                    yield f"{name}.bias", part.bias


class Ends(NamedTuple):
    """What lies before the first layer and after the last.

    embed: W_E (d_vocab, d_model). unembed: W_U stored (d_vocab, d_model), the same as `embed` when tied.
    positions: learned position embeddings (n_ctx, d_model). unembed_bias: (d_vocab,).
    """

    embed: Table
    unembed: Table
    final_norm: Norm | None
    positions: Array | None = None
    unembed_bias: Array | None = None

    def with_tables(self, change: Callable[[Table], Table]) -> "Ends":
        """The same with embedding and unembedding kept otherwise."""
        embed = change(self.embed)
        return self._replace(embed=embed, unembed=embed if self.unembed is self.embed else change(self.unembed))

    def packed_by(self, scales: "Ends", minima: "Ends") -> "Ends":
        """As `LayerParams.packed_by`."""

        def made(table: Table, by: Table, offset: Table) -> Table:
            return packed(rows_of(table).T, rows_of(by).T, rows_of(offset).T) or table

        embed = made(self.embed, scales.embed, minima.embed)
        tied = self.unembed is self.embed
        return self._replace(embed=embed, unembed=embed if tied else made(self.unembed, scales.unembed, minima.unembed))


ENDS = -1
"""What lies outside the layers, among the parts of `Params.vouched`, which are the layers by their numbers."""


class Params:
    """All the weights of a model: the fields of `Ends`, and the layers.

    `vouched` is asked before a part is given out, where weights are mapped: see `vouched.py`.
    """

    vouched: Vouched | None = None

    def __init__(self, ends: Ends, load_layer: Callable[[int], LayerParams], keep: int) -> None:
        """At most `keep` layers are held in memory, pinned ones aside; the least recently used go first."""
        self._ends = ends
        self.final_norm, self.positions, self.unembed_bias = ends.final_norm, ends.positions, ends.unembed_bias
        self._load_layer = load_layer
        self.keep = keep
        self._dense: OrderedDict[int, LayerParams] = OrderedDict()
        self._pinned: dict[int, LayerParams] = {}

    @property
    def ends(self) -> Ends:
        """What lies outside the layers. Raises `DamagedConversion`."""
        if self.vouched is not None:
            self.vouched.require(ENDS)
            self.vouched.require_unchanged()
        return self._ends

    @property
    def embed(self) -> Array:
        """W_E (d_vocab, d_model), a copy if it is packed."""
        return rows_of(self.ends.embed)

    @property
    def unembed(self) -> Array:
        """W_U stored (d_vocab, d_model), the same array as `embed` when tied, a copy if it is packed."""
        return rows_of(self.ends.unembed)

    def layer(self, index: int) -> LayerParams:
        """The weights of one layer. Raises `DamagedConversion`."""
        if self.vouched is not None:
            self.vouched.require(index)
        if index in self._pinned:
            return self._pinned[index]
        if index in self._dense:
            self._dense.move_to_end(index)
            return self._dense[index]
        while self._dense and len(self._dense) >= self.keep:  # before loading: the budget is a peak, not an average
            self._dense.popitem(last=False)
        params = self._load_layer(index)
        if self.keep:
            self._dense[index] = params
        return params

    def take(self, index: int) -> LayerParams:
        """The weights of one layer, which are not kept here any longer. Raises `DamagedConversion`."""
        if self.vouched is not None:
            self.vouched.require(index)
        return self._dense.pop(index, None) or self._load_layer(index)

    @contextmanager
    def pinned(self, index: int) -> Iterator[LayerParams]:
        """Keep one layer dense for the length of a `with` block; blocks for one layer may lie inside each other."""
        outer = index in self._pinned
        self._pinned[index] = self.layer(index)
        try:
            yield self._pinned[index]
        finally:
            if not outer:
                self._pinned.pop(index, None)

    @property
    def nbytes(self) -> int:
        """Bytes of weights in memory now."""
        layers = {**self._dense, **self._pinned}.values()
        total = sum(array.nbytes for layer in layers for _, array in layer.stored())
        embed, unembed = self._ends.embed, self._ends.unembed
        total += embed.nbytes + (0 if unembed is embed else unembed.nbytes)
        norm = () if self.final_norm is None else (self.final_norm.weight, self.final_norm.bias)
        total += sum(part.nbytes for part in (self.positions, self.unembed_bias, *norm) if part is not None)
        return int(total)

    @property
    def dense_layers(self) -> tuple[int, ...]:
        """The layers whose weights are dense in memory now."""
        return tuple(sorted({*self._dense, *self._pinned}))


def in_bfloat16(params: Params, n_layers: int, told: Callable[[int], None] = lambda index: None) -> Params:
    """The same with the layers' matrices rounded to bfloat16: half the memory. What lies outside the layers stays."""
    return _kept_otherwise(params, params.ends, n_layers, lambda weight: rounded(widened(weight)), told)


def in_panels(params: Params, n_layers: int, width: int, told: Callable[[int], None] = lambda index: None) -> Params:
    """The same with the layers' matrices, and tables that are packed, in panels of `width` columns: for kernels."""
    ends = params.ends.with_tables(lambda table: panelled(table, width) if isinstance(table, Packed) else table)
    return _kept_otherwise(params, ends, n_layers, lambda weight: panelled(weight, width), told)


def _kept_otherwise(
    params: Params, ends: Ends, n_layers: int, change: Callable[[Matrix], Matrix], told: Callable[[int], None]
) -> Params:
    """All layers with their matrices changed, taken from `params` one by one; `told` of each before."""
    made = Params(ends, lambda index: params.take(index).with_matrices(change), n_layers)
    made.vouched = params.vouched
    for index in range(n_layers):
        told(index)
        made.layer(index)
    return made


def transposed(weight: Array) -> Array:
    """(out, in) as files store it -> (in, out), contiguous float32."""
    return np.ascontiguousarray(weight.T, dtype=np.float32)
