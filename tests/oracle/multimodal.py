"""A tiny Gemma 3 that sees pictures, saved by transformers: its text part against `Gemma3ForConditionalGeneration`."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tokenizers
import torch
from oracle.measure import Result, distance, measure
from oracle.reference import Array, in_float64
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from engine import forward, load_model

TEXT = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "sliding_window": 4,
    "query_pre_attn_scalar": 24,
    "final_logit_softcapping": 2.0,  # goes unread here
}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def multimodal_agrees() -> Iterator[Result]:
    """Logits of a text; the control is the same text one token later."""
    ids = np.random.default_rng(1).integers(0, 300, 100).tolist()
    config = Gemma3Config(text_config=TEXT, vision_config=VISION | {"image_size": 28, "patch_size": 14})
    torch.manual_seed(0)
    single = Gemma3ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in single.named_parameters():
            parameter.normal_(0, 0.3 if "norm" in name else 0.2)
    with in_float64():
        double = Gemma3ForConditionalGeneration._from_config(
            config, attn_implementation="eager", dtype=torch.float64
        ).eval()
        double.load_state_dict(single.state_dict())
        exact = _logits(double, ids)
    with tempfile.TemporaryDirectory() as directory:
        single.save_pretrained(directory)
        words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
        words.save(str(Path(directory) / "tokenizer.json"))
        as_filed = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
        (Path(directory) / "tokenizer_config.json").write_text(as_filed)
        ours = forward(load_model(directory), ids, logits_at="all").logits[0]
    control = distance(np.roll(exact, 1, axis=0), exact)
    yield Result("multimodal gemma3", "logits of its text part", measure(ours, _logits(single, ids), exact), control)


def _logits(model: torch.nn.Module, ids: list[int]) -> Array:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].numpy()
