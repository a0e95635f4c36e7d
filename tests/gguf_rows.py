"""Tiny models of every GGUF architecture, written as llama.cpp's converter writes them.

ROWS               name -> config.json, with what a GGUF file can say of the family
tensors(row)       the row's tensors by their Hugging Face names
write(row, path)   a GGUF file; every step follows llama.cpp's conversion/*.py, and names come from gguf-py's own map
directory(row, at) the same tensors as transformers would save them

`make oracle-gguf` loads the files with llama.cpp. The writer knows nothing of the engine's reader.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import numpy as np
import tiny_files
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFWriter, RopeScalingType, get_tensor_name_map
from gguf.quants import quantize
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from engine.config import Config
from engine.families import family

Raw = dict[str, Any]
Weights = dict[str, np.ndarray[Any, Any]]

ARCHITECTURES = {
    "llama": MODEL_ARCH.LLAMA,
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
    "gemma2": MODEL_ARCH.GEMMA2,
    "gemma3_text": MODEL_ARCH.GEMMA3,
    "phi3": MODEL_ARCH.PHI3,
    "gpt2": MODEL_ARCH.GPT2,
}
CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 10.0}
GEMMA = families.WIDE | {"sliding_window": 4, "query_pre_attn_scalar": 16}
GEMMA3 = GEMMA | {"model_type": "gemma3_text", "final_logit_softcapping": 15.0}
BASES = {
    "full_attention": {"rope_type": "default", "rope_theta": 200_000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
}
STRETCHED = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
}
CONTEXT = {"original_max_position_embeddings": 256}
"""Of Phi-3's longrope: it stands beside the settings."""
LONG = {
    "rope_type": "longrope",
    "rope_theta": 5000.0,
    "short_factor": [1.0 + 0.125 * i for i in range(6)],
    "long_factor": [1.5 + i for i in range(6)],
} | CONTEXT


def _of(row: str, **changes: Any) -> Raw:
    """A row of `families.ROWS`, changed; a value of None takes an entry out."""
    return {key: value for key, value in (families.ROWS[row] | changes).items() if value is not None}


def _yarn() -> Raw:
    return {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 32}


ROWS: dict[str, Raw] = {
    "llama": _of("llama"),
    "llama-tied": _of("llama-tied", hidden_act=None),
    "llama-linear": _of("llama-linear"),
    "llama-llama3": _of("llama-llama3"),
    "llama-yarn": _of("llama-yarn"),
    "qwen2": _of("qwen2", use_sliding_window=None, sliding_window=None, max_window_layers=None),
    "qwen2-yarn": families.SIZES | {"model_type": "qwen2", "rope_parameters": _yarn()},
    "qwen3": _of("qwen3", attention_bias=None, tie_word_embeddings=True),
    "gemma2": GEMMA | CAPS | {"model_type": "gemma2"},
    "gemma2-27b": GEMMA | CAPS | {"model_type": "gemma2", "num_hidden_layers": 46, "query_pre_attn_scalar": 12},
    "gemma3": GEMMA3 | {"num_hidden_layers": 7, "rope_parameters": BASES},
    "gemma3-pattern": GEMMA3 | {"sliding_window_pattern": 3, "rope_parameters": STRETCHED},
    "gemma3-27b": GEMMA3 | {"num_hidden_layers": 62, "query_pre_attn_scalar": 12, "rope_parameters": BASES},
    "phi3": _of("phi3", sliding_window=None),
    "phi3-longrope": _of("phi3-longrope", max_position_embeddings=512, rope_parameters=LONG, **CONTEXT),
    "phi3-partial": families.SIZES
    | {"model_type": "phi3", "hidden_size": 80, "max_position_embeddings": 512}
    | CONTEXT
    | {"rope_parameters": LONG | {"partial_rotary_factor": 0.6}},
    "gpt2": _of("gpt2", scale_attn_by_inverse_layer_idx=None),
    "llama-mixed": _of("llama", hidden_size=64, intermediate_size=96),
    "gemma3-mixed": GEMMA3 | {"hidden_size": 64, "intermediate_size": 96, "rope_parameters": BASES},
    "gpt2-mixed": _of("gpt2", scale_attn_by_inverse_layer_idx=None, n_embd=64),
}
"""The 27B rows have as many layers as the models whose scale of scores llama.cpp knows by that number."""


