"""GPT-NeoX and Pythia: parallel or sequential blocks, partial rotary, q, k and v fused by head (Black et al. 2022).

Reference: transformers, models/gpt_neox/modeling_gpt_neox.py.
"""

from engine.config import Config, Rope
from engine.families import _parts
from engine.families._parts import Raw
from engine.families._read import flag, real, whole
from engine.params import Ends, Joined, LayerParams, transposed
from engine.weights import Tensors

PREFIX = "gpt_neox."


def config(raw: Raw) -> Config:
    d_head = _parts.head_width(raw)
    return _parts.base_config(
        {**raw, "head_dim": d_head, "num_key_value_heads": None},
        "gpt_neox",
        norm="layer",
        norm_eps=real(raw, "layer_norm_eps", 1e-5),
        activation=_parts.activation(raw, "hidden_act", "gelu"),
        ropes=(_rope(raw),) * whole(raw, "num_hidden_layers"),
        parallel=flag(raw, "use_parallel_residual", True),
    )


def _rope(raw: Raw) -> Rope:
    """By names of its own: what other families call rope_theta and partial_rotary_factor means nothing here."""
    others = {**raw, "rope_theta": None, "partial_rotary_factor": None}
    theta, fraction = real(raw, "rotary_emb_base", 10_000.0), real(raw, "rotary_pct", 0.25)
    return _parts.rope(others, _parts.head_dim(raw), theta, fraction)


def layer(tensors: Tensors, i: int, cfg: Config, raw: Raw) -> LayerParams:
    at = f"gpt_neox.layers.{i}"
    bias = flag(raw, "attention_bias", True)
    return LayerParams(
        qkv=_fused(tensors, f"{at}.attention.query_key_value", cfg, bias),
        o=_parts.linear(tensors, f"{at}.attention.dense", cfg.d_model, cfg.d_model, bias),
        **_parts.plain_mlp(tensors, f"{at}.mlp.dense_h_to_4h", f"{at}.mlp.dense_4h_to_h", cfg),
        attn_norm=_parts.norm(tensors, f"{at}.input_layernorm", cfg.d_model, bias=True),
        mlp_norm=_parts.norm(tensors, f"{at}.post_attention_layernorm", cfg.d_model, bias=True),
    )


def _fused(tensors: Tensors, name: str, cfg: Config, bias: bool) -> Joined:
    """Rows are (head, one of q k v, feature)."""
    d_model = cfg.d_model
    weight = tensors.get(f"{name}.weight", (3 * d_model, d_model)).reshape(cfg.n_heads, 3, cfg.d_head, d_model)
    offset = tensors.get(f"{name}.bias", (3 * d_model,)).reshape(cfg.n_heads, 3, cfg.d_head) if bias else None
    return Joined(
        transposed(weight.swapaxes(0, 1).reshape(3 * d_model, d_model)),
        None if offset is None else offset.swapaxes(0, 1).reshape(3 * d_model),
        widths=cfg.qkv_widths,
    )


def ends(tensors: Tensors, cfg: Config, raw: Raw) -> Ends:
    return _parts.ends(tensors, cfg, "gpt_neox.embed_in", "gpt_neox.final_layer_norm", "embed_out", norm_bias=True)
