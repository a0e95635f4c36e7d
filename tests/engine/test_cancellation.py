"""tick: called at least once per layer; raising from it stops the work at once and leaves everything usable."""

import pytest
from recording import Calls
from tolerances import assert_close, assert_same

from engine import (
    KVCache,
    Metric,
    ablation_scan,
    capture_donor_state,
    forward,
    generate,
    kv_inject_test,
    load_model,
    patch_and_trace,
    patching_grid,
    prefill_inject,
    trace_forward,
)
from engine.errors import CacheError


class Cancelled(Exception):
    pass


WORK = {
    "forward": lambda m, ids, donor, tick: forward(m, ids, tick=tick),
    "generate": lambda m, ids, donor, tick: generate(m, ids, 2, tick=tick),
    "trace_forward": lambda m, ids, donor, tick: trace_forward(m, ids, tick=tick),
    "capture_donor_state": lambda m, ids, donor, tick: capture_donor_state(m, ids, [(-1, 0)], tick=tick),
    "patch_and_trace": lambda m, ids, donor, tick: patch_and_trace(
        m, ids, capture_donor_state(m, donor, [(1, 0)]), tick=tick
    ),
    "prefill_inject": lambda m, ids, donor, tick: prefill_inject(m, ids, donor, max_new_tokens=1, tick=tick),
    "kv_inject_test": lambda m, ids, donor, tick: kv_inject_test(m, ids, donor, 1, layers=[0], tick=tick),
}
PASSES = {"generate": 2, "prefill_inject": 7, "kv_inject_test": 2}


@pytest.mark.parametrize("name", WORK)
def test_tick_counts_the_layers_of_all_passes_once_to_their_total(model, ids, donor, name):
    ticks, n = [], model.config.n_layers
    WORK[name](model, ids, donor, lambda *tick: ticks.append(tick))
    total = n * PASSES.get(name, 1)
    assert ticks == [(i + 1, total, f"layer {i % n}") for i in range(total)]


@pytest.mark.parametrize("mode", ["mean", "resample"])
@pytest.mark.parametrize("over", [[[4, 3, 2, 1]], [[5, 6], [7, 8, 9]]])
def test_the_progress_of_an_ablation_counts_its_pool_and_its_sweep_as_one(synthetic, mode, over):
    told, options = [], {"mode": mode, "over": over, "by": "head", "budget": 1 << 14}
    ablation_scan(synthetic, [1, 2, 3, 4], Metric("kl"), tick=lambda *t: told.append(t[:2]), **options)
    total = len(told)
    assert total > 2 * synthetic.config.n_layers
    assert told == [(i + 1, total) for i in range(total)]


@pytest.mark.parametrize("by", ["position", "head"])
def test_the_progress_of_a_grid_is_one_count_that_ends_at_its_total(synthetic, by):
    told, metric = [], Metric("kl")
    options = {"point": "z", "by": by, "positions": iter([1, 2]), "layers": iter([1, 3])}
    patching_grid(synthetic, [1, 2, 3, 4], [1, 5, 3, 4], metric, tick=lambda *t: told.append(t[:2]), **options)
    total = len(told)
    assert total > synthetic.config.n_layers
    assert told == [(i + 1, total) for i in range(total)]


@pytest.mark.parametrize("name", WORK)
def test_raising_from_tick_stops_the_work(model, ids, donor, name):
    ticks = []

    def cancel(*tick):
        ticks.append(tick)
        if len(ticks) == 3:
            raise Cancelled

    with pytest.raises(Cancelled):
        WORK[name](model, ids, donor, cancel)
    assert len(ticks) == 3


def test_no_layer_is_entered_after_a_cancel_and_the_next_run_succeeds(model, ids):
    baseline, calls = forward(model, ids).logits, Calls(["resid_pre"])

    def cancel(done, total, what):
        if done == 3:
            raise Cancelled

    with pytest.raises(Cancelled):
        forward(model, ids, hook=calls, tick=cancel)
    assert [layer for _, layer, *_ in calls.seen] == [0, 1]
    assert_same(forward(model, ids).logits, baseline)


def test_a_cache_left_ragged_by_a_cancel_says_so_and_can_be_cropped(model, ids):
    cache = KVCache.with_layers(model.config.n_layers)
    forward(model, ids[:3], cache=cache)

    def cancel(done, total, what):
        if done == 3:
            raise Cancelled

    with pytest.raises(Cancelled):
        forward(model, ids[3:], cache=cache, tick=cancel)
    with pytest.raises(CacheError, match=f"layer 0 holds {len(ids)}, layer 1 holds {len(ids)}|layer 2 holds 3"):
        forward(model, ids[3:], cache=cache)
    cache.crop(3)
    assert_close(forward(model, ids[3:], cache=cache).logits[0], forward(model, ids).logits[0])


@pytest.mark.real
def test_loading_ticks_per_layer_and_can_be_cancelled(smollm2):
    ticks = []

    def cancel(done, total, what):
        ticks.append((done, total, what))
        if done == 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        load_model("smollm2-135m-instruct", tick=cancel, converted=False)
    assert ticks == [(1, 30, "reading layer 0"), (2, 30, "reading layer 1")]
