"""A second decoder, slow and in float64, written from the papers with loops over heads and rows.

`naive(model, ids)` reads a model's weights and computes every activation of one prompt without a line of the
engine's forward pass: the reference for what the engine's points, cache and logits must hold. It knows Llama, with
biases, GELU and every kind of rotary scaling; other families are compared with transformers (`oracle/families.py`).
"""

import math
from dataclasses import dataclass, field

import numpy as np

from engine import Model

Array = np.ndarray


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
    cfg, out = model.config, Activations()
    x = np.stack([model.params.embed[token] for token in ids]).astype(np.float64)
    for layer in range(cfg.n_layers):
        p = {name: array.astype(np.float64) for name, array in model.params.layer(layer).arrays()}
        rope = cfg.ropes[layer]
        turn = rope.frequencies(len(ids)), rope.scale
        x = x + _attention(_rms(x, p["attn_norm"], cfg.norm_eps), p, cfg, turn, out)
        h = _rms(x, p["mlp_norm"], cfg.norm_eps)
        act = _ACTIVATIONS[cfg.activation](_product(h, p, "gate")) * _product(h, p, "up")
        out.mlp_act.append(act)
        x = x + _product(act, p, "down")
        out.residual.append(x)
    final = _rms(x, model.params.final_norm.weight.astype(np.float64), cfg.norm_eps)
    out.logits = final @ model.params.unembed.T.astype(np.float64)
    return out


def _silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def _gelu(x: Array) -> Array:
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


_ACTIVATIONS = {"silu": _silu, "gelu": _gelu}


def _product(x: Array, p: dict[str, Array], name: str) -> Array:
    return x @ p[name] + p.get(f"{name}.bias", 0.0)


def _rms(x: Array, gain: Array, eps: float) -> Array:
    return np.stack([row / np.sqrt(np.mean(row**2) + eps) * gain for row in x])


Turn = tuple[tuple[float, ...], float]
"""Rotary frequencies, and what cos and sin are multiplied by."""


def _turned(row: Array, position: int, turn: Turn) -> Array:
    """Rotary embedding of one head's vector: pair i is (row[i], row[i + half])."""
    half, out = len(turn[0]), row.copy()
    for i, frequency in enumerate(turn[0]):
        c, s = turn[1] * np.cos(position * frequency), turn[1] * np.sin(position * frequency)
        out[i], out[i + half] = row[i] * c - row[i + half] * s, row[i + half] * c + row[i] * s
    return out


def _attention(h: Array, p: dict[str, Array], cfg, turn: Turn, out: Activations) -> Array:
    s, width, share = len(h), cfg.d_head, cfg.n_heads // cfg.n_kv_heads
    q, k, v = (_product(h, p, name) for name in "qkv")

    def head(flat: Array, index: int) -> Array:
        return flat[:, index * width : (index + 1) * width]

    def turned(rows: Array) -> Array:
        return np.stack([_turned(row, position, turn) for position, row in enumerate(rows)])

    keys = np.stack([turned(head(k, i)) for i in range(cfg.n_kv_heads)])
    values = np.stack([head(v, i) for i in range(cfg.n_kv_heads)])
    pattern, z = np.zeros((cfg.n_heads, s, s)), np.zeros((s, cfg.n_heads, width))
    for i in range(cfg.n_heads):
        scores = turned(head(q, i)) @ keys[i // share].T / np.sqrt(width)
        for row in range(s):
            weights = np.exp(scores[row, : row + 1] - scores[row, : row + 1].max())
            pattern[i, row, : row + 1] = weights / weights.sum()
        z[:, i] = pattern[i] @ values[i // share]
    for kept, array in ((out.keys, keys), (out.values, values), (out.pattern, pattern), (out.z, z)):
        kept.append(array)
    return _product(z.reshape(s, -1), p, "o")
