"""Which files of a directory are read, under which names: those that transformers reads (tests/oracle/layouts.py)."""

import json
from collections.abc import Callable
from pathlib import Path

import families
import numpy as np
import pytest
import tiny_files
from safetensors.numpy import load_file, save_file

from engine import Model, forward, load_model
from engine.errors import DamagedFile, EngineError, UnknownModel

IDS = [70, 3, 99, 5, 180]
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def logits(model: Model) -> np.ndarray:
    return forward(model, IDS, logits_at="all").logits


@pytest.fixture
def own(tmp_path: Path) -> np.ndarray:
    """The logits of the model's own weights."""
    return logits(load_model(tiny_files.hf_directory(tmp_path / "own")))


def other(path: Path) -> Path:
    """Write another model's weights."""
    save_file(tiny_files.weights(seed=1), path)
    return path


def edit_config(path: Path, **entries: object) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | entries))


def rename_shards(path: Path, stem: str) -> None:
    """The shards and the index of another name."""
    for file in [*path.glob("model*safetensors*")]:
        file.rename(path / file.name.replace("model", stem, 1))
    index = path / f"{stem}.safetensors.index.json"
    index.write_text(index.read_text().replace("model-", f"{stem}-"))


def index_gone_shards(path: Path) -> None:
    gone = tiny_files.hf_directory(path.with_name("gone"), tiny_files.weights(seed=1), shards=2)
    (gone / INDEX).rename(path / INDEX)


def name_a_file(path: Path) -> None:
    (path / SINGLE).rename(path / "mine.safetensors")
    other(path / SINGLE)
    edit_config(path, transformers_weights="mine.safetensors")


def name_an_index(path: Path) -> None:
    rename_shards(path, "mine")
    other(path / SINGLE)
    edit_config(path, transformers_weights="mine.safetensors.index.json")


LAYOUTS: dict[str, tuple[int, Callable[[Path], object], list[str]]] = {
    "alone": (1, lambda path: None, []),
    "beside others": (
        1,
        lambda path: [other(path / f"{name}.safetensors") for name in ("consolidated", "adapter_model", "model.fp16")],
        ["adapter_model.safetensors", "consolidated.safetensors", "model.fp16.safetensors"],
    ),
    "beside what is no safetensors file": (
        1,
        lambda path: [(path / f"{name}.safetensors").write_bytes(b"\xff") for name in ("consolidated", "optimizer")],
        ["consolidated.safetensors", "optimizer.safetensors"],
    ),
    "beside pickles and GGUF": (
        1,
        lambda path: [(path / name).write_bytes(b"") for name in ("pytorch_model.bin", "a.pt", "b.gguf")],
        ["a.pt", "b.gguf", "pytorch_model.bin"],
    ),
    "beside the shards of another": (1, lambda path: other(path / "model-00001-of-00001.safetensors"),
                                     ["model-00001-of-00001.safetensors"]),
    "beside an index whose shards are gone": (1, index_gone_shards, []),
    "shards": (3, lambda path: None, []),
    "shards beside others": (2, lambda path: other(path / "optimizer.safetensors"), ["optimizer.safetensors"]),
    "shards without their index": (3, lambda path: (path / INDEX).unlink(), []),
    "a file that config.json names": (1, name_a_file, [SINGLE]),
    "an index that config.json names": (2, name_an_index, [SINGLE]),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_models_own_weights_are_read_and_the_others_named(layout, own, tmp_path):
    shards, lay, left = LAYOUTS[layout]
    path = tiny_files.hf_directory(tmp_path / "model", shards=shards)
    lay(path)
    model = load_model(path)
    np.testing.assert_array_equal(logits(model), own)
    assert model.left_aside == tuple(left)


def test_a_single_file_comes_before_shards_and_their_index(tmp_path, own):
    path = tiny_files.hf_directory(tmp_path / "model", tiny_files.weights(seed=1), shards=2)
    save_file(tiny_files.weights(), path / SINGLE)
    model = load_model(path)
    np.testing.assert_array_equal(logits(model), own)
    assert model.left_aside == ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def test_a_mapped_model_names_what_was_left_aside_too(tmp_path, monkeypatch):
    monkeypatch.setattr("engine.load.LEAST", 0)
    monkeypatch.setattr("engine.converted.directory", lambda: tmp_path / "converted")
    path = tiny_files.hf_directory(tmp_path / "model")
    other(path / "consolidated.safetensors")
    made, used = load_model(path), load_model(path)
    assert (made.conversion, used.conversion) == ("made", "used")
    assert made.left_aside == used.left_aside == ("consolidated.safetensors",)


REFUSED: dict[str, tuple[int, Callable[[Path], object], type[EngineError], str]] = {
    "a variant alone": (
        1,
        lambda path: (path / SINGLE).rename(path / "model.fp16.safetensors"),
        UnknownModel,
        r"neither model\.safetensors nor model\.safetensors\.index\.json, only \['model\.fp16\.safetensors'\]; if one",
    ),
    "two sets of shards without an index": (
        2,
        lambda path: [(path / INDEX).unlink(), other(path / "model-00001-of-00003.safetensors")],
        DamagedFile,
        r"shards of several sets and no model\.safetensors\.index\.json",
    ),
    "a set without one of its shards and without an index": (
        3,
        lambda path: [(path / INDEX).unlink(), (path / "model-00003-of-00003.safetensors").unlink()],
        DamagedFile,
        r"\['model-00003-of-00003\.safetensors'\] are not in .*download the missing shards",
    ),
    "an absurd number of shards": (
        1,
        lambda path: (path / SINGLE).rename(path / "model-1-of-999999999.safetensors"),
        DamagedFile,
        "download",
    ),
    "an adapter": (
        1,
        lambda path: (path / "config.json").rename(path / "adapter_config.json"),
        UnknownModel,
        r"no config\.json; it holds an adapter: merge it into its model",
    ),
    **{
        f"weights named {name!r}": (
            1,
            lambda path, name=name: edit_config(path, transformers_weights=name),
            DamagedFile,
            "named as weights; these must be .safetensors files of the directory",
        )
        for name in ("../model.safetensors", "/etc/passwd", "pytorch_model.bin", 3, ["model.safetensors"])
    },
    "an index that names a place elsewhere": (
        2,
        lambda path: (path / INDEX).write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}})),
        DamagedFile,
        "these must be .safetensors files of the directory",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_transformers_would_not_read_is_refused_with_what_to_do(case, tmp_path):
    shards, lay, error, says = REFUSED[case]
    path = tiny_files.hf_directory(tmp_path / "model", shards=shards)
    lay(path)
    with pytest.raises(error, match=says):
        load_model(path)


