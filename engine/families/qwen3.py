"""Qwen3: Llama with an RMS norm on each head's queries and keys.

Reference: transformers, models/qwen3/modeling_qwen3.py.
"""

from dataclasses import replace

from engine.config import Config
from engine.families import _parts, llama
from engine.families._parts import Raw
from engine.families.llama import ends
from engine.families.qwen2 import upper_windows
from engine.params import LayerParams
from engine.weights import Tensors

__all__ = ["config", "ends", "layer"]

DEFAULTS: Raw = {"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32_768}
"""What transformers takes where config.json is silent."""


def config(raw: Raw) -> Config:
    raw = {**DEFAULTS, **raw}
    return _parts.base_config(raw, "qwen3", windows=upper_windows(raw))


def layer(tensors: Tensors, i: int, cfg: Config, raw: Raw) -> LayerParams:
    at = f"model.layers.{i}.self_attn"
    return replace(
        llama.layer(tensors, i, cfg, {**raw, "mlp_bias": False}),
        q_norm=_parts.norm(tensors, f"{at}.q_norm", cfg.d_head),
        k_norm=_parts.norm(tensors, f"{at}.k_norm", cfg.d_head),
    )
