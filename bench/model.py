"""SmolLM2 as float32 Hugging Face files, written from the GGUF file: what every contender loads.

python bench/model.py DIRECTORY
"""

import json
import sys
from pathlib import Path

from safetensors.numpy import save_file
from tokenizers import Tokenizer, models

from engine import load_model
from engine.catalog import fetch
from engine.gguf_file import GgufFile
from engine.matrices import widened

NAME = "smollm2-135m-instruct"


def write(directory: Path) -> None:
    """config.json, model.safetensors and tokenizer.json, unless they are there."""
    if (directory / "config.json").exists():
        return
    model = load_model(NAME)
    cfg = model.config
    tensors = {"model.embed_tokens.weight": model.params.embed, "model.norm.weight": model.params.final_norm.weight}
    for i in range(cfg.n_layers):
        p, at = model.params.layer(i), f"model.layers.{i}"
        tensors[f"{at}.input_layernorm.weight"] = p.attn_norm.weight
        tensors[f"{at}.post_attention_layernorm.weight"] = p.mlp_norm.weight
        for name, part in (("q", p.q), ("k", p.k), ("v", p.v), ("o", p.o)):
            tensors[f"{at}.self_attn.{name}_proj.weight"] = widened(part.weight).T.copy()
        for name, part in (("gate", p.gate), ("up", p.up), ("down", p.down)):
            tensors[f"{at}.mlp.{name}_proj.weight"] = widened(part.weight).T.copy()
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    metadata = GgufFile.open(fetch(NAME)).metadata
    words = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    Tokenizer(models.BPE(words, merges)).save(str(directory / "tokenizer.json"))  # prompts are ids: it only has to load
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": cfg.d_vocab,
        "hidden_size": cfg.d_model,
        "intermediate_size": cfg.d_mlp,
        "num_hidden_layers": cfg.n_layers,
        "num_attention_heads": cfg.n_heads,
        "num_key_value_heads": cfg.n_kv_heads,
        "max_position_embeddings": cfg.n_ctx,
        "rms_norm_eps": cfg.norm_eps,
        "rope_theta": metadata["llama.rope.freq_base"],
        "tie_word_embeddings": True,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "torch_dtype": "float32",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    (directory / "config.json").write_text(json.dumps(config, indent=1))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
