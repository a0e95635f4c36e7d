"""Weights converted once: the next load maps what the first one made of the files, and never anything else."""

import ast
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import gguf_rows
import numpy as np
import pytest
import tiny_files
from filelock import FileLock
from safetensors.numpy import load_file
from tiny_files import spoil
from tolerances import assert_same

import engine
from engine import Model, converted, forward, load_model, vouched
from engine.errors import DamagedFile, InputError

IDS = [70, 3, 99, 5, 5, 180, 12]
WORDS = "the thé 12"


@pytest.fixture(autouse=True)
def shelf(tmp_path, monkeypatch) -> Path:
    """A cache directory of this test's own, where models of any size are kept."""
    monkeypatch.setattr("engine.load.LEAST", 0)
    monkeypatch.setattr(converted, "directory", lambda: tmp_path / "converted")
    return tmp_path / "converted"


@pytest.fixture
def source(tmp_path) -> Path:
    return tiny_files.hf_directory(tmp_path / "tiny")


def logits(model: Model) -> np.ndarray:
    return forward(model, IDS, logits_at="all").logits[0]


def arrays(model: Model) -> dict[str, np.ndarray]:
    return dict(converted._named(model.params, model.config.n_layers))


def only_file() -> Path:
    (file,) = converted.held()
    return file


def assert_same_model(a: Model, b: Model) -> None:
    assert (a.config, a.fingerprint, a.name, a.weights) == (b.config, b.fingerprint, b.name, b.weights)
    assert arrays(a).keys() == arrays(b).keys()
    for name, array in arrays(a).items():
        assert_same(array, arrays(b)[name])
    assert (a.params.unembed is a.params.embed) == (b.params.unembed is b.params.embed)
    assert_same(logits(a), logits(b))


def gguf_file(row: str, at: Path) -> Path:
    return gguf_rows.write(row, at / "tiny.gguf")


@pytest.mark.parametrize("row", gguf_rows.ROWS)
@pytest.mark.parametrize("write", [gguf_file, lambda row, at: gguf_rows.directory(row, at / "hf")], ids=["gguf", "hf"])
def test_the_second_load_is_the_first_to_the_last_bit(row, write, tmp_path):
    path = write(row, tmp_path)
    first, second = load_model(path), load_model(path)
    assert (first.conversion, second.conversion) == ("made", "used")
    assert_same_model(second, first)
    assert (second.tokenizer.bos, second.tokenizer.eos) == (first.tokenizer.bos, first.tokenizer.eos)
    assert second.tokenizer.vocabulary == first.tokenizer.vocabulary
    assert second.encode(WORDS) == first.encode(WORDS)
    assert second.tokenizer.decode(IDS) == first.tokenizer.decode(IDS)


def test_a_mapped_model_reads_its_files_only_for_words_and_refuses_others_then(tmp_path):
    path = gguf_file("llama", tmp_path)
    ids = load_model(path).encode(WORDS)
    before, read = load_model(path), load_model(path)
    assert read.encode(WORDS) == ids
    path.write_bytes(path.read_bytes() + b"\0")
    logits(before)
    with pytest.raises(DamagedFile, match="has changed since it was loaded"):
        before.encode(WORDS)
    assert read.encode(WORDS) == ids, "what was read stays"


def test_a_mapped_model_counts_all_its_weights_and_asks_for_their_room(source):
    whole, asked = load_model(source).params.nbytes, []
    mapped = load_model(source, room=asked.append)
    assert (mapped.conversion, asked, mapped.params.nbytes) == ("used", [whole], whole)


def test_a_conversion_that_another_process_replaces_meanwhile_is_not_mixed_with_its_own(source, monkeypatch):
    expected = arrays(load_model(source))
    other = only_file().with_suffix(".other")
    other.write_bytes(bytes(only_file().stat().st_size))

    def and_then(*given):
        found = read_head(*given)
        other.replace(only_file())
        return found

    read_head = converted._read_head
    monkeypatch.setattr(converted, "_read_head", and_then)
    found = converted.find(source)
    assert not other.exists()
    assert all((found.arrays[name] == array).all() for name, array in expected.items())


def test_mapped_weights_cannot_be_written(source):
    load_model(source)
    weight = load_model(source).params.layer(0).q.weight
    with pytest.raises(ValueError, match="read-only"):
        weight[0, 0] = 1


def test_matrices_that_are_one_product_are_one_array_of_the_file(source):
    load_model(source)
    layer = load_model(source).params.layer(1)
    read = load_file(only_file())
    for name, joined in (("qkv", layer.qkv), ("gate_up", layer.gate_up)):
        assert_same(joined.weight, read[f"1.{name}"])
        assert joined.weight.flags.c_contiguous
        assert not joined.weight.flags.owndata, "mapped, not copied"


