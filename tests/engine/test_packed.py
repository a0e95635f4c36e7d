"""`weights="packed"`: blocks of a GGUF file stay packed, stand for the same numbers, and give the same results."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import ggml_blocks
import gguf_rows
import numpy as np
import pytest
import tiny_files
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf_quants import READ, blocks_of, packed_projections, wide_model, write
from recording import everything
from tolerances import KERNEL, SAME, assert_close, assert_moved, assert_same, assert_same_weights

from engine import Model, fast, forward, generate, load_model, ops
from engine.errors import InputError, UnknownModel
from engine.gguf_blocks import KINDS
from engine.levels import GROUP
from engine.matrices import Array, Packed, Panels, columns, packed, panelled, rows_of, widened
from engine.params import Params, in_panels

with fast.using(True):
    kernels = fast.kernels()

IDS = [70, 3, 99, 5, 5, 180, 12]
FORMS = {"nibbles": (0, 15), "bytes": (-128, 127)}


def drawn(n: int, columns: int, form: str, group: int = 2 * GROUP) -> tuple[Array, Packed]:
    """A matrix whose numbers are levels of float16 scales and minima, dense and packed."""
    rng, groups = np.random.default_rng(n + columns), (n // group, columns)
    low, high = FORMS[form]
    levels = rng.integers(low, high, (n, columns), endpoint=True).astype(np.float32)
    scales, minima = (rng.standard_normal(groups).astype(np.float16).astype(np.float32) for _ in "sm")
    dense = levels * scales.repeat(group, 0) + minima.repeat(group, 0)
    made = packed(dense, scales.repeat(group // GROUP, 0), minima.repeat(group // GROUP, 0))
    assert made is not None
    assert (made.levels.dtype, made.group) == ({"nibbles": np.uint8, "bytes": np.int8}[form], group)
    return dense, made


# --- the same numbers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", READ)
def test_blocks_of_a_type_come_apart_exactly_or_the_matrix_stays_dense(kind: str, tmp_path: Path) -> None:
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    times = -(-256 // block)
    rows = blocks_of(kind, 19 * times).reshape(19, times * size)
    file = write(tmp_path / "one.gguf", {"w": (kind, rows), "v": (kind, rows[0])})
    dense = file.dense("w").T
    scales, minima = (part.T for part in file.steps("w"))
    assert [part.shape for part in file.steps("v")] == 2 * [(len(dense),)], "a vector has none"
    assert scales.shape == minima.shape == (len(dense) // GROUP, 19)
    made = packed(dense, scales, minima)
    assert (made is not None) == (kind in KINDS)
    if made is not None:
        assert_same(widened(made), dense)
        assert_same(widened(panelled(made, 16)), dense)
        assert made.nbytes <= 0.4 * dense.nbytes


@pytest.mark.parametrize("kind", ggml_blocks.BLOCKS)
def test_they_are_those_of_a_decoder_written_from_ggmls_sources(kind: str, tmp_path: Path) -> None:
    rows = blocks_of(kind, 48, seed=3).reshape(12, -1)
    file = write(tmp_path / "k.gguf", {"w": (kind, rows)})
    decoded = ggml_blocks.decoded(kind, rows).T
    made = packed(decoded, *(part.T for part in file.steps("w")))
    assert made is not None
    assert_same(widened(made), decoded)


def test_numbers_that_are_no_levels_are_not_packed() -> None:
    dense, made = drawn(64, 40, "bytes")
    scales, minima = (widened(part).repeat(2, 0) for part in (made.scales, made.minima))
    assert packed(dense, scales, minima) is not None
    odd = dense.copy()
    odd[33, 39] = np.nextafter(odd[33, 39], np.float32(1e9))
    assert packed(odd, scales, minima) is None
    assert packed(dense, scales * np.float32(0.5), minima) is None, "some are too far away, then"
    assert packed(dense[:48], scales, minima) is None
    assert packed(np.ones((GROUP, 3), np.float32), *np.zeros((2, 1, 3), np.float32)) is None
    flat = packed(np.full((GROUP, 3), 5, np.float32), np.zeros((1, 3), np.float32), np.full((1, 3), 5, np.float32))
    assert flat is not None
    assert (widened(flat) == 5).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("width", [None, 16, 7])
def test_columns_are_those_of_the_dense_matrix(form: str, width: int | None) -> None:
    dense, made = drawn(96, 37, form)
    kept = made if width is None else panelled(made, width)
    assert kept.shape == dense.shape
    for at in (slice(None), slice(3, 29), np.array([36, 0, 5, 5])):
        assert_same(columns(kept, at), dense[:, at])
    some = np.array([[1, 36], [0, 7]])
    assert_same(rows_of(kept, some), dense.T[some])
    assert_same(rows_of(kept), dense.T)


# --- products -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("group", [GROUP, 2 * GROUP])
@pytest.mark.parametrize("n", [32, 96, 3 * ops.SUM_BLOCK + 48])
@pytest.mark.parametrize("rows", [1, 5, kernels.ROWS, kernels.ROWS + 1, kernels.TOGETHER + 3])
def test_products_are_those_with_the_dense_matrix_to_the_last_bit(form: str, group: int, n: int, rows: int) -> None:
    dense, made = drawn(n, 3 * kernels.WIDTH - 5, form, group)
    x = np.random.default_rng(1).standard_normal((rows, n)).astype(np.float32)
    with fast.using(True):
        compiled, expected = (ops.linear(x, panelled(w, kernels.WIDTH)) for w in (made, dense))
    assert_same(compiled, expected)
    assert_close(compiled, x.astype(np.float64) @ dense, KERNEL)
    with fast.using(False):
        for kept in (made, panelled(made, 16)):
            assert_same(ops.linear(x, kept), ops.linear(x, dense))


def test_what_kernels_cannot_read_is_left_to_numpy() -> None:
    dense, made = drawn(96, 40, "nibbles")
    x = np.ones((2, 96), np.float32)
    assert kernels.product(x, made, 144) is None
    assert kernels.product(x, panelled(made, kernels.WIDTH // 2), 144) is None
    for kept in (made, panelled(made, kernels.WIDTH)):
        with fast.using(True):
            assert_close(ops.linear(x, kept), x @ dense, KERNEL)
            for other in (x[:, :-1], x[:, :-1].copy(), np.ones((2, 98), np.float32)):
                with pytest.raises(ValueError, match="mismatch"):
                    ops.linear(other, kept)


# --- whole models ---------------------------------------------------------------------------------------------


def tiny(path: Path) -> Path:
    return tiny_files.gguf_file(path / "tiny.gguf", tiny_files.small())


def of_k_quants(path: Path) -> Path:
    return wide_model(path / "wide.gguf", packed_projections())


def mixed(row: str) -> Callable[[Path], Path]:
    return lambda path: gguf_rows.write(row, path / f"{row}.gguf")


def untied(path: Path) -> Path:
    """With an unembedding of its own, and embeddings by other blocks."""
    kinds = tiny_files.KINDS | {"token_embd": "Q4_0", "output": "Q8_0"}
    return tiny_files.gguf_file(path / "untied.gguf", tiny_files.small(tied=False), kinds)


FILES = {"tiny": tiny, "untied": untied, "k-quants": of_k_quants} | {
    row: mixed(row) for row in gguf_rows.ROWS if row.endswith("-mixed")
}
PACKED = {
    "tiny": {"down"},
    "untied": {"down", "embed", "unembed"},
    "k-quants": {"qkv", "o", "gate_up", "down"},
    "llama-mixed": {"o", "gate_up", "down", "embed"},
    "gemma3-mixed": {"o", "gate_up", "down", "embed"},
    "gpt2-mixed": {"qkv", "o", "gate_up", "down", "embed"},
    "smollm2": {"qkv", "o", "gate_up", "down", "embed"},
}
"""What stays packed: matrices beside each other only if all of them are in such blocks."""


@pytest.fixture(scope="module", params=[*FILES, pytest.param("smollm2", marks=pytest.mark.real)])
def pair(request, tmp_path_factory) -> tuple[str, Model, Model]:
    """(which, dense, packed) of one file."""
    if request.param == "smollm2":
        return "smollm2", request.getfixturevalue("smollm2"), load_model("smollm2-135m-instruct", weights="packed")
    path = FILES[request.param](tmp_path_factory.mktemp("files"))
    return request.param, load_model(path), load_model(path, weights="packed")


def test_what_is_in_blocks_is_packed_and_every_weight_is_the_dense_one(pair) -> None:
    which, dense, kept = pair
    found = {name for name, array in kept.params.layer(0).stored() if isinstance(array, Packed)}
    ends = kept.params.ends
    found |= {"embed"} if isinstance(ends.embed, Packed) else set()
    found |= {"unembed"} if isinstance(ends.unembed, Packed) and ends.unembed is not ends.embed else set()
    assert found == PACKED[which]
    assert_same_weights(kept, dense)
    assert (kept.params.ends.unembed is kept.params.ends.embed) == dense.config.tied
    assert (kept.weights, kept.fingerprint, kept.conversion) == ("packed", dense.fingerprint, "none")


def with_kernels(model: Model) -> Model:
    """As loading lays its weights out when kernels are in use."""
    n = model.config.n_layers
    return replace(model, params=in_panels(Params(model.params.ends, model.params.layer, n), n, kernels.WIDTH))


@pytest.mark.parametrize("compiled", [False, True])
def test_every_point_is_the_same_to_the_last_bit_and_logits_but_for_rounding(pair, compiled: bool) -> None:
    _, dense, kept = pair
    with fast.using(compiled):
        models = [with_kernels(model) for model in (dense, kept)] if compiled else [dense, kept]
        theirs, ours = (everything(model, IDS) for model in models)
        for where, array in theirs.items():
            assert_same(ours[where], array)
        theirs, ours = (forward(model, IDS, logits_at="all").logits[0] for model in models)
        assert_close(ours, theirs, SAME)
        assert_moved(forward(models[1], IDS[::-1], logits_at="all").logits[0], theirs, SAME)
        assert generate(models[1], IDS, 5).ids == generate(models[0], IDS, 5).ids


def test_the_vocabulary_reads_the_same(pair) -> None:
    _, dense, kept = pair
    vector = np.linspace(-1, 1, dense.config.d_model, dtype=np.float32)
    for model in (kept, with_kernels(kept)):
        with fast.using(model is not kept):
            for read in ("project_through_unembed", "embedding_neighbors"):
                ours, theirs = (dict(getattr(m, read)(vector, k=5)) for m in (model, dense))
                assert ours == pytest.approx(theirs, rel=10 * SAME)
        for read in ("embedding_for", "unembedding_for"):
            assert_same(getattr(model, read)(5), getattr(dense, read)(5))


def test_tables_are_laid_out_for_kernels_too(tmp_path: Path) -> None:
    path = untied(tmp_path)
    kept, dense = (with_kernels(load_model(path, weights=weights)).params.ends for weights in ("packed", "dense"))
    for table in (kept.embed, kept.unembed):
        assert isinstance(table, Packed)
        assert isinstance(table.levels, Panels)
    assert isinstance(dense.embed, np.ndarray)


@pytest.mark.real
def test_smollm2_takes_less_than_a_quarter_of_the_memory(smollm2: Model) -> None:
    kept = load_model("smollm2-135m-instruct", weights="packed")
    assert kept.params.nbytes < 0.22 * smollm2.params.nbytes
    assert with_kernels(kept).params.nbytes < 0.22 * smollm2.params.nbytes


@pytest.mark.parametrize("model", ["synthetic", "synthetic:induction", "owner/name", "."])
def test_what_is_no_gguf_file_has_no_blocks(model: str) -> None:
    with pytest.raises(InputError, match=rf"\.gguf file, and '{model}' is none; choose \"dense\" or \"bf16\""):
        load_model(model, weights="packed")


def test_a_file_without_such_blocks_and_a_budget_of_layers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match='no matrix of plain\'s layers is in blocks that weights="packed" keeps'):
        load_model(tiny_files.gguf_file(tmp_path / "plain.gguf", kinds={"token_embd": "Q8_0"}), weights="packed")
    with pytest.raises(InputError, match='dense_layers is for weights="scoped"'):
        load_model(tiny(tmp_path), weights="packed", dense_layers=1)
    with pytest.raises(UnknownModel, match="there is no model"):
        load_model(tmp_path / "missing.gguf", weights="packed")


def test_loading_asks_for_the_room_that_packed_weights_take(tmp_path: Path) -> None:
    asked: list[int] = []
    kept = load_model(of_k_quants(tmp_path), weights="packed", room=asked.append)
    assert asked == [kept.params.nbytes]
