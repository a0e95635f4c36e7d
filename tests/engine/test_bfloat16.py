"""Weights rounded to bfloat16: the rounding, and that nothing but the weights changes."""

from dataclasses import replace

import numpy as np
import pytest
from tolerances import KERNEL

from engine import Model, fast, forward, load_model, ops
from engine.errors import InputError
from engine.matrices import panelled, widened
from engine.matrices import rounded as to_bfloat16
from engine.params import Params, in_bfloat16, in_panels

PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def rounded() -> Model:
    return load_model("synthetic", weights="bf16")


def as_float32(model: Model) -> Model:
    """The same rounded numbers, in float32."""
    layers = [model.params.layer(i).with_matrices(widened) for i in range(model.config.n_layers)]
    return replace(model, params=Params(model.params.ends, layers.__getitem__, len(layers)))


def test_rounding_goes_to_the_nearest_and_ties_go_to_even() -> None:
    exact = np.array([[1, 1.0078125], [-2, 0]], np.float32)
    assert (widened(to_bfloat16(exact)) == exact).all()
    ties = np.array([[1 + 2**-8, 1 + 3 * 2**-8], [1 + 2**-8 + 2**-20, -(1 + 2**-8)]], np.float32)
    assert widened(to_bfloat16(ties)).tolist() == [[1, 1 + 2**-6], [1 + 2**-7, -1]]
    extreme = np.array([[3e38], [1e-30]], np.float32)
    assert np.abs(widened(to_bfloat16(extreme)) / extreme - 1).max() <= 2**-8
    noise = np.random.default_rng(0).standard_normal((100, 100)).astype(np.float32)
    share = np.abs(widened(to_bfloat16(noise)) / noise - 1)
    assert 2**-9 < share.max() <= 2**-8


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("rows", [1, ops.ROWS_BY_HALVES, ops.ROWS_BY_HALVES + 1])
@pytest.mark.parametrize("n", [1, 7, ops.SUM_BLOCK, 2 * ops.SUM_BLOCK + 1, 3 * ops.SUM_BLOCK - 2])
def test_a_product_is_that_with_the_widened_numbers_also_of_an_odd_number_of_features(
    n: int, rows: int, kernels: bool
) -> None:
    drawn = np.random.default_rng(0)
    x, w = (drawn.standard_normal(shape).astype(np.float32) for shape in ((rows, n), (n, 5)))
    pairs = to_bfloat16(w)
    assert pairs.shape == ((n + 1) // 2, 5)
    with fast.using(kernels):
        made = ops.linear(x, panelled(pairs, fast.kernels().WIDTH) if kernels else pairs)
    assert np.abs(made - x @ widened(pairs)[:n]).max() <= KERNEL * np.abs(made).max()


@pytest.mark.parametrize("n", [ops.SUM_BLOCK - 2, ops.SUM_BLOCK + 1])
def test_rows_that_are_wider_or_narrower_than_a_whole_block_are_refused(n: int) -> None:
    with pytest.raises(ValueError, match="mismatch"):
        ops.linear(np.ones((1, n), np.float32), to_bfloat16(np.ones((ops.SUM_BLOCK, 5), np.float32)))


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("prompt", ["a", PROMPT])
def test_a_run_is_that_of_the_rounded_weights_in_float32(rounded: Model, prompt: str, kernels: bool) -> None:
    expected = forward(as_float32(rounded), list(rounded.encode(prompt)), logits_at="all").logits
    if kernels:
        with fast.using(True):
            width = fast.kernels().WIDTH
        rounded = replace(rounded, params=in_panels(in_bfloat16(rounded.params, 4), 4, width))
    with fast.using(kernels):
        made = forward(rounded, list(rounded.encode(prompt)), logits_at="all").logits
    assert np.abs(made - expected).max() <= 10 * KERNEL * np.abs(expected).max()


def test_it_is_not_that_of_the_weights_as_they_were(rounded: Model, synthetic: Model) -> None:
    ids = list(rounded.encode(PROMPT))
    apart = np.abs(forward(rounded, ids).logits - forward(synthetic, ids).logits).max()
    assert 1e-3 < apart < 0.3 * np.abs(forward(synthetic, ids).logits).max()


def test_the_model_says_what_it_is(rounded: Model, synthetic: Model) -> None:
    assert (rounded.weights, synthetic.weights) == ("bf16", "dense")
    assert rounded.fingerprint == f"{synthetic.fingerprint}:bf16"
    with pytest.raises(InputError, match='dense_layers is for weights="scoped"'):
        load_model("synthetic-of-a-file", weights="bf16", dense_layers=2)


def test_matrices_take_half_the_memory_and_norms_and_ends_stay(rounded: Model, synthetic: Model) -> None:
    for (name, now), (_, before) in zip(
        rounded.params.layer(0).stored(), synthetic.params.layer(0).stored(), strict=True
    ):
        halved = name in ("qkv", "o", "gate_up", "down")
        assert now.nbytes == before.nbytes // (2 if halved else 1), name
    assert rounded.params.embed is synthetic.params.embed or (rounded.params.embed == synthetic.params.embed).all()
    again = in_bfloat16(rounded.params, rounded.config.n_layers)
    assert (again.layer(0).qkv.weight == rounded.params.layer(0).qkv.weight).all(), "rounding twice changes nothing"


def test_a_matrix_by_itself_is_in_float32_however_it_is_kept(rounded: Model, synthetic: Model) -> None:
    for model in (rounded, replace(rounded, params=in_panels(rounded.params, rounded.config.n_layers, 32))):
        for name, array in model.params.layer(1).arrays():
            assert array.dtype == np.float32, name
        expected = widened(to_bfloat16(synthetic.params.layer(1).q.weight))
        assert (model.params.layer(1).q.weight == expected).all()


@pytest.mark.real
def test_smollm2_still_knows_the_capital(smollm2: Model) -> None:
    model = load_model("smollm2-135m-instruct", weights="bf16", converted=False)
    dense, half = (forward(m, list(m.encode(PROMPT))).logits[0, 0] for m in (smollm2, model))
    assert half.argmax() == dense.argmax()
    assert np.abs(half - dense).max() > 1e-2
