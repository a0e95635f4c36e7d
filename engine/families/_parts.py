"""Parts that many families share: reading projections, norms and the ends, and what most config.json files call them.

Names follow transformers' checkpoints: `model.layers.{i}.self_attn.q_proj.weight`. Matrices come as (out, in).
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import numpy as np

from engine.activations import ACTIVATIONS
from engine.config import Config, Rope
from engine.errors import DamagedFile, UnknownModel, clipped
from engine.families._read import choice, flag, real, whole
from engine.families._rope import rope_from
from engine.ops import Array
from engine.params import Ends, Joined, Linear, Norm, transposed
from engine.weights import Tensors

Raw = Mapping[str, Any]

CONTEXT = "original_max_position_embeddings"


class Attention(TypedDict):
    """Fields of `LayerParams`."""

    qkv: Joined
    o: Linear


class Mlp(TypedDict):
    """Fields of `LayerParams`."""

    gate_up: Joined
    down: Linear


def base_config(raw: Raw, family: str, **changes: Any) -> Config:
    """The Config of a decoder with the usual names in config.json; `changes` replace what a family does otherwise."""
    refuse_two_ways(raw)
    n_layers, n_heads = whole(raw, "num_hidden_layers"), whole(raw, "num_attention_heads")
    d_model = whole(raw, "hidden_size")
    d_head = head_dim(raw)
    settled: dict[str, Any] = {
        "family": family,
        "n_layers": n_layers,
        "n_ctx": whole(raw, "max_position_embeddings", 2048),
        "d_vocab": whole(raw, "vocab_size"),
        "d_model": d_model,
        "d_mlp": whole(raw, "intermediate_size"),
        "n_heads": n_heads,
        "n_kv_heads": whole(raw, "num_key_value_heads", n_heads),
        "d_head": d_head,
        "norm": "rms",
        "windows": (None,) * n_layers,
        "attn_scales": (d_head**-0.5,) * n_layers,
        "tied": flag(raw, "tie_word_embeddings", False),
    } | changes
    settled.setdefault("norm_eps", real(raw, "rms_norm_eps", 1e-6))
    settled.setdefault("activation", activation(raw, "hidden_act", "silu"))
    if "ropes" not in settled:  # the config of a family that has them may say nothing of use to others
        settled["ropes"] = (rope(raw, d_head),) * n_layers
    longest = [rope.dynamic for rope in settled["ropes"] if rope is not None and rope.dynamic is not None]
    if longest:  # dynamic scaling exists to go beyond the length trained on
        settled["n_ctx"] = int(max(factor * context for _, factor, context in longest))
    cfg = Config(**settled)
    if any(rope is not None and 2 * len(rope.inv_freq) > cfg.d_head for rope in cfg.ropes):
        raise DamagedFile(f"config: head_dim is {cfg.d_head}, narrower than what the rotary embedding turns")
    if cfg.n_heads % cfg.n_kv_heads:
        raise DamagedFile(f"config: {cfg.n_heads} heads cannot share {cfg.n_kv_heads} key-value heads evenly")
    return cfg


def named(raw: Raw, names: Mapping[str, str]) -> Raw:
    """config.json with transformers' general `names` in the place of the architecture's own."""
    return {**raw, **{own: raw[general] for general, own in names.items() if general in raw}}


def refuse_two_ways(raw: Raw) -> None:
    """Raise `UnknownModel` for what lets transformers' decoders read later tokens, as models of embeddings do."""
    one_way = {
        "is_causal": raw.get("is_causal", True) is True,
        "use_bidirectional_attention": not raw.get("use_bidirectional_attention"),
    }
    for key in (key for key, said in one_way.items() if not said):
        raise UnknownModel(f"config: {key} is {clipped(raw[key])}, which is not supported: this is a causal decoder")


