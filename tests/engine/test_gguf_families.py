"""GGUF files of every architecture: llama.cpp's logits, and the Hugging Face directory they were converted from.

`make oracle-gguf` makes `tests/golden/gguf.*`; `gguf_controls.py` says what each row is allowed.
"""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import gguf_controls
import gguf_rows
import numpy as np
import pytest
from gguf import GGUFWriter
from gguf_rows import ROWS, Weights
from oracle.golden import Golden
from oracle.measure import row_errors
from tolerances import SCOPED, assert_close, assert_same

from engine import Model, forward, load_model
from engine.errors import EngineError
from engine.families._gguf.table import ARCHITECTURES

EXACT = [row for row in ROWS if not row.endswith("-mixed")]


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden.read(Path(__file__).parents[1] / "golden", "gguf")


def loaded(row: str, at: Path, weights: str = "dense") -> Model:
    return load_model(gguf_rows.write(row, at / "tiny.gguf"), weights)


# --- against llama.cpp --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ROWS)
def test_logits_are_llama_cpps(row, golden, tmp_path):
    for prompt, found in gguf_controls.logits(loaded(row, tmp_path), row).items():
        name = f"{row}/{prompt}"
        errors, limits = row_errors(found, golden.arrays[name]), golden.allowed(name)
        for position, error, limit in zip(gguf_controls.KEPT[prompt], errors, limits, strict=True):
            assert error <= limit, f"{name}, position {position}: relative error {error:.1e} is above {limit:.1e}"


@pytest.mark.parametrize("row", ROWS)
def test_a_file_that_was_read_wrongly_would_be_noticed(row, golden, tmp_path):
    least = gguf_controls.FAR * gguf_controls.allowed(row)
    for name, model in gguf_controls.changed(row, tmp_path):
        assert gguf_controls.farthest(model, row, golden) >= least, name


def test_the_golden_logits_are_of_these_files_and_prompts(golden):
    assert golden.facts["llama_cpp_python"] == "0.3.36"
    assert golden.facts["prompts"] == {row: gguf_controls.prompts(row) for row in ROWS}
    assert golden.facts["positions"] == {name: list(kept) for name, kept in gguf_controls.KEPT.items()}
    assert golden.arrays.keys() == {f"{row}/{prompt}" for row in ROWS for prompt in gguf_controls.prompts(row)}
    for name in golden.arrays:
        assert {*golden.allowed(name)} == {gguf_controls.allowed(name.split("/")[0])}


def test_every_architecture_has_a_row():
    assert {raw["model_type"] for raw in ROWS.values()} == {row.model_type for row in ARCHITECTURES.values()}
    assert gguf_rows.ARCHITECTURES.keys() == {raw["model_type"] for raw in ROWS.values()}


# --- against the directory ----------------------------------------------------------------------------------------


def everything(model: Model) -> dict[str, np.ndarray]:
    found = {"embed": model.params.embed, "unembed": model.params.unembed, "norm": model.params.final_norm.weight}
    for layer in range(model.config.n_layers):
        found |= {f"{layer}.{name}": array for name, array in model.params.layer(layer).arrays()}
    return found


@pytest.mark.parametrize("row", EXACT)
def test_weights_are_those_of_the_directory_to_the_last_bit(row, tmp_path):
    ours = everything(loaded(row, tmp_path))
    theirs = everything(load_model(gguf_rows.directory(row, tmp_path / "hf")))
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        assert_same(ours[name], array)


