"""The features of each row of `tests/families.py`, read from its config, its weights and how they are stored.

features(row)   {sentence, ...}: what the row's architecture has

`make mutants` demands a mutant for each of them on every row: a row with a feature that nobody takes away fails.
"""

from collections.abc import Iterator
from dataclasses import MISSING, fields

import families
import numpy as np

from engine.config import Config, Rope
from engine.families import family
from engine.params import Ends, LayerParams

Array = np.ndarray
Stored = dict[str, Array]


class Asked(families.Seeded):
    """Remembers the tensors that were asked for."""

    def __init__(self, row: str) -> None:
        super().__init__(row)
        self.seen: Stored = {}

    def get(self, name: str, shape: tuple[int, ...]) -> Array:
        self.seen[name] = super().get(name, shape)
        return self.seen[name]


def features(row: str) -> set[str]:
    raw, asked = families.ROWS[row], Asked(row)
    reader = family(raw["model_type"])
    cfg = reader.config(raw)
    ends, layer = reader.ends(asked, cfg, raw), reader.layer(asked, 0, cfg, raw)
    kind = (raw.get("rope_parameters") or {}).get("rope_type", "default")
    return {
        *_sizes(cfg),
        *(() if any(key.endswith(("_eps", "_epsilon")) for key in raw) else ["default epsilon"]),
        *_positions(cfg, kind),
        *_attention(cfg),
        *_parts(layer, ends, cfg),
        *_biases(layer, ends),
        *_storage(layer, ends, asked.seen),
    }


SETTINGS = {
    "attn_softcap": "attention softcap",
    "final_softcap": "final softcap",
    "embed_scale": "embedding scale",
    "residual_scale": "residual multiplier",
    "logit_scale": "logit scale",
    "parallel": "parallel blocks",
    "learned_positions": "learned positions",
    "tied": "tied head",
}
"""Fields of `Config` that have defaults; a field without a name here is a feature by its own name."""

PARTS = {
    "attn_norm": "norm before attention",
    "mlp_norm": "norm before the MLP",
    "q_norm": "queries normed",
    "k_norm": "keys normed",
    "attn_post_norm": "norm after attention",
    "mlp_post_norm": "norm after the MLP",
}
"""Fields of `LayerParams` that may be absent, likewise."""


def _sizes(cfg: Config) -> Iterator[str]:
    yield f"{cfg.norm} norm"
    yield "epsilon"
    yield f"activation {cfg.activation}"
    yield from () if cfg.tied else ["untied head"]
    yield from () if cfg.parallel else ["sequential blocks"]
    if cfg.n_heads * cfg.d_head != cfg.d_model:
        yield "heads wider than the model"
    for field in fields(cfg):
        if field.default is not MISSING and getattr(cfg, field.name) != field.default:
            yield SETTINGS.get(field.name, field.name)


def _positions(cfg: Config, kind: str) -> Iterator[str]:
    ropes = [rope for rope in cfg.ropes if rope is not None]
    if not ropes:
        return
    yield "rotary positions"
    if kind != "default":
        yield f"{kind} rope"
    elif any(rope.inv_freq != Rope.plain(10_000.0, 2 * len(rope.inv_freq)).inv_freq for rope in ropes):
        yield "rotary base"
    for name, there in (
        ("layers without rotary", len(ropes) < cfg.n_layers),
        ("rotary frequencies by layer", len({*ropes}) > 1),
        ("partial rotary", any(2 * len(rope.inv_freq) < cfg.d_head for rope in ropes)),
        ("attention factor of the rope", any(rope.scale != 1 for rope in ropes)),
        ("frequencies of long sequences", any(rope.long or rope.dynamic for rope in ropes)),
    ):
        if there:
            yield name


def _attention(cfg: Config) -> Iterator[str]:
    for name, there in (
        ("window", any(cfg.windows)),
        ("windows in some layers", len({*cfg.windows}) > 1),
        ("attention scale", any(scale != cfg.d_head**-0.5 for scale in cfg.attn_scales)),
        ("attention scale by layer", len({*cfg.attn_scales}) > 1),
        ("grouped queries", cfg.group > 1),
    ):
        if there:
            yield name


def _parts(layer: LayerParams, ends: Ends, cfg: Config) -> Iterator[str]:
    yield "gated MLP" if layer.gate else "plain MLP"
    yield from ["final norm"] if ends.final_norm else ()
    for field in fields(layer):
        if field.default is None and getattr(layer, field.name) is not None:
            yield PARTS.get(field.name, field.name)
    if layer.attn_norm is layer.mlp_norm and layer.attn_norm is not None:
        yield "one norm for attention and MLP"
    if layer.q_norm is not None:
        gain = layer.q_norm.weight
        yield "heads normed one by one" if gain.shape[-1] == cfg.d_head else "heads normed together"
        if gain.ndim == 2:
            yield "gains by head"


def _biases(layer: LayerParams, ends: Ends) -> Iterator[str]:
    names = {name for name, _ in layer.arrays() if name.endswith(".bias")}
    if any(name in names for name in ("q.bias", "k.bias", "v.bias")):
        yield "bias of q, k and v"
    if "o.bias" in names:
        yield "bias of attention's output"
    if "up.bias" in names:
        yield "bias of the MLP"
    if any("norm" in name for name in names) or (ends.final_norm is not None and ends.final_norm.bias is not None):
        yield "bias of norms"
    if ends.unembed_bias is not None:
        yield "bias of the head"


def _storage(layer: LayerParams, ends: Ends, stored: Stored) -> Iterator[str]:
    def is_there(array: Array) -> bool:
        return any(np.array_equal(array, other) for other in stored.values())

    if not is_there(layer.q.weight.T):
        yield "q, k and v fused"
    if layer.gate is not None and not is_there(layer.gate.weight.T):
        yield "gate and up fused"
    if is_there(layer.o.weight):
        yield "matrices stored (in, out)"
    if ends.final_norm is not None and not is_there(ends.final_norm.weight):
        yield "gains stored as gain - 1"