def test_arrays_begin_at_cache_lines_and_another_reader_reads_the_file(source):
    first = load_model(source)
    second = load_model(source)
    first_weight = second.params.embed
    assert first_weight.ctypes.data % converted.ALIGNMENT == 0
    read = load_file(only_file())
    assert {name: array.tolist() for name, array in read.items()} == {n: a.tolist() for n, a in arrays(first).items()}


def test_another_model_at_the_same_path_is_converted_again(source, tmp_path):
    old = load_model(source)
    new = tiny_files.hf_directory(tmp_path / "new", tiny_files.weights(seed=1))
    (new / "model.safetensors").replace(source / "model.safetensors")
    changed = load_model(source)
    assert changed.conversion == "made"
    assert changed.fingerprint != old.fingerprint
    assert_same_model(load_model(source), changed)
    assert len(converted.held()) == 1, "the stale one is replaced"


@pytest.mark.parametrize("change", ["config.json", "tokenizer.json"])
def test_a_change_of_config_or_tokenizer_counts(change, source):
    load_model(source)
    text = json.loads((source / change).read_text())
    (source / change).write_text(json.dumps(text, indent=1))
    assert [load_model(source).conversion for _ in range(2)] == ["made", "used"]


def test_files_swapped_for_others_of_one_size_and_time_are_noticed(source, tmp_path):
    load_model(source)
    weights = source / "model.safetensors"
    was = weights.stat()
    other = tiny_files.hf_directory(tmp_path / "new", tiny_files.weights(seed=1)) / "model.safetensors"
    weights.write_bytes(other.read_bytes())
    os.utime(weights, ns=(was.st_atime_ns, was.st_mtime_ns))
    assert (weights.stat().st_size, weights.stat().st_mtime_ns) == (was.st_size, was.st_mtime_ns)
    assert load_model(source).conversion == "made"


