"""Llama, and SmolLM2 with it: RMS norms, rotary positions, grouped queries, gated MLP (Touvron et al. 2023).

Reference: transformers, models/llama/modeling_llama.py.
"""

from engine.config import Config
from engine.families import _parts
from engine.families._parts import Raw
from engine.params import Ends, LayerParams
from engine.weights import Tensors


def config(raw: Raw) -> Config:
    return _parts.base_config(raw, "llama")


def layer(tensors: Tensors, i: int, cfg: Config, raw: Raw) -> LayerParams:
    at = f"model.layers.{i}"
    bias = _parts.has_bias(raw, "attention_bias")
    return LayerParams(
        **_parts.attention(tensors, f"{at}.self_attn", cfg, bias, bias),
        **_parts.gated_mlp(tensors, f"{at}.mlp", cfg, _parts.has_bias(raw, "mlp_bias")),
        attn_norm=_parts.norm(tensors, f"{at}.input_layernorm", cfg.d_model),
        mlp_norm=_parts.norm(tensors, f"{at}.post_attention_layernorm", cfg.d_model),
    )


def ends(tensors: Tensors, cfg: Config, raw: Raw) -> Ends:
    return _parts.ends(tensors, cfg)
