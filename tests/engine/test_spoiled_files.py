"""What fuzzing has found, one by one: settings, tokenizers and weights that reached the arithmetic, a library that
panics, and configs that want code run. Each is refused in words.
"""

import json
from pathlib import Path
from typing import Any

import fuzzing
import numpy as np
import pytest
import tiny_files

import engine
from engine.errors import DamagedFile, EngineError

Row = dict[str, Any]

FOUND = {
    "heads that do not divide the width of gpt2": ("gpt2", {"n_head": 5}, "5 heads cannot share 48 features evenly"),
    "more heads than features in gpt2": ("gpt2", {"n_head": 96}, "96 heads cannot share 48 features"),
    "heads that do not divide the width of gpt_neo": ("gpt_neo", {"num_heads": 7}, "7 heads cannot share 48 features"),
    "heads that do not divide the width of gpt_neox": (
        "gpt_neox",
        {"num_attention_heads": 5, "rotary_pct": 1.0},
        "5 heads cannot share 48 features",
    ),
    "a kind of attention that is a list": ("gpt_neo", {"attention_types": [[[["x"]], 4]]}, "attention_types is"),
    "endless attention": ("gpt_neo", {"attention_types": [[["global"], float("inf")]]}, "attention_types is"),
    "attention for a billion layers": (
        "gpt_neo",
        {"attention_types": [[["global"] * 10**6, 10**9]]},
        "each of 4 layers",
    ),
    "a layer to slide from that is text": (
        "qwen2",
        {"max_window_layers": "two"},
        "max_window_layers is 'two'; it must be a whole number from 0",
    ),
    "yarn to the base 1": ("llama-yarn", {"rope_theta": 1.0}, "rope_theta is 1.0; it must be a number from 1.001"),
    "longrope from one position": (
        "llama",
        {
            "rope_scaling": {"type": "longrope", "short_factor": [1] * 8, "long_factor": [1] * 8}
            | {"original_max_position_embeddings": 1}
        },
        "original_max_position_embeddings is 1; it must be a whole number from 2",
    ),
    "dynamic scaling of a single pair": (
        "phi",
        {"rope_scaling": {"type": "dynamic", "factor": 2.0, "partial_rotary_factor": 0.17}},
        "at least 4 rotated features",
    ),
    "a rotary embedding wider than a head": (
        "stablelm",
        {"head_dim": 2},
        "head_dim is 2, but heads are 16 features wide",
    ),
}


@pytest.fixture(scope="module")
def family_directory(tmp_path_factory: pytest.TempPathFactory):
    """A copy of a row's directory with settings changed, in `rope_parameters` where they stand there."""
    home = tmp_path_factory.mktemp("rows")

    def make(row: str, changes: Row, to: Path) -> Path:
        if not (home / row).exists():
            fuzzing.family_directory(home / row, row)
        config = json.loads((home / row / "config.json").read_text())
        for key, value in changes.items():
            ropes = config.get("rope_parameters", {})
            (ropes if key in ropes or key.startswith(("rope_t", "partial")) else config)[key] = value
        case = fuzzing.Case("", "", home / row, "config.json", json.dumps(config).encode(), "dense")
        to.mkdir()
        return case.lay_out(to)

    return make


@pytest.mark.parametrize("case", FOUND.values(), ids=FOUND)
def test_a_setting_that_reached_the_arithmetic_is_refused(case, family_directory, tmp_path: Path) -> None:
    row, changes, says = case
    engine.load_model(family_directory(row, {}, tmp_path / "good"))
    with pytest.raises(DamagedFile, match=says):
        engine.load_model(family_directory(row, changes, tmp_path / "bad"))


def test_a_head_width_that_gpt_neox_does_not_have_is_the_part_that_is_turned(family_directory, tmp_path: Path) -> None:
    cfg = engine.load_model(family_directory("gpt_neox", {"head_dim": 4}, tmp_path / "m")).config
    assert (cfg.d_head, {rope.inv_freq for rope in cfg.ropes if rope is not None}) == (12, {(1.0,)})


