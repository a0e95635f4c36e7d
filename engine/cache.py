"""KVCache: keys (after rotary) and values of every layer, with their absolute positions.

append, fork, crop, keep_last        the decoder's and the generator's needs
to_tensors, from_tensors             for keeping
clone_layer_from, clone_layer_position_range, transplant    surgery

Arrays are (batch, kv_heads, positions, d_head). Layers may be unfilled or of different lengths while a cache
is being assembled; decoding checks and names the odd ones out.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from engine.config import Config
from engine.errors import CacheError, LayerError
from engine.ops import Array, IntArray, rotate


@dataclass
class LayerKV:
    """One layer's buffers; only the first `length` positions are filled."""

    k: Array
    v: Array
    pos: IntArray
    length: int

    @classmethod
    def of(cls, k: Array, v: Array, pos: IntArray) -> "LayerKV":
        return cls(k.copy(), v.copy(), pos.copy(), len(pos))

    def filled(self) -> tuple[Array, Array, IntArray]:
        """Views of the filled part: keys, values, positions."""
        return self.k[:, :, : self.length], self.v[:, :, : self.length], self.pos[: self.length]

    def extend(self, k: Array, v: Array, pos: IntArray) -> None:
        needed = self.length + len(pos)
        if needed > len(self.pos):
            self._grow(max(needed, 2 * len(self.pos)))
        new = slice(self.length, needed)
        self.k[:, :, new], self.v[:, :, new], self.pos[new] = k, v, pos
        self.length = needed

    def _grow(self, capacity: int) -> None:
        old_k, old_v, old_pos = self.filled()
        b, heads, _, d_head = self.k.shape
        self.k = np.empty((b, heads, capacity, d_head), np.float32)
        self.v = np.empty((b, heads, capacity, self.v.shape[3]), np.float32)
        self.pos = np.empty(capacity, np.int64)
        self.k[:, :, : self.length], self.v[:, :, : self.length], self.pos[: self.length] = old_k, old_v, old_pos


