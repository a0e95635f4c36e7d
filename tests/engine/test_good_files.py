"""What is loaded is what was written: safetensors in every dtype and layout, GGUF in every stored form and order."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_files
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from tiny_files import Weights

import engine
from engine.gguf_file import GgufFile

PARTS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
}


def loaded(model: engine.Model) -> Weights:
    """The model's weights under their Hugging Face names and in the shape of the files."""
    params = model.params
    found = {"model.embed_tokens.weight": params.embed, "model.norm.weight": params.final_norm.weight}
    if params.unembed is not params.embed:
        found["lm_head.weight"] = params.unembed
    for i in range(model.config.n_layers):
        for name, array in params.layer(i).arrays():
            found[f"model.layers.{i}.{PARTS[name]}.weight"] = array.T
    return found


def assert_equal(found: Weights, written: Weights) -> None:
    assert found.keys() == written.keys()
    for name, array in written.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def cut_to_bfloat16(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return (array.view("<u4") & 0xFFFF0000).view("<f4")


AS_STORED = {
    "F32": lambda array: array,
    "F16": lambda array: array.astype(np.float16).astype(np.float32),
    "BF16": cut_to_bfloat16,
}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", sorted(AS_STORED))
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kept", ["dense", "scoped"])
def test_safetensors_values_are_those_written(dtype: str, shards: int, tied: bool, kept: str, tmp_path: Path) -> None:
    tensors = tiny_files.weights(tied=tied)
    path = tiny_files.hf_directory(tmp_path / "Tiny", tensors, dtype, shards, tie_word_embeddings=tied)
    model = engine.load_model(path, weights=kept)
    assert_equal(loaded(model), {name: AS_STORED[dtype](array) for name, array in tensors.items()})
    assert (model.name, model.config.tied, model.weights) == ("tiny", tied, kept)


def test_shards_without_an_index_are_all_read(tmp_path: Path) -> None:
    path = tiny_files.hf_directory(tmp_path / "tiny", shards=2)
    (path / "model.safetensors.index.json").unlink()
    assert_equal(loaded(engine.load_model(path)), tiny_files.weights())


def test_files_that_the_index_does_not_name_are_left_alone(tmp_path: Path) -> None:
    path = tiny_files.hf_directory(tmp_path / "tiny", shards=2)
    (path / "consolidated.safetensors").write_bytes((path / "model-00001-of-00002.safetensors").read_bytes())
    assert_equal(loaded(engine.load_model(path)), tiny_files.weights())


def test_the_order_of_the_tensors_in_a_file_does_not_matter(tmp_path: Path) -> None:
    backwards = dict(reversed(tiny_files.weights().items()))
    for path in (
        tiny_files.hf_directory(tmp_path / "tiny", backwards),
        tiny_files.hf_directory(tmp_path / "bf16", {n: cut_to_bfloat16(a) for n, a in backwards.items()}, "BF16"),
        tiny_files.gguf_file(tmp_path / "tiny.gguf", backwards, kinds={}),
    ):
        found = loaded(engine.load_model(path))
        assert found.keys() == backwards.keys()
        for name, array in backwards.items():
            np.testing.assert_allclose(found[name], array, rtol=2**-7)


# --- GGUF -----------------------------------------------------------------------------------------------------


def from_q8_0(blocks: np.ndarray[Any, Any], shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Blocks of a float16 scale and 32 signed bytes."""
    rows = blocks.reshape(-1, 34)
    scale = rows[:, :2].copy().view(np.float16).astype(np.float32)
    return (scale * rows[:, 2:].view(np.int8)).reshape(shape)


def from_q4_1(blocks: np.ndarray[Any, Any], shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Blocks of a float16 scale, a float16 minimum and 32 nibbles: low ones are values 0-15, high ones 16-31."""
    rows = blocks.reshape(-1, 20)
    scale, least = rows[:, :4].copy().view(np.float16).astype(np.float32).T
    nibbles = np.concatenate([rows[:, 4:] & 15, rows[:, 4:] >> 4], axis=1)
    return (scale[:, None] * nibbles + least[:, None]).reshape(shape).astype(np.float32)


def as_stored_in_gguf(name: str, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    kind = tiny_files.KINDS.get(tiny_files.gguf_name(name).split(".")[-2], "F32")
    if kind in ("F32", "F16"):
        return AS_STORED[kind](array)
    decode = {"Q8_0": from_q8_0, "Q4_1": from_q4_1}[kind]
    return decode(quantize(array, GGMLQuantizationType[kind]), array.shape)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kept", ["dense", "scoped", "packed"])
def test_gguf_values_are_those_written_and_the_rotary_rows_are_back_in_place(
    tied: bool, kept: str, tmp_path: Path
) -> None:
    tensors = tiny_files.weights(tied=tied)
    model = engine.load_model(tiny_files.gguf_file(tmp_path / "Tiny.gguf", tensors), weights=kept)
    found = loaded(model)
    for name, array in tensors.items():
        np.testing.assert_allclose(found.pop(name), as_stored_in_gguf(name, array), rtol=1e-6, atol=1e-7, err_msg=name)
    assert not found
    assert (model.name, model.config.tied, model.weights) == ("tiny", tied, kept)


def test_quantised_values_are_near_the_originals(tmp_path: Path) -> None:
    found = loaded(engine.load_model(tiny_files.gguf_file(tmp_path / "tiny.gguf")))
    for name, array in tiny_files.weights().items():
        assert np.abs(found[name] - array).max() < 0.25, name


def test_a_gguf_file_and_a_directory_of_one_model_give_the_same_numbers(tmp_path: Path) -> None:
    ours = engine.load_model(tiny_files.gguf_file(tmp_path / "tiny.gguf", kinds={}))
    theirs = engine.load_model(tiny_files.hf_directory(tmp_path / "tiny"))
    ids = ours.encode("the and then <|end|>")
    assert ids == theirs.encode("the and then <|end|>")
    np.testing.assert_array_equal(ours.forward_with_capture(ids, [1])[1], theirs.forward_with_capture(ids, [1])[1])


def test_query_and_key_biases_in_a_gguf_are_put_back_in_place_too(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    biases = {"q": rng.standard_normal(32).astype(np.float32), "k": rng.standard_normal(16).astype(np.float32)}

    def change(_: GGUFWriter, tensors: Weights) -> None:
        tensors["blk.1.attn_q.bias"] = tiny_files.interleaved(biases["q"], 4)
        tensors["blk.1.attn_k.bias"] = tiny_files.interleaved(biases["k"], 2)

    layer = engine.load_model(tiny_files.gguf_file(tmp_path / "tiny.gguf", kinds={}, change=change)).params.layer(1)
    np.testing.assert_array_equal(layer.q.bias, biases["q"])
    np.testing.assert_array_equal(layer.k.bias, biases["k"])


def test_a_gguf_that_does_not_say_its_key_value_heads_has_one_per_head(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    keys = rng.standard_normal((32, 32)).astype(np.float32)

    def change(_: GGUFWriter, tensors: Weights) -> None:
        for i in range(2):
            tensors[f"blk.{i}.attn_k.weight"] = tiny_files.interleaved(keys, 4)
            tensors[f"blk.{i}.attn_v.weight"] = keys

    path = tiny_files.gguf_file(
        tmp_path / "tiny.gguf", kinds={}, change=change, leave_out=("llama.attention.head_count_kv",)
    )
    model = engine.load_model(path)
    assert model.config.n_kv_heads == model.config.n_heads == 4
    np.testing.assert_array_equal(model.params.layer(0).k.weight, keys.T)


@pytest.mark.parametrize("alignment", [8, 64, 4096])
def test_a_gguf_with_its_own_alignment_is_read(alignment: int, tmp_path: Path) -> None:
    path = tiny_files.gguf_file(tmp_path / "tiny.gguf", kinds={}, alignment=alignment)
    assert all(tensor.offset % alignment == 0 for tensor in GgufFile.open(path).tensors.values())
    assert_equal(loaded(engine.load_model(path)), tiny_files.weights())


def test_every_kind_of_gguf_metadata_is_read_back(tmp_path: Path) -> None:
    written: dict[str, Any] = {
        "x.text": "naïve ☃",
        "x.yes": True,
        "x.small": -3,
        "x.large": 2**63,
        "x.real": 0.1,
        "x.numbers": [1, -2, 3],
        "x.reals": [0.5, -0.25],
        "x.flags": [True, False],
        "x.texts": ["a", "", "naïve"],
    }

    def change(writer: GGUFWriter, _: Weights) -> None:
        writer.add_string("x.text", written["x.text"])
        writer.add_bool("x.yes", True)
        writer.add_int8("x.small", -3)
        writer.add_uint64("x.large", 2**63)
        writer.add_float64("x.real", 0.1)
        for key in ("x.numbers", "x.reals", "x.flags", "x.texts"):
            writer.add_array(key, written[key])

    path = tiny_files.gguf_file(tmp_path / "tiny.gguf", change=change)
    metadata = GgufFile.open(path).metadata
    assert {key: metadata.get(key) for key in written} == written


def test_a_bos_token_is_put_in_front_where_the_gguf_asks_for_it(tmp_path: Path) -> None:
    leave_out = ("tokenizer.ggml.add_bos_token",)
    path = tiny_files.gguf_file(
        tmp_path / "tiny.gguf", leave_out=leave_out, change=lambda writer, _: writer.add_add_bos_token(True)
    )
    tokenizer = engine.load_model(path).tokenizer
    the = tiny_files.VOCABULARY["the"]
    assert tokenizer.encode("the<|end|>") == [0, the, 1]
    assert tokenizer.eos == (1,)


def test_the_fingerprint_follows_the_weights_and_nothing_else(tmp_path: Path) -> None:
    one = engine.load_model(tiny_files.hf_directory(tmp_path / "one"))
    same = engine.load_model(tiny_files.hf_directory(tmp_path / "same", max_position_embeddings=64), weights="scoped")
    other = engine.load_model(tiny_files.hf_directory(tmp_path / "other", tiny_files.weights(seed=1)))
    assert one.fingerprint == same.fingerprint != other.fingerprint
