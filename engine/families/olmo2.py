"""OLMo 2: norms after attention and MLP only, and over the whole query and key projections (OLMo Team 2024).

Reference: transformers, models/olmo2/modeling_olmo2.py.
"""

from engine.config import Config
from engine.families import _parts
from engine.families._parts import Raw
from engine.families._read import flag, real
from engine.families.llama import ends
from engine.params import LayerParams
from engine.weights import Tensors

__all__ = ["config", "ends", "layer"]


def config(raw: Raw) -> Config:
    return _parts.base_config(raw, "olmo2", norm_eps=real(raw, "rms_norm_eps", 1e-5))


def layer(tensors: Tensors, i: int, cfg: Config, raw: Raw) -> LayerParams:
    at = f"model.layers.{i}"
    bias = flag(raw, "attention_bias", False)
    return LayerParams(
        **_parts.attention(tensors, f"{at}.self_attn", cfg, bias, bias),
        **_parts.gated_mlp(tensors, f"{at}.mlp", cfg),
        q_norm=_parts.norm(tensors, f"{at}.self_attn.q_norm", cfg.n_heads * cfg.d_head),
        k_norm=_parts.norm(tensors, f"{at}.self_attn.k_norm", cfg.n_kv_heads * cfg.d_head),
        attn_post_norm=_parts.norm(tensors, f"{at}.post_attention_layernorm", cfg.d_model),
        mlp_post_norm=_parts.norm(tensors, f"{at}.post_feedforward_layernorm", cfg.d_model),
    )