def head_dim(raw: Raw) -> int:
    """Features of a head: `head_dim`, or the model's width shared among the heads."""
    return whole(raw, "head_dim", max(whole(raw, "hidden_size") // whole(raw, "num_attention_heads"), 1))


def head_width(raw: Raw, width: str = "hidden_size", heads: str = "num_attention_heads") -> int:
    """Features of a head, where the heads share the model's width evenly."""
    d_model, n_heads = whole(raw, width), whole(raw, heads)
    if d_model % n_heads:
        raise DamagedFile(f"config: {n_heads} heads cannot share {d_model} features evenly")
    return d_model // n_heads


def activation(raw: Raw, key: str, default: str) -> str:
    """The MLP's activation; raises `DamagedFile` for one that is not known."""
    return choice(raw, key, default, tuple(ACTIVATIONS))


def rope(raw: Raw, d_head: int, theta: float = 10_000.0, fraction: float | None = None) -> Rope:
    """The rotary embedding of a model that has one for all layers."""
    return layer_rope(raw, rope_settings(raw), d_head, theta, fraction)


def rope_settings(raw: Raw) -> Raw:
    """`rope_scaling`, which users add to a file, or `rope_parameters`, as transformers 5 takes them."""
    settings = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(settings, Mapping):
        raise DamagedFile(f"config: the rope settings are {clipped(settings)}, not an object")
    return settings


def kind_rope(raw: Raw, kind: str, d_head: int, theta: float) -> Rope:
    """The rotary embedding of full_attention or sliding_attention layers, at base `theta` where settings are silent."""
    silent = {**raw, "rope_theta": None, CONTEXT: None}
    return layer_rope(silent, _settings_by_kind(raw, kind), d_head, theta)


def _settings_by_kind(raw: Raw, kind: str) -> dict[str, Any]:
    """`rope_scaling` is added to the settings of full_attention layers.

    Without `rope_parameters` the kind of scaling is there already, so that its older name, `type`, goes unread.
    """
    by_kind = raw.get("rope_parameters")
    own = by_kind.get(kind) if isinstance(by_kind, Mapping) else by_kind
    added = raw.get("rope_scaling") if kind == "full_attention" else None
    if wrong := [part for part in (own, added) if not isinstance(part, Mapping | None)]:
        raise DamagedFile(f"config: the rope settings are {clipped(wrong[0])}, not an object")
    beside = by_kind if isinstance(by_kind, Mapping) else {}  # where transformers looks for truncate
    return {**(own or {"rope_type": "default"}), **(added or {}), "truncate": beside.get("truncate", True)}


def layer_rope(raw: Raw, settings: Raw, d_head: int, theta: float = 10_000.0, fraction: float | None = None) -> Rope:
    """The rotary embedding that `settings` describe, with the config's own values where they are silent.

    The config's own original context comes before theirs, as in transformers.

    `fraction` of the head is rotated unless `partial_rotary_factor` says otherwise; None for architectures that rotate
    whole heads whatever it says.
    """
    stands = {key: raw[key] for key in ("rope_theta", "partial_rotary_factor", CONTEXT) if raw.get(key) is not None}
    full = {"rope_theta": theta} | stands | dict(settings)
    full |= {CONTEXT: stands[CONTEXT]} if CONTEXT in stands else {}  # before what the settings say
    _check_part(full, fraction)
    width = d_head if fraction is None else int(d_head * real(full, "partial_rotary_factor", fraction))
    if width % 2 or not 2 <= width <= d_head:
        raise DamagedFile(f"config: {width} of {d_head} features per head cannot be rotated in pairs")
    return rope_from(full, width, whole(raw, "max_position_embeddings", 2048))


def _check_part(settings: Raw, fraction: float | None) -> None:
    """Raise `DamagedFile` for a part of the head that transformers makes frequencies for and then fails to turn."""
    kind = settings.get("rope_type", settings.get("type")) or "default"
    part = real(settings, "partial_rotary_factor", 1.0)
    if kind == "proportional" if fraction is not None else part != 1.0 and kind not in ("default", "proportional"):
        raise DamagedFile(f"config: {clipped(kind)} rotary scaling of {part} of each head is not of this architecture")


def layer_types(raw: Raw, n_layers: int, default: Sequence[str]) -> list[str]:
    """`layer_types` of config.json, one per layer: full_attention or sliding_attention."""
    types = raw.get("layer_types") or list(default)
    valid = ("full_attention", "sliding_attention")
    if not isinstance(types, list) or len(types) != n_layers or any(t not in valid for t in types):
        raise DamagedFile(f"config: layer_types must name {' or '.join(valid)} for each of {n_layers} layers")
    return types


def windows(raw: Raw, types: Sequence[str], default: int | None = None) -> tuple[int | None, ...]:
    """The window of each layer: `sliding_window` for sliding layers."""
    return tuple(whole(raw, "sliding_window", default) if t == "sliding_attention" else None for t in types)


def has_bias(raw: Raw, key: str) -> bool | None:
    """What config.json says; None for a GGUF file, where a bias is there if it is stored."""
    return None if raw.get("gguf") else flag(raw, key, False)


def gain_minus_one(raw: Raw) -> bool:
    """Whether a Gemma checkpoint stores gain - 1; GGUF files carry the 1 already."""
    return not raw.get("gguf")


def linear(tensors: Tensors, name: str, d_in: int, d_out: int, bias: bool | None = False) -> Linear:
    """`name.weight`, and `name.bias` if the architecture has one (None: if it is stored)."""
    weight, offset = _stored(tensors, name, d_in, d_out, bias)
    return Linear(transposed(weight), offset)


def joined(
    tensors: Tensors, names: Sequence[str], d_in: int, widths: Sequence[int], bias: bool | None = False
) -> Joined:
    """`linear` of each name, beside each other."""
    stored = [_stored(tensors, name, d_in, width, bias) for name, width in zip(names, widths, strict=True)]
    return Joined.of(*(Linear(weight.T, offset) for weight, offset in stored))


def _stored(tensors: Tensors, name: str, d_in: int, d_out: int, bias: bool | None) -> tuple[Array, Array | None]:
    """(out, in) and the bias, as files have them."""
    bias = f"{name}.bias" in tensors if bias is None else bias
    weight = tensors.get(f"{name}.weight", (d_out, d_in))
    return weight, tensors.get(f"{name}.bias", (d_out,)) if bias else None


def norm(tensors: Tensors, name: str, width: int, bias: bool = False, plus_one: bool = False) -> Norm:
    """`name.weight` as the gain; `plus_one` for checkpoints that store gain - 1."""
    weight = tensors.get(f"{name}.weight", (width,))
    return Norm(weight + np.float32(1) if plus_one else weight, tensors.get(f"{name}.bias", (width,)) if bias else None)


def attention(
    tensors: Tensors,
    at: str,
    cfg: Config,
    qkv_bias: bool | None = False,
    o_bias: bool | None = False,
    o: str = "o_proj",
) -> Attention:
    """The four projections under `at`."""
    names = [f"{at}.{part}_proj" for part in "qkv"]
    return {
        "qkv": joined(tensors, names, cfg.d_model, cfg.qkv_widths, qkv_bias),
        "o": linear(tensors, f"{at}.{o}", cfg.qkv_widths[0], cfg.d_model, o_bias),
    }


def gated_mlp(tensors: Tensors, at: str, cfg: Config, bias: bool | None = False) -> Mlp:
    """gate, up and down under `at`."""
    names = [f"{at}.{part}_proj" for part in ("gate", "up")]
    return {
        "gate_up": joined(tensors, names, cfg.d_model, (cfg.d_mlp, cfg.d_mlp), bias),
        "down": linear(tensors, f"{at}.down_proj", cfg.d_mlp, cfg.d_model, bias),
    }


def plain_mlp(tensors: Tensors, up: str, down: str, cfg: Config, bias: bool = True) -> Mlp:
    """An MLP without gate."""
    return {
        "gate_up": Joined.fused(linear(tensors, up, cfg.d_model, cfg.d_mlp, bias), cfg.d_mlp),
        "down": linear(tensors, down, cfg.d_mlp, cfg.d_model, bias),
    }


def ends(
    tensors: Tensors,
    cfg: Config,
    embed: str = "model.embed_tokens",
    final: str = "model.norm",
    head: str = "lm_head",
    norm_bias: bool = False,
    head_bias: bool = False,
    plus_one: bool = False,
) -> Ends:
    """Embedding, unembedding (the same array when tied) and final norm."""
    w_e, w_u = _embeddings(tensors, cfg, f"{embed}.weight", f"{head}.weight")
    bias = tensors.get(f"{head}.bias", (cfg.d_vocab,)) if head_bias else None
    return Ends(w_e, w_u, norm(tensors, final, cfg.d_model, norm_bias, plus_one), unembed_bias=bias)


def _embeddings(tensors: Tensors, cfg: Config, embed: str, head: str) -> tuple[Array, Array]:
    """W_E and W_U: one array where they are tied, unless the file holds two that differ (as transformers reads it)."""
    shape = cfg.d_vocab, cfg.d_model
    if not cfg.tied:
        return tensors.get(embed, shape), tensors.get(head, shape)
    stored = [tensors.get(name, shape) for name in (embed, head) if name in tensors] or [tensors.get(embed, shape)]
    return (stored[0], stored[0]) if np.array_equal(stored[0], stored[-1]) else (stored[0], stored[-1])
