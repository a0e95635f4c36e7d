"""Where the engine's points are in each family of transformers: `sites(model)`, all that its blocks have.

Names   what a family calls its modules; most call them as Llama does
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from oracle.reference import Site, View, as_is, flat, heads_first


@dataclass(frozen=True)
class Names:
    """Module names. `returns` is "first" where a layer returns a tuple; `mid` reads the residual after attention.

    `after` are the norms of attention's and the MLP's output, `normed` the norms of queries and keys and the layout
    of what they return, `fused` the projection that holds q, k and v and how they lie in it.
    """

    layer: str = "model.layers.{}"
    attention: str = "self_attn"
    o: str = "o_proj"
    mlp: str = "mlp"
    down: str = "down_proj"
    final: str = "model.norm"
    mid: str = "post_attention_layernorm"
    returns: str = "out"
    after: tuple[str, str] | None = None
    normed: tuple[str, str, View] | None = None
    fused: tuple[str, Callable[[Any, int], View]] | None = None


def _thirds(config: Any, index: int) -> View:
    """Queries, then keys, then values, of any widths."""
    kv = getattr(config, "num_key_value_heads", config.num_attention_heads)
    first = sum((config.num_attention_heads, kv, kv)[:index])
    count = config.num_attention_heads if index == 0 else kv
    return lambda x, d_head: flat(x[..., first * d_head : (first + count) * d_head], d_head)


def _by_head(config: Any, index: int) -> View:
    """Query, key and value of the first head, then of the second, ..."""
    return lambda x, d_head: x.unflatten(-1, (-1, 3, d_head))[..., index, :]


_GPT: dict[str, Any] = {"layer": "transformer.h.{}", "down": "c_proj", "final": "transformer.ln_f", "mid": "ln_2"}
_OLMO = Names(
    mid="mlp", after=("post_attention_layernorm", "post_feedforward_layernorm"), normed=("q_norm", "k_norm", flat)
)
_GEMMA: dict[str, Any] = {
    "mid": "pre_feedforward_layernorm",
    "after": ("post_attention_layernorm", "post_feedforward_layernorm"),
}
_PER_HEAD = ("q_layernorm", "k_layernorm", heads_first)

NAMES = {
    "gemma2": Names(**_GEMMA),
    "gemma3_text": Names(**_GEMMA, normed=("q_norm", "k_norm", heads_first)),
    "gpt2": Names(**_GPT, attention="attn", o="c_proj", fused=("c_attn", _thirds)),
    "gpt_neo": Names(**_GPT, attention="attn.attention", o="out_proj", returns="first"),
    "gpt_neox": Names(
        layer="gpt_neox.layers.{}",
        attention="attention",
        o="dense",
        down="dense_4h_to_h",
        final="gpt_neox.final_layer_norm",
        fused=("query_key_value", _by_head),
    ),
    "olmo2": _OLMO,
    "olmo3": _OLMO,
    "phi": Names(o="dense", down="fc2", final="model.final_layernorm", normed=_PER_HEAD),
    "phi3": Names(fused=("qkv_proj", _thirds)),
    "qwen3": Names(normed=("q_norm", "k_norm", as_is)),
    "stablelm": Names(normed=_PER_HEAD),
    "starcoder2": Names(down="c_proj"),
}
"""Families that differ from Llama."""


def sites(model: Any) -> dict[str, Site]:
    """Every point; `embed` is the first layer's input, which holds scales and positions."""
    config = model.config
    names = NAMES.get(config.model_type, Names())
    attention, mlp = f"{names.layer}.{names.attention}", f"{names.layer}.{names.mlp}"
    o, down = f"{attention}.{names.o}", f"{mlp}.{names.down}"
    scale = getattr(config, "residual_multiplier", 1.0)
    after = [f"{names.layer}.{norm}" for norm in names.after or ()]
    found = {
        "embed": Site(names.layer, "in"),
        "resid_pre": Site(names.layer, "in"),
        **_projections(model, names, attention),
        "attn_pattern": Site(attention, "weights"),
        "z": Site(o, "in", flat),
        "attn_proj": Site(o, "out"),
        "attn_out": Site(after[0], "out") if after else Site(attention, "first", scale=scale),
        "resid_mid": Site(f"{names.layer}.{names.mid}", "shared"),
        "mlp_act": Site(down, "in"),
        "mlp_proj": Site(down, "out"),
        "mlp_out": Site(after[1], "out") if after else Site(mlp, "out", scale=scale),
        "resid_post": Site(names.layer, names.returns),
        "final_norm": Site(names.final, "out"),
    }
    if getattr(config, "use_parallel_residual", config.model_type == "phi"):
        del found["resid_mid"]
    return found


def _projections(model: Any, names: Names, attention: str) -> dict[str, Site]:
    """q, k, v: after their norms, before rotary."""
    if names.fused is not None:
        module, view = names.fused
        return {name: Site(f"{attention}.{module}", "out", view(model.config, i)) for i, name in enumerate("qkv")}
    found = {name: Site(f"{attention}.{name}_proj", "out", flat) for name in "qkv"}
    if names.normed is not None and getattr(model.config, "qk_layernorm", True):
        *norms, view = names.normed
        found |= {name: Site(f"{attention}.{norm}", "out", view) for name, norm in zip("qk", norms, strict=True)}
    return found
