"""What a key of config.json means is what transformers does with it; `make oracle` compares the same edits' logits."""

from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import tiny_files

import engine
from engine.config import Config, Rope
from engine.errors import DamagedFile, UnknownModel
from engine.families import family

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
SILENT = ("num_key_value_heads", "max_position_embeddings")
LONG = {"short_factor": [1.0 + 0.1 * i for i in range(6)], "long_factor": [1.5 + i for i in range(6)]}


def config(row: str, **edits: Any) -> Config:
    raw = families.ROWS[row] | edits
    return family(raw["model_type"]).config(raw)


def test_rope_scaling_beside_rope_parameters_takes_their_place():
    added = config("llama-linear", rope_scaling=YARN, rope_theta=5000.0)
    assert added == config("llama-linear", rope_parameters=YARN | {"rope_theta": 5000.0})
    assert added != config("llama-linear")


@pytest.mark.parametrize("row", ["gemma3", "olmo3"])
def test_rope_scaling_is_added_to_what_full_layers_have(row: str):
    both = {"full_attention": {"rope_theta": 77.0}, "sliding_attention": {"rope_theta": 33.0}}
    plain, scaled = config(row, rope_parameters=both), config(row, rope_parameters=both, rope_scaling=YARN)
    by_kind = both | {"full_attention": {"rope_theta": 77.0} | YARN}
    assert scaled == config(row, rope_parameters=by_kind)
    differ = [a != b for a, b in zip(plain.ropes, scaled.ropes, strict=True)]
    assert differ == [window is None for window in plain.windows]


@pytest.mark.parametrize("row", ["gemma3", "olmo3"])
def test_the_older_name_of_a_scaling_goes_unread_where_kinds_have_settings_of_their_own(row: str):
    old = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    assert config(row, rope_scaling=old) == config(row)
    assert config(row, rope_scaling=YARN) != config(row)


def test_rope_theta_of_olmo3_is_of_the_full_layers():
    cfg = config("olmo3", rope_theta=333.0)
    theta = {None: 333.0, 4: 500_000.0}
    assert cfg.ropes == tuple(Rope.plain(theta[window], cfg.d_head) for window in cfg.windows)


@pytest.mark.parametrize("name", ["su", "yarn"])
def test_early_names_of_longrope_are_longrope_in_phi3(name: str):
    now = config("phi3-longrope")
    assert config("phi3-longrope", rope_parameters=None, rope_scaling={"type": name} | LONG, rope_theta=5000.0) == now


def test_the_original_context_of_phi3_is_the_configs():
    settings = families.ROWS["phi3-longrope"]["rope_parameters"] | {"original_max_position_embeddings": 7}
    assert config("phi3-longrope", rope_parameters=settings) == config("phi3-longrope")


def test_phi3_takes_no_other_scaling():
    with pytest.raises(
        DamagedFile, match="rope_type is 'linear'; the supported values are default, longrope, su, yarn"
    ):
        config("phi3", rope_parameters={"rope_type": "linear", "factor": 2.0})


@pytest.mark.parametrize(("row", "part"), [("phi", 0.5), ("phi3", 0.5), ("olmo3", 1.0), ("smollm3", 1.0)])
def test_heads_of_a_width_of_their_own_are_turned_in_that_width(row: str, part: float):
    cfg = config(row, head_dim=24)
    assert cfg.d_head == 24
    assert {2 * len(rope.inv_freq) for rope in cfg.ropes if rope is not None} == {24 * part}


def test_gpt_neox_has_names_of_its_own():
    ignored = {"num_key_value_heads": 2, "rope_theta": 333.0, "partial_rotary_factor": 1.0}
    assert config("gpt_neox", **ignored) == config("gpt_neox")
    assert config("gpt_neox", rotary_emb_base=333.0) != config("gpt_neox")


WHOLE = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "olmo2", "granite", "smollm3", "starcoder2")


@pytest.mark.parametrize("row", WHOLE)
def test_architectures_that_turn_whole_heads_turn_no_part_of_them(row: str):
    assert config(row, partial_rotary_factor=0.5) == config(row)
    with pytest.raises(DamagedFile, match=r"linear' rotary scaling of 0.5 of each head"):
        config(row, partial_rotary_factor=0.5, rope_scaling={"rope_type": "linear", "factor": 2.0})


def test_proportional_frequencies_are_those_of_the_whole_head_for_a_part_of_it():
    settings = {"rope_type": "proportional", "rope_theta": 100.0, "partial_rotary_factor": 0.25, "factor": 2.0}
    (rope,) = {*config("llama", rope_parameters=settings).ropes}
    assert rope is not None
    assert rope.inv_freq == (0.5, 0.5 * 100.0 ** (-2 / 16), 0, 0, 0, 0, 0, 0)
    with pytest.raises(DamagedFile, match="proportional"):
        config("phi", rope_parameters=settings)


def test_llama3_without_an_original_context_takes_the_configs():
    settings = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    own = config("llama", rope_parameters=settings)
    assert own == config("llama", rope_parameters=settings | {"original_max_position_embeddings": own.n_ctx})


def test_the_original_context_of_the_config_comes_before_that_of_its_rope_settings():
    for settings in (YARN, YARN | {"original_max_position_embeddings": 999}):
        told = config("llama", rope_parameters=settings, original_max_position_embeddings=32)
        assert told == config("llama", rope_parameters=YARN)
    assert told != config("llama", rope_parameters=settings)


