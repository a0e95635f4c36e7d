"""Llama, and SmolLM2 with it: RMS norms, rotary positions, grouped queries, SiLU-gated MLP (Touvron et al. 2023).

Reference: transformers, models/llama/modeling_llama.py.
"""

from collections.abc import Mapping
from typing import Any

from engine.config import Config, Rope
from engine.errors import DamagedFile, clipped
from engine.families._read import choice, flag, real, whole
from engine.ops import ACTIVATIONS, Array
from engine.params import LayerParams, Linear, Norm, transposed
from engine.weights import Tensors


def config(raw: Mapping[str, Any]) -> Config:
    """config.json -> Config; raises `DamagedFile` for sizes that do not fit together."""
    n_layers, n_heads, d_model = (
        whole(raw, "num_hidden_layers"),
        whole(raw, "num_attention_heads"),
        whole(raw, "hidden_size"),
    )
    n_kv_heads = whole(raw, "num_key_value_heads", n_heads)
    d_head = whole(raw, "head_dim", d_model // n_heads)
    if n_heads % n_kv_heads or d_head % 2:
        raise DamagedFile(f"config: {n_heads} heads of width {d_head} cannot share {n_kv_heads} key-value heads")
    return Config(
        family="llama",
        n_layers=n_layers,
        n_ctx=whole(raw, "max_position_embeddings", 2048),
        d_vocab=whole(raw, "vocab_size"),
        d_model=d_model,
        d_mlp=whole(raw, "intermediate_size"),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        d_head=d_head,
        norm="rms",
        norm_eps=real(raw, "rms_norm_eps", 1e-6),
        activation=choice(raw, "hidden_act", "silu", tuple(ACTIVATIONS)),
        ropes=(rope(raw, d_head),) * n_layers,
        windows=(None,) * n_layers,
        attn_scale=d_head**-0.5,
        tied=flag(raw, "tie_word_embeddings", False),
    )


def rope(raw: Mapping[str, Any], width: int) -> Rope:
    """Rotary frequencies from `rope_theta`, or from `rope_parameters` as transformers 5 writes them."""
    settings = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(settings, Mapping):
        raise DamagedFile(f"config: the rope settings are {clipped(settings)}, not an object")
    choice({"rope_type": settings.get("rope_type", settings.get("type"))}, "rope_type", "default", ("default",))
    return Rope.plain(real({**raw, **settings}, "rope_theta", 10_000.0, least=1.0), width)


def layer(tensors: Tensors, i: int, cfg: Config) -> LayerParams:
    """The tensors of `model.layers.{i}`."""
    at = f"model.layers.{i}."
    q_width, kv_width = cfg.n_heads * cfg.d_head, cfg.n_kv_heads * cfg.d_head

    def linear(name: str, d_in: int, d_out: int) -> Linear:
        bias = f"{at}{name}.bias"
        weight = transposed(tensors.get(f"{at}{name}.weight", (d_out, d_in)))
        return Linear(weight, tensors.get(bias, (d_out,)) if bias in tensors else None)

    return LayerParams(
        q=linear("self_attn.q_proj", cfg.d_model, q_width),
        k=linear("self_attn.k_proj", cfg.d_model, kv_width),
        v=linear("self_attn.v_proj", cfg.d_model, kv_width),
        o=linear("self_attn.o_proj", q_width, cfg.d_model),
        gate=linear("mlp.gate_proj", cfg.d_model, cfg.d_mlp),
        up=linear("mlp.up_proj", cfg.d_model, cfg.d_mlp),
        down=linear("mlp.down_proj", cfg.d_mlp, cfg.d_model),
        attn_norm=Norm(tensors.get(f"{at}input_layernorm.weight", (cfg.d_model,))),
        mlp_norm=Norm(tensors.get(f"{at}post_attention_layernorm.weight", (cfg.d_model,))),
    )


def ends(tensors: Tensors, cfg: Config) -> tuple[Array, Array, Norm]:
    """W_E, W_U (the same array when tied) and the final norm."""
    embed = tensors.get("model.embed_tokens.weight", (cfg.d_vocab, cfg.d_model))
    unembed = embed if cfg.tied else tensors.get("lm_head.weight", (cfg.d_vocab, cfg.d_model))
    return embed, unembed, Norm(tensors.get("model.norm.weight", (cfg.d_model,)))
