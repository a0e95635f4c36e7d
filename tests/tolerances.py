"""How close is close, decided before measuring, and the comparisons that use it.

far_out         the tolerance where early rows were zeroed or replaced by noise
row_error       relative error of the worst row: |a - b| / |b| over the last axis
assert_close    every row within a tolerance
assert_moved    the positive control: some row differs by at least CONTROL times the tolerance
assert_same     equal to the last bit
assert_same_weights    that of every weight of two models
"""

import numpy as np

from engine import Model

SAME = 1e-5
"""Two ways of computing one thing in float32: cached and uncached, batched and solo, sums of parts."""

REFERENCE = {"synthetic": 1e-5, "smollm2-135m-instruct": 1e-4}
"""float32 engine against the float64 decoder of naive.py: 4 layers and 30 layers."""

AMPLIFIED = 1e-4
"""SAME for SmolLM2 after rows of an early layer are zeroed or replaced by noise: far from anything it was trained on,
30 layers turn a relative noise of 1e-7 in the residual into 3e-5 in the logits.
"""

PATTERN = 1e-4
"""Attention patterns against naive.py: a softmax turns the absolute error of a score into a relative one."""

DECIDED = 10 * SAME
"""How far the best logit is ahead of the second, relative to the largest, where a greedy token is certain: each of the
two may be off by SAME. A few hundred steps of random models come closer than 100 x SAME by chance.
"""

LEAST_KL = 1e-3
"""KL in nats between the runs of two prompts; the same run twice stays below 1e-9. A prompt that differs only at the
far end of four windows of 4 tokens reaches 6e-3.
"""

RANDOM = 5e-5
"""SAME for random configurations of any shape, which nothing keeps from growing rounding errors."""

SCOPED = 1e-6
"""Scoped against dense weights: the same numbers, the same products."""

CONTROL = 100
"""A positive control moves at least this many times the tolerance beside it."""


def far_out(model: Model) -> float:
    return SAME if model.synthetic else AMPLIFIED


def row_error(a: np.ndarray, b: np.ndarray) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape, f"shapes {a.shape} and {b.shape} differ"
    assert a.size, "nothing to compare"
    size = np.maximum(np.linalg.norm(b, axis=-1), np.finfo(np.float32).tiny)
    return float((np.linalg.norm(a - b, axis=-1) / size).max())


def assert_close(a: np.ndarray, b: np.ndarray, tolerance: float = SAME) -> None:
    error = row_error(a, b)
    assert error <= tolerance, f"relative error {error:.2e} is above {tolerance:.0e}"


def assert_moved(a: np.ndarray, b: np.ndarray, tolerance: float = SAME) -> None:
    error = row_error(a, b)
    assert error >= CONTROL * tolerance, f"a change of {error:.2e} is no change against a tolerance of {tolerance:.0e}"


def assert_same(a: np.ndarray, b: np.ndarray) -> None:
    assert a.shape == b.shape, f"shapes {a.shape} and {b.shape} differ"
    assert np.array_equal(a, b), f"not equal to the last bit: relative error {row_error(a, b):.2e}"


KERNEL = 2e-6
"""Of the largest number, between a compiled kernel and its numpy function: both round a few times, elsewhere."""


def assert_same_weights(ours: Model, theirs: Model) -> None:
    for layer in range(theirs.config.n_layers):
        arrays = (model.params.layer(layer).arrays() for model in (ours, theirs))
        for (name, a), (other, b) in zip(*arrays, strict=True):
            assert name == other
            assert_same(a, b)
    assert_same(ours.params.embed, theirs.params.embed)
    assert_same(ours.params.unembed, theirs.params.unembed)
    assert_same(ours.params.final_norm.weight, theirs.params.final_norm.weight)
