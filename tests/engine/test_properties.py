"""What must hold for any model, prompt, layer and position: random small configurations of every family."""

from collections.abc import Callable

import families
import numpy as np
import pytest
from declared import has, moves
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import naive
from random_models import Run, runs
from recording import Calls, cached, everything, uneven
from tolerances import RANDOM, assert_close, assert_same, row_error

from engine import POINTS, EditHook, Intervention, KVCache, Model, RecordHook, compile_interventions, forward
from engine.distribution import softmax_of
from engine.hooks import Edit

EXAMPLES = 5
"""Of every family, in every test."""


def each_family(test: Callable[[Run], None]) -> Callable[..., None]:
    """Runs a test on some random models of every family, the same ones each time."""

    @pytest.mark.parametrize("model_type", sorted({raw["model_type"] for raw in families.ROWS.values()}))
    @settings(max_examples=EXAMPLES, derandomize=True, deadline=None)
    @given(st.data())
    def run_it(model_type: str, data: st.DataObject) -> None:
        test(data.draw(runs(model_type)))

    return run_it


def logits(model: Model, ids: list[int], hook=None) -> np.ndarray:
    return forward(model, ids, hook=hook, logits_at="all").logits[0]


def vector(run: Run, width: int) -> np.ndarray:
    return np.random.default_rng(run.seed).standard_normal(width).astype(np.float32)


def width(run: Run, point: str) -> int:
    return getattr(run.model.config, POINTS[point].axes[-1])


def prefilled(model: Model, ids: list[int]) -> KVCache:
    cache = KVCache.with_layers(model.config.n_layers)
    forward(model, ids, cache=cache, logits_at="none")
    return cache


@each_family
def test_logits_and_points_equal_the_float64_reference(run):
    exact, record = naive(run.model, run.ids), RecordHook.for_layers([run.layer], points=["resid_post", "z", "mlp_act"])
    assert_close(logits(run.model, run.ids, record), exact.logits, RANDOM)
    for name, expected in (("resid_post", exact.residual), ("mlp_act", exact.mlp_act), ("z", exact.z)):
        found = record.get(name)[run.layer]
        assert_close(found.reshape(len(found), -1), expected[run.layer].reshape(len(found), -1), RANDOM)


@each_family
def test_cached_equals_uncached_in_any_chunks_and_under_an_intervention(run):
    hook = EditHook([Edit("z", run.layer, lambda rows, pos, key_pos: uneven(rows), [run.position])])
    for given_hook in (None, hook):
        found, cache = cached(run.model, run.ids, run.chunks, given_hook)
        assert_close(found, logits(run.model, run.ids, given_hook), RANDOM)
        assert cache.length == len(run.ids)


@each_family
def test_batched_equals_solo(run):
    both = forward(run.model, [run.ids, run.donor], logits_at="all").logits
    for row, tokens in zip(both, (run.ids, run.donor), strict=True):
        assert_close(row, logits(run.model, tokens), RANDOM)


@each_family
def test_listening_changes_no_bit(run):
    calls = Calls()
    assert_same(logits(run.model, run.ids, calls), logits(run.model, run.ids))
    assert {name for name, *_ in calls.seen} == {name for name in POINTS if has(run.model, name)}


@each_family
def test_what_comes_before_in_place_or_depth_is_untouched(run):
    hook = EditHook([Edit("attn_out", run.layer, lambda rows, pos, key_pos: uneven(rows) + 1, [run.position])])
    clean, found = everything(run.model, run.ids), everything(run.model, run.ids, hook)
    for name, layer in clean:
        old, new = (np.moveaxis(x[name, layer], POINTS[name].seq_axis - 1, 0) for x in (clean, found))
        if layer < run.layer and name != "final_norm":
            assert_same(new, old)
        if run.position:
            assert_close(*(x[: run.position].reshape(run.position, -1) for x in (new, old)), RANDOM)
    moved = (x["resid_post", run.layer][run.position] for x in (found, clean))
    assert row_error(*moved) > 100 * RANDOM


def identities(run: Run) -> list[Intervention]:
    """Interventions that change nothing."""
    at = {"layers": (run.layer,), "positions": [run.position]}
    h = everything(run.model, run.ids)["resid_post", run.layer][run.position]
    u = vector(run, run.model.config.d_model)
    u /= np.linalg.norm(u)
    return [
        Intervention("scale", value=1.0, point="attn_pattern", **at),
        Intervention("steer", value=0.0, vector=u, **at),
        Intervention("patch", vector=h, **at),
        Intervention("set_component", value=float(h @ u), vector=u, **at),
    ]


