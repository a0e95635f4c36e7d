"""GPT-2: layer norms, learned positions, fused projections stored (in, out) (Radford et al. 2019).

Reference: transformers, models/gpt2/modeling_gpt2.py.
"""

from engine.config import Config
from engine.errors import UnknownModel
from engine.families import _parts
from engine.families._parts import Raw
from engine.families._read import flag, real, whole
from engine.params import Ends, Joined, LayerParams
from engine.weights import Tensors

PREFIX = "transformer."

NAMES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}


def config(raw: Raw) -> Config:
    raw = _parts.named(raw, NAMES)
    _parts.refuse_two_ways(raw)
    if flag(raw, "add_cross_attention", False):
        raise UnknownModel("config: add_cross_attention is not supported: this is a decoder on its own")
    d_model, n_layers, n_heads = whole(raw, "n_embd"), whole(raw, "n_layer"), whole(raw, "n_head")
    d_head = _parts.head_width(raw, "n_embd", "n_head")
    scale = d_head**-0.5 if flag(raw, "scale_attn_weights", True) else 1.0
    by_layer = flag(raw, "scale_attn_by_inverse_layer_idx", False)
    return Config(
        family="gpt2",
        n_layers=n_layers,
        n_ctx=whole(raw, "n_positions", 1024),
        d_vocab=whole(raw, "vocab_size"),
        d_model=d_model,
        d_mlp=whole(raw, "n_inner", 4 * d_model),
        n_heads=n_heads,
        n_kv_heads=n_heads,
        d_head=d_head,
        norm="layer",
        norm_eps=real(raw, "layer_norm_epsilon", 1e-5),
        activation=_parts.activation(raw, "activation_function", "gelu_new"),
        ropes=(None,) * n_layers,
        windows=(None,) * n_layers,
        attn_scales=tuple(scale / (i + 1) if by_layer else scale for i in range(n_layers)),
        tied=flag(raw, "tie_word_embeddings", True),
        learned_positions=True,
    )


def layer(tensors: Tensors, i: int, cfg: Config, raw: Raw) -> LayerParams:
    at = f"transformer.h.{i}"
    return LayerParams(
        qkv=_conv1d(tensors, f"{at}.attn.c_attn", cfg.d_model, *cfg.qkv_widths),
        o=_conv1d(tensors, f"{at}.attn.c_proj", cfg.d_model, cfg.d_model),
        gate_up=_conv1d(tensors, f"{at}.mlp.c_fc", cfg.d_model, cfg.d_mlp),
        down=_conv1d(tensors, f"{at}.mlp.c_proj", cfg.d_mlp, cfg.d_model),
        attn_norm=_parts.norm(tensors, f"{at}.ln_1", cfg.d_model, bias=True),
        mlp_norm=_parts.norm(tensors, f"{at}.ln_2", cfg.d_model, bias=True),
    )


def _conv1d(tensors: Tensors, name: str, d_in: int, *widths: int) -> Joined:
    """A Conv1D of GPT-2's: stored (in, out) already."""
    d_out = sum(widths)
    return Joined(tensors.get(f"{name}.weight", (d_in, d_out)), tensors.get(f"{name}.bias", (d_out,)), widths=widths)


def ends(tensors: Tensors, cfg: Config, raw: Raw) -> Ends:
    made = _parts.ends(tensors, cfg, "transformer.wte", "transformer.ln_f", norm_bias=True)
    return made._replace(positions=tensors.get("transformer.wpe.weight", (cfg.n_ctx, cfg.d_model)))
