"""StarCoder2: layer norms and biases, a plain GELU MLP, rotary positions, a window (Lozhkov et al. 2024).

Reference: transformers, models/starcoder2/modeling_starcoder2.py.
"""

from engine.config import Config
from engine.families import _parts
from engine.families._parts import Raw
from engine.families._read import flag, real, whole
from engine.params import Ends, LayerParams
from engine.weights import Tensors

DEFAULTS: Raw = {"num_key_value_heads": 2, "max_position_embeddings": 4096, "tie_word_embeddings": True}
"""What transformers takes where config.json is silent."""


def config(raw: Raw) -> Config:
    raw = {**DEFAULTS, **raw}
    kind = "full_attention" if raw.get("sliding_window") is None else "sliding_attention"
    return _parts.base_config(
        raw,
        "starcoder2",
        norm="layer",
        norm_eps=real(raw, "norm_epsilon", 1e-5),
        activation=_parts.activation(raw, "hidden_act", "gelu_pytorch_tanh"),
        windows=_parts.windows(raw, [kind] * whole(raw, "num_hidden_layers")),
    )


def layer(tensors: Tensors, i: int, cfg: Config, raw: Raw) -> LayerParams:
    at = f"model.layers.{i}"
    bias = flag(raw, "use_bias", True)
    return LayerParams(
        **_parts.attention(tensors, f"{at}.self_attn", cfg, bias, bias),
        **_parts.plain_mlp(tensors, f"{at}.mlp.c_fc", f"{at}.mlp.c_proj", cfg, bias),
        attn_norm=_parts.norm(tensors, f"{at}.input_layernorm", cfg.d_model, bias=True),
        mlp_norm=_parts.norm(tensors, f"{at}.post_attention_layernorm", cfg.d_model, bias=True),
    )


def ends(tensors: Tensors, cfg: Config, raw: Raw) -> Ends:
    return _parts.ends(tensors, cfg, norm_bias=True)
