"""The named points inside a forward pass, one row each: the table every consumer reads.

`POINTS` maps a point's name to its callback in `LayerHook`, its axes, and whether a hook may write into
the array in place. Names follow TransformerLens and interp-engine.
"""

from dataclasses import dataclass

from engine.errors import PointError


@dataclass(frozen=True)
class Point:
    """One place in the forward pass where a hook can read or replace an array."""

    name: str
    callback: str
    axes: tuple[str, ...]
    meaning: str
    in_place: bool = False

    @property
    def seq_axis(self) -> int:
        """The axis that runs over positions (query positions for the attention pattern)."""
        return self.axes.index("seq")

    @property
    def head_axis(self) -> int | None:
        """The axis that runs over heads, or None."""
        return self.axes.index("head") if "head" in self.axes else None


_RESIDUAL = ("batch", "seq", "d_model")
_HEADS = ("batch", "head", "seq", "d_head")

_TABLE = (
    Point("embed", "on_embed", _RESIDUAL, "residual before layer 0, embedding scale and positions included"),
    Point("resid_pre", "on_pre_layer", _RESIDUAL, "input of the layer"),
    Point("q", "on_qkv", _HEADS, "queries, after norms, before rotary"),
    Point("k", "on_qkv", _HEADS, "keys of the key-value heads, after norms, before rotary"),
    Point("v", "on_qkv", _HEADS, "values of the key-value heads"),
    Point("attn_pattern", "on_attention_weights", ("batch", "head", "seq", "key"), "softmaxed attention weights"),
    Point("z", "on_head_outputs", ("batch", "seq", "head", "d_head"), "per-head outputs before W_O"),
    Point("attn_proj", "on_attn_proj", _RESIDUAL, "output of W_O, before a post-norm and residual multiplier"),
    Point("attn_out", "on_attn_out", _RESIDUAL, "what attention adds to the residual"),
    Point("resid_mid", "on_post_attention", _RESIDUAL, "residual between attention and MLP", in_place=True),
    Point("mlp_act", "on_ffn_activation", ("batch", "seq", "d_mlp"), "act(gate) * up: the input of W_down"),
    Point("mlp_proj", "on_mlp_proj", _RESIDUAL, "output of W_down, before a post-norm and residual multiplier"),
    Point("mlp_out", "on_mlp_out", _RESIDUAL, "what the MLP adds to the residual"),
    Point("resid_post", "on_post_layer", _RESIDUAL, "output of the layer, before the final norm", in_place=True),
    Point("final_norm", "on_final_norm", _RESIDUAL, "input of the unembedding"),
)

POINTS: dict[str, Point] = {point.name: point for point in _TABLE}

RESIDUAL_STREAM = ("resid_pre", "resid_mid", "resid_post")
"""The three points of the residual stream that `RecordHook` records by default."""

ONCE = ("embed", "final_norm")
"""Points that exist once per pass: `embed` fires with layer 0, `final_norm` with the last layer."""


def only_layer(name: str, n_layers: int) -> int | None:
    """Where a point that exists once per pass is; None for one that every layer has."""
    return {"embed": 0, "final_norm": n_layers - 1}.get(name)


def point(name: str) -> Point:
    """The row of `POINTS` called `name`; raises `PointError` naming the valid ones."""
    if name not in POINTS:
        raise PointError(f"there is no point {name!r}; the points are {', '.join(POINTS)}")
    return POINTS[name]
