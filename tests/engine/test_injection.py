"""prefill_inject and kv_inject_test: a donor's cache in a recipient's run."""

import numpy as np
import pytest
from declared import moves, refuses_to_move
from tolerances import LEAST_KL, assert_close, assert_moved, assert_same

from engine import KVCache, Metric, forward, generate, kv_inject_test, prefill_inject
from engine.distribution import kl_divergence, softmax_of
from engine.errors import CacheError, PromptError
from engine.injection import next_logits, prefilled
from engine.metrics import LEAST_GAP as LEAST_GAPS

LEAST_GAP = LEAST_GAPS["probability"]


@pytest.fixture(scope="module")
def logits(model, ids):
    return forward(model, ids).logits[0]


@pytest.fixture(scope="module")
def donor_logits(model, donor):
    return forward(model, donor).logits[0]


@pytest.fixture(scope="module")
def injection(model, ids, donor):
    return prefill_inject(model, ids, donor, max_new_tokens=3)


def test_the_whole_cache_of_a_donor_gives_the_donors_distribution(model, ids, donor, injection, logits, donor_logits):
    assert_close(injection.injected[None], donor_logits)
    assert_close(injection.baseline[None], logits)
    assert_moved(logits, donor_logits)
    assert injection.kl == pytest.approx(kl_divergence(donor_logits[0], logits[0]), rel=1e-3)
    assert injection.kl > LEAST_KL


def test_the_continuations_are_those_of_the_two_prompts(model, ids, donor, injection):
    assert injection.baseline_text == generate(model, ids, 3)
    assert injection.injected_text == generate(model, donor, 3)


def test_an_injection_says_what_it_replaced(model, ids, injection):
    n = len(ids)
    assert (injection.source, injection.dest) == ((0, n - 1), 0)
    assert injection.layers == list(range(model.config.n_layers))
    assert injection.rows_replaced == model.config.n_layers * (n - 1)
    assert injection.cache.length == n - 1


def test_rows_that_a_sliding_window_hides_are_reported_and_change_nothing(model, ids, donor, injection):
    n = len(ids)
    windows = {layer: window for layer, window in enumerate(model.config.windows) if window is not None}
    hidden = {layer: list(range(n - window)) for layer, window in windows.items() if window < n}
    assert injection.unseen == hidden
    if len(hidden) == model.config.n_layers:
        far = prefill_inject(model, ids, donor, source=(0, n - max(windows.values())), max_new_tokens=1)
        assert sum(map(len, far.unseen.values())) == far.rows_replaced
        assert far.kl < 1e-9


def test_injecting_a_prompt_into_itself_changes_nothing(model, ids, logits):
    own = prefill_inject(model, ids, ids, max_new_tokens=2)
    assert_close(own.injected[None], logits)
    assert own.kl < 1e-9
    assert own.injected_text == own.baseline_text


def rows_that_fit(model, n) -> tuple[tuple[int, int], int]:
    """Two rows inside every window of the last token, and one place further if they can be moved."""
    return (n - 4, n - 2), n - 3 if moves(model) else n - 4


def test_the_edited_cache_reaches_the_first_new_token(model, ids, donor):
    source, dest = rows_that_fit(model, len(ids))
    part = prefill_inject(model, ids, donor, layers=[1, -1], source=source, dest=dest, max_new_tokens=1)
    assert part.layers == [1, model.config.n_layers - 1]
    assert part.rows_replaced == 4
    assert_moved(part.injected[None], part.baseline[None])
    mine, theirs = prefilled(model, ids), prefilled(model, donor)
    for layer in part.layers:
        written, given = part.cache.layer(layer).v[:, :, dest : dest + 2], theirs.layer(layer).v[:, :, slice(*source)]
        assert_same(written, given)
    assert_same(part.cache.layer(0).v, mine.layer(0).v)
    assert_same(part.injected, next_logits(model, part.cache, ids[-1]))


