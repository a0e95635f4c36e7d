"""One run computed in different ways: cached and uncached, in chunks, from a fork; with hooks and without."""

import numpy as np
import pytest
from declared import turns
from recording import Calls, Replace, cached
from tolerances import SAME, assert_close, assert_moved, assert_same, far_out

from engine import CompositeHook, Intervention, KVCache, SteerHook, ZeroAblateHook, compile_interventions, forward
from engine.errors import CacheError, InputError, PositionError


def vector(model) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(model.config.d_model).astype(np.float32)


def whole(model, ids, hook=None, prompt=None):
    return forward(model, ids, hook=hook, logits_at="all", prompt_length=prompt).logits[0]


@pytest.fixture(scope="module")
def plain(model, ids) -> np.ndarray:
    """Logits of an uncached run without hooks."""
    return whole(model, ids)


@pytest.fixture(scope="module")
def steered(model, ids) -> np.ndarray:
    """Logits of an uncached run, steered at the prompt's last row."""
    return whole(model, ids, SteerHook().add(1, vector(model), 1.0))


def chunkings(n: int) -> list[list[int]]:
    return [[1] * n, [2, n - 2], [n - 1, 1], [1, 2, n - 3]]


@pytest.mark.parametrize("which", range(4))
def test_cached_logits_equal_uncached_ones(model, ids, plain, which):
    logits, cache = cached(model, ids, chunkings(len(ids))[which])
    assert_close(logits, plain)
    assert cache.length == cache.next_position == len(ids)


def test_a_cache_of_another_prompt_is_told_apart(model, ids, donor, plain):
    cache = KVCache.with_layers(model.config.n_layers)
    forward(model, donor[:-1], cache=cache)
    assert_moved(forward(model, ids[-1:], cache=cache).logits[0], plain[-1:])


HOOKS = {
    "steering, scope last": lambda m: SteerHook().add(1, vector(m), 1.0),
    "steering, scope all": lambda m: SteerHook().add(1, vector(m), 1.0, positions="all"),
    "steering, scope prompt": lambda m: SteerHook().add(1, vector(m), 1.0, positions="prompt"),
    "steering, scope generated": lambda m: SteerHook().add(1, vector(m), 1.0, positions="generated"),
    "steering at positions 1 and -1": lambda m: SteerHook().add(1, vector(m), 1.0, positions=[1, -1]),
    "ablation": lambda m: ZeroAblateHook.for_layers([2]),
    "ablation then steering": lambda m: CompositeHook(
        [ZeroAblateHook.for_layers([1]), SteerHook().add(1, vector(m), 1.0)]
    ),
    "a doubled head": lambda m: compile_interventions(m, [Intervention("scale", (1,), "z", heads=(1,), value=2.0)], 3),
    "a knock-out": lambda m: compile_interventions(m, [Intervention("knockout", (0, 1), "attn_pattern", keys=(1,))], 3),
    "doubled keys": lambda m: Replace("k", 1, lambda x: x * np.float32(2)),
}


@pytest.mark.parametrize("name", HOOKS)
def test_cached_equals_uncached_under_intervention(model, ids, plain, name):
    """The first three tokens are the prompt; the rest stands for generated tokens, two singly, then all others."""
    expected = whole(model, ids, HOOKS[name](model), prompt=3)
    sizes = [size for size in (3, 1, 1, len(ids) - 5) if size]
    logits, _ = cached(model, ids, sizes, HOOKS[name](model), prompt=3)
    tolerance = far_out(model) if "ablation" in name else SAME
    assert_close(logits, expected, tolerance)
    assert_moved(logits, plain, tolerance)


def test_scope_last_covers_every_row_that_emits_a_token_once(model, ids):
    hook = SteerHook().add(1, vector(model), 1.0)
    cached(model, ids, [3] + [1] * (len(ids) - 3), hook, prompt=3)
    assert hook.edits[0].fired == len(ids) - 2


@pytest.mark.parametrize("which", range(4))
def test_a_chunked_prefill_intervenes_only_on_the_prompts_last_row(model, ids, plain, steered, which):
    hook = SteerHook().add(1, vector(model), 1.0)
    logits, _ = cached(model, ids, chunkings(len(ids))[which], hook)
    assert hook.edits[0].fired == 1
    assert_close(logits, steered)
    assert_close(logits[:-1], plain[:-1])
    assert_moved(logits[-1:], plain[-1:])


def test_position_zero_is_the_first_token_in_every_chunk(model, ids, plain):
    hook = ZeroAblateHook.for_layers([1], positions=[0])
    logits, _ = cached(model, ids, [2, 1, len(ids) - 3], hook)
    assert hook.edits[0].fired == 1
    whole_run = whole(model, ids, ZeroAblateHook.for_layers([1], positions=[0]))
    assert_close(logits, whole_run, far_out(model))
    assert_moved(logits, plain, far_out(model))


