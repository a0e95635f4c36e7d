"""GPT-Neo: GPT-2 with separate unscaled projections and a window in every other layer (Black et al. 2021).

Reference: transformers, models/gpt_neo/modeling_gpt_neo.py.
"""

from itertools import islice

from engine.config import Config
from engine.errors import DamagedFile, clipped
from engine.families import _parts
from engine.families._parts import Raw
from engine.families._read import flag, real, whole
from engine.params import Ends, LayerParams
from engine.weights import Tensors

PREFIX = "transformer."

NAMES = {"num_attention_heads": "num_heads", "num_hidden_layers": "num_layers"}


def config(raw: Raw) -> Config:
    raw = _parts.named(raw, NAMES)
    _parts.refuse_two_ways(raw)
    d_model, n_layers, n_heads = whole(raw, "hidden_size"), whole(raw, "num_layers"), whole(raw, "num_heads")
    window = whole(raw, "window_size", 256)
    return Config(
        family="gpt_neo",
        n_layers=n_layers,
        n_ctx=whole(raw, "max_position_embeddings", 2048),
        d_vocab=whole(raw, "vocab_size"),
        d_model=d_model,
        d_mlp=whole(raw, "intermediate_size", 4 * d_model),
        n_heads=n_heads,
        n_kv_heads=n_heads,
        d_head=_parts.head_width(raw, heads="num_heads"),
        norm="layer",
        norm_eps=real(raw, "layer_norm_epsilon", 1e-5),
        activation=_parts.activation(raw, "activation_function", "gelu_new"),
        ropes=(None,) * n_layers,
        windows=tuple(window if kind == "local" else None for kind in _kinds(raw, n_layers)),
        attn_scales=(1.0,) * n_layers,
        tied=flag(raw, "tie_word_embeddings", True),
        learned_positions=True,
    )


def _kinds(raw: Raw, n_layers: int) -> list[str]:
    """One kind per layer: `attention_layers`, or `attention_types`, [[["global", "local"], 12]], written out."""
    key, groups = "attention_types", raw.get("attention_types") or [[["global", "local"], -(-n_layers // 2)]]
    if raw.get("attention_layers") is not None:
        key, groups = "attention_layers", [[raw["attention_layers"], 1]]
    try:
        written = (kind for pattern, times in groups for _ in range(min(int(times), n_layers)) for kind in pattern)
        kinds = list(islice(written, n_layers + 1))
        known = {*kinds} <= {"global", "local"}
    except (TypeError, ValueError, OverflowError):
        raise DamagedFile(f"config: {key} is {clipped(groups)}") from None
    if len(kinds) != n_layers or not known:
        raise DamagedFile(f"config: {key} must name global or local for each of {n_layers} layers")
    return kinds


def layer(tensors: Tensors, i: int, cfg: Config, raw: Raw) -> LayerParams:
    at = f"transformer.h.{i}"
    return LayerParams(
        **_parts.attention(tensors, f"{at}.attn.attention", cfg, o_bias=True, o="out_proj"),
        **_parts.plain_mlp(tensors, f"{at}.mlp.c_fc", f"{at}.mlp.c_proj", cfg),
        attn_norm=_parts.norm(tensors, f"{at}.ln_1", cfg.d_model, bias=True),
        mlp_norm=_parts.norm(tensors, f"{at}.ln_2", cfg.d_model, bias=True),
    )


def ends(tensors: Tensors, cfg: Config, raw: Raw) -> Ends:
    made = _parts.ends(tensors, cfg, "transformer.wte", "transformer.ln_f", norm_bias=True)
    return made._replace(positions=tensors.get("transformer.wpe.weight", (cfg.n_ctx, cfg.d_model)))
