"""Phi-1, 1.5 and 2: parallel blocks that share one norm, partial rotary, biases everywhere (Li et al. 2023).

Reference: transformers, models/phi/modeling_phi.py.
"""

from engine.config import Config
from engine.families import _parts
from engine.families._parts import Raw
from engine.families._read import flag, real, whole
from engine.params import Ends, LayerParams
from engine.weights import Tensors


def config(raw: Raw) -> Config:
    d_head = _parts.head_dim(raw)
    return _parts.base_config(
        raw,
        "phi",
        norm="layer",
        norm_eps=real(raw, "layer_norm_eps", 1e-5),
        activation=_parts.activation(raw, "hidden_act", "gelu_new"),
        ropes=(_parts.rope(raw, d_head, fraction=0.5),) * whole(raw, "num_hidden_layers"),
        parallel=True,
    )


def layer(tensors: Tensors, i: int, cfg: Config, raw: Raw) -> LayerParams:
    at = f"model.layers.{i}"
    shared = _parts.norm(tensors, f"{at}.input_layernorm", cfg.d_model, bias=True)
    normed = flag(raw, "qk_layernorm", False)
    return LayerParams(
        **_parts.attention(tensors, f"{at}.self_attn", cfg, qkv_bias=True, o_bias=True, o="dense"),
        **_parts.plain_mlp(tensors, f"{at}.mlp.fc1", f"{at}.mlp.fc2", cfg),
        attn_norm=shared,
        mlp_norm=shared,
        q_norm=_parts.norm(tensors, f"{at}.self_attn.q_layernorm", cfg.d_head, bias=True) if normed else None,
        k_norm=_parts.norm(tensors, f"{at}.self_attn.k_layernorm", cfg.d_head, bias=True) if normed else None,
    )


def ends(tensors: Tensors, cfg: Config, raw: Raw) -> Ends:
    return _parts.ends(tensors, cfg, final="model.final_layernorm", norm_bias=True, head_bias=True)