def test_a_fork_continues_like_the_original_and_leaves_it_alone(model, ids, donor, plain):
    cache = KVCache.with_layers(model.config.n_layers)
    forward(model, ids[:-1], cache=cache)
    fork = cache.fork()
    forward(model, donor[:2], cache=fork)
    assert (cache.length, fork.length) == (len(ids) - 1, len(ids) + 1)
    assert_close(forward(model, ids[-1:], cache=cache).logits[0], plain[-1:])


def test_a_cropped_cache_continues_from_where_it_was_cut(model, ids, donor, plain):
    cache = KVCache.with_layers(model.config.n_layers)
    forward(model, ids[:2] + donor, cache=cache)
    cache.crop(2)
    assert_close(forward(model, ids[2:], cache=cache, logits_at="all").logits[0], plain[2:])


def test_logits_can_be_asked_for_by_absolute_position(model, ids, plain):
    expected, n = plain, len(ids)
    some = forward(model, ids, logits_at=[1, -1])
    assert some.logit_positions.tolist() == [1, n - 1]
    assert_close(some.logits[0], expected[[1, -1]])
    last = forward(model, ids)
    assert last.logit_positions.tolist() == [n - 1]
    assert_close(last.logits[0], expected[-1:])
    none = forward(model, ids, logits_at="none")
    assert none.logits is None
    cache = KVCache.with_layers(model.config.n_layers)
    forward(model, ids[:2], cache=cache)
    rest = forward(model, ids[2:], cache=cache, logits_at=[3])
    assert_close(rest.logits[0], expected[[3]])


def test_logits_of_positions_outside_the_pass_are_refused(synthetic):
    cache = KVCache.with_layers(4)
    forward(synthetic, [1, 2, 3], cache=cache)
    for wanted in ([0], [5], [-3]):
        with pytest.raises(PositionError, match="positions 3 to 4"):
            forward(synthetic, [4, 5], cache=cache.fork(), logits_at=wanted)


def test_layers_run_in_two_halves_equal_one_pass(model, ids):
    half = model.config.n_layers // 2
    lower = forward(model, ids, stop=half)
    assert lower.logits is None
    upper = forward(model, None, residual=lower.residual, start=half, logits_at="all")
    assert_same(upper.logits[0], whole(model, ids))


def test_a_partial_pass_fires_only_the_points_it_runs(synthetic):
    calls = Calls()
    forward(synthetic, [1, 2], hook=calls, stop=2)
    assert {layer for _, layer, *_ in calls.seen} == {0, 1}
    calls.seen.clear()
    forward(synthetic, None, residual=np.ones((2, 64), np.float32), start=3, hook=calls)
    assert {call[:2] for call in calls.seen if call[0] in ("embed", "final_norm")} == {("final_norm", 3)}


def test_a_residual_can_have_gaps_in_its_positions(model, ids):
    """Rows 0, 2, 3 of a layer's input see each other exactly as far apart as in the prompt."""
    x = forward(model, ids, stop=1, logits_at="none").residual[0]
    gap = np.array([0, 2, 3])
    with_gap = forward(model, None, residual=x[gap], start=1, positions=gap, logits_at=[3])
    hidden = Intervention("knockout", tuple(range(1, model.config.n_layers)), "attn_pattern", keys=(1,))
    knocked = forward(model, ids, hook=compile_interventions(model, [hidden], len(ids)), logits_at=[3])
    assert_close(with_gap.logits[0], knocked.logits[0])
    close_up = forward(model, None, residual=x[gap], start=1)
    depends = any(turns(model, layer) for layer in range(1, model.config.n_layers))
    (assert_moved if depends else assert_close)(close_up.logits[0], knocked.logits[0])


@pytest.mark.parametrize("positions", [[0], [0, 1, 2, 3], [2, 1, 0], [0, 0, 1], [-1, 0, 1], [0.0, 1.0, 2.0]])
def test_positions_that_do_not_fit_the_rows_are_refused(synthetic, positions):
    with pytest.raises(PositionError, match="3 ascending whole numbers"):
        forward(synthetic, [1, 2, 3], positions=np.array(positions))


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (2, 2), (3, 2), (-1, 2), (0, 5), (4, 4)])
def test_a_range_of_layers_that_cannot_be_run_is_refused(synthetic, start, stop):
    with pytest.raises(InputError, match="0 <= start < stop <= 4"):
        forward(synthetic, [1, 2], start=start, stop=stop)


def test_a_pass_needs_tokens_or_a_residual_but_not_both(synthetic):
    x = np.ones((2, 64), np.float32)
    for tokens, given, start in (([1], x, 0), (None, None, 0), ([1], None, 1)):
        with pytest.raises(InputError, match="residual"):
            forward(synthetic, tokens, residual=given, start=start)
    for bad in (x[0], x[:, :5], x[:0]):
        with pytest.raises(InputError, match=r"must be \(seq, 64\)"):
            forward(synthetic, None, residual=bad)


def test_a_cache_of_other_sizes_is_refused(synthetic):
    with pytest.raises(CacheError, match="3 layers, the model 4"):
        forward(synthetic, [1, 2], cache=KVCache.with_layers(3))