def test_keys_values_heads_and_alignment_are_choices(model, ids, donor):
    source, dest = rows_that_fit(model, len(ids))

    def injected(**settings):
        return prefill_inject(model, ids, donor, source=source, dest=dest, max_new_tokens=1, **settings).injected

    runs = [injected(), injected(what="k"), injected(what="v"), injected(heads=[0]), injected(rope="keep")]
    if not moves(model):  # the rows stay where they were, so there is nothing to turn
        assert_same(runs.pop(), runs[0])
    for i, one in enumerate(runs):
        for other in runs[:i]:
            assert_moved(one[None], other[None], 1e-6)


def test_a_donor_may_be_a_cache_and_stays_as_it_was(model, ids, donor, injection):
    theirs = prefilled(model, donor)
    before = [kv.k.copy() for kv in theirs.layers]
    assert_same(prefill_inject(model, ids, theirs, max_new_tokens=1).injected, injection.injected)
    for old, kv in zip(before, theirs.layers, strict=True):
        assert_same(old, kv.k)


def test_by_default_as_much_of_the_donor_goes_in_as_fits(model, ids, donor):
    longer = prefill_inject(model, ids, [*donor, *donor], max_new_tokens=1)
    assert longer.source == (0, len(ids) - 1)
    shorter = prefill_inject(model, ids, donor[:3], max_new_tokens=1)
    assert (shorter.source, shorter.dest) == ((0, 2), 0)


def test_a_donor_goes_where_it_is_told_unless_positions_are_learned(model, ids, donor):
    if not moves(model):
        with refuses_to_move():
            prefill_inject(model, ids, donor[:3], dest=1, max_new_tokens=1)
        return
    moved = prefill_inject(model, ids, donor[:3], dest=1, max_new_tokens=1)
    assert (moved.source, moved.dest) == ((0, 2), 1)


def test_a_scan_finds_the_donors_answer_in_all_layers_together(model, ids, donor, logits, donor_logits):
    target, layers = int(donor_logits[0].argmax()), [1, 0, -1]
    scan = kv_inject_test(model, ids, donor, target, layers=layers)
    p, q = softmax_of(logits)[0, target], softmax_of(donor_logits)[0, target]
    assert scan.baseline == pytest.approx(p, rel=1e-3)
    assert scan.donor == pytest.approx(q, rel=1e-3)
    last = model.config.n_layers - 1
    assert [cell.layers for cell in scan.per_layer] == [[0], [1], [last]]
    assert [cell.layers for cell in scan.from_last] == [[last], [1, last], [0, 1, last]]
    assert [cell.layers for cell in scan.from_first] == [[0], [0, 1], [0, 1, last]]
    for one, same in ((scan.from_last[-1], scan.from_first[-1]), (scan.per_layer[0], scan.from_first[0])):
        assert one.layers == same.layers  # other rows of one product, which BLAS may add up in another order
        assert one.probability == pytest.approx(same.probability, rel=1e-4)
    assert (scan.source, scan.dest) == ((0, len(ids) - 1), 0)


@pytest.mark.parametrize("fewer", [0, 1], ids=["as many tokens", "one token fewer"])
def test_each_cell_of_a_scan_is_one_injection(model, ids, donor, donor_logits, fewer):
    target, donor = int(donor_logits[0].argmax()), donor[fewer:]
    scan = kv_inject_test(model, ids, donor, target, layers=[1])
    alone = prefill_inject(model, ids, donor, layers=[1], max_new_tokens=1)
    assert scan.donor == pytest.approx(float(softmax_of(forward(model, donor).logits[0, 0])[target]), rel=1e-4)
    assert scan.per_layer[0].probability == pytest.approx(float(softmax_of(alone.injected)[target]), rel=1e-4)
    assert scan.per_layer[0].kl == pytest.approx(alone.kl, rel=1e-3)


def furthest_apart(logits, donor_logits) -> int:
    """The token whose probability differs most between the two prompts."""
    gap = np.abs(softmax_of(donor_logits)[0] - softmax_of(logits)[0])
    assert gap.max() >= LEAST_GAP
    return int(gap.argmax())


