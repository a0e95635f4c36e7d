"""Keys of config.json: both sides read the same directory, for every architecture and every edit of `EDITS`.

An edit gives the same logits on both sides, or this project refuses it by name. `_heads` are files of tied models with
a head of their own.
"""

import json
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from operator import itemgetter
from pathlib import Path
from typing import Any

import families
import torch
from oracle.families import ON_DISK, save_tokenizer
from oracle.layouts import SAME, ours, saved, theirs
from oracle.measure import Measure, Result, distance
from oracle.reference import Array
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from engine.errors import EngineError
from engine.families import family

Edit = dict[str, Any]

LINEAR = {"rope_type": "linear", "factor": 3.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SU = {
    "type": "su",
    "original_max_position_embeddings": 64,
    "short_factor": [1.0 + 0.1 * i for i in range(6)],
    "long_factor": [1.5 + i for i in range(6)],
}
BY_KIND = {"full_attention": {"rope_theta": 77.0}, "sliding_attention": {"rope_theta": 33.0}}
YARN_BY_KIND = BY_KIND | {"full_attention": YARN | {"rope_theta": 77.0, "truncate": False}}
PART = {"rope_type": "proportional", "rope_theta": 100.0, "partial_rotary_factor": 0.5, "factor": 2.0}
SLIDING, FULL = "sliding_attention", "full_attention"

EDITS: list[tuple[Edit, str]] = [
    *(({"hidden_act": name}, "llama gemma phi") for name in ("relu2", "quick_gelu", "mish")),
    *(({"hidden_act": name}, "llama") for name in ("gelu", "gelu_python", "gelu_fast")),
    ({"hidden_activation": "relu"}, "gemma2 gemma3"),
    ({"activation_function": "relu"}, "gpt2 gpt_neo"),
    ({"num_attention_heads": 2}, "llama gpt2 gpt_neo gpt_neox"),
    ({"num_hidden_layers": 2, "num_layers": 2, "n_layer": 2}, "llama gpt2"),
    ({"num_key_value_heads": 1}, "llama gemma olmo3 stablelm"),
    ({"head_dim": 24}, "llama olmo3 phi3 smollm3"),
    ({"head_dim": 24, "qk_layernorm": False}, "phi"),
    ({"head_dim": 8}, "gpt_neox"),
    ({"rms_norm_eps": 0.1, "layer_norm_eps": 0.1, "norm_epsilon": 0.1, "layer_norm_epsilon": 0.1}, "llama gpt2 phi"),
    ({"rope_theta": 333.0}, "llama olmo3 gemma3 phi smollm3"),
    ({"rotary_emb_base": 333.0, "rope_local_base_freq": 33.0}, "gpt_neox gemma3"),
    ({"partial_rotary_factor": 1.0, "rotary_pct": 1.0}, "phi gpt_neox"),
    ({"partial_rotary_factor": 0.5}, "stablelm"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "llama gpt_neox"),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}, "max_position_embeddings": 16}, "llama qwen3 olmo2"),
    ({"rope_scaling": YARN}, "llama-linear qwen3 gemma3 gpt_neox"),
    ({"rope_scaling": LLAMA3}, "llama"),
    ({"rope_scaling": LLAMA3, "original_max_position_embeddings": 8}, "llama granite"),
    ({"rope_scaling": SU, "rope_parameters": None}, "phi3"),
    ({"rope_parameters": PART}, "llama"),
    ({"rope_parameters": YARN | {"original_max_position_embeddings": 7}}, "llama gpt_neox"),
    ({"rope_parameters": BY_KIND, "rope_scaling": LINEAR}, "gemma3 olmo3"),
    ({"rope_parameters": YARN_BY_KIND, "original_max_position_embeddings": 8}, "gemma3 olmo3"),
    ({"rope_parameters": YARN_BY_KIND | {"truncate": False}}, "gemma3 olmo3"),
    ({"sliding_window": 2, "use_sliding_window": True, "max_window_layers": 1}, "mistral phi3 qwen2 starcoder2"),
    ({"window_size": 2}, "gpt_neo"),
    ({"sliding_window": 2, "use_sliding_window": True, "layer_types": [SLIDING, FULL] * 2}, "gemma2 olmo3 qwen3"),
    ({"sliding_window_pattern": 2}, "gemma3"),
    ({"attention_types": [[["local"], 4]]}, "gpt_neo"),
    ({"attention_layers": ["local"] * 4}, "gpt_neo"),
    ({"no_rope_layers": [0, 1, 0, 1]}, "smollm3"),
    ({"no_rope_layer_interval": 2}, "smollm3"),
    ({"attention_bias": True, "mlp_bias": True}, "olmo3 smollm3"),
    ({"attention_bias": False, "use_qkv_bias": False, "use_bias": False, "qk_layernorm": False}, "gpt_neox starcoder2"),
    ({"tie_word_embeddings": True}, "llama phi gpt_neox"),
    ({"tie_word_embeddings": False}, "gpt2 gemma smollm3"),
    ({"query_pre_attn_scalar": 99, "final_logit_softcapping": 1.0, "attn_logit_softcapping": 1.0}, "gemma2 gemma3"),
    ({"final_logit_softcapping": None, "attn_logit_softcapping": None}, "gemma2"),
    ({"embedding_multiplier": 2, "residual_multiplier": 0.2}, "granite"),
    ({"attention_multiplier": 0.5, "logits_scaling": 2}, "granite"),
    ({"scale_attn_weights": False, "reorder_and_upcast_attn": True}, "gpt2"),
    ({"scale_attn_by_inverse_layer_idx": False}, "gpt2"),
    ({"use_parallel_residual": False}, "gpt_neox"),
    ({"is_causal": False}, ""),
    ({"use_bidirectional_attention": True}, ""),
    ({"clip_qkv": 0.1, "alibi": True, "multi_query": True, "logit_scale": 2.0, "parallel_attn": True}, ""),
    ({"norm_bias": True, "qk_norm": True, "embed_scale": 2.0, "attention_chunk_size": 4, "original_context": 8}, ""),
]  # fmt: skip
"""Edits, each made to every row, and some rows whose logits it moves: those must be read alike, not refused."""

