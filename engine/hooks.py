"""The hook protocol and the built-in hooks.

LayerHook       the callbacks, all no-ops: override what you need
RecordHook      snapshots of any points
EditHook        a list of `edits.Edit`s
ZeroAblateHook, SteerHook, PatchHook, ScaleHook    EditHooks for `resid_post`
CompositeHook   several hooks, in order
NoopHook        listens to nothing
Listeners       what the decoder holds: who wants which point at which layer

A callback receives the layer, the array and the absolute positions of its rows. It returns a replacement of
the same shape, or None for "unchanged". Arrays are read-only except at `resid_mid` and `resid_post`.
Arrays have the batch axis (see `points.POINTS` for all axes).
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import numpy as np

from engine.edits import Edit, Scope, plus, replaced_by, rows_in_scope, times, zeroed
from engine.errors import HookError
from engine.ops import Array, IntArray
from engine.points import ONCE, POINTS, RESIDUAL_STREAM, only_layer, point


class LayerHook:
    """Base of all hooks. Override callbacks; `wants` then says which points the hook listens to."""

    def begin_run(self, prompt_length: int, past: int) -> None:
        """Called before a pass: the prompt's length in tokens, and how many positions the cache already holds."""

    def named_layers(self) -> Iterable[int]:
        """The layers this hook was made for; a run raises `LayerError` for one the model does not have."""
        return ()

    def named_points(self) -> Iterable[str]:
        """The points this hook was made for; a run raises `PointError` for one the model's blocks do not have."""
        return ()

    def named_edits(self) -> Iterable[Edit]:
        """The edits it makes, in order; a run raises `HookError` for one that others leave nothing of."""
        return ()

    def wants(self, point: str, layer: int) -> bool:
        """Whether to be called at this point of this layer. Default: every point whose callback is overridden."""
        name = POINTS[point].callback
        return getattr(type(self), name) is not getattr(LayerHook, name)

    def at(self, point: str, layer: int, x: Array, pos: IntArray, key_pos: IntArray | None = None) -> Array | None:
        """Every point arrives here; the default hands it to its callback."""
        if point in ("q", "k", "v"):
            return self.on_qkv(layer, point, x, pos)
        if point == "attn_pattern":
            assert key_pos is not None
            return self.on_attention_weights(layer, x, pos, key_pos)
        callback: Callable[[int, Array, IntArray], Array | None] = getattr(self, POINTS[point].callback)
        return callback(layer, x, pos)

    def on_embed(self, layer: int, x: Array, pos: IntArray) -> Array | None: ...
    def on_pre_layer(self, layer: int, x: Array, pos: IntArray) -> Array | None: ...
    def on_qkv(self, layer: int, name: str, x: Array, pos: IntArray) -> Array | None: ...
    def on_attention_weights(self, layer: int, weights: Array, pos: IntArray, key_pos: IntArray) -> Array | None: ...
    def on_head_outputs(self, layer: int, z: Array, pos: IntArray) -> Array | None: ...
    def on_attn_proj(self, layer: int, x: Array, pos: IntArray) -> Array | None: ...
    def on_attn_out(self, layer: int, x: Array, pos: IntArray) -> Array | None: ...
    def on_post_attention(self, layer: int, x: Array, pos: IntArray) -> Array | None: ...
    def on_ffn_activation(self, layer: int, x: Array, pos: IntArray) -> Array | None: ...
    def on_mlp_proj(self, layer: int, x: Array, pos: IntArray) -> Array | None: ...
    def on_mlp_out(self, layer: int, x: Array, pos: IntArray) -> Array | None: ...
    def on_post_layer(self, layer: int, x: Array, pos: IntArray) -> Array | None: ...
    def on_final_norm(self, layer: int, x: Array, pos: IntArray) -> Array | None: ...


class NoopHook(LayerHook):
    """Listens to nothing."""


class Listeners:
    """A hook as the decoder sees it: `fire` costs one set look-up where nobody listens."""

    def __init__(self, hook: LayerHook | None, layers: range, last_layer: int, pos: IntArray) -> None:
        self._hook = NoopHook() if hook is None else hook
        self._pos = pos
        self._wanted = {
            (name, layer)
            for layer in (layers if hook is not None else ())
            for name in POINTS
            if only_layer(name, last_layer + 1) in (None, layer) and self._hook.wants(name, layer)
        }

    def wanted(self, name: str, layer: int) -> bool:
        """Whether anyone listens to this point of this layer."""
        return (name, layer) in self._wanted

    def fire(
        self, name: str, layer: int, x: Array, key_pos: IntArray | None = None, pos: IntArray | None = None
    ) -> Array:
        """Show `x` to the hook; returns it, or its replacement."""
        if (name, layer) not in self._wanted:
            return x
        shown = x
        if not POINTS[name].in_place:
            shown = x.view()
            shown.flags.writeable = False
        replaced = self._hook.at(name, layer, shown, self._pos if pos is None else pos, key_pos)
        if replaced is None or replaced is shown:
            return x
        if not isinstance(replaced, np.ndarray) or replaced.shape != x.shape or replaced.dtype != np.float32:
            found = f"{replaced.dtype} {replaced.shape}" if isinstance(replaced, np.ndarray) else repr(replaced)
            raise HookError(f"the hook at {name}, layer {layer}, returned {found}; it must be float32 {x.shape}")
        return replaced


