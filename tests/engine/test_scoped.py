"""`weights="scoped"`: the file stays as it is, layers become dense when they run, and every result is that of dense."""

import mmap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny_files
from recording import everything, uneven
from tolerances import SCOPED, assert_close, assert_moved, assert_same, assert_same_weights

from engine import (
    Intervention,
    KVCache,
    Model,
    ZeroAblateHook,
    compile_interventions,
    forward,
    kv_inject_test,
    load_model,
    map_pre_o_head,
    prefill_inject,
    run_layer_with_mapped_pre_o_head,
    scoped_layer,
)
from engine.errors import DamagedFile, InputError, LayerError
from engine.gguf_file import GgufFile
from engine.params import Params
from engine.synthetic import synthetic

IDS, DONOR = [70, 3, 99, 5, 5, 180, 12], [9, 3, 41, 5, 77, 18, 12]


def in_bf16(path: Path) -> Path:
    return tiny_files.hf_directory(path / "m", tiny_files.small(), dtype="BF16", shards=2)


def quantised(path: Path) -> Path:
    return tiny_files.gguf_file(path / "m.gguf", tiny_files.small())


@pytest.fixture(scope="module", params=[quantised, in_bf16, pytest.param("smollm2", marks=pytest.mark.real)])
def pair(request, tmp_path_factory) -> tuple[Model, Model]:
    """(dense, scoped) of one file."""
    if request.param == "smollm2":
        return request.getfixturevalue("smollm2"), load_model("smollm2-135m-instruct", weights="scoped")
    path = request.param(tmp_path_factory.mktemp("files"))
    return load_model(path), load_model(path, weights="scoped")


def logits(model: Model, ids: list[int] = IDS) -> np.ndarray:
    return forward(model, ids, logits_at="all").logits[0]


# --- the same numbers -----------------------------------------------------------------------------------------


def test_scoped_tensors_are_identical_to_dense_ones(pair):
    dense, scoped = pair
    assert_same_weights(scoped, dense)


def test_scoped_logits_equal_dense_ones(pair):
    dense, scoped = pair
    assert (dense.weights, scoped.weights) == ("dense", "scoped")
    assert dense.fingerprint == scoped.fingerprint
    assert_close(logits(scoped), logits(dense), SCOPED)
    assert_moved(logits(scoped, IDS[::-1]), logits(dense), SCOPED)


def test_every_point_of_every_layer_is_the_same(pair):
    dense, scoped = (everything(model, IDS) for model in pair)
    assert scoped.keys() == dense.keys()
    for where, array in dense.items():
        assert_close(scoped[where], array, SCOPED)


def vector(model: Model) -> np.ndarray:
    return np.linspace(-1, 1, model.config.d_model, dtype=np.float32)


def edited(model: Model) -> np.ndarray:
    items = [
        Intervention("scale", (0,), "z", heads=(1,)),
        Intervention("steer", (1,), "mlp_out", value=2.0, vector=vector(model)),
    ]
    return forward(model, IDS, hook=compile_interventions(model, items, len(IDS))).logits[0]


def from_a_cache(model: Model) -> np.ndarray:
    cache = KVCache.with_layers(model.config.n_layers)
    rows = [forward(model, chunk, cache=cache).logits[0] for chunk in (IDS[:3], IDS[3:5], IDS[5:])]
    return np.concatenate(rows)


def transplanted(model: Model) -> np.ndarray:
    caches = [KVCache.with_layers(model.config.n_layers) for _ in (IDS, DONOR)]
    for ids, cache in zip((IDS, DONOR), caches, strict=True):
        forward(model, ids[:-1], cache=cache)
    caches[0].clone_layer_from(caches[1], 1)
    return forward(model, IDS[-1:], cache=caches[0]).logits[0]


def scanned(model: Model) -> np.ndarray:
    scan = kv_inject_test(model, IDS, DONOR, 5, layers=[1])
    return np.array([[cell.probability for cell in scan.per_layer]])


