"""A GGUF file seen as a Hugging Face checkpoint: `config_json` and `GgufTensors`.

Families then need one reader each. Repairs at the door: llama.cpp's converter interleaves the rotary pairs
of llama's query and key rows (convert_hf_to_gguf.py, `LlamaModel.permute`); `GgufTensors` puts them back.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from engine.errors import DamagedFile, UnknownModel, clipped
from engine.families._read import whole
from engine.gguf_file import GgufFile
from engine.ops import Array

_CONFIG_KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}

_ENDS = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}

_PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}

_UNREAD = {"llama.expert_count": 0, "llama.rope.scaling.type": "none", "llama.rope.scale_linear": 1.0}
"""Settings that change the computation in ways `families.llama` does not know -> the value that changes nothing."""


def config_json(file: GgufFile) -> dict[str, Any]:
    """The file's metadata under the names of config.json; raises `UnknownModel` for other architectures."""
    architecture = file.metadata.get("general.architecture")
    if architecture != "llama":
        raise UnknownModel(
            f"{file.path.name}: GGUF architecture {clipped(architecture)} is not supported; the supported one is llama"
        )
    for key, harmless in _UNREAD.items():
        if (value := file.metadata.get(key, harmless)) != harmless:
            raise UnknownModel(f"{file.path.name}: {key} {clipped(value)} is not supported in GGUF files")
    if "rope_freqs.weight" in file.tensors:
        raise UnknownModel(f"{file.path.name}: scaled rotary frequencies are not supported in GGUF files")
    raw: dict[str, Any] = {
        key: file.metadata[f"llama.{name}"] for name, key in _CONFIG_KEYS.items() if f"llama.{name}" in file.metadata
    }
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list):
        raw.setdefault("vocab_size", len(tokens))
    _check_rotary(file, raw)
    return raw | {"gguf": True, "model_type": "llama", "tie_word_embeddings": "output.weight" not in file.tensors}


def _check_rotary(file: GgufFile, raw: dict[str, Any]) -> None:
    """Refuse heads that are rotated only in part, or whose values have another width."""
    width = whole(raw, "head_dim", whole(raw, "hidden_size") // whole(raw, "num_attention_heads"))
    for key in ("rope.dimension_count", "attention.value_length"):
        if (found := file.metadata.get(f"llama.{key}", width)) != width:
            raise UnknownModel(f"{file.path.name}: llama.{key} {clipped(found)} is not the head width {width}")


class GgufTensors:
    """The tensors of a GGUF file under their Hugging Face names."""

    def __init__(self, file: GgufFile, raw: dict[str, Any]) -> None:
        self._file = file
        heads = whole(raw, "num_attention_heads")
        self._heads = {"attn_q": heads, "attn_k": whole(raw, "num_key_value_heads", heads)}

    def __contains__(self, name: str) -> bool:
        return _gguf_name(name) in self._file.tensors

    def names(self) -> Iterable[str]:
        return map(_hugging_face_name, self._file.tensors)

    def get(self, name: str, shape: tuple[int, ...]) -> Array:
        stored = _gguf_name(name)
        if stored not in self._file.tensors:
            raise DamagedFile(f"{self._file.path.name} has no tensor {stored!r}, which its metadata imply")
        found = self._file.tensors[stored].shape
        if found != shape:
            raise DamagedFile(f"{self._file.path.name}: {stored} has shape {found}, but the config implies {shape}")
        dense = self._file.dense(stored)
        heads = self._heads.get(stored.split(".")[-2])
        return dense if heads is None else _unpermute(dense, heads)


def _gguf_name(name: str) -> str:
    """model.layers.3.self_attn.q_proj.weight -> blk.3.attn_q.weight."""
    if name in _ENDS:
        return _ENDS[name]
    _, _, layer, part = name.split(".", 3)
    module, kind = part.rsplit(".", 1)
    return f"blk.{layer}.{_PARTS[module]}.{kind}"


def _hugging_face_name(stored: str) -> str:
    """The way back; a name that is not known stays as it is."""
    ends = {gguf: name for name, gguf in _ENDS.items()}
    parts = {gguf: name for name, gguf in _PARTS.items()}
    pieces = stored.split(".")
    if len(pieces) == 4 and pieces[0] == "blk" and pieces[2] in parts:
        return f"model.layers.{pieces[1]}.{parts[pieces[2]]}.{pieces[3]}"
    return ends.get(stored, stored)


def _unpermute(rows: Array, heads: int) -> Array:
    """Interleaved rotary pairs (0, 1), (2, 3), ... -> half-split pairs, per head; works on weights and biases."""
    paired = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return np.ascontiguousarray(paired.swapaxes(1, 2)).reshape(rows.shape)
