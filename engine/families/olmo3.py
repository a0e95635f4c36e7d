"""OLMo 3: OLMo 2 with three windowed layers to each full one, each kind with rotary frequencies of its own.

Reference: transformers, models/olmo3/modeling_olmo3.py.
"""

from typing import Any

from engine.config import Config
from engine.families import _parts
from engine.families._parts import Raw
from engine.families._read import real, whole
from engine.families.llama import ends
from engine.families.olmo2 import layer

__all__ = ["config", "ends", "layer"]


def config(raw: Raw) -> Config:
    n_layers = whole(raw, "num_hidden_layers")
    usual = ["sliding_attention" if (i + 1) % 4 else "full_attention" for i in range(n_layers)]
    types = _parts.layer_types(raw, n_layers, usual)
    d_head = whole(raw, "hidden_size") // whole(raw, "num_attention_heads")
    ropes = {kind: _parts.layer_rope(raw, _settings(raw, kind), d_head, 500_000.0) for kind in set(types)}
    return _parts.base_config(
        raw,
        "olmo3",
        norm_eps=real(raw, "rms_norm_eps", 1e-5),
        ropes=tuple(ropes[kind] for kind in types),
        windows=_parts.windows(raw, types, 4096),
    )


def _settings(raw: Raw, kind: str) -> dict[str, Any]:
    """Rope settings by kind of layer in `rope_parameters`; older files scale the full layers only."""
    by_kind = raw.get("rope_parameters")
    if isinstance(by_kind, dict) and isinstance(by_kind.get(kind), dict):
        return dict(by_kind[kind])
    return dict(_parts.rope_settings(raw)) if kind == "full_attention" else {}
