"""The compiled kernels compute what numpy computes: each kernel beside its numpy function, then whole runs."""

import gc
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_files import hf_directory
from tolerances import KERNEL

from engine import (
    POINTS,
    KVCache,
    Metric,
    Model,
    RecordHook,
    blas,
    fast,
    forward,
    generate,
    load_model,
    ops,
    patching_grid,
)
from engine.activations import ACTIVATIONS
from engine.matrices import Array, Panels, panelled, rounded, widened
from engine.params import Ends, Joined, LayerParams, Linear, Params, in_bfloat16, in_panels

kernels = fast._compiled()
ROWS, WIDTH = kernels.ROWS, kernels.WIDTH
NOISE = np.random.default_rng(0)


def noise(*shape: int) -> Array:
    return NOISE.standard_normal(shape, np.float32)


@pytest.fixture(autouse=True)
def _kernels() -> Iterator[None]:
    with fast.using(True):
        yield


def agree(by_kernel: Array, by_numpy: Array, share: float = KERNEL) -> None:
    """Within a share of numpy's largest number."""
    assert by_kernel.shape == by_numpy.shape
    assert by_kernel.dtype == np.float32
    assert np.abs(by_kernel - by_numpy).max() <= share * np.abs(by_numpy).max()


SHAPES = [(576, 1536), (1536, 576), (64, 16), (50, 37), (7, 1), (333, 1000), (8, 3), (145, 2 * WIDTH)]


@pytest.mark.parametrize("rows", [*range(1, ROWS + 2), 33, 1100])
@pytest.mark.parametrize(("n", "columns"), SHAPES)
def test_a_product_is_as_near_to_float64_as_numpys(rows: int, n: int, columns: int) -> None:
    x, w = noise(rows, n), noise(n, columns)
    exact = x.astype(np.float64) @ w.astype(np.float64)
    made = kernels.product(x, panelled(w, WIDTH), ops.SUM_BLOCK)
    assert made.shape == exact.shape
    error, numpys = (np.sqrt(np.mean((y - exact) ** 2)) for y in (made, ops._product(x, w)))
    assert error <= 2 * numpys + KERNEL * np.sqrt(np.mean(exact**2)) / 10


@pytest.mark.parametrize("rows", [1, 2, 33, 300])
@pytest.mark.parametrize(("n", "columns"), SHAPES)
@pytest.mark.skipif(blas.library() is None, reason="numpy's library was not found")
def test_a_matrix_that_is_not_in_panels_is_multiplied_by_the_library(rows: int, n: int, columns: int) -> None:
    x, w = noise(rows, n), noise(n, columns)
    agree(kernels.product(x, w, ops.SUM_BLOCK), ops._product(x, w))


@pytest.mark.parametrize("rows", [1, ROWS, 33])
@pytest.mark.parametrize(("n", "columns"), SHAPES)
def test_a_product_with_bfloat16_is_that_with_the_widened_numbers(rows: int, n: int, columns: int) -> None:
    x, w = noise(rows, n), rounded(noise(n, columns))
    expected = kernels.product(x, panelled(widened(w)[:n], WIDTH), ops.SUM_BLOCK)
    agree(kernels.product(x, panelled(w, WIDTH), ops.SUM_BLOCK), expected)


def test_a_word_without_a_second_feature_reads_nothing_of_the_next_row() -> None:
    x, w = noise(ROWS + 1, 7), panelled(rounded(noise(7, 5)), WIDTH)
    expected = kernels.product(x, w, 144)[:ROWS]
    x[ROWS] = np.nan
    assert (kernels.product(x, w, 144)[:ROWS] == expected).all()
    x[1] = np.nan
    assert np.isfinite(kernels.product(x[:1], w, 144)).all()


