"""Granite: Llama with four multipliers: embedding, attention, residual, logits (IBM 2024).

Reference: transformers, models/granite/modeling_granite.py.
"""

from engine.config import Config
from engine.families import _parts
from engine.families._parts import Raw
from engine.families._read import real, whole
from engine.families.llama import ends, layer

__all__ = ["config", "ends", "layer"]


def config(raw: Raw) -> Config:
    return _parts.base_config(
        raw,
        "granite",
        embed_scale=real(raw, "embedding_multiplier", 1.0),
        attn_scales=(real(raw, "attention_multiplier", 1.0),) * whole(raw, "num_hidden_layers"),
        residual_scale=real(raw, "residual_multiplier", 1.0),
        logit_scale=1 / real(raw, "logits_scaling", 1.0),
    )