# --- names --------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["llama", "llama-tied", "gpt2", "gpt_neo", "gpt_neox", "gemma3"])
def row(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def directory(path: Path, row: str, rename: Callable[[str], str] = str) -> Path:
    """The tiny model of a row, its tensors renamed."""
    asked: dict[str, np.ndarray] = {}

    class Kept(families.Seeded):
        def get(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
            asked[rename(name)] = made = super().get(name, shape)
            return made

    model = families.tiny(row, Kept(row))
    for i in range(model.config.n_layers):
        model.params.layer(i)
    tiny_files.hf_directory(path, asked)
    (path / "config.json").write_text(json.dumps(families.ROWS[row]))
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return path


PREFIXES = {"gpt2": "transformer.", "gpt_neo": "transformer.", "gpt_neox": "gpt_neox."}


@pytest.mark.parametrize("rename", ["bare", "too many", "mixed"])
def test_names_with_and_without_the_base_models_prefix_are_the_same_tensors(row, rename, tmp_path):
    prefix = PREFIXES.get(row, "model.")
    how = {
        "bare": lambda name: name.removeprefix(prefix),
        "too many": lambda name: prefix + name,
        "mixed": lambda name: name.removeprefix(prefix) if ".1." in name else name,
    }[rename]
    plain = load_model(directory(tmp_path / "plain", row))
    renamed = load_model(directory(tmp_path / "renamed", row, how))
    assert set(load_file(tmp_path / "plain" / SINGLE)) != set(load_file(tmp_path / "renamed" / SINGLE))
    np.testing.assert_array_equal(logits(renamed), logits(plain))


def test_a_prefix_of_another_family_is_no_prefix(tmp_path):
    path = directory(tmp_path / "model", "gpt2", lambda name: name.replace("transformer.", "model."))
    with pytest.raises(DamagedFile, match=r"no tensor 'transformer\.h\.0\.attn\.c_attn\.weight'|'transformer\.wte"):
        load_model(path)


def test_a_tensor_under_both_names_is_refused(tmp_path):
    tensors = tiny_files.weights()
    twice = tensors | {"norm.weight": tensors["model.norm.weight"]}
    path = tiny_files.hf_directory(tmp_path / "model", twice)
    with pytest.raises(DamagedFile, match=r"hold 'model\.norm\.weight' twice, one of them as 'norm\.weight'"):
        load_model(path)


def test_an_official_gpt2_file_with_its_masks_is_read(tmp_path):
    """Bare names and the causal masks that the first checkpoints saved as buffers."""
    path = directory(tmp_path / "model", "gpt2", lambda name: name.removeprefix("transformer."))
    tensors = load_file(path / SINGLE)
    masks = {f"h.{i}.attn.bias": np.tri(128, dtype=np.float32)[None, None] for i in range(4)}
    save_file(tensors | masks, path / SINGLE)
    np.testing.assert_array_equal(logits(load_model(path)), logits(load_model(directory(tmp_path / "plain", "gpt2"))))
