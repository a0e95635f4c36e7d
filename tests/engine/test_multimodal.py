"""A Gemma 3 that sees pictures: its text part is the text model, whatever the tensors are called around it."""

import json
from pathlib import Path
from typing import Any

import families
import gguf_rows
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tolerances import SCOPED, assert_close, assert_same

from engine import Model, forward, load_model
from engine.errors import EngineError
from engine.families import gemma3

ROW = "gemma3-pattern"
AROUND = {
    "saved": ("language_model.model.", "vision_tower.", "multi_modal_projector."),
    "older": ("model.language_model.", "model.vision_tower.", "model.multi_modal_projector."),
}
PICTURES = {"encoder.layers.0.mlp.fc1.weight": (8, 4), "mm_soft_emb_norm.weight": (4,)}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The text model, without the softcap that its logits do not have beside pictures."""
    at = gguf_rows.directory(ROW, tmp_path_factory.mktemp("text") / "hf")
    (at / "config.json").write_text(json.dumps(gguf_rows.ROWS[ROW] | {"final_logit_softcapping": None}))
    return at


def wrapped(plain: Path, at: Path, names: str = "saved", **changes: Any) -> Path:
    """The same weights in a multimodal directory; `changes` to config.json."""
    text, tower, projector = AROUND[names]
    tensors = {name.replace("model.", text, 1): array for name, array in load_file(plain / "model.safetensors").items()}
    for (name, shape), of in zip(PICTURES.items(), (tower, projector), strict=True):
        tensors[f"{of}{name}"] = np.ones(shape, np.float32)
    at.mkdir()
    save_file(tensors, at / "model.safetensors")
    config = {"model_type": "gemma3", "text_config": gguf_rows.ROWS[ROW], "vision_config": {"hidden_size": 4}} | changes
    (at / "config.json").write_text(json.dumps(config))
    (at / "tokenizer.json").write_bytes((plain / "tokenizer.json").read_bytes())
    return at


def logits(model: Model) -> np.ndarray:
    return forward(model, list(range(20)), logits_at=[0, 7, 19]).logits


@pytest.mark.parametrize("names", AROUND)
def test_the_text_part_is_the_text_model(plain, tmp_path, names):
    ours, text = load_model(wrapped(plain, tmp_path / "both", names)), load_model(plain)
    assert ours.config == text.config
    assert_same(logits(ours), logits(text))


def test_its_layers_can_be_kept_on_disk(plain, tmp_path):
    at = wrapped(plain, tmp_path / "both")
    assert_close(logits(load_model(at, "scoped")), logits(load_model(at)), SCOPED)


def test_what_the_text_config_leaves_out_has_transformers_defaults():
    cfg = gemma3.config({"text_config": {"num_hidden_layers": 34, "hidden_size": 2560, "intermediate_size": 10240}})
    assert (cfg.n_heads, cfg.n_kv_heads, cfg.d_head, cfg.d_vocab, cfg.n_ctx) == (8, 4, 256, 262_208, 131_072)
    assert cfg.windows[:6] == (4096,) * 5 + (None,)
    assert cfg.attn_scales[0] == 1 / 16


def test_the_outer_config_ties_the_head_and_no_softcap_bounds_it():
    raw = {"text_config": gguf_rows.ROWS[ROW] | {"tie_word_embeddings": False, "final_logit_softcapping": 2.0}}
    assert (gemma3.config(raw).tied, gemma3.config(raw).final_softcap) == (True, None)
    assert not gemma3.config(raw | {"tie_word_embeddings": False}).tied


@pytest.mark.parametrize(
    ("changes", "eos"),
    [({}, (256,)), ({"eos_token_id": [1, 6]}, (1, 6)), ({"eos_token_id": None}, (2,))],
)
def test_the_end_of_a_text_stands_in_either_config(plain, tmp_path, changes, eos):
    assert load_model(wrapped(plain, tmp_path / "both", **changes)).tokenizer.eos == eos


def test_only_the_vision_part_may_be_left_unread(plain, tmp_path):
    at = wrapped(plain, tmp_path / "both")
    tensors = load_file(at / "model.safetensors")
    save_file(tensors | {"audio_tower.weight": np.ones(4, np.float32)}, at / "model.safetensors")
    with pytest.raises(EngineError, match=r"does not account for, such as 'audio_tower\.weight'"):
        load_model(at)


def test_a_missing_text_tensor_is_named_as_it_would_be_saved(plain, tmp_path):
    at = wrapped(plain, tmp_path / "both")
    tensors = load_file(at / "model.safetensors")
    del tensors["language_model.model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, at / "model.safetensors")
    with pytest.raises(EngineError, match=r"no tensor 'language_model\.model\.layers\.1\.mlp\.up_proj\.weight'"):
        load_model(at)


def test_a_tensor_under_two_names_is_refused(plain, tmp_path):
    at = wrapped(plain, tmp_path / "both")
    tensors = load_file(at / "model.safetensors")
    save_file(tensors | {"model.norm.weight": np.ones(48, np.float32)}, at / "model.safetensors")
    with pytest.raises(EngineError, match="twice"):
        load_model(at)


@pytest.mark.parametrize("inner", [None, 3, "text", []])
def test_a_config_without_a_text_part_is_refused(plain, tmp_path, inner):
    with pytest.raises(EngineError, match=r"text_config is .*must be the text model's config"):
        load_model(wrapped(plain, tmp_path / "both", text_config=inner))


def test_the_row_has_windows_and_two_bases():
    cfg = gguf_rows.config(ROW)
    assert len({*cfg.windows}) == len({*cfg.ropes}) == 2
    assert families.SIZES["num_hidden_layers"] == cfg.n_layers