def generated(model: Model) -> np.ndarray:
    _, ids = model.generate_with_hooks(IDS, 4, ablate_layers=[0], steers=[(1, vector(model), 2.0)])
    return np.array([ids])


def ranked(model: Model, prompt: list[int]) -> np.ndarray:
    return np.array([score for _, score in model.logit_lens(model.capture_residuals(prompt, [0])[0])])[None]


RUNS: dict[str, Callable[[Model], np.ndarray]] = {
    "ablation": lambda m: forward(m, IDS, hook=ZeroAblateHook.for_layers([0])).logits[0],
    "steering": lambda m: m.forward_steer(IDS, [(0, vector(m), 3.0)], [1])[1][None],
    "interventions": edited,
    "patching": lambda m: m.patch_activations(DONOR, IDS, [(0, 1)], [1])[1][None],
    "a head's outputs mapped": lambda m: map_pre_o_head(m, IDS, 1, 0, uneven).logits[None],
    "one layer alone": lambda m: run_layer_with_mapped_pre_o_head(m, 1, m.params.embed[IDS], 0, uneven),
    "lens": lambda m: ranked(m, IDS),
    "projection": lambda m: np.array([[score for _, score in m.project_through_unembed(vector(m))]]),
    "neighbours": lambda m: np.array([[score for _, score in m.embedding_neighbors(vector(m))]]),
    "a cache": from_a_cache,
    "a transplant": transplanted,
    "an injection": lambda m: prefill_inject(m, IDS, DONOR, layers=[1], max_new_tokens=2).injected[None],
    "an injection scan": scanned,
    "generation": generated,
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_what_is_done_to_a_model_gives_the_same_on_scoped_weights(pair, run):
    dense, scoped = pair
    assert_close(run(scoped), run(dense), SCOPED)


# --- the budget -----------------------------------------------------------------------------------------------


class Loads:
    """Params over the synthetic model that notes which layers are made dense, and how many are held meanwhile."""

    def __init__(self, keep: int) -> None:
        inner = synthetic().params
        self.made: list[int] = []
        self.held: list[int] = []
        self.params = Params(inner.ends, self._load, keep)
        self._layer = inner.layer

    def _load(self, layer: int):
        self.made.append(layer)
        self.held.append(len(self.params.dense_layers))
        return self._layer(layer)

    def run(self, *layers: int) -> list[int]:
        """Which of the layers had to be made."""
        self.made.clear()
        for layer in layers:
            self.params.layer(layer)
        return list(self.made)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_least_recently_used_layer_makes_room_before_the_next_is_made(keep: int):
    loads = Loads(keep)
    loads.run(0, 1, 2, 3)
    assert loads.params.dense_layers == tuple(range(4 - keep, 4))
    assert max(loads.held) == keep - 1
    assert loads.run(3) == []
    loads = Loads(2)
    loads.run(0, 1)
    assert loads.run(0, 2) == [2]  # 0 was used after 1, so 1 goes
    assert loads.params.dense_layers == (0, 2)


def test_pinned_layers_are_dense_beside_the_budget_and_may_be_pinned_twice():
    loads = Loads(1)
    with loads.params.pinned(0) as outer:
        with loads.params.pinned(0) as inner:
            assert inner is outer
        assert loads.run(1, 2, 0) == [1, 2]
        assert loads.params.dense_layers == (0, 2)
    assert loads.params.dense_layers == (2,)


@pytest.mark.parametrize("budget", [None, 1, 2])
def test_a_budget_says_how_many_layers_stay_dense(tmp_path, budget):
    path = quantised(tmp_path)
    model, dense = load_model(path, weights="scoped", dense_layers=budget), load_model(path)
    kept = budget or 1
    assert model.params.keep == kept
    assert_close(logits(model), logits(dense), SCOPED)
    assert model.params.dense_layers == tuple(range(2 - kept, 2))
    layer_bytes = sum(array.nbytes for _, array in dense.params.layer(0).arrays())
    assert dense.params.nbytes - model.params.nbytes == (2 - kept) * layer_bytes


@pytest.mark.real
def test_smollm2_keeps_as_many_layers_dense_as_its_budget(smollm2):
    model = load_model("smollm2-135m-instruct", weights="scoped", dense_layers=3)
    assert_close(logits(model), logits(smollm2), SCOPED)
    assert model.params.dense_layers == (27, 28, 29)


@pytest.mark.parametrize(
    ("weights", "budget", "says"),
    [
        ("scoped", 0, "dense_layers is 0; it must be a whole number of at least 1"),
        ("scoped", -1, "at least 1"),
        ("scoped", 1.0, "at least 1"),
        ("scoped", True, "at least 1"),
        ("scoped", "1", "at least 1"),
        ("scoped", 3, r"dense_layers is 3, but m has 2 layers; valid: 1 to 2"),
        ("dense", 1, 'dense_layers is for weights="scoped"'),
        ("int8", None, "weights is 'int8'; valid: dense, scoped"),
    ],
)
def test_a_budget_that_cannot_be_kept_is_refused(tmp_path, weights, budget, says):
    with pytest.raises(InputError, match=says):
        load_model(quantised(tmp_path), weights=weights, dense_layers=budget)


def test_the_synthetic_model_has_no_file_so_no_budget():
    with pytest.raises(InputError, match="their weights are always dense"):
        load_model("synthetic", weights="scoped", dense_layers=1)


# --- one layer for the length of a block ----------------------------------------------------------------------


def test_a_scoped_layer_is_dense_inside_its_block_only(pair):
    dense, scoped = pair
    last = dense.config.n_layers - 1
    with scoped_layer(scoped, -dense.config.n_layers) as params:
        forward(scoped, IDS[:1])
        assert scoped.params.dense_layers == (0, last)
        assert scoped.params.layer(0) is params
        assert_same(params.q.weight, dense.params.layer(0).q.weight)
    forward(scoped, IDS[:1])
    assert scoped.params.dense_layers == (last,)


def test_a_scoped_layer_is_let_go_after_an_error(pair):
    _, scoped = pair
    with pytest.raises(RuntimeError, match="mine"), scoped_layer(scoped, 0):
        raise RuntimeError("mine")
    forward(scoped, IDS[:1])
    assert 0 not in scoped.params.dense_layers
    with pytest.raises(LayerError, match="valid: 0 to"), scoped_layer(scoped, 99):
        pass


# --- the file -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(mmap, "MADV_DONTNEED"), reason="the system has no madvise")
def test_the_pages_of_a_file_are_given_back_after_every_tensor(tmp_path, monkeypatch):
    path, given_back, forget = quantised(tmp_path), [], GgufFile._forget
    monkeypatch.setattr(GgufFile, "_forget", lambda file: given_back.append(forget(file)))
    load_model(path)
    assert len(given_back) == len(GgufFile.open(path).tensors)


def test_dense_weights_of_a_gguf_file_are_copies_of_their_own(tmp_path):
    path = tiny_files.gguf_file(tmp_path / "m.gguf", tiny_files.small(), kinds={})
    params = load_model(path).params
    arrays = [params.embed, params.final_norm.weight, *(array for _, array in params.layer(0).arrays())]
    assert all(array.flags.writeable and array.flags.aligned for array in arrays)


def test_a_safetensors_file_that_changed_under_a_scoped_model_is_an_engine_error(tmp_path):
    path = tiny_files.hf_directory(tmp_path / "m", tiny_files.small())
    model = load_model(path, weights="scoped")
    file = path / "model.safetensors"
    for damage in (lambda: file.write_bytes(file.read_bytes()[:500]), file.unlink):
        damage()
        with pytest.raises(DamagedFile, match=r"model\.safetensors has changed or gone since it was loaded"):
            forward(model, IDS)