@each_family
def test_interventions_that_say_what_is_there_change_nothing(run):
    baseline = logits(run.model, run.ids)
    for item in identities(run):
        hook = compile_interventions(run.model, [item], len(run.ids))
        assert_close(logits(run.model, run.ids, hook), baseline, RANDOM)
        assert [edit.fired for edit in hook.edits] == [1]
    other = Intervention("steer", (run.layer,), value=3.0, vector=vector(run, run.model.config.d_model))
    moved = logits(run.model, run.ids, compile_interventions(run.model, [other], len(run.ids)))
    assert row_error(moved, baseline) > 100 * RANDOM


@each_family
def test_interventions_follow_their_formulas_at_the_row_they_name(run):
    name = ("resid_pre", "q", "v", "z", "attn_proj", "mlp_act", "mlp_out", "final_norm")[run.seed % 8]
    vec = vector(run, width(run, name))
    layer = run.model.config.n_layers - 1 if name == "final_norm" else run.layer
    formulas = {
        "zero": lambda x: 0 * x,
        "scale": lambda x: -2 * x,
        "steer": lambda x: x - 2 * vec,
        "patch": lambda x: 0 * x + vec,
        "project_out": lambda x: x - (x @ vec)[..., None] * vec / (vec @ vec),
    }
    clean = everything(run.model, run.ids)[name, layer]
    axis = POINTS[name].seq_axis - 1
    for kind, formula in formulas.items():
        item = Intervention(kind, (layer,), name, [run.position], value=-2.0, vector=vec)
        found = everything(run.model, run.ids, compile_interventions(run.model, [item], len(run.ids)))[name, layer]
        expected = np.moveaxis(clean.copy(), axis, 0)
        expected[run.position] = formula(expected[run.position])
        size = np.abs(clean).max() + np.abs(vec).max()
        assert np.abs(np.moveaxis(found, axis, 0) - expected).max() <= RANDOM * size, (kind, name)


@each_family
def test_a_cache_transplanted_there_and_back_is_what_it_was(run):
    cache, layers = prefilled(run.model, run.ids), range(run.model.config.n_layers)
    start, length = min(run.position, len(run.ids) - 2), 1
    dest = run.seed % (len(run.ids) - length) if moves(run.model) else start
    there, back = prefilled(run.model, run.donor), prefilled(run.model, run.donor)
    there.transplant(cache, layers, (start, start + length), dest)
    back.transplant(there, layers, (dest, dest + length), start)
    for layer in layers:
        (k, v, _), (k0, v0, _) = back.layer(layer).filled(), cache.layer(layer).filled()
        assert_close(k[:, :, start], k0[:, :, start], RANDOM)
        assert_same(v[:, :, start], v0[:, :, start])


@each_family
def test_a_transplant_of_the_own_cache_is_the_identity_and_the_donors_whole_cache_the_donor(run):
    n, layers = len(run.ids) - 1, range(run.model.config.n_layers)
    mine, theirs = prefilled(run.model, run.ids[:-1]), prefilled(run.model, run.donor[:-1])
    own, whole = mine.fork(), mine.fork()
    own.transplant(mine, layers, (0, n), 0)
    whole.transplant(theirs, layers, (0, n), 0)
    last = run.ids[-1:]
    assert_close(forward(run.model, last, cache=own).logits[0], logits(run.model, run.ids)[-1:], RANDOM)
    expected = logits(run.model, [*run.donor[:-1], *last])[-1:]
    assert_close(forward(run.model, last, cache=whole).logits[0], expected, RANDOM)


@each_family
def test_the_lens_of_the_last_layer_is_the_models_distribution(run):
    cfg = run.model.config
    rows = run.model.forward_with_capture(run.ids, [-1])[cfg.n_layers - 1]
    expected = softmax_of(logits(run.model, run.ids))
    for row, ranked in enumerate(run.model.logit_lens(rows, cfg.d_vocab)):
        lens = np.zeros(cfg.d_vocab)
        lens[[token for token, _ in ranked]] = [probability for _, probability in ranked]
        assert np.abs(lens - expected[row]).max() <= RANDOM
