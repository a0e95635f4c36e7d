"""Tiny llama models written to disk, with every value known.

weights(seed)          Hugging Face name -> float32 array, in the shape files store, (out, in)
hf_directory(path)     config.json, tokenizer.json and safetensors (f32, f16 or bf16; one file or shards)
spoil(file, at)        turn one bit of a file over
gguf_file(path)        the same model as llama.cpp's converter would write it, some tensors quantised
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("a", "n"), ("an", "d")]
SPECIAL = ["<|start|>", "<|end|>"]
TOKENS = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in MERGES)]
VOCABULARY = {token: i for i, token in enumerate(TOKENS)}

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "vocab_size": len(TOKENS),
    "eos_token_id": 1,
    "tie_word_embeddings": True,
}

Weights = dict[str, np.ndarray[Any, Any]]


def small(tied: bool = True) -> Weights:
    """`weights` of the size a trained model has, so that a few layers do not saturate."""
    return {name: array * (0.3 if array.ndim == 2 else 1) for name, array in weights(tied=tied).items()}


def weights(seed: int = 0, tied: bool = True) -> Weights:
    rng = np.random.default_rng(seed)
    width, kv_width, mlp = 32, 16, 64
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (len(TOKENS), width),
        "model.norm.weight": (width,),
    }
    if not tied:
        shapes["lm_head.weight"] = (len(TOKENS), width)
    for i in range(2):
        at = f"model.layers.{i}."
        shapes |= {
            f"{at}self_attn.q_proj.weight": (width, width),
            f"{at}self_attn.k_proj.weight": (kv_width, width),
            f"{at}self_attn.v_proj.weight": (kv_width, width),
            f"{at}self_attn.o_proj.weight": (width, width),
            f"{at}mlp.gate_proj.weight": (mlp, width),
            f"{at}mlp.up_proj.weight": (mlp, width),
            f"{at}mlp.down_proj.weight": (width, mlp),
            f"{at}input_layernorm.weight": (width,),
            f"{at}post_attention_layernorm.weight": (width,),
        }
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


# --- a Hugging Face directory -------------------------------------------------------------------------------


def hf_directory(
    path: Path, tensors: Weights | None = None, dtype: str = "F32", shards: int = 1, **config: Any
) -> Path:
    """`config` replaces entries of config.json; a value of None takes the entry out."""
    path.mkdir(parents=True)
    wanted = CONFIG | config
    (path / "config.json").write_text(json.dumps({key: value for key, value in wanted.items() if value is not None}))
    backend = Tokenizer(models.BPE(VOCABULARY, MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    backend.save(str(path / "tokenizer.json"))
    _write_safetensors(path, weights() if tensors is None else tensors, dtype, shards)
    return path


def _write_safetensors(path: Path, tensors: Weights, dtype: str, shards: int) -> None:
    save = save_bf16 if dtype == "BF16" else save_file
    stored = {name: array.astype(np.float16) if dtype == "F16" else array for name, array in tensors.items()}
    if shards == 1:
        save(stored, path / "model.safetensors")
        return
    names, where = list(stored), {}
    for k in range(shards):
        file = f"model-{k + 1:05}-of-{shards:05}.safetensors"
        save({name: stored[name] for name in names[k::shards]}, path / file)
        where |= dict.fromkeys(names[k::shards], file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def save_bf16(tensors: Mapping[str, np.ndarray[Any, Any]], path: Path) -> None:
    """The format by hand (8 bytes of length, a JSON header, the data): numpy has no bfloat16. Values are cut to it."""
    header, data = {}, b""
    for name, array in tensors.items():
        raw = (array.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
        header[name] = {"dtype": "BF16", "shape": list(array.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def spoil(file: Path, at: int) -> None:
    """Turn the lowest bit of a byte over, in place; negative places count from the end."""
    with file.open("r+b") as opened:
        opened.seek(at, 2 if at < 0 else 0)
        was = opened.read(1)[0]
        opened.seek(-1, 1)
        opened.write(bytes([was ^ 1]))


# --- a GGUF file ----------------------------------------------------------------------------------------------

GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
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
KINDS = {"attn_v": "Q8_0", "ffn_up": "Q4_1", "ffn_down": "Q8_0", "ffn_gate": "F16"}
"""How a GGUF tensor is stored; the others are F32."""


def gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in GGUF_NAMES:
        return f"{GGUF_NAMES[stem]}.weight"
    layer, part = stem.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{GGUF_NAMES[part]}.weight"


def interleaved(rows: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """What llama.cpp's converter does to query and key rows, one row at a time: a head's row i of the first half
    goes to 2i and row i of the second half to 2i + 1.
    """
    width = len(rows) // heads
    out = np.empty_like(rows)
    for head in range(heads):
        for i in range(width // 2):
            out[head * width + 2 * i] = rows[head * width + i]
            out[head * width + 2 * i + 1] = rows[head * width + width // 2 + i]
    return out


def gguf_tensors(tensors: Weights) -> Weights:
    """Under the names and in the row order of a GGUF file."""
    heads = {"q_proj": 4, "k_proj": 2}
    return {
        gguf_name(name): interleaved(array, heads[part]) if (part := name.split(".")[-2]) in heads else array
        for name, array in tensors.items()
    }


def gguf_file(
    path: Path,
    tensors: Weights | None = None,
    kinds: Mapping[str, str] = KINDS,
    alignment: int | None = None,
    change: Callable[[GGUFWriter, Weights], object] | None = None,
    leave_out: tuple[str, ...] = (),
) -> Path:
    """`change` may alter the (named, ordered) tensors or add metadata; `leave_out` names metadata not to write."""
    stored = gguf_tensors(weights() if tensors is None else tensors)
    writer = GGUFWriter(path, "llama")
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    _add_metadata(writer)
    for key in leave_out:
        del writer.kv_data[0][key]
    if change is not None:
        change(writer, stored)
    for name, array in stored.items():
        kind = GGMLQuantizationType[kinds.get(name.split(".")[-2], "F32")]
        writer.add_tensor(name, array if kind.name == "F32" else quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_metadata(writer: GGUFWriter) -> None:
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_rope_dimension_count(8)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in TOKENS])
    writer.add_token_merges([f"{a} {b}" for a, b in MERGES])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(False)