class RecordHook(LayerHook):
    """Snapshots of points. A run that starts at position 0 clears the record; decode steps append rows.

    Where hooks may write in place (`resid_mid`, `resid_post`) a snapshot is a copy, and where the array is a part of a
    larger one (`q`, `k`, `v`). Elsewhere it is the decoder's own array, which nobody changes once it was shown:
    read-only, so copy it to write into it.

    Points that exist once per pass (`points.ONCE`) are recorded whatever the layers. Results are `{layer: array}`
    without the batch axis for a single prompt: `get(point)`, and the attributes `pre_layer`,
    `post_attention`, `post_layer`, `attention_weights`, `ffn_activation`. The rows' absolute positions are in
    `positions`.
    """

    def __init__(
        self, layers: Iterable[int], points: Iterable[str], scope: Scope = "all", named: Iterable[str] | None = None
    ) -> None:
        """`named` are the points that the model must have, all by default."""
        self._layers = frozenset(layers)
        self._points = tuple(point(name).name for name in points)
        self._named = self._points if named is None else tuple(named)
        self._scope = scope
        self._prompt_length = 0
        self._rows: dict[tuple[str, int], list[Array]] = {}
        self._positions: dict[tuple[str, int], list[IntArray]] = {}

    @classmethod
    def for_layers(
        cls,
        layers: Iterable[int],
        capture_attention: bool = False,
        capture_activations: bool = False,
        points: Iterable[str] | None = None,
        positions: Scope = "all",
    ) -> "RecordHook":
        """Record `points` of `layers`; by default those of the residual stream that the model has."""
        names = list(RESIDUAL_STREAM if points is None else points)
        names += ["attn_pattern"] * capture_attention + ["mlp_act"] * capture_activations
        return cls(layers, dict.fromkeys(names), positions, () if points is None else points)

    def begin_run(self, prompt_length: int, past: int) -> None:
        self._prompt_length = prompt_length
        if past == 0:
            self._rows.clear()
            self._positions.clear()

    def named_layers(self) -> Iterable[int]:
        return self._layers

    def named_points(self) -> Iterable[str]:
        return self._named

    def wants(self, point: str, layer: int) -> bool:
        return point in self._points and (layer in self._layers or point in ONCE)

    def at(self, point: str, layer: int, x: Array, pos: IntArray, key_pos: IntArray | None = None) -> None:
        rows = rows_in_scope(self._scope, pos, self._prompt_length)
        if len(rows):
            taken = _snapshot(x) if len(rows) == len(pos) else np.take(x, rows, POINTS[point].seq_axis)
            self._rows.setdefault((point, layer), []).append(taken)
            self._positions.setdefault((point, layer), []).append(pos[rows])

    def get(self, point: str) -> dict[int, Array]:
        """What was recorded at a point: {layer: array}, rows in the order of `positions`."""
        axis = POINTS[point].seq_axis
        return {
            layer: _without_batch(rows[0] if len(rows) == 1 else np.concatenate(_same_width(rows, point), axis))
            for (name, layer), rows in self._rows.items()
            if name == point
        }

    @property
    def positions(self) -> IntArray:
        """Absolute positions of the recorded rows."""
        kept = next(iter(self._positions.values()), [np.zeros(0, np.int64)])
        return np.concatenate(kept)

    @property
    def pre_layer(self) -> dict[int, Array]:
        return self.get("resid_pre")

    @property
    def post_attention(self) -> dict[int, Array]:
        return self.get("resid_mid")

    @property
    def post_layer(self) -> dict[int, Array]:
        return self.get("resid_post")

    @property
    def attention_weights(self) -> dict[int, Array]:
        return self.get("attn_pattern")

    @property
    def ffn_activation(self) -> dict[int, Array]:
        return self.get("mlp_act")


def _snapshot(x: Array) -> Array:
    """A copy, unless nobody can change `x`; what another hook returned is writeable like the stream itself.

    A view of something larger is copied, too: it would keep all of that in memory.
    """
    is_part = isinstance(x.base, np.ndarray) and x.base.nbytes > x.nbytes
    return np.array(x) if x.flags.writeable or is_part else x


