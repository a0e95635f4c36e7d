"""The fixed names of the Python API, and what they return."""

import inspect

import numpy as np
import pytest

import engine
from engine import RecordHook

NAMES = [
    "load_model",
    "RecordHook",
    "ZeroAblateHook",
    "SteerHook",
    "CompositeHook",
    "KVCache",
    "forward",
    "trace_forward",
    "generate",
    "capture_donor_state",
    "patch_and_trace",
    "map_pre_o_head",
    "run_layer_with_mapped_pre_o_head",
    "scoped_layer",
    "NoopHook",
    "PatchHook",
    "ScaleHook",
    "LayerHook",
    "logit_lens_topk",
    "track_token",
    "track_race",
    "embedding_neighbors",
    "project_through_unembed",
    "embedding_row",
    "embedding_row_scaled",
    "unembedding_row",
    "prefill_inject",
    "kv_inject_test",
    "EngineError",
]

METHODS = {
    "capture_residuals": ["prompt", "layers"],
    "forward_with_capture": ["prompt", "layers"],
    "forward_ablate": ["prompt", "ablate_layers", "capture_layers"],
    "forward_steer": ["prompt", "steers", "capture_layers"],
    "patch_activations": ["donor", "recipient", "targets", "capture_layers"],
    "logit_lens": ["residual", "k"],
    "track_token_at": ["residual", "token_id"],
    "track_race": ["residuals", "k"],
    "embedding_neighbors": ["query", "k"],
    "project_through_unembed": ["vec", "k"],
    "embedding_for": ["token_id", "scaled"],
    "unembedding_for": ["token_id"],
    "generate_with_hooks": ["prompt", "max_new_tokens", "ablate_layers", "steers"],
}


def test_the_fixed_names_are_exported_and_all_is_sorted_and_complete():
    assert not set(NAMES) - set(engine.__all__)
    assert all(hasattr(engine, name) for name in engine.__all__)
    assert len(set(engine.__all__)) == len(engine.__all__)
    upper = [name for name in engine.__all__ if name.isupper()]
    classes = [name for name in engine.__all__ if name[0].isupper() and not name.isupper()]
    functions = [name for name in engine.__all__ if name[0].islower()]
    assert [*sorted(upper), *sorted(classes), *sorted(functions)] == list(engine.__all__)


@pytest.mark.parametrize("name", METHODS)
def test_the_models_methods_keep_their_argument_names(name):
    arguments = list(inspect.signature(getattr(engine.Model, name)).parameters)
    assert arguments[1 : 1 + len(METHODS[name])] == METHODS[name]


@pytest.mark.parametrize(
    ("function", "keywords"),
    [
        (engine.trace_forward, {"hook", "capture_layers", "stop"}),
        (engine.generate, {"hook", "cache", "window", "on_token", "temperature", "top_p", "seed"}),
        (engine.run_layer_with_mapped_pre_o_head, {"positions", "shared_kv", "ple"}),
        (engine.KVCache.transplant, {"donor", "layers", "source", "dest", "what", "heads", "rope"}),
        (RecordHook.for_layers, {"layers", "capture_attention", "capture_activations", "points"}),
    ],
)
def test_functions_keep_their_keywords(function, keywords):
    assert not keywords - set(inspect.signature(function).parameters)


def test_every_method_returns_the_shape_it_promises(model, ids, donor):
    d, s = model.config.d_model, len(ids)
    vec = np.ones(d, np.float32)
    for found in (
        model.capture_residuals(ids, [0, -1]),
        model.forward_ablate(ids, [0], [0, -1]),
        model.forward_steer(ids, [(0, vec, 1.0)], [0, -1]),
        model.patch_activations(donor, ids, [(0, -1)], [0, -1]),
    ):
        assert {layer: row.shape for layer, row in found.items()} == {0: (d,), model.config.n_layers - 1: (d,)}
        assert {row.dtype for row in found.values()} == {np.dtype(np.float32)}
    assert model.forward_with_capture(ids, [1])[1].shape == (s, d)
    assert model.embedding_for(3).shape == model.unembedding_for(3).shape == (d,)
    assert len(model.logit_lens(vec)) == len(model.embedding_neighbors(vec)) == 10
    assert len(model.logit_lens(np.stack([vec, vec]), 3)) == 2
    assert isinstance(model.track_token_at(vec, 3), float)
    text, new = model.generate_with_hooks(ids, 2)
    assert isinstance(text, str)
    assert len(new) == 2


def test_a_text_and_a_list_of_ids_are_both_prompts(model):
    text, ids = model.generate_with_hooks("The capital", 1), model.encode("The capital")
    assert model.generate_with_hooks(ids, 1) == text


def test_the_synthetic_model_says_that_it_is_synthetic(synthetic):
    assert synthetic.synthetic
    assert synthetic.name == "synthetic"


@pytest.mark.real
def test_a_real_model_does_not(smollm2):
    assert not smollm2.synthetic
    assert smollm2.name == "smollm2-135m-instruct"
