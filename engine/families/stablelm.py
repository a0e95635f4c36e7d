"""StableLM: layer norms, partial rotary, gated MLP; sequential, or parallel with one norm; normed heads (Stability AI).

Reference: transformers, models/stablelm/modeling_stablelm.py.
"""

import numpy as np

from engine.config import Config
from engine.errors import DamagedFile
from engine.families import _parts
from engine.families._parts import Raw
from engine.families._read import flag, real, whole
from engine.params import Ends, LayerParams, Norm
from engine.weights import Tensors

DEFAULTS: Raw = {"num_key_value_heads": 32, "max_position_embeddings": 4096}
"""What transformers takes where config.json is silent."""


def config(raw: Raw) -> Config:
    raw = {**DEFAULTS, **raw}
    d_head = _parts.head_width(raw)
    if (given := _parts.head_dim(raw)) != d_head:
        raise DamagedFile(f"config: head_dim is {given}, but heads are {d_head} features wide in this architecture")
    return _parts.base_config(
        raw,
        "stablelm",
        norm="layer",
        norm_eps=real(raw, "layer_norm_eps", 1e-5),
        ropes=(_parts.rope(raw, d_head, fraction=0.25),) * whole(raw, "num_hidden_layers"),
        parallel=flag(raw, "use_parallel_residual", False),
    )


def layer(tensors: Tensors, i: int, cfg: Config, raw: Raw) -> LayerParams:
    at = f"model.layers.{i}"
    first = _parts.norm(tensors, f"{at}.input_layernorm", cfg.d_model, bias=True)
    second = first if cfg.parallel else _parts.norm(tensors, f"{at}.post_attention_layernorm", cfg.d_model, bias=True)
    normed = flag(raw, "qk_layernorm", False)
    return LayerParams(
        **_parts.attention(tensors, f"{at}.self_attn", cfg, qkv_bias=flag(raw, "use_qkv_bias", False)),
        **_parts.gated_mlp(tensors, f"{at}.mlp", cfg),
        attn_norm=first,
        mlp_norm=second,
        q_norm=_by_head(tensors, f"{at}.self_attn.q_layernorm", cfg.n_heads, cfg.d_head) if normed else None,
        k_norm=_by_head(tensors, f"{at}.self_attn.k_layernorm", cfg.n_kv_heads, cfg.d_head) if normed else None,
    )


def _by_head(tensors: Tensors, name: str, heads: int, d_head: int) -> Norm:
    """A gain for each head: (heads, d_head)."""
    return Norm(np.stack([tensors.get(f"{name}.norms.{head}.weight", (d_head,)) for head in range(heads)]))


def ends(tensors: Tensors, cfg: Config, raw: Raw) -> Ends:
    return _parts.ends(tensors, cfg, norm_bias=True)
