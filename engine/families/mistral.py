"""Mistral: Llama with a sliding window (Jiang et al. 2023).

Reference: transformers, models/mistral/modeling_mistral.py.
"""

from engine.config import Config
from engine.errors import DamagedFile
from engine.families import _parts, llama
from engine.families._parts import Raw
from engine.families._read import whole
from engine.families.llama import ends
from engine.params import LayerParams
from engine.weights import Tensors

__all__ = ["config", "ends", "layer"]

DEFAULTS: Raw = {"num_key_value_heads": 8, "max_position_embeddings": 131_072}
"""What transformers takes where config.json is silent."""


def config(raw: Raw) -> Config:
    raw = {**DEFAULTS, **raw}
    n_layers = whole(raw, "num_hidden_layers")
    kind = "full_attention" if raw.get("sliding_window", 4096) is None else "sliding_attention"
    if raw.get("layer_types") not in (None, [kind] * n_layers):  # transformers follows them
        raise DamagedFile(f"config: layer_types other than {kind} in every layer are not supported for mistral")
    return _parts.base_config(raw, "mistral", windows=_parts.windows(raw, [kind] * n_layers, 4096))


def layer(tensors: Tensors, i: int, cfg: Config, raw: Raw) -> LayerParams:
    return llama.layer(tensors, i, cfg, {**raw, "attention_bias": False, "mlp_bias": False})