ROWS = {raw["model_type"]: row for row, raw in reversed(families.ROWS.items())}.values()
"""One of each architecture: what rows of the same one differ in is edited."""

TIED = ("llama-tied", "gpt2", "gemma3", "qwen2", "starcoder2")


def config_keys_agree() -> Iterator[Result]:
    """Every edit of every row, and every way to store a tied head."""
    for row in dict.fromkeys([*ROWS, *(row for _, moved in EDITS for row in moved.split())]):
        yield _edited(row)
    for row in TIED:
        yield from _heads(row)


def _edited(row: str) -> Result:
    """The worst of a row's edits; its control is what moves the logits least of those that must."""
    plain, _ = _both(row, {})
    assert plain is not None
    alone, others = _grouped(row)
    worst, edit, compared, least = 0.0, others, 0, float("inf")
    for given, moves in [*alone, (others, False)]:
        expected, read = _both(row, given)
        if expected is not None and read is not None:
            worst, edit = max((worst, edit), (distance(read, expected), given), key=itemgetter(0))
            least = min(least, distance(expected, plain)) if moves else least
            compared += 1
        elif moves or given is others:
            worst, edit = float("inf"), given
    name = f"{row}: {compared} of {len(alone) + 1} edits, what means nothing as one; worst {json.dumps(edit)[:160]}"
    return Result("config keys", name, Measure(worst, SAME, compared), least)


def _grouped(row: str) -> tuple[list[tuple[Edit, bool]], Edit]:
    """The edits that mean something to this project in a row, and whether they must; all others in one.

    One that is refused is left out; what shares a key with it or replaces rope settings stands alone.
    """
    raw = families.ROWS[row]
    reader = family(raw["model_type"])
    alone: list[tuple[Edit, bool]] = []
    others: Edit = {}
    scaled = {"rope_parameters", "rope_scaling"}
    for edit, movers in EDITS:
        moves = row in movers.split()
        with suppress(EngineError):
            if moves or edit.keys() & {*others, *scaled} or reader.config(raw | edit) != reader.config(raw):
                alone.append((edit, moves))
            else:
                others |= edit
    return alone, others


def _both(row: str, edit: Edit) -> tuple[Array | None, Array | None]:
    """Transformers' logits and ours; None where there are none."""
    with tempfile.TemporaryDirectory() as scratch:
        at = Path(scratch)
        save_tokenizer(at)
        (at / "config.json").write_text(json.dumps(families.ROWS[row] | edit))
        try:
            _write_weights(at)
            expected = theirs(at)
        except Exception:  # of any kind: transformers checks little
            return None, None
        try:
            return expected, ours(at)
        except EngineError:
            return expected, None


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
