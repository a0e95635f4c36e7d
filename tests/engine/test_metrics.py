"""Metrics: how much of the way is recovered, what rounding can do, and where a metric can no longer move."""

import numpy as np
import pytest

from engine import Metric
from engine.errors import InputError
from engine.metrics import LEAST_GAP, METRICS, recovered, rounding, saturating


@pytest.mark.parametrize("kind", METRICS)
def test_recovered_is_the_part_of_the_way_from_baseline_to_donor(kind):
    gap = 2 * LEAST_GAP[kind]
    for part in (0.0, 0.25, 1.0, 1.5, -0.5):
        assert recovered(kind, 1 + part * gap, 1.0, 1 + gap) == pytest.approx(part)
        assert recovered(kind, 1 - part * gap, 1.0, 1 - gap) == pytest.approx(part), "a metric that falls counts alike"
    values = np.float32([1, 1 + gap / 2, 1 + gap])
    np.testing.assert_allclose(recovered(kind, values, 1.0, 1 + gap), [0, 0.5, 1], atol=1e-5)
    assert recovered(kind, values, 1.0, 1 + gap).dtype == np.float32


@pytest.mark.parametrize(
    ("kind", "least"), [("probability", 0.05), ("logit", 0.1), ("logit_difference", 0.1), ("kl", 0.01)]
)
def test_nothing_is_recovered_between_runs_that_are_too_close_in_units_of_the_metric(kind, least):
    assert recovered(kind, 1.0, 0.0, 0.99 * least) is None
    assert recovered(kind, 1.0, 0.0, -0.99 * least) is None
    assert recovered(kind, 1.0, 0.0, 1.01 * least) == pytest.approx(1 / (1.01 * least))
    assert recovered(kind, 1.0, 3.0, 3.0) is None


def test_a_hair_between_two_logits_is_no_way_to_recover():
    assert recovered("logit", 16.7834, 16.8279, 16.8271) is None


@pytest.mark.parametrize("kind", METRICS)
@pytest.mark.parametrize("size", [0.5, 4.0])
def test_rounding_bounds_what_errors_in_the_logits_do_and_not_by_far(kind, size):
    rng = np.random.default_rng(0)
    logits = (size * rng.standard_normal(500)).astype(np.float32)
    best, second = np.argsort(-logits)[:2]
    metric = Metric(kind, *{"kl": (), "logit_difference": (best, second)}.get(kind, (best,)))
    e, bound = 1e-4 * np.abs(logits).max(), rounding(metric, logits)
    changes = []
    for share in (0.02, 0.5, None):  # all but the named tokens down by e, at random, or half and half
        for _ in range(20):
            off = e * np.where(rng.random(500) < share, 1, -1) if share else e * rng.uniform(-1, 1, 500)
            off[best], off[second] = e, -e
            noisy = (logits + off).astype(np.float32)
            changes.append(abs(float((metric(noisy[None], logits) - metric(logits[None], logits))[0])))
    assert max(changes) <= 1.05 * bound
    assert max(changes) > bound / 20


SATURATED = [
    (Metric("probability", 0), [20, 0, 0], True),
    (Metric("probability", 1), [20, 0, 0], True),
    (Metric("probability", 0), [1, 0, 0], False),
    (Metric("kl"), [20, 0, 0], True),
    (Metric("kl"), [1, 0, 0], False),
    (Metric("kl"), [0] * 1000, False),
    (Metric("logit", 0), [20, 0, 0], False),
    (Metric("logit_difference", 0, 1), [20, 0, 0], False),
]


@pytest.mark.parametrize(("metric", "logits", "saturated"), SATURATED)
def test_probabilities_and_kl_are_saturated_where_a_logit_hardly_moves_them(metric, logits, saturated):
    row = np.float32(logits)
    p = saturating(metric, row)
    assert (p is not None) == saturated
    raised = row.copy()
    raised[0] += 1
    if saturated:
        assert p == pytest.approx(float(np.exp(row[metric.token or 0]) / np.exp(row).sum()), rel=1e-4)
        assert abs(float((metric(raised[None], row) - metric(row[None], row))[0])) < 0.01


def test_a_token_has_no_difference_to_itself():
    with pytest.raises(InputError, match="token and against are one token, 7"):
        Metric("logit_difference", 7, 7)