@pytest.mark.parametrize("row", ["gemma3", "olmo3"])
def test_where_kinds_have_settings_of_their_own_the_original_context_is_read_there_and_truncate_beside_them(row: str):
    both = {"full_attention": YARN | {"rope_theta": 77.0}, "sliding_attention": {"rope_theta": 33.0}}
    inside = both | {"full_attention": both["full_attention"] | {"truncate": False}}
    plain = config(row, rope_parameters=both)
    assert plain == config(row, rope_parameters=both, original_max_position_embeddings=16)
    assert plain == config(row, rope_parameters=inside)
    assert plain != config(row, rope_parameters=both | {"truncate": False})


@pytest.mark.parametrize("row", families.ROWS)
@pytest.mark.parametrize("edit", [{"is_causal": False}, {"is_causal": None}, {"use_bidirectional_attention": True}])
def test_decoders_that_read_later_tokens_are_refused(row: str, edit: dict[str, Any]):
    (key,) = edit
    with pytest.raises(UnknownModel, match=f"{key} is {edit[key]}.*causal decoder"):
        config(row, **edit)
    assert config(row, is_causal=True, use_bidirectional_attention=None) == config(row)


@pytest.mark.parametrize(
    ("row", "general", "own"),
    [
        ("gpt2", {"hidden_size": 96, "num_attention_heads": 2}, {"n_embd": 96, "n_head": 2}),
        ("gpt2", {"num_hidden_layers": 3, "max_position_embeddings": 99}, {"n_layer": 3, "n_positions": 99}),
        ("gpt_neo", {"num_hidden_layers": 2, "num_attention_heads": 2}, {"num_layers": 2, "num_heads": 2}),
    ],
)
def test_general_names_take_the_place_of_an_architectures_own(row: str, general: dict[str, int], own: dict[str, int]):
    kinds = {"attention_types": None}  # one for each layer, however many
    assert config(row, **general, **kinds) == config(row, **own, **kinds) != config(row, **kinds)


def test_gemmas_read_one_name_of_the_activation_each():
    assert config("gemma", hidden_activation="relu") == config("gemma", hidden_act="gelu") == config("gemma")
    assert config("gemma", hidden_act="relu").activation == "relu"
    for row in ("gemma2", "gemma3"):
        assert config(row, hidden_act="relu") == config(row)
        assert config(row, hidden_activation="gelu").activation == "gelu"


def test_layers_of_gpt_neo_written_out_come_before_groups_of_them():
    kinds = ["local", "local", "global", "local"]
    assert config("gpt_neo", attention_layers=kinds).windows == (4, 4, None, 4)
    with pytest.raises(DamagedFile, match="attention_layers must name global or local for each of 4 layers"):
        config("gpt_neo", attention_layers=kinds[1:])


def test_gemma3_has_no_softcap_of_scores():
    assert config("gemma3", attn_logit_softcapping=2.0).attn_softcap is None


@pytest.mark.parametrize(
    ("row", "heads", "context"),
    [
        ("mistral", 8, 131_072),
        ("qwen2", 32, 32_768),
        ("qwen3", 32, 32_768),
        ("gemma", 16, 8192),
        ("gemma2", 4, 8192),
        ("gemma3", 4, 131_072),
        ("smollm3", 4, 32_768),
        ("starcoder2", 2, 4096),
        ("stablelm", 32, 4096),
        ("phi3", 4, 4096),
        ("llama", 4, 2048),
    ],
)
def test_a_silent_config_means_what_the_architecture_has_by_default(row: str, heads: int, context: int):
    silent = {key: value for key, value in families.ROWS[row].items() if key not in SILENT}
    n_heads = 32 if heads > 4 else 4
    raw = silent | {"num_attention_heads": n_heads, "hidden_size": 16 * n_heads}
    cfg = family(raw["model_type"]).config(raw)
    assert (cfg.n_kv_heads, cfg.n_ctx) == (heads, context)


@pytest.mark.parametrize("told", ["an equal head", "another head", "a head alone"])
def test_a_tied_file_with_a_head_of_its_own_has_the_head_that_is_stored(told: str, tmp_path: Path):
    tensors = tiny_files.weights()
    embed = tensors["model.embed_tokens.weight"]
    head = embed[::-1].copy() if told == "another head" else embed.copy()
    if told == "a head alone":
        del tensors["model.embed_tokens.weight"]
    at = tiny_files.hf_directory(tmp_path / "tied", tensors | {"lm_head.weight": head}, tie_word_embeddings=True)
    params = engine.load_model(at).params
    assert np.array_equal(params.embed, embed)
    assert np.array_equal(params.unembed, head)
    assert (params.unembed is params.embed) == (told != "another head")


def test_layers_of_mistral_are_all_of_one_kind():
    assert config("mistral", layer_types=["sliding_attention"] * 4) == config("mistral")
    with pytest.raises(DamagedFile, match="layer_types other than sliding_attention"):
        config("mistral", layer_types=["sliding_attention", "full_attention"] * 2)


def test_mistral_has_no_biases():
    seeded = families.Seeded("mistral")
    raw = families.ROWS["mistral"]
    reader = family("mistral")
    layers = [
        reader.layer(seeded, 0, reader.config(raw), raw | edit)
        for edit in ({}, {"attention_bias": True, "mlp_bias": True})
    ]
    assert [name for name, _ in layers[0].stored()] == [name for name, _ in layers[1].stored()]
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(layers[0].stored(), layers[1].stored(), strict=True))
