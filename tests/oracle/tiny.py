"""Tiny random Llamas, written by transformers and loaded from the same directory by both sides.

Grouped queries, heads wider than d_model / n_heads, biases everywhere, sharded safetensors in f32, f16 and bf16, with
and without tied embeddings.
"""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tokenizers
import torch
from oracle.cases import ours
from oracle.checks import agreement
from oracle.measure import Result
from oracle.reference import Reference, doubled, load
from transformers import LlamaConfig, LlamaForCausalLM

from engine import load_model

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def directories_agree() -> Iterator[Result]:
    """Logits and resid_post of every combination."""
    ids = {"tiny": np.random.default_rng(1).integers(0, 300, 150).tolist()}
    for tied in (True, False):
        for name, dtype in DTYPES.items():
            with tempfile.TemporaryDirectory() as directory:
                shards = write(Path(directory), tied, dtype)
                model, reference = load_model(directory), load(Path(directory))
            pair = Reference(reference).run(ids["tiny"]), Reference(doubled(reference)).run(ids["tiny"])
            label = f"{name}, {'tied' if tied else 'untied'}, {shards} shards"
            yield from agreement("tiny directories", label, ours(model, "tiny", ids), pair)


def write(directory: Path, tied: bool, dtype: torch.dtype) -> int:
    """Save a random model and a tokenizer; returns the number of shards."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=48,
        intermediate_size=112,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=20,
        max_position_embeddings=256,
        rms_norm_eps=1e-3,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.to(dtype).save_pretrained(directory, max_shard_size="60KB")
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0}, unk_token="<unk>")).save(
        str(directory / "tokenizer.json")
    )
    as_filed = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
    (directory / "tokenizer_config.json").write_text(as_filed)
    return len(list(directory.glob("*.safetensors")))