@pytest.mark.parametrize("shape", [(7, 1), (64, WIDTH), (50, 3 * WIDTH + 5)])
def test_panels_hold_each_column_with_all_its_features_and_zeros_after_the_last(shape: tuple[int, int]) -> None:
    w = noise(*shape)
    panels = panelled(w, WIDTH)
    assert (panels.shape, panelled(panels, WIDTH)) == (shape, panels)
    for column in range(shape[1]):
        assert (panels.numbers[column // WIDTH, :, column % WIDTH] == w[:, column]).all()
    assert np.count_nonzero(panels.numbers) == w.size
    assert (widened(panels) == w).all()
    assert (widened(panelled(rounded(w), WIDTH)) == widened(rounded(w))).all()


@pytest.mark.parametrize("rows", [1, 2, 33])
@pytest.mark.parametrize("columns", [1, 16, 5000])
def test_rows_times_the_rows_of_a_matrix(rows: int, columns: int) -> None:
    x, w = noise(rows, 577), noise(columns, 577)
    agree(kernels.inner(x, w), (x.astype(np.float64) @ w.T.astype(np.float64)).astype(np.float32))


def test_numpys_library_has_one_thread_while_kernels_are_in_use_and_its_own_number_after() -> None:
    if (found := blas.library()) is None or found.set_threads is None:
        pytest.skip("the number of threads cannot be changed")
    with fast.using(False):
        before = found.get_threads()
        found.set_threads(2)
    try:
        threads = [found.get_threads()]
        with fast.using(False):
            threads.append(found.get_threads())
        assert [*threads, found.get_threads()] == [1, 2, 1]
    finally:
        with fast.using(False):
            found.set_threads(before)


@pytest.mark.parametrize("width", [1, 7, 8, 33, 300])
def test_softmax(width: int) -> None:
    x = 20 * noise(6, 5, width)
    by_kernel, by_numpy = x.copy(), x.copy()
    assert kernels.softmax(by_kernel)
    with fast.using(False):
        ops.softmax(by_numpy)
    assert np.abs(by_kernel - by_numpy).max() < KERNEL
    assert np.abs(by_kernel.sum(-1) - 1).max() < KERNEL


def test_a_softcap_of_any_size_is_near_to_float64() -> None:
    x = np.concatenate([noise(40) * np.float32(10.0**power) for power in range(-6, 5)])
    exact = 50 * np.tanh(x.astype(np.float64) / 50)
    made = ops.softcap(x.copy(), 50.0)
    assert np.abs(made / exact - 1).max() < KERNEL
    assert kernels.softcap(x[:3].copy(), 50.0)
    assert not kernels.softcap(x[::2], 50.0)
    assert ops.softcap(np.array([np.inf, -np.inf], np.float32), 50.0).tolist() == [50, -50]


def test_what_softmax_may_not_see_gets_exactly_nothing_and_a_row_of_that_alone_is_zeros() -> None:
    x = noise(3, 40)
    x[0, 7:] = -np.inf
    x[1] = -np.inf
    x[2, 5] = -200
    assert kernels.softmax(x)
    assert (x[0, 7:] == 0).all()
    assert (x[1] == 0).all()
    assert x[2, 5] == 0
    assert x[0].sum() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("place", [0, 5, 39])
def test_no_kernel_hides_a_nan(place: int) -> None:
    x = noise(1, 40)
    x[0, place] = np.nan
    ones = np.ones((1, 40), np.float32)
    assert kernels.softmax(weights := x.copy())
    assert np.isnan(weights).all()
    assert np.isnan(kernels.rms_norm(x, ones[0], 1e-5)).all()
    for activation in ("silu", "gelu", "gelu_new"):
        assert np.isnan(kernels.activated(activation, x, ones)).tolist() == np.isnan(x).tolist()
        assert np.isnan(kernels.activated(activation, x, None)).tolist() == np.isnan(x).tolist()
    assert np.isnan(ops.softcap(x.copy(), 50.0)).tolist() == np.isnan(x).tolist()
    heads, pos = x[None, None], np.array([0])
    assert np.isnan(ops.attend(heads, np.ones_like(heads), np.ones_like(heads), pos, pos, scale=1, cap=50.0)).all()
    assert np.isnan(kernels.product(x, panelled(np.ones((40, 3), np.float32), WIDTH), 16)).all()


BY_NUMPY = ("mish", "quick_gelu", "relu", "relu2")
"""Activations that have no kernel."""


@pytest.mark.parametrize("size", [1e-3, 1, 30, 90, 1e4, 1e15])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_an_activation_of_any_size_with_and_without_a_gate(activation: str, size: float) -> None:
    gate, up = np.float32(size) * noise(4, 333), noise(4, 333)
    beside = np.concatenate([gate, up], axis=1)
    alone, gated = ops._activated(activation, gate, None), ops._activated(activation, gate, up)
    agree(ops.activated(activation, gate), alone)
    agree(ops.activated(activation, gate, up), gated)
    agree(ops.activated(activation, beside[:, :333], beside[:, 333:]), gated)
    assert (kernels.activated(activation, gate, up) is None) == (activation in BY_NUMPY)


@pytest.mark.parametrize("weights", [(64,), (3, 64)])
def test_a_norm_with_gains_for_all_and_for_each_head(weights: tuple[int, ...]) -> None:
    x, gain = 100 * noise(2, 5, 3, 64), noise(*weights)
    agree(kernels.rms_norm(x, gain, 1e-5), ops._rms_norm(x, gain, 1e-5))


@pytest.mark.parametrize("half", [32, 20])
def test_rotation_of_all_features_and_of_some(half: int) -> None:
    x = noise(2, 7, 3, 64).swapaxes(1, 2)
    angle = noise(7, half)
    cos, sin = np.cos(angle), np.sin(angle)
    agree(kernels.rotate(x, cos, sin), ops._rotate(x, cos, sin))
    part = noise(2, 7, 5 * 64)[:, :, 64:256].reshape(2, 7, 3, 64).swapaxes(1, 2)
    agree(kernels.rotate(part, cos, sin), ops._rotate(part, cos, sin))
    alone = noise(2, 3, 7, 64)
    agree(kernels.rotate(alone, cos, sin), ops._rotate(alone, cos, sin))


@pytest.mark.parametrize("queries", [1, 5, 64, 65, 150])
@pytest.mark.parametrize("window", [None, 1, 6, 100])
@pytest.mark.parametrize("past", [0, 30])
@pytest.mark.parametrize("cap", [None, 0.7, 50.0])
def test_attention_and_its_pattern(queries: int, window: int | None, past: int, cap: float | None) -> None:
    key_pos = np.arange(queries + past)
    q, k = noise(2, 6, queries, 16), noise(2, 3, len(key_pos) + 9, 16)[:, :, : len(key_pos)]
    v = noise(2, len(key_pos), 3, 16).swapaxes(1, 2)
    seen: list[Array] = []

    def attend(**more: object) -> Array:
        return ops.attend(q, k, v, key_pos[past:], key_pos, scale=0.25, window=window, cap=cap, **more)

    listened, alone = attend(on_weights=lambda weights: seen.append(weights) or weights), attend()
    assert (listened == alone).all(), "listening changes nothing"
    with fast.using(False):
        agree(alone, attend(on_weights=lambda weights: seen.append(weights) or weights))
    assert np.abs(seen[0] - seen[1]).max() < KERNEL
    assert ((seen[0] == 0) == (seen[1] == 0)).all()


def test_a_query_that_sees_no_key_attends_to_nothing() -> None:
    q, k = noise(1, 2, 3, 16), noise(1, 2, 4, 16)
    z = ops.attend(q, k, k, np.array([2, 3, 4]), np.array([3, 4, 5, 6]), scale=1)
    assert (z[0, 0] == 0).all()
    assert (z[0, 1:] != 0).all()
    assert (ops.attend(q, k, k, np.array([0, 1, 2]), np.array([3, 4, 5, 6]), scale=1) == 0).all()


def test_what_lies_otherwise_in_memory_is_copied_or_left_to_numpy() -> None:
    x, w = noise(9, 80)[:, ::2], noise(40, 30)
    agree(kernels.product(x, panelled(w, WIDTH), 16), x @ w)
    agree(kernels.product(x, w, 16), x @ w)
    assert kernels.product(x.copy(), w.T, 16) is None
    assert kernels.product(x.copy(), rounded(w), 16) is None
    agree(kernels.rms_norm(x, w[:, 0], 1e-5), ops._rms_norm(x, w[:, 0], 1e-5))
    agree(kernels.activated("silu", x, x), kernels.activated("silu", x.copy(), x.copy()))
    assert not kernels.softmax(x)
    frozen = noise(3, 4)
    frozen.flags.writeable = False
    assert not kernels.softmax(frozen), "what may not be written is not"
    agree(ops.linear(x, w), x @ w)
    agree(ops.linear(x, panelled(w, WIDTH)), x @ w)


def test_rows_that_lie_upon_each_other_or_backwards_are_read_where_they_are() -> None:
    cos, sin = noise(7, 8), noise(7, 8)
    for q in (np.broadcast_to(noise(1, 3, 1, 16), (1, 3, 7, 16)), noise(1, 3, 7, 16)[:, :, ::-1]):
        agree(kernels.rotate(q, cos, sin), ops._rotate(q, cos, sin))
        k, pos = noise(1, 3, 7, 16), np.arange(7)
        for given in ((q, k, k), (k, q, k), (k, k, q)):
            made = ops.attend(*given, pos, pos, scale=1)
            with fast.using(False):
                agree(made, ops.attend(*given, pos, pos, scale=1))
    gate = np.broadcast_to(noise(1, 33), (7, 33))
    agree(kernels.activated("silu", gate, gate[::-1]), kernels.activated("silu", gate.copy(), gate.copy()))


@pytest.mark.parametrize("n", [38, 41, 0])
def test_rows_of_another_width_than_the_matrixs_are_refused(n: int) -> None:
    x, w = noise(3, n), noise(40, 8)
    for matrix in (w, rounded(w), panelled(w, WIDTH), panelled(rounded(w), WIDTH)):
        assert kernels.product(x, matrix, 144) is None, "it is left to numpy"
        with pytest.raises(ValueError, match=r"mismatch|reshape"):
            ops.linear(x, matrix)
    assert kernels.product(noise(3, 0), panelled(noise(0, 8), WIDTH), 144) is None
    for rows in (x, x[:1]):
        assert kernels.inner(rows, noise(8, 40)) is None
        with pytest.raises(ValueError, match=r"mismatch|reshape"):
            ops.inner(rows, noise(8, 40))


def test_words_do_not_tell_an_odd_number_of_features_from_the_next() -> None:
    odd, even = noise(39, 8), noise(40, 8)
    x = noise(3, 39)
    agree(ops.linear(x, rounded(even)), ops.linear(x, rounded(even[:39])))
    agree(ops.linear(np.pad(x, ((0, 0), (0, 1))), rounded(odd)), ops.linear(x, rounded(odd)))


def test_no_rows_and_no_columns_make_an_empty_product() -> None:
    assert kernels.product(noise(0, 40), panelled(noise(40, 8), WIDTH), 16).shape == (0, 8)
    assert kernels.product(noise(3, 40), panelled(noise(40, 0), WIDTH), 16).shape == (3, 0)


def test_panels_of_another_width_are_left_to_numpy() -> None:
    x, w = noise(3, 40), noise(40, 50)
    panels = panelled(w, WIDTH // 2)
    assert kernels.product(x, panels, 16) is None
    agree(ops.linear(x, panels), x @ w)


NARROW = f"""
import sys
sys.path[:0] = {sys.path!r}
import llvmlite.binding
known = llvmlite.binding.get_host_cpu_features()
known.update((name, False) for name in known if name.startswith("avx512"))
llvmlite.binding.get_host_cpu_features = lambda: known
import numpy as np
from engine.fast import _compiled
from engine.matrices import packed, panelled, rounded, widened
kernels, noise = _compiled(print), np.random.default_rng(0)
print(kernels.WIDTH, kernels.ROWS)
for rows, n, columns in ((1, 7, 1), (6, 50, 37), (7, 145, 64), (200, 40, 100)):
    x, w = (noise.standard_normal(shape).astype(np.float32) for shape in ((rows, n), (n, columns)))
    for given, meant in ((w, w), (rounded(w), widened(rounded(w))[:n])):
        made = kernels.product(x, panelled(given, kernels.WIDTH), 16)
        assert np.abs(made - x @ meant).max() < 1e-4, (rows, n, columns)
for rows, columns, most in ((1, 37, 15), (7, 64, 15), (6, 40, 127), (200, 17, 127)):
    x, levels = noise.standard_normal((rows, 160)).astype(np.float32), noise.integers(0, most + 1, (160, columns))
    steps = noise.standard_normal((2, 10, columns)).astype(np.float16).astype(np.float32)
    dense = levels.astype(np.float32) * steps[0].repeat(16, 0) + steps[1].repeat(16, 0)
    made = kernels.product(x, panelled(packed(dense, *steps), kernels.WIDTH), 48)
    assert (made == kernels.product(x, panelled(dense, kernels.WIDTH), 48)).all(), (rows, columns, most)
print("agree")
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the tile for processors of this kind")
def test_a_tile_of_narrower_vectors_computes_the_same(tmp_path: Path) -> None:
    child = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    ran = subprocess.run([sys.executable, "-c", NARROW], capture_output=True, text=True, env=child)
    said = "compiling kernels, once per machine and version (half a minute)"
    assert ran.stdout.split("\n")[:3] == [said, "16 6", "agree"], ran.stderr


# --- whole runs ---------------------------------------------------------------------------------------------------


def with_panels(model: Model) -> Model:
    """The same numbers as a model has them that was loaded with kernels in use."""
    n = model.config.n_layers
    held = Params(model.params.ends, model.params.layer, n)
    return replace(model, params=in_panels(held, n, WIDTH))


def test_every_point_of_every_family_is_what_numpy_computes(model: Model, ids: list[int]) -> None:
    def points(model: Model) -> dict[str, dict[int, Array]]:
        names = [name for name in POINTS if not (model.config.parallel and name == "resid_mid")]
        record = RecordHook.for_layers(range(model.config.n_layers), points=names)
        logits = forward(model, ids, hook=record, logits_at="all").logits
        return {name: record.get(name) for name in names} | {"logits": {0: logits}}

    compiled = with_panels(model)
    assert isinstance(compiled.params.layer(0).o.weight, Panels)
    with fast.using(False):
        by_numpy = points(model)
    for by_kernels in (points(compiled), points(model)):  # in panels; as scoped layers are
        for name, layers in by_numpy.items():
            for layer, rows in layers.items():
                largest = np.abs(rows).max()
                assert np.abs(by_kernels[name][layer] - rows).max() <= 3e-5 * max(largest, 1), (name, layer)


def test_generation_and_a_grid_come_out_the_same(smollm2: Model) -> None:
    clean, corrupt = (list(smollm2.encode(f"The capital of {x} is")) for x in ("France", "Italy"))
    metric = Metric("logit_difference", *(smollm2.encode(f" {x}")[-1] for x in ("Paris", "Rome")))

    def both(model: Model) -> tuple[list[int], Array]:
        new = generate(model, clean, 8, cache=KVCache.with_layers(30)).ids
        return new, patching_grid(model, clean, corrupt, metric, "resid_pre").values

    ids, grid = both(with_panels(smollm2))
    with fast.using(False):
        expected_ids, expected = both(smollm2)
    assert ids == expected_ids
    assert np.abs(grid - expected).max() < 1e-3


def test_many_threads_at_once_get_what_one_gets() -> None:
    x, w = noise(50, 576), panelled(noise(576, 576), WIDTH)
    expected = kernels.product(x, w, 144)
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: kernels.product(x, w, 144), range(200)))
    assert all((one == expected).all() for one in made)


AGAIN = f"""
import sys
sys.path[:0] = {sys.path!r}
from engine.fast import _compiled
modules = [module for name, module in vars(_compiled(print)).items() if hasattr(module, "__file__")]
compiled = {{name: x.stats for module in modules for name, x in vars(module).items() if hasattr(x, "stats")}}
print(len(compiled) > 5, [name for name, stats in compiled.items() if stats.cache_misses])
"""


def test_another_process_compiles_nothing_again() -> None:
    ran = subprocess.run([sys.executable, "-c", AGAIN], capture_output=True, text=True)
    assert ran.stdout.strip() == "True []", ran.stderr


def test_another_environment_compiles_nothing_again_and_needs_no_place_beside_its_sources(tmp_path: Path) -> None:
    copy = shutil.copytree(Path(fast.__file__).parent, tmp_path / "site" / "engine", copy_function=shutil.copy)
    for place in (copy, *copy.rglob("*")):
        place.chmod(0o555 if place.is_dir() else 0o444)
    script = f"import sys; sys.path.insert(0, {str(copy.parent)!r})\n" + AGAIN.replace("sys.path[:0]", "sys.path[1:1]")
    script += f"import engine; assert engine.__file__.startswith({str(tmp_path)!r})"
    ran = subprocess.run([sys.executable, "-P", "-B", "-c", script], capture_output=True, text=True)
    for place in (copy, *copy.rglob("*")):
        place.chmod(0o755)
    assert ran.stdout.strip() == "True []", ran.stderr
    assert ran.returncode == 0, ran.stderr


def test_kernels_without_a_place_for_good_are_kept_as_long_as_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    assert fast._folder(str(tmp_path)).parent == tmp_path
    passing = fast._folder(str(tmp_path / "file"))
    assert passing.is_dir()
    assert passing.name.startswith("mechscope-kernels-")


def test_a_model_loaded_with_kernels_in_use_has_panels_unless_its_layers_come_and_go(tmp_path: Path) -> None:
    for weights in ("dense", "bf16"):
        assert isinstance(load_model("synthetic", weights=weights).params.layer(3).down.weight, Panels)
    tmp_path = hf_directory(tmp_path / "tiny")
    assert isinstance(load_model(tmp_path).params.layer(0).down.weight, Panels)
    assert not isinstance(load_model(tmp_path, weights="scoped").params.layer(0).down.weight, Panels)
    with fast.using(False):
        assert not isinstance(load_model("synthetic").params.layer(3).down.weight, Panels)


def test_layers_that_are_laid_out_are_not_kept_as_they_were() -> None:
    def read(index: int) -> LayerParams:
        alone = Linear(noise(8, 8))
        return LayerParams(Joined.of(alone, alone, alone), alone, Joined.of(alone), alone)

    plain, asked = Params(Ends(noise(3, 8), noise(3, 8), None), read, 2), list[int]()
    numbers = weakref.ref(plain.layer(1).o.weight)
    rounded = in_bfloat16(plain, 2, asked.append)
    words = weakref.ref(rounded.layer(1).o.weight)
    panels = in_panels(rounded, 2, WIDTH, asked.append)
    gc.collect()
    assert (numbers(), words()) == (None, None)
    assert [panels.dense_layers, asked] == [(0, 1), [0, 1, 0, 1]]


CHILD = f"""
import sys
sys.path[:0] = {sys.path!r}
from engine import fast, load_model
load_model("synthetic")
print(fast.state(), "numba" in sys.modules)
"""


@pytest.mark.parametrize(
    ("variable", "expected"),
    [
        ("no", "switched off by MECHSCOPE_FAST False"),
        ("yes", "in use True"),
    ],
)
def test_loading_a_model_prepares_the_kernels_unless_they_are_switched_off(variable: str, expected: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", CHILD], capture_output=True, text=True, env=os.environ | {"MECHSCOPE_FAST": variable}
    )
    assert ran.stdout.strip() == expected, ran.stderr


def test_without_numba_everything_works_and_the_state_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MECHSCOPE_FAST", "yes")
    monkeypatch.setattr(fast, "find_spec", lambda name: None)
    with fast.using(False):
        fast.prepare()
        assert fast.kernels() is None
        command = fast.state().partition("into this environment: ")[2]
    tried = subprocess.run(f"{command} --dry-run --no-index --no-deps", shell=True, capture_output=True, text=True)
    assert tried.returncode == 0, "pip of this very environment: " + tried.stderr
    assert "numba" in tried.stdout


def test_an_environment_that_cannot_be_written_is_not_told_to_install_into_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MECHSCOPE_FAST", "yes")
    monkeypatch.setattr(fast, "find_spec", lambda name: None)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: "/nowhere")
    with fast.using(False):
        fast.prepare()
        assert "this environment cannot be written" in fast.state()
        assert "pip" not in fast.state()


def test_kernels_that_cannot_be_compiled_are_not_used_and_a_warning_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def fails(say: object) -> None:
        tried.append(1)
        raise OSError("no place for the cache\nand more")

    monkeypatch.setenv("MECHSCOPE_FAST", "yes")
    monkeypatch.setattr(fast, "_off", "")
    with fast.using(False):
        monkeypatch.setattr(fast, "_compiled", fails)
        with pytest.warns(UserWarning, match="no place for the cache; "):
            fast.prepare()
        fast.prepare()
        assert tried == [1], "the next load does not wait for the same failure"
        assert fast.kernels() is None
        assert fast.state() == "cannot be compiled here: no place for the cache; the next process tries again"


JIT_OFF = f"""
import sys, warnings
sys.path[:0] = {sys.path!r}
warnings.simplefilter("ignore")
from engine import fast, forward, load_model
print(forward(load_model("synthetic"), [1, 2]).logits.shape, fast.state())
"""


def test_kernels_that_fail_at_first_use_are_not_used() -> None:
    child = os.environ | {"MECHSCOPE_FAST": "yes", "NUMBA_DISABLE_JIT": "1"}
    ran = subprocess.run([sys.executable, "-c", JIT_OFF], capture_output=True, text=True, env=child)
    assert ran.stdout.startswith("(1, 1, 257) cannot be compiled here: "), ran.stderr


FORKING = f"""
import os, signal, sys, warnings
sys.path[:0] = {sys.path!r}
warnings.simplefilter("ignore")
import numpy as np
from engine import blas, fast, forward, load_model
threads, model = blas.most_threads(), load_model("synthetic")
expected = forward(model, [1, 2, 3]).logits
if (child := os.fork()) == 0:
    signal.alarm(60)
    same = np.abs(forward(model, [1, 2, 3]).logits - expected).max() < 1e-4
    fast.prepare()
    print(same, blas.threads_now() == threads, fast.state(), flush=True)
    os._exit(0)
print(os.waitpid(child, 0)[1], fast.state())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
def test_a_forked_process_computes_with_numpy_and_all_its_threads() -> None:
    child = os.environ | {"MECHSCOPE_FAST": "yes", "OPENBLAS_NUM_THREADS": "2"}
    ran = subprocess.run([sys.executable, "-c", FORKING], capture_output=True, text=True, env=child)
    assert ran.stdout.split("\n")[:2] == ["True True not used in a forked process", "0 in use"], ran.stderr