def test_the_own_cache_recovers_nothing_and_an_unrelated_one_something_else(model, ids, donor, logits, donor_logits):
    target = int(np.abs(softmax_of(donor_logits[0]) - softmax_of(logits[0])).argmax())
    scan = kv_inject_test(model, ids, donor, target, layers=[0, 1, -1])
    assert scan.self_control.probability == pytest.approx(scan.baseline, rel=1e-3)
    assert scan.self_control.kl < 1e-9
    assert scan.unrelated_control.kl > 1e-4
    if abs(scan.donor - scan.baseline) < LEAST_GAP:
        assert [cell.recovered for cell in scan.per_layer] == [None] * 3
        return
    assert scan.self_control.recovered == pytest.approx(0, abs=1e-3)
    assert scan.per_layer[0].recovered == pytest.approx(
        (scan.per_layer[0].probability - scan.baseline) / (scan.donor - scan.baseline)
    )


def test_all_layers_together_recover_the_whole_effect(synthetic):
    """On the small model only: a scan of all layers of SmolLM2 takes a hundred runs."""
    recipient, other = list(b"The capital"), list(b"Our capital")
    before, after = (forward(synthetic, tokens).logits[0] for tokens in (recipient, other))
    scan = kv_inject_test(synthetic, recipient, other, furthest_apart(before, after))
    for everything in (scan.from_first[-1], scan.from_last[-1]):
        assert everything.recovered == pytest.approx(1, abs=1e-3)
        assert everything.probability == pytest.approx(scan.donor, rel=1e-3)
        assert everything.kl == pytest.approx(kl_divergence(after[0], before[0]), rel=1e-3)
    assert scan.self_control.recovered == pytest.approx(0, abs=1e-3)
    assert abs(scan.per_layer[0].recovered - 1) > 0.05


def test_recovery_is_left_out_where_donor_and_baseline_hardly_differ(model, ids):
    scan = kv_inject_test(model, ids, ids, 5, layers=[0])
    assert scan.per_layer[0].recovered is None


def test_an_injection_says_how_much_of_the_donor_it_recovers(model, ids, donor, injection, logits, donor_logits):
    token, other = int(donor_logits[0].argmax()), int(logits[0].argmin())
    assert_close(injection.donor[None], donor_logits)
    part = prefill_inject(model, ids, donor, layers=[1], max_new_tokens=1)
    for metric in (Metric("logit", token), Metric("logit_difference", token, other), Metric("kl")):
        before, after, theirs = (
            float(metric(x[None], logits[0])[0]) for x in (logits[0], part.injected, donor_logits[0])
        )
        if abs(theirs - before) < LEAST_GAPS[metric.kind]:
            assert part.recovered(metric) is None
        else:
            assert injection.recovered(metric) == pytest.approx(1, abs=1e-2)
            assert part.recovered(metric) == pytest.approx((after - before) / (theirs - before), rel=1e-2, abs=1e-3)


def test_a_cache_as_a_donor_has_no_answer_of_its_own_to_recover(synthetic):
    moved = prefill_inject(synthetic, [1, 2, 3], prefilled(synthetic, [4, 5, 6]), max_new_tokens=1)
    assert moved.donor is None
    assert moved.recovered(Metric("logit", 5)) is None


def test_the_unrelated_donor_depends_on_the_seed_only(synthetic):
    runs = [kv_inject_test(synthetic, [1, 2, 3], [4, 5, 6], 7, layers=[0], seed=s).unrelated_control for s in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("run", [prefill_inject, lambda *a: kv_inject_test(*a, 7)])
def test_a_prompt_of_one_token_has_nothing_to_edit(synthetic, run):
    for pair in (([1], [2, 3]), ([2, 3], [1])):
        with pytest.raises(PromptError, match="at least two tokens"):
            run(synthetic, *pair)


def test_rows_that_do_not_exist_are_refused(synthetic):
    with pytest.raises(CacheError, match=r"\[0, 3\) do not lie in the 2"):
        prefill_inject(synthetic, [1, 2, 3], [4, 5, 6], source=(0, 3))
    with pytest.raises(CacheError, match="dest 2 does not lie in the 2"):
        prefill_inject(synthetic, [1, 2, 3], [4, 5, 6], dest=2)
    with pytest.raises(CacheError, match="3 layers, the model 4"):
        prefill_inject(synthetic, [1, 2, 3], KVCache.with_layers(3))
