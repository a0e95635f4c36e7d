"""Gemma 3's text model: Gemma 2's norms, normed queries and keys, five windowed layers to each full one, each kind with
rotary frequencies of its own (Gemma Team 2025).

Reference: transformers, models/gemma3/modeling_gemma3.py.
"""

from dataclasses import replace

from engine.config import Config
from engine.families import _parts, gemma2
from engine.families._parts import Raw
from engine.families._read import real, whole
from engine.families.gemma import ends, gemma_config
from engine.families.gemma2 import optional_cap
from engine.params import LayerParams
from engine.weights import Tensors

__all__ = ["config", "ends", "layer"]

THETA = {"full_attention": 1_000_000.0, "sliding_attention": 10_000.0}

DEFAULTS: Raw = {"num_key_value_heads": 4, "max_position_embeddings": 131_072}
"""What transformers takes where config.json is silent."""


def config(raw: Raw) -> Config:
    raw = {**DEFAULTS, **raw}
    n_layers = whole(raw, "num_hidden_layers")
    pattern = whole(raw, "sliding_window_pattern", 6)
    usual = ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(n_layers)]
    types = _parts.layer_types(raw, n_layers, usual)
    d_head = whole(raw, "head_dim", 256)
    ropes = {kind: _parts.kind_rope(raw, kind, d_head, _theta(raw, kind)) for kind in set(types)}
    return gemma_config(
        raw,
        "gemma3_text",
        ropes=tuple(ropes[kind] for kind in types),
        windows=_parts.windows(raw, types, 4096),
        attn_scales=(real(raw, "query_pre_attn_scalar", 256) ** -0.5,) * n_layers,
        final_softcap=optional_cap(raw, "final_logit_softcapping"),
    )


def _theta(raw: Raw, kind: str) -> float:
    """The rotary base of a kind of layer, under its older key."""
    old = "rope_theta" if kind == "full_attention" else "rope_local_base_freq"
    return real(raw, old, THETA[kind])


def layer(tensors: Tensors, i: int, cfg: Config, raw: Raw) -> LayerParams:
    at, plus_one = f"model.layers.{i}.self_attn", _parts.gain_minus_one(raw)
    return replace(
        gemma2.layer(tensors, i, cfg, raw),
        q_norm=_parts.norm(tensors, f"{at}.q_norm", cfg.d_head, plus_one=plus_one),
        k_norm=_parts.norm(tensors, f"{at}.k_norm", cfg.d_head, plus_one=plus_one),
    )
