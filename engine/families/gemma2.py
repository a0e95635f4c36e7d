"""Gemma 2: norms after attention and MLP too, softcaps, alternating windows (Gemma Team 2024).

Reference: transformers, models/gemma2/modeling_gemma2.py.
"""

from engine.config import Config
from engine.families import _parts
from engine.families._parts import Raw
from engine.families._read import flag, real, whole
from engine.families.gemma import ends, gemma_config
from engine.params import LayerParams
from engine.weights import Tensors

__all__ = ["config", "ends", "layer", "optional_cap"]

DEFAULTS: Raw = {"num_key_value_heads": 4, "max_position_embeddings": 8192}
"""What transformers takes where config.json is silent."""


def config(raw: Raw) -> Config:
    raw = {**DEFAULTS, **raw}
    n_layers = whole(raw, "num_hidden_layers")
    types = _parts.layer_types(
        raw, n_layers, ["full_attention" if i % 2 else "sliding_attention" for i in range(n_layers)]
    )
    return gemma_config(
        raw,
        "gemma2",
        windows=_parts.windows(raw, types, 4096),
        attn_scales=(real(raw, "query_pre_attn_scalar", 256) ** -0.5,) * n_layers,
        attn_softcap=optional_cap({"attn_logit_softcapping": 50.0, **raw}, "attn_logit_softcapping"),
        final_softcap=optional_cap({"final_logit_softcapping": 30.0, **raw}, "final_logit_softcapping"),
    )


def optional_cap(raw: Raw, key: str) -> float | None:
    """A softcap, or None for none."""
    return None if raw.get(key) is None else real(raw, key)


def layer(tensors: Tensors, i: int, cfg: Config, raw: Raw) -> LayerParams:
    at = f"model.layers.{i}"
    bias, plus_one = flag(raw, "attention_bias", False), _parts.gain_minus_one(raw)
    return LayerParams(
        **_parts.attention(tensors, f"{at}.self_attn", cfg, bias, bias),
        **_parts.gated_mlp(tensors, f"{at}.mlp", cfg),
        attn_norm=_parts.norm(tensors, f"{at}.input_layernorm", cfg.d_model, plus_one=plus_one),
        attn_post_norm=_parts.norm(tensors, f"{at}.post_attention_layernorm", cfg.d_model, plus_one=plus_one),
        mlp_norm=_parts.norm(tensors, f"{at}.pre_feedforward_layernorm", cfg.d_model, plus_one=plus_one),
        mlp_post_norm=_parts.norm(tensors, f"{at}.post_feedforward_layernorm", cfg.d_model, plus_one=plus_one),
    )
