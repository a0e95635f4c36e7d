"""A tiny model of every family, one row each: every test that takes the `model` fixture runs on all of them.

ROWS        name -> config.json, with every feature of the family switched on
Seeded      a source of tensors that makes any tensor from its name: the same numbers here and in the reference run
tiny(name)  the model of a row
"""

import zlib
from collections.abc import Iterable
from copy import copy
from functools import cache
from typing import Any

import numpy as np

from engine import Model
from engine.families import family
from engine.library import byte_level
from engine.params import Params
from engine.tokenizer import Tokenizer

Raw = dict[str, Any]

SIZES: Raw = {
    "vocab_size": 257,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 256,
    "eos_token_id": 256,
    "pad_token_id": 256,
}
WIDE = SIZES | {"head_dim": 16}  # heads x head width is not the model's width
UNSHARED = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
GPT: Raw = {"vocab_size": 257, "bos_token_id": 256, "eos_token_id": 256}
RMS: Raw = {"rms_norm_eps": 2e-3}  # far above the defaults: against rows near 1 those are rounding errors
LAYER: Raw = {"layer_norm_eps": 2e-3}


def _rope(kind: str, **settings: Any) -> Raw:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 5000.0} | settings}


ROWS: dict[str, Raw] = {
    "llama": WIDE
    | RMS
    | {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    "llama-tied": WIDE | RMS | {"model_type": "llama", "tie_word_embeddings": True, "hidden_act": "gelu"},
    "llama-linear": WIDE | RMS | {"model_type": "llama"} | _rope("linear", factor=3.0),
    "llama-dynamic": WIDE | RMS | {"model_type": "llama", "max_position_embeddings": 64} | _rope("dynamic", factor=2.0),
    "llama-llama3": WIDE
    | RMS
    | {"model_type": "llama"}
    | _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32),
    "llama-yarn": WIDE | RMS | {"model_type": "llama"} | _rope("yarn", factor=4.0, original_max_position_embeddings=32),
    "mistral": WIDE | RMS | {"model_type": "mistral", "sliding_window": 4},
    "qwen2": SIZES
    | RMS
    | {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}
    | {"tie_word_embeddings": True},
    "qwen3": WIDE | RMS | {"model_type": "qwen3", "attention_bias": True},
    "gemma": WIDE | RMS | {"model_type": "gemma", "attention_bias": True},
    "gemma2": WIDE
    | {"rms_norm_eps": 0.02}
    | {"model_type": "gemma2", "sliding_window": 4, "query_pre_attn_scalar": 24}
    | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 10.0},
    "gemma3": WIDE
    | {"rms_norm_eps": 0.02}
    | {"model_type": "gemma3_text", "sliding_window": 4, "query_pre_attn_scalar": 24, "sliding_window_pattern": 3}
    | {"final_logit_softcapping": 15.0},
    "gpt2": GPT
    | {"layer_norm_epsilon": 2e-3}
    | {"model_type": "gpt2", "n_embd": 48, "n_layer": 4, "n_head": 4, "n_positions": 128}
    | {"scale_attn_by_inverse_layer_idx": True},
    "gpt_neo": GPT
    | {"layer_norm_epsilon": 2e-3}
    | {"model_type": "gpt_neo", "hidden_size": 48, "num_layers": 4, "num_heads": 4, "max_position_embeddings": 128}
    | {"window_size": 4, "attention_types": [[["global", "local"], 2]]},
    "gpt_neox": UNSHARED | LAYER | {"model_type": "gpt_neox", "rotary_pct": 0.5},
    "gpt_neox-sequential": UNSHARED
    | LAYER
    | {"model_type": "gpt_neox", "rotary_pct": 0.34, "use_parallel_residual": False},
    "phi": SIZES | LAYER | {"model_type": "phi", "qk_layernorm": True, "partial_rotary_factor": 0.5},
    "phi3": SIZES | RMS | {"model_type": "phi3", "sliding_window": 4} | _rope("default", partial_rotary_factor=0.5),
    "phi3-longrope": SIZES
    | {"model_type": "phi3", "original_max_position_embeddings": 64}
    | _rope(
        "longrope",
        short_factor=[1.0 + 0.1 * i for i in range(6)],
        long_factor=[1.5 + i for i in range(6)],
        original_max_position_embeddings=64,
    ),
    "olmo2": SIZES | RMS | {"model_type": "olmo2", "attention_bias": True},
    "olmo3": SIZES | RMS | {"model_type": "olmo3", "sliding_window": 4},
    "granite": SIZES
    | RMS
    | {"model_type": "granite", "embedding_multiplier": 3.0, "logits_scaling": 0.5, "residual_multiplier": 0.3}
    | {"attention_multiplier": 0.2, "attention_bias": True, "mlp_bias": True},
    "smollm3": SIZES | RMS | {"model_type": "smollm3", "tie_word_embeddings": True},
    "starcoder2": SIZES | {"norm_epsilon": 2e-3} | {"model_type": "starcoder2", "sliding_window": 4},
    "stablelm": SIZES
    | LAYER
    | {"model_type": "stablelm", "hidden_size": 64, "use_qkv_bias": True, "qk_layernorm": True},
    "stablelm-parallel": SIZES | LAYER | {"model_type": "stablelm", "hidden_size": 64, "use_parallel_residual": True},
}