@pytest.mark.parametrize("first_layer", [0, 2, 4])
def test_the_first_sliding_layer_may_be_any(first_layer: int, family_directory, tmp_path: Path) -> None:
    model = engine.load_model(family_directory("qwen2", {"max_window_layers": first_layer}, tmp_path / "m"))
    assert model.config.windows == (None,) * first_layer + (4,) * (4 - first_layer)


def spoiled_tokenizer(path: Path, part: str, key: str, value: object) -> Path:
    directory = tiny_files.hf_directory(path / "m")
    fuzzing.rich_tokenizer(directory / "tokenizer.json")
    tree = json.loads((directory / "tokenizer.json").read_text())
    tree[part][key] = value
    (directory / "tokenizer.json").write_text(json.dumps(tree))
    return directory


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [("post_processor", "special_tokens", {}), ("model", "continuing_subword_prefix", "x" * 100)],
)
def test_a_tokenizer_that_makes_its_library_panic_is_refused(part, key, value, tmp_path: Path, capfd) -> None:
    with pytest.raises(DamagedFile, match="the tokenizer cannot be used"):
        engine.load_model(spoiled_tokenizer(tmp_path, part, key, value))
    assert "panicked" in capfd.readouterr().err, "the library no longer panics here: choose another case"


def test_a_tokenizer_that_fails_on_the_first_text_with_a_number_is_refused(tmp_path: Path) -> None:
    directory = tiny_files.hf_directory(tmp_path / "m")
    tree = json.loads((directory / "tokenizer.json").read_text())
    tree["model"] = {"type": "WordLevel", "vocab": {"<|start|>": 0, "<|end|>": 1, "a": 2}, "unk_token": "gone"}
    (directory / "tokenizer.json").write_text(json.dumps(tree))
    with pytest.raises(DamagedFile, match="the tokenizer cannot be used"):
        engine.load_model(directory)


def test_interrupting_a_load_is_no_damaged_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine.load.tokenizer_files, "from_directory", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.load_model(tiny_files.hf_directory(tmp_path / "m"))


@pytest.mark.parametrize("weights", ["dense", "scoped"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused_by_name(value: float, weights: str, tmp_path: Path) -> None:
    for name in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"):
        tensors = tiny_files.weights()
        tensors[name].reshape(-1)[-1] = value
        for path in (
            tiny_files.hf_directory(tmp_path / name / "m", tensors),
            tiny_files.gguf_file(tmp_path / f"{name}.gguf", tensors, kinds={}),
        ):
            with pytest.raises(DamagedFile, match=f"the tensor {name} holds NaN or infinity"):
                engine.load_model(path, weights=weights)


# --- code -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("value", [{"AutoModelForCausalLM": "modeling.Model"}, "modeling.Model", ["x"], 1])
def test_a_model_that_needs_code_of_its_own_is_refused_and_the_code_is_not_run(
    name: str, value: object, tmp_path: Path
) -> None:
    path = tiny_files.hf_directory(tmp_path / "m")
    touched = tmp_path / "touched"
    for module in ("modeling.py", "tokenization.py", "__init__.py"):
        (path / module).write_text(f"open({str(touched)!r}, 'w')")
    engine.load_model(path)
    settings = json.loads((path / name).read_text()) if name == "config.json" else {}
    (path / name).write_text(json.dumps(settings | {"auto_map": value}))
    with pytest.raises(EngineError, match=rf"auto_map in {name}\); code in models is never run"):
        engine.load_model(path)
    assert not touched.exists()


def test_a_tokenizer_class_by_name_is_no_code(tmp_path: Path) -> None:
    path = tiny_files.hf_directory(tmp_path / "m")
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "SomebodysTokenizer", "auto_map": None}))
    assert engine.load_model(path).encode("the") == [tiny_files.VOCABULARY["the"]]
