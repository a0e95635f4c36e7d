"""`ARCHITECTURES`: one row for each GGUF architecture that loads.

Tensor names follow gguf-py's constants.py (`TENSOR_NAMES`); stems are without .weight or .bias.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from engine.errors import UnknownModel, clipped
from engine.families._gguf import readers
from engine.families._gguf.readers import Reader
from engine.gguf_file import GgufFile


@dataclass(frozen=True)
class Architecture:
    """How one architecture's files are read.

    model_type    the family that reads them
    readers       metadata -> config.json, in this order
    ends, parts   stems of tensors, GGUF -> Hugging Face, outside and inside a layer; `layers` stands before the
                  layer's number
    interleaved   parts whose rotary pairs lie in neighbouring rows, by heads: True for key-value heads
    transposed    parts whose matrices the family wants as (in, out)
    settings      tensors that the readers read
    """

    model_type: str
    readers: tuple[Reader, ...]
    ends: Mapping[str, str]
    parts: Mapping[str, str]
    layers: str = "model.layers"
    interleaved: Mapping[str, bool] | None = None
    transposed: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()


_SIZES = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_TIED = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
_ENDS = {**_TIED, "output": "lm_head"}
_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_LLAMA = {
    **_NORMS,
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NORMED_HEADS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_GEMMA2 = {
    **_LLAMA,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}

ARCHITECTURES = {
    "llama": Architecture(
        "llama",
        (readers.sizes(_SIZES), readers.llama_rope),
        _ENDS,
        _LLAMA,
        interleaved={"attn_q": False, "attn_k": True},
        settings=("rope_freqs.weight",),
    ),
    "qwen2": Architecture(
        "qwen2", (readers.sizes(_SIZES, free_width=False), readers.scaled_rope("linear", "yarn")), _ENDS, _LLAMA
    ),
    "qwen3": Architecture(
        "qwen3", (readers.sizes(_SIZES), readers.scaled_rope("linear", "yarn")), _ENDS, {**_LLAMA, **_NORMED_HEADS}
    ),
    "gemma2": Architecture(
        "gemma2", (readers.sizes(_SIZES), readers.scaled_rope("linear"), readers.gemma2_layers), _TIED, _GEMMA2
    ),
    "gemma3": Architecture(
        "gemma3_text",
        (readers.sizes(_SIZES), readers.scaled_rope("linear"), readers.gemma3_layers),
        _TIED,
        {**_GEMMA2, **_NORMED_HEADS},
    ),
    "phi3": Architecture(
        "phi3",
        (readers.sizes(_SIZES, free_width=False), readers.longrope, readers.phi3_window),
        _ENDS,
        {
            **_NORMS,
            "attn_qkv": "self_attn.qkv_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_up": "mlp.gate_up_proj",
            "ffn_down": "mlp.down_proj",
        },
        settings=("rope_factors_short.weight", "rope_factors_long.weight"),
    ),
    "gpt2": Architecture(
        "gpt2",
        (
            readers.sizes(
                {
                    "block_count": "n_layer",
                    "context_length": "n_positions",
                    "embedding_length": "n_embd",
                    "feed_forward_length": "n_inner",
                    "attention.head_count": "n_head",
                    "attention.layer_norm_epsilon": "layer_norm_epsilon",
                },
                free_width=False,
            ),
        ),
        {
            "token_embd": "transformer.wte",
            "position_embd": "transformer.wpe",
            "output_norm": "transformer.ln_f",
            "output": "lm_head",
        },
        {
            "attn_norm": "ln_1",
            "attn_qkv": "attn.c_attn",
            "attn_output": "attn.c_proj",
            "ffn_norm": "ln_2",
            "ffn_up": "mlp.c_fc",
            "ffn_down": "mlp.c_proj",
        },
        layers="transformer.h",
        transposed=("attn_qkv", "attn_output", "ffn_up", "ffn_down"),
    ),
}


def architecture(file: GgufFile) -> Architecture:
    """The row of a file; raises `UnknownModel` listing those that there are."""
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise UnknownModel(
            f"{file.path.name}: GGUF architecture {clipped(name)} is not supported; the supported ones are "
            f"{', '.join(sorted(ARCHITECTURES))}"
        )
    return ARCHITECTURES[name]
