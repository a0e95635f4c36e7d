"""Qwen2 and Qwen2.5: Llama with biases on q, k and v, and a window in the upper layers if asked for.

Reference: transformers, models/qwen2/modeling_qwen2.py.
"""

from engine.config import Config
from engine.families import _parts
from engine.families._parts import Raw
from engine.families._read import flag, whole
from engine.families.llama import ends
from engine.params import LayerParams
from engine.weights import Tensors

__all__ = ["config", "ends", "layer", "upper_windows"]

DEFAULTS: Raw = {"num_key_value_heads": 32, "max_position_embeddings": 32_768}
"""What transformers takes where config.json is silent."""


def config(raw: Raw) -> Config:
    raw = {**DEFAULTS, **raw}
    return _parts.base_config(raw, "qwen2", windows=upper_windows(raw))


def upper_windows(raw: Raw) -> tuple[int | None, ...]:
    """A window for the layers from `max_window_layers` on, when `use_sliding_window` is set."""
    n_layers = whole(raw, "num_hidden_layers")
    if not flag(raw, "use_sliding_window", False):
        return (None,) * n_layers
    first = whole(raw, "max_window_layers", 28, least=0)
    default = ["sliding_attention" if i >= first else "full_attention" for i in range(n_layers)]
    return _parts.windows(raw, _parts.layer_types(raw, n_layers, default), 4096)


def layer(tensors: Tensors, i: int, cfg: Config, raw: Raw) -> LayerParams:
    at = f"model.layers.{i}"
    return LayerParams(
        **_parts.attention(tensors, f"{at}.self_attn", cfg, qkv_bias=True),
        **_parts.gated_mlp(tensors, f"{at}.mlp", cfg),
        attn_norm=_parts.norm(tensors, f"{at}.input_layernorm", cfg.d_model),
        mlp_norm=_parts.norm(tensors, f"{at}.post_attention_layernorm", cfg.d_model),
    )