class KVCache:
    """The cache of one run. `layers[i]` is None until layer i has run."""

    def __init__(self, layers: list[LayerKV | None], config: Config | None = None) -> None:
        self.layers = layers
        self.config = config
        self.rope_length = 0  # of the sequence whose rotary frequencies the keys have

    @classmethod
    def with_layers(cls, n: int) -> "KVCache":
        """An empty cache of n layers."""
        if n < 1:
            raise CacheError(f"a cache needs at least one layer, not {n}")
        return cls([None] * n)

    def bind(self, config: Config) -> None:
        """Say which architecture the cache belongs to (done by the first pass that uses it)."""
        if len(self.layers) != config.n_layers:
            raise CacheError(f"the cache has {len(self.layers)} layers, the model {config.n_layers}")
        if self.config is not None and _shape(self.config) != _shape(config):
            raise CacheError(f"the cache has (kv_heads, d_head) {_shape(self.config)}, the model {_shape(config)}")
        self.config = config

    @property
    def length(self) -> int:
        """Positions held; raises `CacheError` naming the layers that hold another number."""
        lengths = [0 if layer is None else layer.length for layer in self.layers]
        usual = max(set(lengths), key=lengths.count)
        odd = {i: n for i, n in enumerate(lengths) if n != usual}
        if odd:
            named = ", ".join(f"layer {i} holds {n}" for i, n in odd.items())
            raise CacheError(f"the cache is ragged: most layers hold {usual} positions, but {named}")
        return usual

    @property
    def next_position(self) -> int:
        """The absolute position of the next token."""
        if self.length == 0:
            return 0
        return 1 + max(int(layer.pos[layer.length - 1]) for layer in self.layers if layer is not None)

    def serves(self, length: int) -> bool:
        """Whether the cached keys keep their rotary frequencies when the sequence becomes so long."""
        ropes = {rope for rope in self.config.ropes if rope is not None} if self.config is not None else set()
        return not self.length or all(rope.frequencies(self.rope_length) == rope.frequencies(length) for rope in ropes)

    def grow_to(self, length: int) -> None:
        """Say how long the sequence becomes; raises `CacheError` where that changes the frequencies of cached keys."""
        if not self.serves(length):
            raise CacheError(
                f"this model's rotary frequencies change between {self.rope_length} and {length} tokens, so the "
                "cached keys no longer fit; run the whole sequence in one pass, without a cache"
            )
        self.rope_length = length

    @property
    def nbytes(self) -> int:
        """Bytes held by keys and values."""
        return sum(2 * layer.k[:, :, : layer.length].nbytes for layer in self.layers if layer is not None)

    def layer(self, index: int) -> LayerKV:
        """A filled layer; raises `LayerError` or `CacheError`."""
        if not 0 <= index < len(self.layers):
            raise LayerError(f"layer {index} does not exist; the cache has layers 0 to {len(self.layers) - 1}")
        layer = self.layers[index]
        if layer is None:
            raise CacheError(f"layer {index} of the cache is empty")
        return layer

    def append(self, index: int, k: Array, v: Array, pos: IntArray) -> tuple[Array, Array, IntArray]:
        """Add positions to a layer; returns all its keys, values and positions."""
        layer = self.layers[index]
        if layer is None:
            self.layers[index] = LayerKV.of(k, v, pos)
            return k, v, pos
        if layer.k.shape[0] != k.shape[0]:
            raise CacheError(f"the cache holds {layer.k.shape[0]} sequences, the tokens are {k.shape[0]}")
        layer.extend(k, v, pos)
        return layer.filled()

    def fork(self) -> "KVCache":
        """An independent copy."""
        copies = [None if layer is None else LayerKV.of(*layer.filled()) for layer in self.layers]
        copy = KVCache(copies, self.config)
        copy.rope_length = self.rope_length
        return copy

    def sequence(self, index: int) -> "KVCache":
        """An independent copy of one sequence of a batch."""
        one = KVCache([layer and LayerKV(layer.k[index][None], layer.v[index][None], layer.pos, layer.length)
                       for layer in self.layers], self.config)  # fmt: skip
        one.rope_length = self.rope_length
        return one.fork()

    def crop(self, n: int) -> None:
        """Keep the first n positions of every layer."""
        if n < 0:
            raise CacheError(f"cannot crop to {n} positions")
        for layer in self.layers:
            if layer is not None:
                layer.length = min(layer.length, n)

    def keep_last(self, n: int) -> None:
        """Keep the last n positions of every layer; they stay at their absolute positions."""
        if n < 1:
            raise CacheError(f"a window must keep at least one position, not {n}")
        for index, layer in enumerate(self.layers):
            if layer is not None and layer.length > n:
                k, v, pos = layer.filled()
                self.layers[index] = LayerKV.of(k[:, :, -n:], v[:, :, -n:], pos[-n:])

    def to_tensors(self) -> dict[str, Array]:
        """{"k.0": (batch, kv_heads, positions, d_head), "v.0": ..., "pos": (positions,)}; whole caches only."""
        pos = self.layer(0).filled()[2] if self.length else np.zeros(0, np.int64)
        tensors = {"pos": pos.astype(np.float32)}  # exact below 2**24 positions
        for index in range(len(self.layers)):
            k, v, _ = self.layer(index).filled()
            tensors |= {f"k.{index}": k.copy(), f"v.{index}": v.copy()}
        return tensors

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Array], config: Config) -> "KVCache":
        """What `to_tensors` gave, as a cache again."""
        pos = tensors["pos"].astype(np.int64)
        layers = [LayerKV.of(tensors[f"k.{i}"], tensors[f"v.{i}"], pos) for i in range(config.n_layers)]
        cache = cls(list(layers), config)
        cache.rope_length = cache.next_position
        return cache

    def clone_layer_from(self, other: "KVCache", layer: int) -> None:
        """This layer becomes a copy of the other cache's."""
        source = other.layer(layer)
        self._check_layer(other, layer)
        self._become(layer, other, *source.filled())

    def clone_layer_position_range(self, other: "KVCache", layer: int, start: int, end: int) -> None:
        """This layer becomes the other's rows [start, end), at their absolute positions."""
        source = other.layer(layer)
        self._check_layer(other, layer)
        _check_range(start, end, source.length)
        k, v, pos = source.filled()
        self._become(layer, other, k[:, :, start:end], v[:, :, start:end], pos[start:end])

    def _become(self, layer: int, other: "KVCache", k: Array, v: Array, pos: IntArray) -> None:
        self.layers[layer] = LayerKV.of(k, v, pos)
        self.config = self.config or other.config
        self.rope_length = self.rope_length or other.rope_length

    def transplant(
        self,
        donor: "KVCache",
        layers: Iterable[int],
        source: tuple[int, int],
        dest: int,
        what: Literal["kv", "k", "v"] = "kv",
        heads: Sequence[int] | None = None,
        rope: Literal["realign", "keep"] = "realign",
    ) -> int:
        """Write the donor's rows [start, end) over this cache's rows from `dest` on; lengths stay equal.

        `realign` turns each key from its position in the donor to its new one; `keep` leaves it as it was.
        `heads` are key-value heads. Returns the number of (layer, position) rows written.
        """
        start, end = source
        chosen = list(dict.fromkeys(layers))
        for index in chosen:
            self._check_layer(donor, index)
            check_move(self.config, source, dest, donor.layer(index).length, self.layer(index).length, what, rope)
            self._check_heads(heads, index)
        for index in chosen:
            self._write_layer(donor, index, slice(start, end), slice(dest, dest + end - start), what, heads, rope)
        return len(chosen) * (end - start)

    def _write_layer(
        self, donor: "KVCache", index: int, rows: slice, to: slice, what: str, heads: Sequence[int] | None, rope: str
    ) -> None:
        mine, theirs = self.layer(index), donor.layer(index)
        which = slice(None) if heads is None else list(dict.fromkeys(heads))
        if "k" in what:
            keys = theirs.k[:, :, rows]
            if rope == "realign":
                keys = realigned(
                    keys, donor.frequencies(index), theirs.pos[rows], self.frequencies(index), mine.pos[to]
                )
            mine.k[:, which, to] = keys[:, which]
        if "v" in what:
            mine.v[:, which, to] = theirs.v[:, which, rows]

    def frequencies(self, index: int) -> tuple[float, ...] | None:
        """The rotary frequencies a layer's keys were turned by; `CacheError` while the cache belongs to no model."""
        if self.config is None:
            raise CacheError("an empty cache belongs to no model yet; run a prompt through it first")
        rope = self.config.ropes[index]
        return None if rope is None else rope.frequencies(self.rope_length)

    def _check_layer(self, other: "KVCache", index: int) -> None:
        if not 0 <= index < len(self.layers):
            raise LayerError(f"layer {index} does not exist; the cache has layers 0 to {len(self.layers) - 1}")
        mine, theirs = self.layers[index], other.layer(index)
        if mine is not None and (mine.k.shape[:2], mine.k.shape[3]) != (theirs.k.shape[:2], theirs.k.shape[3]):
            raise CacheError(f"layer {index}: the donor's keys are {theirs.k.shape}, the recipient's {mine.k.shape}")

    def _check_heads(self, heads: Sequence[int] | None, index: int) -> None:
        n = self.layer(index).k.shape[1]
        if heads is not None and (not heads or min(heads) < 0 or max(heads) >= n):
            raise CacheError(f"key-value heads {list(heads)} do not exist; valid: 0 to {n - 1}")