DAMAGE = {
    "cut short": lambda file: file.write_bytes(file.read_bytes()[:-4]),
    "longer": lambda file: file.write_bytes(file.read_bytes() + bytes(4)),
    "empty": lambda file: file.write_bytes(b""),
    "something else": lambda file: file.write_bytes(b"\xff" * 4096),
    "its length field": lambda file: spoil(file, 0),
    "an offset": lambda file: spoil(file, file.read_bytes().index(b"data_offsets") + 16),
    "a note": lambda file: spoil(file, file.read_bytes().index(b"hidden_size") + 16),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_conversion_is_made_again(what, source):
    first = load_model(source)
    DAMAGE[what](only_file())
    again = load_model(source)
    assert again.conversion == "made"
    assert_same_model(load_model(source), first)


def test_what_is_damaged_is_told_by_name(source):
    load_model(source)
    file = only_file()
    assert converted.damage(file, thorough=True) is None
    spoil(file, -2)
    assert converted.damage(file, thorough=False) is None
    assert converted.damage(file, thorough=True) == "the numbers of ['1.mlp_norm'] are not those that were written"
    spoil(file, 3)
    assert converted.damage(file, thorough=False) == "its header is damaged, or its length"


def offset_of(name: str, file: Path) -> int:
    """Of the first byte of an array."""
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    return start + json.loads(content[8:start])[name]["data_offsets"][0]


PARTS = ("qkv", "o", "gate_up", "down", "attn_norm", "mlp_norm")
NAMES = ["embed", "final_norm", *(f"{i}.{part}" for i in (0, 1) for part in PARTS)]


@pytest.mark.parametrize("name", NAMES)
def test_damaged_numbers_give_no_result_and_are_made_again(name, source):
    first = load_model(source)
    assert {*arrays(first)} == {*NAMES}
    spoil(only_file(), offset_of(name, only_file()) + 5)
    damaged = load_model(source)
    assert damaged.conversion == "used", "the start did not read them"
    with pytest.raises(DamagedFile, match=r"the converted weights .* not those that were written; they were deleted"):
        logits(damaged)
    assert converted.held() == []
    with pytest.raises(DamagedFile, match="not those that were written"):
        logits(damaged)
    assert [load_model(source).conversion for _ in range(2)] == ["made", "used"]
    assert_same_model(load_model(source), first)


def test_pages_of_zeros_are_noticed_before_a_lens_reads_them(source):
    load_model(source)
    file = only_file()
    content = bytearray(file.read_bytes())
    start = offset_of("embed", file)
    content[start : start + 4096] = bytes(4096)
    file.write_bytes(content)
    with pytest.raises(DamagedFile, match="not those that were written"):
        load_model(source).embedding_for(3)


def test_a_load_that_reads_all_weights_makes_damaged_ones_again_and_warns(source):
    first = load_model(source, weights="bf16")
    spoil(only_file(), -2)
    with pytest.warns(UserWarning, match="the converted weights .* are not those that were written"):
        again = load_model(source, weights="bf16")
    assert (first.conversion, again.conversion) == ("made", "made")
    assert_same(logits(again), logits(first))
    assert load_model(source).conversion == "used"


def test_every_piece_is_looked_at_ahead_and_only_once(source, monkeypatch):
    load_model(source)
    seen, digest, ahead = [], vouched._digest, vouched.Vouched.look_ahead

    def counted(piece):
        seen.append(piece.ctypes.data)
        return digest(piece)

    monkeypatch.setattr(vouched, "_digest", counted)
    monkeypatch.setattr(vouched.Vouched, "look_ahead", lambda self: ahead(self).join())
    model = load_model(source)
    assert len(seen) == len(set(seen)) == len(NAMES), "nobody used them"
    logits(model)
    assert len(seen) == len(NAMES)


def test_who_uses_weights_does_not_wait_for_the_look_ahead(source, monkeypatch):
    expected = logits(load_model(source))
    monkeypatch.setattr(vouched.Vouched, "look_ahead", lambda self: None)
    assert_same(logits(load_model(source)), expected)
    spoil(only_file(), -2)
    with pytest.raises(DamagedFile, match="not those that were written"):
        logits(load_model(source))


@pytest.mark.parametrize("times", ["those of the write", "set back"])
def test_numbers_that_are_written_over_while_they_are_mapped_give_no_result(source, times):
    load_model(source)
    os.utime(only_file(), ns=(0, 0))
    mapped = load_model(source)
    logits(mapped)
    spoil(only_file(), -2)
    if times == "set back":
        os.utime(only_file(), ns=(0, 0))
    with pytest.raises(DamagedFile, match="not those that were written"):
        logits(mapped)
    assert load_model(source).conversion == "made"


def test_a_conversion_whose_mode_or_links_change_stays_in_use(source):
    load_model(source)
    mapped = load_model(source)
    expected = logits(mapped)
    only_file().chmod(0o600)
    os.link(only_file(), only_file().with_suffix(".backup"))
    assert_same(logits(mapped), expected)


def test_a_conversion_that_is_replaced_or_deleted_while_it_is_mapped_stays_what_it_was(source):
    load_model(source)
    mapped = load_model(source)
    expected = logits(mapped)
    other = only_file().with_suffix(".other")
    other.write_bytes(bytes(only_file().stat().st_size))
    other.replace(only_file())
    assert_same(logits(mapped), expected)
    only_file().unlink()
    assert_same(logits(mapped), expected)


def without_digests(file: Path) -> None:
    """As conversions were before there were digests of their arrays: one of all numbers."""
    with file.open("rb") as opened:
        head, table, start = converted._read_head(opened)
    numbers = file.read_bytes()[start:]
    head["contents"] = hashlib.sha256(numbers).hexdigest()
    del head["digests"]
    text = json.dumps(head)
    metadata = {"format": "np", "mechscope": text, "digest": converted._head_digest(text, table)}
    raw = json.dumps({"__metadata__": metadata} | table).encode()
    file.write_bytes(len(raw).to_bytes(8, "little") + raw + numbers)


def test_a_conversion_without_digests_is_made_again(source):
    first = load_model(source)
    without_digests(only_file())
    assert not converted.outdated(only_file())
    with only_file().open("rb") as opened:
        head = converted._read_head(opened)[0]
    assert "digests" not in head
    assert [load_model(source).conversion for _ in range(2)] == ["made", "used"]
    assert_same_model(load_model(source), first)


CHANGES = {
    "one bit": lambda x: x.__setitem__(0, x[0] ^ 1),
    "two bits that cancel in a row": lambda x: (x.__setitem__(8, x[8] ^ 1), x.__setitem__(16, x[16] ^ 1)),
    "a page of zeros": lambda x: x[4096:8192].fill(0),
    "two rows exchanged": lambda x: x.__setitem__(slice(0, 8192), np.roll(x[:8192], 4096)),
    "words of a row exchanged": lambda x: x.__setitem__(slice(0, 16), np.roll(x[:16], 8)),
    "the last byte": lambda x: x.__setitem__(-1, x[-1] ^ 1),
    "a bit of the second piece": lambda x: x.__setitem__(vouched.PIECE, x[vouched.PIECE] ^ 128),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_digest_changes_with(change):
    rng = np.random.default_rng(0)
    numbers = rng.standard_normal(vouched.PIECE // 4 + 5003).astype(np.float32)
    numbers[[2, 4]] = 1, 2  # their lowest bits: one set, one not, once below
    numbers.view(np.uint8)[[8, 16]] = 2, 3
    before = vouched.digests({"x": numbers})
    CHANGES[change](numbers.view(np.uint8))
    assert vouched.digests({"x": numbers}) != before


def test_digests_are_of_the_numbers_wherever_they_lie():
    whole = np.arange(5000, dtype=np.float32)
    apart = np.zeros(5001, np.float32)
    apart[1:] = whole
    assert vouched.digests({"x": whole}) == vouched.digests({"x": apart[1:]})


def test_other_code_makes_its_own_conversion(source, monkeypatch):
    load_model(source)
    assert converted._code() == converted._code.__wrapped__(), "a digest of files, not of the process"
    monkeypatch.setattr(converted, "_LOADERS", ("ops.py",))
    converted._code.cache_clear()
    try:
        assert load_model(source).conversion == "made"
    finally:
        converted._code.cache_clear()


def test_a_change_in_what_reads_models_is_a_change_of_code():
    loader = ast.parse(Path(engine.load.__file__).read_text("utf-8"))
    imports = [node for node in ast.walk(loader) if isinstance(node, ast.ImportFrom)]
    modules = {node.module.split(".")[1] for node in imports if str(node.module).startswith("engine.")}
    modules |= {alias.name for node in imports if node.module == "engine" for alias in node.names}
    numbers_do_not_come_of = {
        "catalog", "decoder", "errors", "fast", "heap", "model", "network", "planted", "progress", "synthetic"
    }  # fmt: skip
    digested = {pattern.split("/")[0].removesuffix(".py") for pattern in converted._LOADERS}
    assert modules - numbers_do_not_come_of <= digested


def test_files_that_change_while_they_are_read_are_not_kept(source, shelf):
    def tick(done, total, what):
        if done == 1:
            (source / "config.json").touch()

    assert load_model(source, tick=tick).conversion == "not kept: its files changed while they were read"
    assert converted.held() == []
    assert list(shelf.glob("*.partial")) == []


def test_a_conversion_that_another_process_is_making_is_left_to_it(source):
    load_model(source)
    file = only_file()
    file.unlink()
    with FileLock(file.with_suffix(".lock")):
        waiting = load_model(source)
    assert waiting.conversion == "not kept: another process is keeping it"
    logits(waiting)


def test_a_cache_that_cannot_be_written_stops_no_load(source, shelf):
    shelf.write_text("a file")
    model = load_model(source)
    assert model.conversion.startswith("not kept: the cache directory cannot be written")
    logits(model)


def test_a_full_disk_stops_no_load_and_leaves_nothing(source, shelf, monkeypatch):
    full = type("Usage", (), {"free": 1 << 20})
    monkeypatch.setattr("engine.converted.shutil.disk_usage", lambda place: full)
    assert "has no room for" in load_model(source).conversion
    assert converted.held() == []


def test_a_killed_process_leaves_no_conversion_and_its_remains_are_cleared(source, shelf):
    script = f"""
import os, sys
sys.path[:0] = {sys.path!r}
from engine import converted, load
load.LEAST = 0
converted.directory = lambda: __import__("pathlib").Path({str(shelf)!r})
os.fsync = lambda fd: os.kill(os.getpid(), 9)
load.load_model({str(source)!r})
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True)
    assert ran.returncode == -9, ran.stderr
    assert [file.suffix for file in shelf.iterdir() if file.suffix != ".lock"] == [".partial"]
    assert [load_model(source).conversion for _ in range(2)] == ["made", "used"]
    assert list(shelf.glob("*.partial")) == []


@pytest.mark.parametrize("how", [{"converted": False}, {"weights": "scoped"}])
def test_nothing_is_kept_or_used_where_it_is_not_wanted(how, source, shelf):
    assert load_model(source, **how).conversion == "none"
    assert not shelf.exists()
    load_model(source)
    assert load_model(source, **how).conversion == "none"


def test_small_models_are_not_kept(source, shelf, monkeypatch):
    monkeypatch.setattr("engine.load.LEAST", converted.LEAST)
    assert load_model(source).conversion == "none"
    assert not shelf.exists()


def test_arguments_are_checked_with_a_conversion_too(source):
    load_model(source)
    with pytest.raises(InputError, match="dense_layers"):
        load_model(source, dense_layers=1)


def test_a_load_can_be_stopped_while_it_maps(source):
    load_model(source)

    class Stopped(Exception): ...

    def stop(done, total, what):
        raise Stopped(what)

    with pytest.raises(Stopped, match="mapping the converted weights"):
        load_model(source, tick=stop)


@pytest.mark.real
def test_smollm2_is_mapped_to_the_last_bit(smollm2):
    assert load_model("smollm2-135m-instruct").conversion == "made"
    mapped = load_model("smollm2-135m-instruct")
    only_file().unlink()  # half a gigabyte; what is mapped stays
    assert mapped.conversion == "used"
    assert_same_model(mapped, smollm2)
    assert mapped.encode("The capital of France is") == smollm2.encode("The capital of France is")
    assert mapped.fingerprint == engine.catalog.CATALOGUE["smollm2-135m-instruct"].sha256
