"""Damaged model files: every one is refused with an `EngineError`, in bounded memory and time, and the next load works.

The damaged files are loaded in child processes (load_damaged.py: 2 GB of address space, 10 seconds per case, then the
good model again). Good loading, value by value, is in test_good_files.py.
"""

import json
import os
import random
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_files
from gguf import GGUFWriter

import engine
from engine.gguf_file import GgufFile

CHILD = Path(__file__).with_name("load_damaged.py")
Case = dict[str, Any]


def run_cases(tmp_path: Path, model: Path, cases: list[Case]) -> None:
    """Fails unless every case does what it says."""
    (tmp_path / "scratch").mkdir()
    job = tmp_path / "job.json"
    job.write_text(json.dumps({"model": str(model), "scratch": str(tmp_path / "scratch"), "cases": cases}))
    ran = subprocess.run(
        [sys.executable, str(CHILD), str(job)],
        env=os.environ
        | {"OPENBLAS_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        | {"PYTHONPATH": str(Path(engine.__file__).parents[1])},  # this engine, not the one that is installed
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = ran.stdout.splitlines()
    wrong = [line for line in lines if line.startswith("WRONG")]
    assert not wrong, f"{len(wrong)} of {len(cases)} cases:\n" + "\n".join(wrong[:20])
    assert lines[-1:] == [f"done {len(cases)}"], f"ended with {ran.returncode} in {lines[-1:]}\n{ran.stderr[-2000:]}"


def cut(file: Path, offsets: Iterator[int] | range | list[int], may_load: str = "no") -> list[Case]:
    return [{"label": f"{file.name} cut at {n}", "file": file.name, "keep": n, "may_load": may_load} for n in offsets]


def put(file: Path, label: str, at: int, form: str, *values: int | float) -> Case:
    return {"label": label, "file": file.name, "at": at, "put": struct.pack(form, *values).hex(), "may_load": "no"}


def written(file: Path, label: str, text: str) -> Case:
    return {"label": label, "file": file.name, "text": text, "may_load": "no"}


def seeded(count: int, start: int, stop: int, seed: int = 0) -> list[int]:
    return sorted(random.Random(seed).sample(range(start, stop), count))


def flipped(file: Path, count: int, stop: int) -> list[Case]:
    """Any header byte may become any other: refused or, where it carries no structure, loaded. Never a crash."""
    rng = random.Random(1)
    return [
        {
            "label": f"{file.name} byte {at} = {value}",
            "file": file.name,
            "at": at,
            "put": f"{value:02x}",
            "may_load": "any",
        }
        for at, value in ((rng.randrange(stop), rng.randrange(256)) for _ in range(count))
    ]


def test_the_child_reports_damage_that_was_accepted_and_a_case_that_ends_it(gguf: Path, tmp_path: Path) -> None:
    accepted = put(gguf, "nothing changed", 0, "<4s", b"GGUF")
    with pytest.raises(AssertionError, match="WRONG nothing changed: was loaded"):
        run_cases(tmp_path, gguf, [accepted])
    (tmp_path / "again").mkdir()
    with pytest.raises(AssertionError, match=r"ended with 1 in \['case impossible'\]"):
        run_cases(tmp_path / "again", gguf, [accepted | {"label": "impossible", "file": "no such file"}])


# --- GGUF -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_files.gguf_file(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="module")
def data_start(gguf: Path) -> int:
    return min(tensor.offset for tensor in GgufFile.open(gguf).tensors.values())


def test_a_gguf_cut_at_any_header_byte_is_refused(gguf: Path, data_start: int, tmp_path: Path) -> None:
    run_cases(tmp_path, gguf, cut(gguf, range(data_start)))


def test_a_gguf_cut_in_its_data_is_refused_or_was_only_padding(gguf: Path, data_start: int, tmp_path: Path) -> None:
    last = max(tensor.offset + tensor.nbytes for tensor in GgufFile.open(gguf).tensors.values())
    cases = cut(gguf, seeded(200, data_start, last)) + cut(gguf, [last - 1])
    run_cases(tmp_path, gguf, cases + cut(gguf, range(last, gguf.stat().st_size), "whole"))


def test_gguf_header_bytes_overwritten_at_random_never_crash_a_load(
    gguf: Path, data_start: int, tmp_path: Path
) -> None:
    run_cases(tmp_path, gguf, flipped(gguf, 1500, data_start))


def test_a_gguf_with_an_absurd_header_is_refused(gguf: Path, tmp_path: Path) -> None:
    most, much = 2**64 - 1, 2**40
    key = gguf.read_bytes().index(b"llama.block_count") + len("llama.block_count")
    row = gguf.read_bytes().index(b"token_embd.weight") + len("token_embd.weight")
    tokens = gguf.read_bytes().index(b"tokenizer.ggml.tokens") + len("tokenizer.ggml.tokens")
    types = gguf.read_bytes().index(b"tokenizer.ggml.token_type") + len("tokenizer.ggml.token_type")
    cases = [
        put(gguf, "magic", 0, "<4s", b"GGML"),
        put(gguf, "big-endian magic", 0, "<4s", b"FUGG"),
        put(gguf, "version 1", 4, "<I", 1),
        put(gguf, "version big-endian", 4, ">I", 3),
        put(gguf, "version 99", 4, "<I", 99),
        *(put(gguf, f"{n} tensors", 8, "<Q", n) for n in (most, much, 1000, 0)),
        *(put(gguf, f"{n} keys", 16, "<Q", n) for n in (most, much, 1000, 0)),
        *(put(gguf, f"a key of {n} bytes", 24, "<Q", n) for n in (most, much, 2**31)),
        *(put(gguf, f"value type {n}", key, "<I", n) for n in (13, 255, 2**32 - 1)),
        *(put(gguf, f"{n} layers", key, "<II", 4, n) for n in (0, 1, 3, 1000, 2**32 - 1)),
        *(put(gguf, f"{n} tokens", tokens, "<IIQ", 9, 8, n) for n in (most, much, 2**61, 2**62)),
        *(put(gguf, f"{n} token types", types, "<IIQ", 9, 5, n) for n in (most, much, 2**62)),
        put(gguf, "an array of arrays", tokens, "<II", 9, 9),
        put(gguf, "an array of unknown type", tokens, "<II", 9, 77),
        *(put(gguf, f"{n} dimensions", row, "<I", n) for n in (0, 5, 2**32 - 1)),
        *(put(gguf, f"rows {n}", row + 12, "<Q", n) for n in (0, 1, most, much, 2**62)),
        *(put(gguf, f"columns {n}", row + 4, "<Q", n) for n in (0, 1, 31, most, much)),
        *(put(gguf, f"quantisation {n}", row + 20, "<I", n) for n in (4, 99, 2**32 - 1)),
        *(put(gguf, f"data at {n}", row + 24, "<Q", n) for n in (1, 32, most, much, 2**63)),
    ]
    run_cases(tmp_path, gguf, cases)


def drop(name: str) -> Callable[[GGUFWriter, tiny_files.Weights], None]:
    def change(_: GGUFWriter, tensors: tiny_files.Weights) -> None:
        del tensors[name]

    return change


@pytest.mark.parametrize("name", sorted(tiny_files.gguf_tensors(tiny_files.weights())))
def test_a_gguf_without_one_of_its_tensors_names_it(name: str, tmp_path: Path) -> None:
    path = tiny_files.gguf_file(tmp_path / "tiny.gguf", change=drop(name))
    with pytest.raises(engine.EngineError, match=f"has no tensor '{name}'"):
        engine.load_model(path)


@pytest.mark.parametrize("name", sorted(tiny_files.gguf_tensors(tiny_files.weights())))
def test_a_gguf_tensor_of_another_shape_is_refused_with_both_shapes(name: str, tmp_path: Path) -> None:
    def change(_: GGUFWriter, tensors: tiny_files.Weights) -> None:
        tensors[name] = np.concatenate([tensors[name], tensors[name]])

    path = tiny_files.gguf_file(tmp_path / "tiny.gguf", kinds={}, change=change)
    with pytest.raises(engine.EngineError, match=rf"{name} has shape \(\d+.*\), but the config implies \(\d+.*\)"):
        engine.load_model(path)


@pytest.mark.parametrize(
    ("key", "add"),
    [
        ("rope.dimension_count", lambda w: w.add_uint32("llama.rope.dimension_count", 4)),
        ("attention.value_length", lambda w: w.add_uint32("llama.attention.value_length", 16)),
        ("expert_count", lambda w: w.add_uint32("llama.expert_count", 8)),
        ("rope.scaling.type", lambda w: w.add_string("llama.rope.scaling.type", "longrope")),
    ],
)
def test_a_gguf_setting_that_the_decoder_does_not_know_is_refused_not_ignored(
    key: str, add: Callable[[GGUFWriter], None], tmp_path: Path
) -> None:
    path = tiny_files.gguf_file(
        tmp_path / "tiny.gguf", leave_out=("llama.rope.dimension_count",), change=lambda writer, _: add(writer)
    )
    with pytest.raises(engine.EngineError, match=f"llama.{key} "):
        engine.load_model(path)


@pytest.mark.parametrize(
    ("key", "add", "says"),
    [
        ("tokenizer.ggml.pre", lambda w, k: w.add_string(k, "tekken"), "supported: 'llama', and 'gpt2' with"),
        ("tokenizer.ggml.pre", lambda w, k: w.add_array(k, ["smollm"]), "supported: 'llama', and 'gpt2' with"),
        ("tokenizer.ggml.pre", None, "supported: 'llama', and 'gpt2' with"),
        ("tokenizer.ggml.model", lambda w, k: w.add_string(k, "bert"), "supported: 'llama', and 'gpt2' with"),
        ("tokenizer.ggml.tokens", None, "tokenizer.ggml.tokens is missing"),
        ("tokenizer.ggml.tokens", lambda w, k: w.add_array(k, [1, 2]), "not a list of texts"),
        ("tokenizer.ggml.merges", None, "tokenizer.ggml.merges is missing"),
        ("tokenizer.ggml.merges", lambda w, k: w.add_array(k, ["t h", "nothing"]), "do not fit together"),
        ("tokenizer.ggml.merges", lambda w, k: w.add_array(k, ["t zzz"]), "do not fit together"),
        ("tokenizer.ggml.token_type", lambda w, k: w.add_uint32(k, 1), "a number for each token"),
        ("tokenizer.ggml.token_type", lambda w, k: w.add_array(k, [1, 1]), "a number for each token"),
        ("tokenizer.ggml.eos_token_id", lambda w, k: w.add_string(k, "end"), "must be an id or a list of ids"),
        ("tokenizer.ggml.add_bos_token", lambda w, k: w.add_string(k, "yes"), "must be true or false"),
        ("general.architecture", lambda w, k: w.add_string(k, "bert"), "architecture 'bert' is not supported"),
        ("general.architecture", lambda w, k: w.add_string(k, "b" * 10_000), "the supported ones are gemma2"),
        ("general.alignment", lambda w, k: w.add_uint32(k, 0), "not a power of two"),
        ("general.alignment", lambda w, k: w.add_string(k, "x" * 10_000), "not a power of two"),
        ("llama.attention.head_count", lambda w, k: w.add_string(k, "four"), "must be a whole number from 1"),
        ("llama.attention.head_count_kv", lambda w, k: w.add_array(k, [2, 2]), "must be a whole number from 1"),
        ("llama.attention.head_count_kv", lambda w, k: w.add_uint32(k, 3), "cannot share 3 key-value heads"),
        ("llama.embedding_length", None, "has no llama.embedding_length"),
        ("llama.rope.freq_base", lambda w, k: w.add_float32(k, 0.0), "must be a number from 1"),
        ("llama.rope.freq_base", lambda w, k: w.add_float32(k, float("nan")), "must be a number from 1"),
        ("llama.attention.layer_norm_rms_epsilon", lambda w, k: w.add_float32(k, float("inf")), "must be a number"),
    ],
)
def test_gguf_metadata_of_the_wrong_kind_is_refused_in_few_words(
    key: str, add: Callable[[GGUFWriter, str], None] | None, says: str, tmp_path: Path
) -> None:
    path = tiny_files.gguf_file(
        tmp_path / "tiny.gguf",
        leave_out=() if key == "general.alignment" else (key,),
        change=None if add is None else lambda writer, _: add(writer, key),
    )
    with pytest.raises(engine.EngineError, match=says) as refusal:
        engine.load_model(path)
    assert len(str(refusal.value)) < 300


def test_a_bos_token_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    def change(writer: GGUFWriter, _: tiny_files.Weights) -> None:
        writer.add_bool("tokenizer.ggml.add_bos_token", True)
        writer.add_uint32("tokenizer.ggml.bos_token_id", 9_999)

    leave_out = ("tokenizer.ggml.bos_token_id", "tokenizer.ggml.add_bos_token")
    path = tiny_files.gguf_file(tmp_path / "tiny.gguf", leave_out=leave_out, change=change)
    with pytest.raises(engine.EngineError, match="bos_token_id is 9999; it must be an id from 0 to"):
        engine.load_model(path)


def test_a_gguf_with_fewer_embeddings_than_tokens_is_refused(tmp_path: Path) -> None:
    def change(writer: GGUFWriter, tensors: tiny_files.Weights) -> None:
        writer.add_uint32("llama.vocab_size", 200)
        tensors["token_embd.weight"] = tensors["token_embd.weight"][:200]

    path = tiny_files.gguf_file(tmp_path / "tiny.gguf", leave_out=("llama.vocab_size",), change=change)
    with pytest.raises(engine.EngineError, match=r"the tokenizer has \d+ tokens, the model only 200 embeddings"):
        engine.load_model(path)


# --- Hugging Face directories ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_files.hf_directory(tmp_path_factory.mktemp("hf") / "tiny")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_files.hf_directory(tmp_path_factory.mktemp("sharded") / "tiny", shards=3)


def header_length(file: Path) -> int:
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


def test_a_safetensors_file_cut_at_any_header_byte_is_refused(directory: Path, tmp_path: Path) -> None:
    file = directory / "model.safetensors"
    run_cases(tmp_path, directory, cut(file, range(header_length(file))))


def test_a_safetensors_file_cut_in_its_data_is_refused(directory: Path, tmp_path: Path) -> None:
    file = directory / "model.safetensors"
    end = file.stat().st_size
    run_cases(tmp_path, directory, cut(file, [*seeded(200, header_length(file), end), end - 1]))


def test_a_cut_shard_is_refused(sharded: Path, tmp_path: Path) -> None:
    cases = [
        case
        for seed, file in enumerate(sorted(sharded.glob("*.safetensors")))
        for case in cut(file, seeded(60, 0, file.stat().st_size, seed))
    ]
    run_cases(tmp_path, sharded, cases)


def test_safetensors_header_bytes_overwritten_at_random_never_crash_a_load(directory: Path, tmp_path: Path) -> None:
    file = directory / "model.safetensors"
    run_cases(tmp_path, directory, flipped(file, 1000, header_length(file)))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_json_file_cut_at_any_byte_is_refused(name: str, directory: Path, tmp_path: Path) -> None:
    size = (directory / name).stat().st_size
    run_cases(tmp_path, directory, cut(directory / name, range(0, size, 1 if size < 1000 else 7)))


def test_an_index_cut_at_any_byte_is_refused(sharded: Path, tmp_path: Path) -> None:
    file = sharded / "model.safetensors.index.json"
    run_cases(tmp_path, sharded, cut(file, range(0, file.stat().st_size, 3)))


def test_tokenizer_json_bytes_overwritten_at_random_never_crash_a_load(directory: Path, tmp_path: Path) -> None:
    file = directory / "tokenizer.json"
    run_cases(tmp_path, directory, flipped(file, 500, file.stat().st_size))


def with_header(file: Path, **rows: dict[str, Any] | None) -> Case:
    """The file with rows of its header replaced or, for None, taken out; the data stay."""
    content = file.read_bytes()
    length = header_length(file)
    header = json.loads(content[8:length])
    for name, row in rows.items():
        header.pop(name, None)
        header |= {} if row is None else {name: row}
    text = json.dumps(header).encode()
    put = len(text).to_bytes(8, "little") + text + content[length:]
    label = f"{file.name} with {str(rows)[:100]}"
    return {"label": label, "file": file.name, "at": 0, "put": put.hex(), "may_load": "no"}


def test_a_safetensors_file_with_an_absurd_header_is_refused(directory: Path, tmp_path: Path) -> None:
    file = directory / "model.safetensors"
    norm = json.loads(file.read_bytes()[8 : header_length(file)])["model.norm.weight"]
    start, stop = norm["data_offsets"]
    rows: list[dict[str, Any]] = [
        norm | {"dtype": "F16"},
        norm | {"dtype": "I32"},
        norm | {"dtype": "F8_E4M3"},
        norm | {"dtype": "X" * 5_000},
        norm | {"shape": [33]},
        norm | {"shape": [2**63, 2]},
        norm | {"shape": [-32]},
        norm | {"shape": [0]},
        norm | {"shape": [2, 16]},
        norm | {"shape": [1] * 10_000 + [32]},
        norm | {"data_offsets": [0, stop - start]},
        norm | {"data_offsets": [start, 2**63]},
        norm | {"data_offsets": [stop, start]},
        norm | {"data_offsets": [start]},
        {"dtype": "F32"},
    ]
    lengths = [0, 1, file.stat().st_size, 2**31, 2**40, 2**63, 2**64 - 1]
    cases = [with_header(file, **{"model.norm.weight": row}) for row in rows]
    cases += [put(file, f"a header of {n} bytes", 0, "<Q", n) for n in lengths]
    cases += [put(file, "a zip", 0, "<4s", b"PK\3\4"), written(file, "empty", ""), written(file, "text", "hello" * 9)]
    run_cases(tmp_path, directory, cases)


@pytest.mark.parametrize("name", sorted(tiny_files.weights()))
def test_a_directory_without_one_of_its_tensors_names_it(name: str, tmp_path: Path) -> None:
    tensors = tiny_files.weights()
    del tensors[name]
    path = tiny_files.hf_directory(tmp_path / "tiny", tensors)
    with pytest.raises(engine.EngineError, match=f"no tensor '{name}'"):
        engine.load_model(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", 64),
        ("intermediate_size", 65),
        ("num_attention_heads", 8),
        ("num_key_value_heads", 4),
        ("num_key_value_heads", 3),
        ("head_dim", 16),
        ("head_dim", 7),
        ("vocab_size", 270),
        ("vocab_size", 100),
        ("num_hidden_layers", 1),
        ("num_hidden_layers", 3),
        ("tie_word_embeddings", False),
    ],
)
def test_a_config_that_disagrees_with_the_weights_is_refused(key: str, value: object, tmp_path: Path) -> None:
    path = tiny_files.hf_directory(tmp_path / "tiny", **{key: value})
    with pytest.raises(engine.EngineError, match=r"config|lm_head|the model only"):
        engine.load_model(path)


SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size", "head_dim")


def test_absurd_values_in_config_json_are_refused(directory: Path, tmp_path: Path) -> None:
    file = directory / "config.json"
    huge = 10**400
    bad: list[tuple[str, object]] = [
        *((key, value) for key in SIZES for value in (0, -1, 1.5, True, "4", [4], {}, 10**9, huge, "9" * 5_000)),
        *(("rope_theta", value) for value in (0, -1.0, 1e-320, float("nan"), float("inf"), huge, "big")),
        *(("rms_norm_eps", value) for value in (0, -1.0, float("nan"), huge, [1e-5])),
        *(("rope_scaling", value) for value in ({"rope_type": "yarn"}, {"rope_type": ["x"]}, [1], 7)),
        *(("model_type", value) for value in (None, "", "bert", "_gguf", "../llama", ["llama"], {}, "x" * 5_000)),
        *(("hidden_act", value) for value in ("nothing", ["silu"], 3)),
        *(("tie_word_embeddings", value) for value in ("yes", 1, [])),
        *(("eos_token_id", value) for value in ("end", [1, "end"], 1.5, {})),
        ("auto_map", {"AutoModel": "modeling.Model"}),
    ]
    cases = [
        written(file, f"{key} = {str(value)[:40]}", json.dumps(tiny_files.CONFIG | {key: value})) for key, value in bad
    ]
    whole_files = [
        "",
        "[]",
        "null",
        "7",
        "{",
        "[" * 100_000,
        '{"a":' * 100_000,
        "\ud7ff\x00",
        '{"vocab_size": ' + "9" * 9_000,
    ]
    run_cases(tmp_path, directory, cases + [written(file, f"config {text[:20]!r}", text) for text in whole_files])


def test_a_directory_with_only_pickles_is_refused_and_they_are_not_opened(directory: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((directory / name).read_bytes())
    touched = tmp_path / "touched"
    (tmp_path / "pytorch_model.bin").write_bytes(f"cos\nsystem\n(S'touch {touched}'\ntR.".encode())
    with pytest.raises(engine.EngineError, match=r"no \.safetensors file .*pytorch_model\.bin.*convert the weights"):
        engine.load_model(tmp_path)
    assert not touched.exists()


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_directory_without_one_of_its_files_names_it(missing: str, tmp_path: Path) -> None:
    path = tiny_files.hf_directory(tmp_path / "tiny")
    (path / missing).unlink()
    with pytest.raises(engine.EngineError, match=missing.removeprefix("model")):
        engine.load_model(path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    path = tiny_files.hf_directory(tmp_path / "tiny", shards=3)
    (path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(engine.EngineError, match=r"model-00002-of-00003\.safetensors.*download the missing shards"):
        engine.load_model(path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    path = tiny_files.hf_directory(tmp_path / "tiny", shards=2)
    first, second = sorted(path.glob("*.safetensors"))
    second.write_bytes(first.read_bytes())
    with pytest.raises(engine.EngineError, match="is in both"):
        engine.load_model(path)


def test_a_model_larger_than_memory_says_so_and_what_to_do(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(GgufFile, "dense", no_memory)
    with pytest.raises(engine.EngineError, match=r'load it with weights="packed" \(a .gguf file\) or "scoped"'):
        engine.load_model(gguf)


def test_a_file_that_may_not_be_read_is_an_engine_error(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(GgufFile, "open", forbidden)
    with pytest.raises(engine.EngineError, match=r"tiny\.gguf cannot be read: Permission denied"):
        engine.load_model(gguf)
