"""OLMo 3: OLMo 2 with three windowed layers to each full one, each kind with rotary frequencies of its own.

Reference: transformers, models/olmo3/modeling_olmo3.py.
"""

from engine.config import Config, Rope
from engine.families import _parts
from engine.families._parts import Raw
from engine.families._read import real, whole
from engine.families.llama import ends
from engine.families.olmo2 import layer

__all__ = ["config", "ends", "layer"]

THETA = 500_000.0


def config(raw: Raw) -> Config:
    n_layers = whole(raw, "num_hidden_layers")
    usual = ["sliding_attention" if (i + 1) % 4 else "full_attention" for i in range(n_layers)]
    types = _parts.layer_types(raw, n_layers, usual)
    ropes = {kind: _rope(raw, kind) for kind in set(types)}
    return _parts.base_config(
        raw,
        "olmo3",
        norm_eps=real(raw, "rms_norm_eps", 1e-5),
        ropes=tuple(ropes[kind] for kind in types),
        windows=_parts.windows(raw, types, 4096),
    )


def _rope(raw: Raw, kind: str) -> Rope:
    """A kind's rotary embedding; `rope_theta` beside the rope settings is the full layers' alone."""
    theta = real(raw, "rope_theta", THETA) if kind == "full_attention" else THETA
    return _parts.kind_rope(raw, kind, _parts.head_dim(raw), theta)
