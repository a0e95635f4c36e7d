"""Phi-3 and 3.5: Llama with fused projections, a window, and longrope for long contexts (Abdin et al. 2024).

Reference: transformers, models/phi3/modeling_phi3.py.
"""

from engine.config import Config, Rope
from engine.families import _parts
from engine.families._parts import Raw
from engine.families._read import choice, real, whole
from engine.families.llama import ends
from engine.params import Joined, LayerParams
from engine.weights import Tensors

__all__ = ["config", "ends", "layer"]

LONGROPE = ("longrope", "su", "yarn")
"""Its name, and the earlier ones in this family's files."""

DEFAULTS: Raw = {"max_position_embeddings": 4096}
"""What transformers takes where config.json is silent."""


def config(raw: Raw) -> Config:
    raw = {**DEFAULTS, **raw}
    n_layers = whole(raw, "num_hidden_layers")
    kind = "full_attention" if raw.get("sliding_window") is None else "sliding_attention"
    return _parts.base_config(
        raw,
        "phi3",
        norm_eps=real(raw, "rms_norm_eps", 1e-5),
        ropes=(_rope(raw),) * n_layers,
        windows=_parts.windows(raw, [kind] * n_layers),
    )


def _rope(raw: Raw) -> Rope:
    settings = _parts.rope_settings(raw)
    return _parts.layer_rope(
        raw, settings if raw.get("gguf") else _named(raw, settings), _parts.head_dim(raw), fraction=1.0
    )


def _named(raw: Raw, settings: Raw) -> Raw:
    """What transformers makes of the settings; GGUF files say what llama.cpp takes them for, other scalings too."""
    kind = choice(settings, "rope_type", settings.get("type") or "default", ("default", *LONGROPE))
    if kind not in LONGROPE:
        return settings
    context = whole(raw, "original_max_position_embeddings", 4096)  # the config's, whatever the settings say
    return {**settings, "rope_type": "longrope", "original_max_position_embeddings": context}


def layer(tensors: Tensors, i: int, cfg: Config, raw: Raw) -> LayerParams:
    at = f"model.layers.{i}"
    return LayerParams(
        qkv=_fused(tensors, f"{at}.self_attn.qkv_proj", cfg.d_model, *cfg.qkv_widths),
        o=_parts.linear(tensors, f"{at}.self_attn.o_proj", cfg.qkv_widths[0], cfg.d_model),
        gate_up=_fused(tensors, f"{at}.mlp.gate_up_proj", cfg.d_model, cfg.d_mlp, cfg.d_mlp),
        down=_parts.linear(tensors, f"{at}.mlp.down_proj", cfg.d_mlp, cfg.d_model),
        attn_norm=_parts.norm(tensors, f"{at}.input_layernorm", cfg.d_model),
        mlp_norm=_parts.norm(tensors, f"{at}.post_attention_layernorm", cfg.d_model),
    )


def _fused(tensors: Tensors, name: str, d_in: int, *widths: int) -> Joined:
    return Joined.fused(_parts.linear(tensors, name, d_in, sum(widths)), *widths)
