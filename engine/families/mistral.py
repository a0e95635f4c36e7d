"""Mistral: Llama with a sliding window (Jiang et al. 2023).

Reference: transformers, models/mistral/modeling_mistral.py.
"""

from engine.config import Config
from engine.families import _parts
from engine.families._parts import Raw
from engine.families._read import whole
from engine.families.llama import ends, layer

__all__ = ["config", "ends", "layer"]


def config(raw: Raw) -> Config:
    n_layers = whole(raw, "num_hidden_layers")
    kind = "full_attention" if raw.get("sliding_window", 4096) is None else "sliding_attention"
    return _parts.base_config(raw, "mistral", windows=_parts.windows(raw, [kind] * n_layers, 4096))