@pytest.mark.parametrize("row", EXACT)
def test_the_config_is_the_directorys_but_for_float32_metadata(row, tmp_path):
    ours, theirs = asdict(loaded(row, tmp_path).config), asdict(gguf_rows.config(row))
    for mine, other in zip(ours.pop("ropes"), theirs.pop("ropes"), strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            for key in ("inv_freq", "scale"):
                np.testing.assert_allclose(mine[key], other[key], rtol=2e-7)
            assert (mine["long"] is None) == (other["long"] is None)
            if mine["long"] is not None:
                assert mine["long"][0] == other["long"][0]
                np.testing.assert_allclose(mine["long"][1], other["long"][1], rtol=2e-7)
    assert np.float32(ours.pop("norm_eps")) == np.float32(theirs.pop("norm_eps"))
    assert ours == theirs


@pytest.mark.parametrize("row", ROWS)
def test_scoped_weights_give_the_dense_logits(row, tmp_path):
    ids, at = gguf_controls.prompts(row)["short"], [0, 11, 23]
    dense, scoped = loaded(row, tmp_path), loaded(row, tmp_path, "scoped")
    assert_close(forward(scoped, ids, logits_at=at).logits, forward(dense, ids, logits_at=at).logits, SCOPED)


def test_phi3s_window_is_kept_though_llama_cpp_leaves_it_out(tmp_path):
    def windowed(writer: GGUFWriter, _: Weights) -> None:
        writer.kv_data[0]["phi3.attention.sliding_window"].value = 4

    model = load_model(gguf_rows.write("phi3", tmp_path / "tiny.gguf", windowed))
    assert model.config == replace(loaded("phi3", tmp_path).config, windows=(4,) * 4)


def test_gemmas_27b_models_divide_their_scores_otherwise():
    for row in ("gemma2-27b", "gemma3-27b"):
        assert gguf_rows.config(row).attn_scales[0] == 12**-0.5 != gguf_rows.config(row).d_head ** -0.5


# --- settings in other forms --------------------------------------------------------------------------------------

Change = Callable[[GGUFWriter, Weights], None]


def put(key: str, value: object) -> Change:
    """A metadata entry, over another if there is one."""

    def change(writer: GGUFWriter, _: Weights) -> None:
        writer.kv_data[0].pop(key, None)
        kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
        kinds |= {str: writer.add_string, list: writer.add_array}
        kinds[type(value)](key, value)

    return change


def take(*keys: str) -> Change:
    def change(writer: GGUFWriter, stored: Weights) -> None:
        for key in keys:
            if key in writer.kv_data[0]:
                del writer.kv_data[0][key]
            else:
                del stored[key]

    return change


def both(*changes: Change) -> Change:
    def change(writer: GGUFWriter, stored: Weights) -> None:
        for one in changes:
            one(writer, stored)

    return change


SAME: list[tuple[str, Change]] = [
    ("llama-linear", both(take("llama.rope.scaling.factor"), put("llama.rope.scale_linear", 3.0))),
    ("llama-linear", take("llama.rope.scaling.type")),
    ("llama", both(put("llama.rope.scaling.type", "none"), put("llama.rope.scaling.factor", 7.0))),
    ("llama", put("llama.rope.scaling.factor", 0.0)),
    ("llama", put("llama.tensor_data_layout", "Meta AI original pth")),
    ("llama", both(put("llama.expert_count", 0), put("general.type", "model"))),
    ("llama-yarn", put("llama.rope.scaling.yarn_beta_fast", 32.0)),
    ("qwen2", put("qwen2.rope.dimension_count", 12)),
    ("gemma2", put("gemma2.attention.sliding_window_pattern", [True, False, True, False])),
    ("gemma3-pattern", put("gemma3.attention.sliding_window_pattern", [True, True, False, True])),
    ("phi3-longrope", put("phi3.rope.scaling.type", "longrope")),
    ("gpt2", put("gpt2.vocab_size", 257)),
]


@pytest.mark.parametrize(("row", "change"), SAME)
def test_other_ways_to_say_the_same_are_read_the_same(row, change, tmp_path):
    said = load_model(gguf_rows.write(row, tmp_path / "said.gguf", change))
    assert said.config == loaded(row, tmp_path).config


def test_a_gemma3_without_a_window_has_full_layers_with_their_base(tmp_path):
    change = take("gemma3.attention.sliding_window")
    cfg = load_model(gguf_rows.write("gemma3", tmp_path / "tiny.gguf", change)).config
    assert cfg.windows == (None,) * 7
    assert {*cfg.ropes} == {loaded("gemma3", tmp_path).config.ropes[5]}


UNKNOWN: list[tuple[str, Change, str]] = [
    ("llama", put("general.architecture", "bert"), "'bert' is not supported; the supported ones are gemma2,"),
    ("llama", put("general.type", "mmproj"), "general.type 'mmproj' is not supported"),
    ("llama", put("split.count", 2), "split.count 2 is not supported"),
    ("llama", put("llama.attention.causal", False), "llama.attention.causal False is not supported"),
    ("llama", put("llama.attention.clamp_kqv", 3.0), "llama.attention.clamp_kqv 3.0 is not .*not known here"),
    ("llama", put("llama.attention.sliding_window", 4), "llama.attention.sliding_window 4 is not supported"),
    ("llama", put("llama.rope.scaling.type", "longrope"), "scaling.type 'longrope' .*ones are none, linear, yarn"),
    ("llama", put("llama.rope.scaling.attn_factor", 2.0), "llama.rope.scaling.attn_factor 2.0 is not supported"),
    ("llama", put("llama.rope.dimension_sections", [1, 2, 3]), "llama.rope.dimension_sections"),
    ("llama-yarn", put("llama.rope.scaling.yarn_beta_fast", 8.0), "rope.scaling.yarn_beta_fast 8.0 is not supported"),
    ("llama-yarn", put("llama.rope.scaling.yarn_attn_factor", 1.0), "yarn_attn_factor 1.0 .* not known here"),
    ("llama-yarn", put("llama.rope.scaling.yarn_log_multiplier", 0.1), "yarn_log_multiplier .* not known here"),
    ("llama-llama3", put("llama.rope.scaling.factor", 2.0), "the file holds rope_freqs.weight, another scaling"),
    ("qwen2", put("qwen2.attention.key_length", 16), "qwen2.attention.key_length 16 .* a head is 12 wide"),
    ("qwen3", put("qwen3.attention.value_length", 8), "qwen3.attention.value_length 8 .* a head is 16 wide"),
    ("qwen3", put("qwen3.rope.dimension_count", 8), "qwen3.rope.dimension_count 8 .*must be the head width 16"),
    ("qwen3", put("qwen3.pooling_type", 4), "qwen3.pooling_type 4 is not supported"),
    ("gemma2", put("gemma2.rope.freq_base_swa", 5.0), "gemma2.rope.freq_base_swa 5.0 is not supported"),
    ("gemma2", put("gemma2.attention.sliding_window_pattern", [True]), "must have an entry for each of 4 layers"),
    ("gemma3", put("gemma3.attn_logit_softcapping", 50.0), "gemma3.attn_logit_softcapping 50.0 is not supported"),
    ("gemma3", put("gemma3.rope.scaling.type", "yarn"), "gemma3.rope.scaling.type 'yarn' is not supported"),
    ("phi3", put("phi3.rope.dimension_count", 24), "phi3.rope.dimension_count 24 .* a head is 12 wide"),
    ("phi3", put("phi3.rope.scaling.attn_factor", 1.5), "phi3.rope.scaling.attn_factor 1.5 is not supported"),
    ("phi3-longrope", put("phi3.rope.scaling.type", "yarn"), "the file holds factors of longrope"),
    ("phi3-longrope", put("phi3.rope.scaling.factor", 4.0), "the file holds factors of longrope"),
    ("phi3-longrope", take("rope_factors_long.weight"), "holds one of rope_factors_short.weight and"),
    ("gpt2", put("gpt2.rope.freq_base", 10_000.0), "gpt2.rope.freq_base 10000.0 is not supported"),
    ("gpt2", take("gpt2.context_length"), "has no gpt2.context_length"),
    ("llama", take("llama.attention.layer_norm_rms_epsilon"), "has no llama.attention.layer_norm_rms_epsilon"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "change", "says"), UNKNOWN)
def test_what_would_have_to_be_guessed_is_refused_by_name(row, change, says, tmp_path):
    with pytest.raises(EngineError, match=says) as refusal:
        load_model(gguf_rows.write(row, tmp_path / "tiny.gguf", change))
    assert len(str(refusal.value)) < 300


def stray(name: str) -> Change:
    def change(_: GGUFWriter, stored: Weights) -> None:
        stored[name] = np.ones(48, np.float32)

    return change


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ("llama", "blk.0.attn_q_norm.weight"),
        ("llama", "rope_factors_long.weight"),
        ("qwen3", "rope_freqs.weight"),
        ("gemma2", "output.weight"),
        ("gemma3", "output.weight"),
        ("gpt2", "nothing"),
    ],
)
def test_a_tensor_that_nothing_reads_is_refused(row, name, tmp_path):
    with pytest.raises(EngineError, match=f"the config does not account for, such as '{name}'"):
        load_model(gguf_rows.write(row, tmp_path / "tiny.gguf", stray(name)))


def test_an_output_bias_is_refused(tmp_path):
    with pytest.raises(EngineError, match=r"does not account for, such as 'lm_head\.bias'"):
        load_model(gguf_rows.write("llama", tmp_path / "tiny.gguf", stray("output.bias")))


def test_a_tensor_under_both_its_names_is_refused(tmp_path):
    with pytest.raises(EngineError, match="under its GGUF and its Hugging Face name"):
        load_model(gguf_rows.write("llama", tmp_path / "tiny.gguf", stray("model.norm.weight")))


def test_factors_that_are_no_vector_are_refused(tmp_path):
    def change(_: GGUFWriter, stored: Weights) -> None:
        stored["rope_freqs.weight"] = np.ones((2, 4), np.float32)

    with pytest.raises(EngineError, match="must have one dimension"):
        load_model(gguf_rows.write("llama", tmp_path / "tiny.gguf", change))


def test_as_many_divisors_as_pairs_are_needed(tmp_path):
    def change(_: GGUFWriter, stored: Weights) -> None:
        stored["rope_freqs.weight"] = np.ones(7, np.float32)

    with pytest.raises(EngineError, match="divisors must be a list of 8 numbers"):
        load_model(gguf_rows.write("llama", tmp_path / "tiny.gguf", change))
