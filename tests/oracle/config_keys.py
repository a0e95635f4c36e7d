"""Keys of config.json that users add and architectures treat in ways of their own: both sides read the same directory.

Each edit of a row's config.json gives the same logits on both sides. `CHANGES` are edits
that move transformers' logits, `IGNORED` those that do not, `HEADS` files with a head of their own.
"""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import families
import torch
from oracle.families import ON_DISK, tokenizer
from oracle.layouts import SAME, ours, saved, theirs
from oracle.measure import Measure, Result, distance
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

Edit = dict[str, Any]

YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SU = {
    "type": "su",
    "original_max_position_embeddings": 64,
    "short_factor": [1.0 + 0.1 * i for i in range(6)],
    "long_factor": [1.5 + i for i in range(6)],
}
BY_KIND = {"full_attention": {"rope_theta": 77.0}, "sliding_attention": {"rope_theta": 33.0}}
PART = {"rope_type": "proportional", "rope_theta": 100.0, "partial_rotary_factor": 0.5, "factor": 2.0}

CHANGES: list[tuple[str, Edit]] = [
    ("llama-linear", {"rope_scaling": YARN}),
    ("llama", {"rope_scaling": LLAMA3}),
    ("llama", {"rope_parameters": PART}),
    ("qwen3", {"rope_scaling": YARN}),
    ("gemma3", {"rope_scaling": {**YARN, "rope_type": "yarn"}}),
    ("gemma3", {"rope_parameters": BY_KIND, "rope_scaling": {"rope_type": "linear", "factor": 3.0}}),
    ("olmo3", {"rope_theta": 333.0}),
    ("olmo3", {"rope_parameters": BY_KIND, "rope_scaling": {"rope_type": "linear", "factor": 3.0}}),
    ("olmo3", {"head_dim": 24}),
    ("phi3", {"head_dim": 24}),
    ("phi3", {"rope_scaling": SU, "rope_parameters": None}),
    ("phi", {"head_dim": 24, "qk_layernorm": False}),
    ("phi", {"partial_rotary_factor": 1.0}),
    ("smollm3", {"head_dim": 24}),
    ("gpt_neox", {"rotary_emb_base": 333.0}),
    ("gpt_neox", {"head_dim": 8}),
    ("gpt_neox", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    ("stablelm", {"partial_rotary_factor": 0.5}),
    *(("llama", {"hidden_act": name}) for name in ("relu2", "quick_gelu", "mish", "gelu_python", "gelu_fast")),
]

IGNORED: list[tuple[str, Edit]] = [
    ("gpt_neox", {"num_key_value_heads": 2}),
    ("gpt_neox", {"rope_theta": 333.0, "partial_rotary_factor": 1.0}),
    ("llama", {"partial_rotary_factor": 0.5}),
    ("mistral", {"partial_rotary_factor": 0.5}),
    ("mistral", {"attention_bias": True, "mlp_bias": True}),
    ("qwen2", {"attention_bias": False}),
    ("gemma3", {"rope_scaling": YARN}),
    ("phi3-longrope", {"rope_parameters": families.ROWS["phi3-longrope"]["rope_parameters"]
                       | {"original_max_position_embeddings": 7}}),
]  # fmt: skip

TIED = ("llama-tied", "gpt2", "gemma3", "qwen2", "starcoder2")


def config_keys_agree() -> Iterator[Result]:
    """Every edit, and every way to store a tied head."""
    for row, edit in CHANGES:
        expected, read = _both(row, edit)
        yield _result(row, edit, expected, read, distance(_both(row, {})[0], expected))
    for row, edit in IGNORED:
        expected, read = _both(row, edit)
        yield _result(row, edit, expected, read, None)
    for row in TIED:
        yield from _heads(row)


def _result(row: str, edit: Edit, expected: Any, read: Any, control: float | None) -> Result:
    measure = Measure(distance(read, expected), SAME, 1)
    name = f"{row}: {json.dumps(edit)}"
    return Result("config keys", name, measure) if control is None else Result("config keys", name, measure, control)


def _both(row: str, edit: Edit) -> tuple[Any, Any]:
    """Transformers' logits and ours."""
    with tempfile.TemporaryDirectory() as scratch:
        at = Path(scratch)
        tokenizer().save(str(at / "tokenizer.json"))
        (at / "config.json").write_text(json.dumps(families.ROWS[row] | edit))
        _write_weights(at)
        return theirs(at), ours(at)


def _write_weights(at: Path) -> None:
    """Random ones of the shapes that the config gives, the same for the same shapes."""
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(at))
    draw = torch.Generator().manual_seed(0)
    named = ON_DISK.get(model.config.model_type, {})
    tensors = {named.get(name, name): torch.randn(p.shape, generator=draw) for name, p in model.named_parameters()}
    for name, tensor in tensors.items():
        tensor *= 0.3 if tensor.ndim == 1 or "embed" in name else 1.2 * max(tensor.shape) ** -0.5
        tensor += 1.0 if tensor.ndim == 1 and name.endswith("weight") else 0.0
    save_file(tensors, at / "model.safetensors")


def _heads(row: str) -> Iterator[Result]:
    """A tied model's file that also holds a head: an equal one, another one, or the head alone."""
    with tempfile.TemporaryDirectory() as scratch:
        at = saved(Path(scratch) / "model", row)
        tied, tensors = theirs(at), load_file(at / "model.safetensors")
        (name,) = (name for name in tensors if name.endswith(("embed_tokens.weight", "wte.weight")))
        other = tensors[name].flip(0).contiguous()
        without = {key: tensor for key, tensor in tensors.items() if key != name}
        for told, held in {
            "an equal head": tensors | {"lm_head.weight": tensors[name].clone()},
            "another head": tensors | {"lm_head.weight": other},
            "a head alone": without | {"lm_head.weight": tensors[name]},
        }.items():
            save_file(held, at / "model.safetensors", {"format": "pt"})
            expected = theirs(at)
            control = distance(expected, tied) if told == "another head" else 1.0
            yield Result("config keys", f"{row}: {told}", Measure(distance(ours(at), expected), SAME, 1), control)