MIXED = {"attn_q": "F16", "attn_k": "Q8_0", "attn_v": "Q5_1", "attn_qkv": "Q8_0", "attn_output": "Q4_0"}
MIXED |= {"ffn_gate": "Q5_0", "ffn_up": "Q8_0", "ffn_down": "Q4_1", "token_embd": "Q8_0", "output": "BF16"}
"""How matrices of the mixed rows are stored, by their GGUF part; vectors and the other rows are F32."""

SMALL = 0.4
"""Smaller weights for the mixed rows: llama.cpp rounds activations to 8 bits there, which sharp attention amplifies."""


class _Kept(families.Seeded):
    """Remembers the tensors that a family asks for."""

    def __init__(self, row: str, raw: Raw) -> None:
        super().__init__(row, raw, SMALL if row.endswith("-mixed") else 1.0)
        self.made: Weights = {}

    def get(self, name: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
        self.made[name] = super().get(name, shape)
        return self.made[name]


def config(row: str) -> Config:
    return family(ROWS[row]["model_type"]).config(ROWS[row])


def tensors(row: str) -> Weights:
    """All tensors of a row; the same numbers each time."""
    raw, cfg = ROWS[row], config(row)
    source, reader = _Kept(row, raw), family(raw["model_type"])
    reader.ends(source, cfg, raw)
    for i in range(cfg.n_layers):
        reader.layer(source, i, cfg, raw)
    return source.made


def directory(row: str, at: Path) -> Path:
    at.mkdir()
    (at / "config.json").write_text(json.dumps(ROWS[row]))
    Tokenizer(models.BPE({"<unk>": 0}, [], unk_token="<unk>")).save(str(at / "tokenizer.json"))
    save_file(tensors(row), at / "model.safetensors")
    return at


# --- the GGUF file ------------------------------------------------------------------------------------------------

Change = Callable[[GGUFWriter, Weights], object]


def write(row: str, path: Path, change: Change | None = None) -> Path:
    """`change` may alter the metadata and the (named, converted) tensors."""
    raw, kinds = ROWS[row], MIXED if row.endswith("-mixed") else {}
    writer = GGUFWriter(path, MODEL_ARCH_NAMES[ARCHITECTURES[raw["model_type"]]])
    METADATA[raw["model_type"]](writer, raw)
    _add_vocabulary(writer)
    stored = {**_converted(raw, tensors(row)), **_extra(writer, raw)}
    if change is not None:
        change(writer, stored)
    for name, array in stored.items():
        kind = GGMLQuantizationType[kinds.get(name.split(".")[-2], "F32") if array.ndim == 2 else "F32"]
        writer.add_tensor(name, array if kind.name == "F32" else quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _converted(raw: Raw, made: Weights) -> Weights:
    """`modify_tensors` of the architecture's converter."""
    kind = raw["model_type"]
    names = get_tensor_name_map(ARCHITECTURES[kind], _n_layers(raw))
    stored = {}
    for name, array in made.items():
        if kind == "llama" and name.split(".")[-2] in ("q_proj", "k_proj"):
            heads = "num_attention_heads" if ".q_proj." in name else "num_key_value_heads"
            array = tiny_files.interleaved(array, raw[heads])
        if kind.startswith("gemma") and name.endswith("norm.weight"):
            array = array + np.float32(1)
        if kind == "gpt2" and name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
            array = np.ascontiguousarray(array.T)
        to = names.get_name(name, (".weight", ".bias"))
        assert to is not None, name
        stored[to] = array
    return stored


def _n_layers(raw: Raw) -> int:
    return raw["n_layer"] if "n_layer" in raw else raw["num_hidden_layers"]


def _extra(writer: GGUFWriter, raw: Raw) -> Weights:
    """`generate_extra_tensors`: llama3's divisors, longrope's factors."""
    rope = raw.get("rope_parameters", {})
    if rope.get("rope_type") == "llama3":
        return {"rope_freqs.weight": _llama3_divisors(rope, raw["head_dim"])}
    if rope.get("rope_type") != "longrope":
        return {}
    original = rope["original_max_position_embeddings"]
    scale = raw["max_position_embeddings"] / original
    writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0)
    return {f"rope_factors_{k}.weight": np.array(rope[f"{k}_factor"], np.float32) for k in ("long", "short")}


def _llama3_divisors(rope: Raw, width: int) -> np.ndarray[Any, Any]:
    context = rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    divisors = []
    for i in range(0, width, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (i / width)
        smooth = (context / wavelength - low) / (high - low)
        between = 1 / ((1 - smooth) / rope["factor"] + smooth)
        divisors.append(
            1.0 if wavelength < context / high else rope["factor"] if wavelength > context / low else between
        )
    return np.array(divisors, np.float32)


def _add_vocabulary(writer: GGUFWriter) -> None:
    """A token for each byte and one that merges two: 257."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*alphabet, "th"])
    writer.add_token_types([1] * 257)
    writer.add_token_merges(["t h"])
    writer.add_eos_token_id(0)


# --- set_gguf_parameters ------------------------------------------------------------------------------------------


def _base(writer: GGUFWriter, raw: Raw) -> None:
    """TextModel in conversion/base.py."""
    writer.add_block_count(raw["num_hidden_layers"])
    writer.add_context_length(raw["max_position_embeddings"])
    writer.add_embedding_length(raw["hidden_size"])
    writer.add_feed_forward_length(raw["intermediate_size"])
    writer.add_head_count(raw["num_attention_heads"])
    writer.add_head_count_kv(raw["num_key_value_heads"])
    rope = raw.get("rope_parameters", {})
    full = rope.get("full_attention", rope)
    if full.get("rope_type") == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(full["factor"])
    if full.get("rope_type") == "yarn":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(full["factor"])
        writer.add_rope_scaling_orig_ctx_len(full["original_max_position_embeddings"])
    writer.add_rope_freq_base(full.get("rope_theta", 10_000.0))
    if "sliding_attention" in rope:
        writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
    writer.add_layer_norm_rms_eps(raw.get("rms_norm_eps", 1e-6))
    if "head_dim" in raw:
        writer.add_key_length(raw["head_dim"])
        writer.add_value_length(raw["head_dim"])


def _llama(writer: GGUFWriter, raw: Raw) -> None:
    _base(writer, raw)
    writer.add_vocab_size(raw["vocab_size"])
    writer.add_rope_dimension_count(raw["head_dim"])


def _gemma2(writer: GGUFWriter, raw: Raw) -> None:
    writer.add_context_length(raw["max_position_embeddings"])
    writer.add_embedding_length(raw["hidden_size"])
    writer.add_block_count(raw["num_hidden_layers"])
    writer.add_feed_forward_length(raw["intermediate_size"])
    writer.add_head_count(raw["num_attention_heads"])
    writer.add_head_count_kv(raw["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(raw.get("rms_norm_eps", 1e-6))
    writer.add_key_length(raw["head_dim"])
    writer.add_value_length(raw["head_dim"])
    writer.add_attn_logit_softcapping(raw["attn_logit_softcapping"])
    writer.add_final_logit_softcapping(raw["final_logit_softcapping"])
    writer.add_sliding_window(raw["sliding_window"])


def _gemma3(writer: GGUFWriter, raw: Raw) -> None:
    """The converter leaves the pattern to llama.cpp (6); a file may state another."""
    _base(writer, raw)
    writer.add_final_logit_softcapping(raw["final_logit_softcapping"])
    writer.add_sliding_window(raw["sliding_window"])
    if (pattern := raw.get("sliding_window_pattern", 6)) != 6:
        writer.add_sliding_window_pattern(pattern)


def _phi3(writer: GGUFWriter, raw: Raw) -> None:
    rope = raw["rope_parameters"]
    width = raw["hidden_size"] // raw["num_attention_heads"]
    writer.add_context_length(raw["max_position_embeddings"])
    writer.add_rope_scaling_orig_ctx_len(rope.get("original_max_position_embeddings", raw["max_position_embeddings"]))
    writer.add_embedding_length(raw["hidden_size"])
    writer.add_feed_forward_length(raw["intermediate_size"])
    writer.add_block_count(raw["num_hidden_layers"])
    writer.add_head_count(raw["num_attention_heads"])
    writer.add_head_count_kv(raw["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(raw.get("rms_norm_eps", 1e-5))
    writer.add_rope_dimension_count(int(rope.get("partial_rotary_factor", 1.0) * width))
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_sliding_window(raw.get("sliding_window", 0))


def _gpt2(writer: GGUFWriter, raw: Raw) -> None:
    writer.add_block_count(raw["n_layer"])
    writer.add_context_length(raw["n_positions"])
    writer.add_embedding_length(raw["n_embd"])
    writer.add_feed_forward_length(4 * raw["n_embd"])
    writer.add_head_count(raw["n_head"])
    writer.add_layer_norm_eps(raw.get("layer_norm_epsilon", 1e-5))


METADATA: dict[str, Callable[[GGUFWriter, Raw], None]] = {
    "llama": _llama,
    "qwen2": _base,
    "qwen3": _base,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "phi3": _phi3,
    "gpt2": _gpt2,
}