def realigned(
    keys: Array, old: tuple[float, ...] | None, old_pos: IntArray, new: tuple[float, ...] | None, new_pos: IntArray
) -> Array:
    """Keys (..., positions, d_head) turned from their old positions and frequencies to new ones.

    One pure rotation by new_pos * new_freq - old_pos * old_freq: the attention factor of yarn and longrope
    is in the keys already and is not applied again.
    """
    if old is None and new is None:
        return keys
    if old is None or new is None or len(old) != len(new):
        raise CacheError("the two layers rotate different features; use rope='keep' or another layer")
    angle = new_pos[:, None] * np.asarray(new) - old_pos[:, None] * np.asarray(old)
    return rotate(keys, np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32))


def check_move(
    config: Config | None, source: tuple[int, int], dest: int, held: int, kept: int, what: str, rope: str
) -> None:
    """Raise `CacheError` unless rows [start, end) of `held` positions can take the place of those of `kept` from `dest`
    on.
    """
    if what not in ("kv", "k", "v") or rope not in ("realign", "keep"):
        raise CacheError(f"what={what!r}, rope={rope!r}; valid: what = kv, k or v; rope = realign or keep")
    start, end = source
    if start != dest and config is not None and config.learned_positions:
        raise CacheError(
            f"this model's positions are learned and part of every key and value: rows [{start}, {end}) cannot be "
            f"moved to {dest}; give dest={start}"
        )
    _check_range(start, end, held)
    _check_range(dest, dest + end - start, kept)


def _shape(config: Config) -> tuple[int, int]:
    return config.n_kv_heads, config.d_head


def _check_range(start: int, end: int, length: int) -> None:
    if not 0 <= start < end <= length:
        said = "hold no row" if 0 <= end <= start <= length else f"do not lie in the {length} that the cache holds"
        raise CacheError(f"positions [{start}, {end}) {said}; valid: 0 <= start < end <= {length}")
