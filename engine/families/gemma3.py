"""The text part of Gemma 3 checkpoints that see pictures too: Gemma 3's text model under longer names.

config.json holds the text model's in `text_config`, where entries with their default value may be missing. The tensors
stand under language_model.model., as transformers saves them, or under model.language_model.; those of the vision tower
and its projector are not read on purpose: prompts are text.

Reference: transformers, models/gemma3/modeling_gemma3.py and configuration_gemma3.py.
"""

from collections.abc import Iterable
from typing import Any

from engine.config import Config
from engine.errors import DamagedFile, clipped
from engine.families import gemma3_text
from engine.families._parts import Raw
from engine.ops import Array
from engine.params import Ends, LayerParams
from engine.weights import Tensors

DEFAULTS: Raw = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131_072,
}
"""Of transformers' Gemma3TextConfig; the other entries have theirs in gemma3_text.py."""

TEXT = {"language_model.": "", "model.language_model.": "model."}
"""How names of the text model start -> what stands there in a text checkpoint."""

VISION = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")


def text(raw: Raw) -> dict[str, Any]:
    """config.json of the text model within the whole: tied if it is said outside, without a final softcap."""
    inner = raw.get("text_config")
    if not isinstance(inner, dict):
        raise DamagedFile(f"config: text_config is {clipped(inner)}; it must be the text model's config")
    outside = {"tie_word_embeddings": raw.get("tie_word_embeddings", True), "final_logit_softcapping": None}
    return {**DEFAULTS, **inner} | outside


def config(raw: Raw) -> Config:
    return gemma3_text.config(text(raw))


def layer(tensors: Tensors, i: int, cfg: Config, raw: Raw) -> LayerParams:
    return gemma3_text.layer(tensors, i, cfg, text(raw))


def ends(tensors: Tensors, cfg: Config, raw: Raw) -> Ends:
    return gemma3_text.ends(tensors, cfg, text(raw))


def view(tensors: Tensors) -> Tensors:
    """The text model's tensors under the names of a text checkpoint."""
    return _TextTensors(tensors)


class _TextTensors:
    def __init__(self, tensors: Tensors) -> None:
        self._tensors = tensors
        self._stored: dict[str, str] = {}
        for stored in tensors.names():
            if not stored.startswith(VISION):
                name = _plain(stored)
                if name in self._stored:
                    raise DamagedFile(f"the weights hold {clipped(name)} twice, one of them as {clipped(stored)}")
                self._stored[name] = stored

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def names(self) -> Iterable[str]:
        return self._stored

    def get(self, name: str, shape: tuple[int, ...]) -> Array:
        return self._tensors.get(self._stored.get(name, f"language_model.{name}"), shape)


def _plain(stored: str) -> str:
    for start, instead in TEXT.items():
        if stored.startswith(start):
            return instead + stored.removeprefix(start)
    return stored