SMALLER = {"gpt_neo": 0.5, "llama": 0.5, "gemma": 0.6, "starcoder2": 0.5, "phi": 0.6}
"""Families whose weights are smaller. Large ones make patterns of zeros and ones, in which rounding errors grow."""

EMBEDDINGS = {"llama-tied": 0.3, "gemma": 0.15, "phi3-longrope": 0.05}
"""Rows whose embeddings are smaller: with a tied head large ones predict the token that was read, and the family's
default epsilon, which phi3-longrope has, would be a rounding error beside them.
"""

VOCABULARIES = ("embed_tokens", "embed_in", "embed_out", "lm_head", "wte", "wpe")
"""Matrices with a row for every token or position."""


class Seeded:
    """Makes the tensor of any name and shape; norms near 1 (stored as gain - 1 where a family does that)."""

    def __init__(self, row: str, raw: Raw | None = None, size: float | None = None) -> None:
        """`raw` is the config of a model that has no row; `size` scales its matrices."""
        model_type = (raw or ROWS[row])["model_type"]
        usual = SMALLER.get(model_type, 1.0) if raw is None else 0.5
        self._row = row
        self._tied = family(model_type).config(raw or ROWS[row]).tied
        self._size = usual if size is None else size
        self._embedding = EMBEDDINGS.get(row, 1.0)
        self._gain = 0.0 if model_type.startswith("gemma") else 1.0

    def __contains__(self, name: str) -> bool:
        """A tied model's file holds no head of its own."""
        return not (self._tied and name in ("lm_head.weight", "embed_out.weight"))

    def names(self) -> Iterable[str]:
        return ()

    def get(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        rng = np.random.default_rng(zlib.crc32(f"{self._row}:{name}".encode()))
        if len(shape) == 1:
            middle = self._gain if name.endswith("weight") else 0.0
            return (middle + rng.uniform(-0.5, 0.5, shape)).astype(np.float16).astype(np.float32)  # 1 + w is exact
        ends = self._embedding if "embed" in name else 1.0
        scale = ends if name.split(".")[-2] in VOCABULARIES else 2 * self._size * max(shape) ** -0.5
        return (scale * rng.standard_normal(shape)).astype(np.float32)


def tiny(row: str, tensors: Seeded | None = None) -> Model:
    """The model of a row."""
    return made(row, ROWS[row], tensors or Seeded(row))


def made(row: str, raw: Raw, tensors: Seeded) -> Model:
    """The model of a config, with one token per byte; none ends a text, so that every generation has its steps."""
    reader = family(raw["model_type"])
    cfg = reader.config(raw)
    params = Params(reader.ends(tensors, cfg, raw), lambda i: reader.layer(tensors, i, cfg, raw), keep=cfg.n_layers)
    fingerprint = zlib.crc32(row.encode()).to_bytes(4, "big").hex() * 8
    return Model(row, cfg, params, copy(_endless()), fingerprint, "dense", True)


@cache
def _endless() -> Tokenizer:
    words = byte_level()
    words.eos = ()
    return words
