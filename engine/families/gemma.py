"""Gemma: Llama with scaled embeddings, gains stored as gain - 1, and a GELU gate (Gemma Team 2024).

Reference: transformers, models/gemma/modeling_gemma.py.
"""

from typing import Any

from engine.config import Config
from engine.families import _parts
from engine.families._parts import Raw
from engine.families._read import flag, whole
from engine.params import Ends, LayerParams
from engine.weights import Tensors

DEFAULTS: Raw = {"num_key_value_heads": 16, "max_position_embeddings": 8192}
"""What transformers takes where config.json is silent."""


def config(raw: Raw) -> Config:
    raw = {**DEFAULTS, **raw}
    if raw.get("hidden_act") == "gelu":  # of the official files, which mean the approximation
        raw["hidden_act"] = "gelu_pytorch_tanh"
    return gemma_config(raw, "gemma", "hidden_act")


def gemma_config(raw: Raw, family: str, act: str = "hidden_activation", **changes: Any) -> Config:
    """What all Gemmas share: tied, scaled embeddings and a GELU gate, whose name stands under `act`."""
    sizes = {"tie_word_embeddings": True, "head_dim": 256, **raw}
    return _parts.base_config(
        sizes,
        family,
        embed_scale=whole(raw, "hidden_size") ** 0.5,
        activation=_parts.activation(raw, act, "gelu_pytorch_tanh"),
        **changes,
    )


def layer(tensors: Tensors, i: int, cfg: Config, raw: Raw) -> LayerParams:
    at = f"model.layers.{i}"
    bias, plus_one = flag(raw, "attention_bias", False), _parts.gain_minus_one(raw)
    return LayerParams(
        **_parts.attention(tensors, f"{at}.self_attn", cfg, bias, bias),
        **_parts.gated_mlp(tensors, f"{at}.mlp", cfg),
        attn_norm=_parts.norm(tensors, f"{at}.input_layernorm", cfg.d_model, plus_one=plus_one),
        mlp_norm=_parts.norm(tensors, f"{at}.post_attention_layernorm", cfg.d_model, plus_one=plus_one),
    )


def ends(tensors: Tensors, cfg: Config, raw: Raw) -> Ends:
    return _parts.ends(tensors, cfg, plus_one=_parts.gain_minus_one(raw))