def _without_batch(x: Array) -> Array:
    return x[0] if x.shape[0] == 1 else x


def _same_width(rows: list[Array], point: str) -> list[Array]:
    """Patterns of later decode steps see more keys: earlier rows get zeros for them."""
    if point != "attn_pattern":
        return rows
    width = max(row.shape[-1] for row in rows)
    return [np.pad(row, [(0, 0)] * 3 + [(0, width - row.shape[-1])]) for row in rows]


class EditHook(LayerHook):
    """Applies `edits` in the order listed, and what they do adds up.

    A run refuses an edit of which nothing would be left, because later ones set every row, head or neuron that it
    changes, and two that set the same position, which both name in a list, to different things. Scaling by 0 sets.
    """

    def __init__(self, edits: Iterable[Edit] = ()) -> None:
        self.edits: list[Edit] = list(edits)
        self._prompt_length = 0

    def begin_run(self, prompt_length: int, past: int) -> None:
        self._prompt_length = prompt_length

    def named_layers(self) -> Iterable[int]:
        return [edit.layer for edit in self.edits]

    def named_points(self) -> Iterable[str]:
        return [edit.point for edit in self.edits]

    def named_edits(self) -> Iterable[Edit]:
        return self.edits

    def wants(self, point: str, layer: int) -> bool:
        return any(edit.point == point and edit.layer == layer for edit in self.edits)

    def at(self, point: str, layer: int, x: Array, pos: IntArray, key_pos: IntArray | None = None) -> Array | None:
        current = x
        for edit in self.edits:
            if edit.point == point and edit.layer == layer:
                edited = edit(current, pos, key_pos, self._prompt_length)
                current = current if edited is None else edited
        return None if current is x else current


class ZeroAblateHook(EditHook):
    """Sets rows of `resid_post` to zero."""

    @classmethod
    def for_layers(cls, layers: Iterable[int], positions: Scope | None = None) -> "ZeroAblateHook":
        """`positions` None means all rows."""
        scope: Scope = "all" if positions is None else positions
        return cls(Edit("resid_post", layer, zeroed, scope, kind="zero", sets=True) for layer in dict.fromkeys(layers))


class SteerHook(EditHook):
    """Adds alpha * vec to rows of `resid_post`; several vectors at one layer add up."""

    def add(self, layer: int, vec: Array, alpha: float, positions: Scope = "last") -> "SteerHook":
        """vec: (d_model,), alpha a number. Returns the hook, so that calls can be chained."""
        self.edits.append(Edit("resid_post", layer, plus(vec, alpha), positions, kind="steer"))
        return self


class ScaleHook(EditHook):
    """Multiplies rows of a point by a factor."""

    @classmethod
    def for_layers(
        cls, layers: Iterable[int], factor: float, point: str = "resid_post", positions: Scope = "all"
    ) -> "ScaleHook":
        by = times(factor)
        made = partial(Edit, function=by, scope=positions, kind="scale", sets=by is zeroed)
        return cls(made(point, layer) for layer in dict.fromkeys(layers))


class PatchHook(EditHook):
    """Writes given rows into `resid_post`."""

    def __init__(self, rows: Mapping[tuple[int, int], Array]) -> None:
        """rows: {(layer, position): (d_model,)}."""
        super().__init__(
            Edit("resid_post", layer, replaced_by(row), [position], kind="patch", sets=True)
            for (layer, position), row in rows.items()
        )


class CompositeHook(LayerHook):
    """Several hooks in order; each sees what the ones before it left."""

    def __init__(self, hooks: Iterable[LayerHook]) -> None:
        self.hooks = list(hooks)

    def begin_run(self, prompt_length: int, past: int) -> None:
        for hook in self.hooks:
            hook.begin_run(prompt_length, past)

    def named_layers(self) -> Iterable[int]:
        return [layer for hook in self.hooks for layer in hook.named_layers()]

    def named_points(self) -> Iterable[str]:
        return [point for hook in self.hooks for point in hook.named_points()]

    def named_edits(self) -> Iterable[Edit]:
        return [edit for hook in self.hooks for edit in hook.named_edits()]

    def wants(self, point: str, layer: int) -> bool:
        return any(hook.wants(point, layer) for hook in self.hooks)

    def at(self, point: str, layer: int, x: Array, pos: IntArray, key_pos: IntArray | None = None) -> Array | None:
        current = x
        for hook in self.hooks:
            if hook.wants(point, layer):
                replaced = hook.at(point, layer, current, pos, key_pos)
                current = current if replaced is None else replaced
        return None if current is x else current
