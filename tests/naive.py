"""A second decoder, slow and in float64, written from the papers with loops over heads and rows.

`naive(model, ids)` reads a model's config and weights and computes every activation of one prompt without a line of
the engine's forward pass: the reference for what the engine's points, cache and logits must hold, in every family.
`make oracle` shows that it equals transformers in float64.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from engine import Model
from engine.config import Config

Array = np.ndarray
Weights = dict[str, Array]


@dataclass
class Activations:
    """By layer: residual (s, d) after it, keys (kv_heads, s, d_head) after rotary, values, attention pattern
    (heads, s, s), z (s, heads, d_head), mlp_act (s, d_mlp). logits (s, d_vocab).
    """

    residual: list[Array] = field(default_factory=list)
    keys: list[Array] = field(default_factory=list)
    values: list[Array] = field(default_factory=list)
    pattern: list[Array] = field(default_factory=list)
    z: list[Array] = field(default_factory=list)
    mlp_act: list[Array] = field(default_factory=list)
    logits: Array = field(default_factory=lambda: np.zeros(0))


def naive(model: Model, ids: list[int]) -> Activations:
    cfg, ends, out = model.config, model.params, Activations()
    x = np.stack([ends.embed[token] for token in ids]).astype(np.float64) * cfg.embed_scale
    if ends.positions is not None:
        x = x + ends.positions[: len(ids)]
    for layer in range(cfg.n_layers):
        p = {name: array.astype(np.float64) for name, array in model.params.layer(layer).arrays()}
        a = _normed(_attention(_normed(x, p, "attn_norm", cfg), p, cfg, layer, out), p, "attn_post_norm", cfg)
        mid = x + cfg.residual_scale * a
        m = _mlp(_normed(x if cfg.parallel else mid, p, "mlp_norm", cfg), p, cfg, out)
        x = mid + cfg.residual_scale * _normed(m, p, "mlp_post_norm", cfg)
        out.residual.append(x)
    last = {"norm": ends.final_norm.weight, "norm.bias": ends.final_norm.bias}
    final = _normed(x, {name: array for name, array in last.items() if array is not None}, "norm", cfg)
    logits = final @ ends.unembed.T.astype(np.float64)
    logits = cfg.logit_scale * (logits if ends.unembed_bias is None else logits + ends.unembed_bias)
    out.logits = _capped(logits, cfg.final_softcap)
    return out


def _silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def _gelu(x: Array) -> Array:
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def _gelu_tanh(x: Array) -> Array:
    return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": _silu,
    "gelu": _gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": lambda x: x * (x > 0),
}


def _product(x: Array, p: Weights, name: str) -> Array:
    return x @ p[name] + p.get(f"{name}.bias", 0.0)


def _capped(x: Array, cap: float | None) -> Array:
    return x if cap is None else cap * np.tanh(x / cap)


def _normed(x: Array, p: Weights, name: str, cfg: Config) -> Array:
    """Row by row, and in every row group by group, each as wide as the gain, or with a gain of its own."""
    if name not in p:
        return x
    gain, out = p[name], np.zeros_like(x)
    width = gain.shape[-1]
    for row in range(len(x)):
        for group, start in enumerate(range(0, x.shape[1], width)):
            part = x[row, start : start + width]
            part = part - part.mean() if cfg.norm == "layer" else part
            part = part / math.sqrt(np.mean(part**2) + cfg.norm_eps) * (gain if gain.ndim == 1 else gain[group])
            out[row, start : start + width] = part + p.get(f"{name}.bias", 0.0)
    return out


def _mlp(h: Array, p: Weights, cfg: Config, out: Activations) -> Array:
    act = _ACTIVATIONS[cfg.activation](_product(h, p, "gate" if "gate" in p else "up"))
    out.mlp_act.append(act * _product(h, p, "up") if "gate" in p else act)
    return _product(out.mlp_act[-1], p, "down")


def _turned(row: Array, position: int, frequencies: tuple[float, ...], scale: float) -> Array:
    """Rotary embedding of one head's vector: pair i is (row[i], row[i + half])."""
    half, out = len(frequencies), row.copy()
    for i, frequency in enumerate(frequencies):
        c, s = scale * np.cos(position * frequency), scale * np.sin(position * frequency)
        out[i], out[i + half] = row[i] * c - row[i + half] * s, row[i + half] * c + row[i] * s
    return out


def _heads(h: Array, p: Weights, name: str, cfg: Config, layer: int) -> Array:
    """(heads, s, d_head): projected, normed, and turned by the rows' positions."""
    product = _product(h, p, name)
    normed = _normed(product, p, f"{name}_norm", cfg)
    heads = np.stack(np.split(normed, product.shape[1] // cfg.d_head, axis=1))
    rope = cfg.ropes[layer]
    if rope is None or name == "v":
        return heads
    turn = rope.frequencies(len(h)), rope.scale
    return np.stack([[_turned(row, position, *turn) for position, row in enumerate(head)] for head in heads])


def _attention(h: Array, p: Weights, cfg: Config, layer: int, out: Activations) -> Array:
    s, share, window = len(h), cfg.n_heads // cfg.n_kv_heads, cfg.windows[layer] or len(h)
    q, keys, values = (_heads(h, p, name, cfg, layer) for name in "qkv")
    pattern, z = np.zeros((cfg.n_heads, s, s)), np.zeros((s, cfg.n_heads, cfg.d_head))
    for i in range(cfg.n_heads):
        scores = _capped(q[i] @ keys[i // share].T * cfg.attn_scales[layer], cfg.attn_softcap)
        for row in range(s):
            seen = slice(max(0, row - window + 1), row + 1)
            weights = np.exp(scores[row, seen] - scores[row, seen].max())
            pattern[i, row, seen] = weights / weights.sum()
        z[:, i] = pattern[i] @ values[i // share]
    for kept, array in ((out.keys, keys), (out.values, values), (out.pattern, pattern), (out.z, z)):
        kept.append(array)
    return _product(z.reshape(s, -1), p, "o")
