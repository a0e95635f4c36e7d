"""SmolLM3: Llama in which some layers have no rotary positions (NoPE).

Reference: transformers, models/smollm3/modeling_smollm3.py.
"""

from engine.config import Config
from engine.errors import DamagedFile
from engine.families import _parts
from engine.families._parts import Raw
from engine.families._read import flag, whole
from engine.families.llama import ends, layer

__all__ = ["config", "ends", "layer"]

DEFAULTS: Raw = {"num_key_value_heads": 4, "max_position_embeddings": 32_768, "tie_word_embeddings": True}
"""What transformers takes where config.json is silent."""


def config(raw: Raw) -> Config:
    raw = {**DEFAULTS, **raw}
    n_layers = whole(raw, "num_hidden_layers")
    interval = whole(raw, "no_rope_layer_interval", 4)
    rotated = raw.get("no_rope_layers") or [int((i + 1) % interval != 0) for i in range(n_layers)]
    if not isinstance(rotated, list) or len(rotated) != n_layers or any(r not in (0, 1) for r in rotated):
        raise DamagedFile(f"config: no_rope_layers must hold 0 (no rotary) or 1 for each of {n_layers} layers")
    slides = flag(raw, "use_sliding_window", False) and raw.get("sliding_window") is not None
    usual = ["sliding_attention" if slides and not r else "full_attention" for r in rotated]
    types = _parts.layer_types(raw, n_layers, usual)
    d_head = _parts.head_dim(raw)
    rope = _parts.rope(raw, d_head, 2_000_000.0)
    return _parts.base_config(
        raw,
        "smollm3",
        ropes=tuple(rope if r else None for r in rotated),
        windows=_parts.windows(raw, types),
    )
