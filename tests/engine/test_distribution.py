"""Next-token distributions: softmax, KL divergence, top k, ranks."""

import numpy as np
import pytest

from engine.distribution import kl_divergence, kl_rows, rank_of, softmax_of, top_k


@pytest.fixture
def logits():
    return np.random.default_rng(0).standard_normal((3, 50)).astype(np.float32) * 5


def test_probabilities_are_exponentials_that_sum_to_one(logits):
    before = logits.copy()
    exp = np.exp(logits.astype(np.float64))
    assert np.allclose(softmax_of(logits), exp / exp.sum(-1, keepdims=True), rtol=1e-5)
    assert np.array_equal(logits, before)


def test_large_logits_do_not_overflow():
    assert softmax_of(np.array([1e4, 0, -1e4], np.float32)).tolist() == [1, 0, 0]
    assert kl_divergence(np.array([300, 0], np.float32), np.array([300, 0], np.float32)) == 0


def test_kl_is_the_expectation_under_its_first_argument(logits):
    p, q = (softmax_of(row.astype(np.float64)) for row in logits[:2])
    forwards, backwards = (p * np.log(p / q)).sum(), (q * np.log(q / p)).sum()
    assert kl_divergence(logits[0], logits[1]) == pytest.approx(forwards, rel=1e-5)
    assert kl_divergence(logits[1], logits[0]) == pytest.approx(backwards, rel=1e-5)
    assert abs(forwards - backwards) > 0.1
    assert kl_divergence(logits[0], logits[0] + 3) == pytest.approx(0, abs=1e-9)


def test_a_kl_near_zero_keeps_its_digits(logits):
    near = logits + np.float32(1e-3) * np.random.default_rng(1).standard_normal(logits.shape, np.float32)
    p, q = (np.exp(x.astype(np.longdouble)) for x in (near, logits[0]))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum()
    before = logits.copy()
    assert kl_rows(near, logits[0]) == pytest.approx((p * np.log(p / q)).sum(-1).astype(float), rel=1e-5)
    assert kl_rows(near, logits[0])[0] < 1e-5
    assert np.array_equal(logits, before)


@pytest.mark.parametrize("n", [1, 63, 64, 65, 300, 4097])
@pytest.mark.parametrize("k", [1, 3, 70])
def test_top_k_is_what_sorting_gives(n, k):
    rng = np.random.default_rng(n)
    for scores in (rng.standard_normal(n), rng.integers(0, 4, n)):
        order = np.argsort(-scores, kind="stable")[:k]
        assert top_k(scores.astype(np.float32), k) == [(i, np.float32(scores[i])) for i in order]


def test_top_k_is_sorted_with_ties_by_index():
    scores = np.array([1, 5, 3, 5, 2, 5], np.float32)
    assert top_k(scores, 2) == [(1, 5.0), (3, 5.0)]
    assert top_k(scores, 4) == [(1, 5.0), (3, 5.0), (5, 5.0), (2, 3.0)]
    assert top_k(scores, 99) == [(1, 5.0), (3, 5.0), (5, 5.0), (2, 3.0), (4, 2.0), (0, 1.0)]
    assert top_k(scores, 0) == []


def test_a_rank_counts_the_larger_entries():
    scores = np.array([1, 5, 3, 5], np.float32)
    assert [rank_of(scores, i) for i in range(4)] == [3, 0, 2, 0]
