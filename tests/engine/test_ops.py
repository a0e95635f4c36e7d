"""The numerics, against formulas written out in float64."""

import math

import numpy as np
import pytest
from tolerances import assert_close

from engine.activations import ACTIVATIONS
from engine.ops import attend, inner, layer_norm, linear, rms_norm, rotate, softcap, softmax


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def test_linear_multiplies_and_adds_its_bias():
    x, w, b = random(2, 3, 5), random(5, 4), random(4)
    assert_close(linear(x, w, b), np.einsum("bsi,io->bso", x, w) + b)


def test_norms_divide_by_the_root_mean_square():
    x, w, b = random(2, 3, 8), random(8), random(8)
    wide = x.astype(np.float64)
    assert_close(rms_norm(x, w, 0.1), wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 0.1) * w)
    centred = wide - wide.mean(-1, keepdims=True)
    assert_close(layer_norm(x, w, b, 0.1), centred / np.sqrt(wide.var(-1, keepdims=True) + 0.1) * w + b)


def test_rotation_turns_pairs_and_passes_the_rest_through():
    x, angle = random(2, 3, 6), np.array([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])
    out = rotate(x, np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32))
    turned = (x[..., :2] + 1j * x[..., 2:4]) * np.exp(1j * angle)
    assert_close(out, np.concatenate([turned.real, turned.imag, x[..., 4:]], -1))


def test_softmax_of_a_row_with_nothing_left_is_zero():
    rows = np.array([[-np.inf, -np.inf], [0, -np.inf]], np.float32)
    assert softmax(rows).tolist() == [[0, 0], [1, 0]]


def test_softcap_bends_towards_its_cap():
    x = np.array([-100, -1, 0, 1, 100], np.float32)
    assert_close(softcap(x.copy(), 10.0), 10 * np.tanh(x / 10))
    assert softcap(x, None) is x


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_follow_their_formulas(name):
    x = np.linspace(-100, 100, 4001).astype(np.float32)
    wide = x.astype(np.float64)
    silu = wide * np.exp(np.minimum(wide, 0)) / (1 + np.exp(-np.abs(wide)))
    tanh = 0.5 * wide * (1 + np.tanh(np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3)))
    gelu = 0.5 * wide * (1 + np.array([math.erf(value / math.sqrt(2)) for value in wide]))
    expected = {
        "silu": silu,
        "swish": silu,
        "gelu": gelu,
        "gelu_python": gelu,
        "mish": wide * np.tanh(np.log1p(np.exp(wide))),
        "quick_gelu": wide / (1 + np.exp(-1.702 * wide)),
        "relu": np.maximum(wide, 0),
        "relu2": np.maximum(wide, 0) ** 2,
    }.get(name, tanh)
    assert (np.abs(ACTIVATIONS[name](x) - expected) / np.maximum(1, np.abs(expected))).max() < 1e-5


def naive_attention(q, k, v, pos, key_pos, scale, window, cap):
    b, heads, s, width = q.shape
    z = np.zeros((b, s, heads, width))
    for i in range(b):
        for h in range(heads):
            kv = h // (heads // k.shape[1])
            for row, p in enumerate(pos):
                seen = [j for j, at in enumerate(key_pos) if at <= p and (window is None or at > p - window)]
                scores = np.array([q[i, h, row].astype(np.float64) @ k[i, kv, j] for j in seen]) * scale
                scores = scores if cap is None else cap * np.tanh(scores / cap)
                weights = np.exp(scores - scores.max())
                z[i, row, h] = weights / weights.sum() @ v[i, kv, seen]
    return z


@pytest.mark.parametrize(("window", "cap"), [(None, None), (3, None), (1, None), (None, 2.0), (150, 2.0)])
@pytest.mark.parametrize("past", [0, 7])
def test_attention_equals_a_loop_over_rows(window, cap, past):
    s = 140
    q, k, v = random(2, 4, s, 6), random(2, 2, s + past, 6), random(2, 2, s + past, 6)
    pos, key_pos = np.arange(past, past + s), np.arange(s + past)
    found = attend(q, k, v, pos, key_pos, scale=0.3, window=window, cap=cap)
    assert_close(found, naive_attention(q, k, v, pos, key_pos, 0.3, window, cap))


def test_a_listener_sees_the_whole_pattern_and_may_replace_it():
    q, k, v = random(1, 4, 140, 6), random(1, 2, 140, 6), random(1, 2, 140, 6)
    pos, seen = np.arange(140), []

    def listen(pattern):
        seen.append(pattern.copy())
        return pattern

    plain = attend(q, k, v, pos, pos, scale=0.3)
    assert np.array_equal(attend(q, k, v, pos, pos, scale=0.3, on_weights=listen), plain)
    mixed = np.stack([seen[0][0, h] @ v[0, h // 2] for h in range(4)], 1)
    assert_close(mixed[None], plain)
    replaced = attend(q, k, v, pos, pos, scale=0.3, on_weights=lambda pattern: pattern[:, ::-1].copy())
    assert_close(replaced[0, :, 0], seen[0][0, 3] @ v[0, 0])


@pytest.mark.parametrize("rows", range(1, 5))
def test_inner_products_of_few_rows(rows):
    x, w = random(rows, 40), random(300, 40)
    assert_close(inner(x, w), x.astype(np.float64) @ w.T.astype(np.float64))
    assert_close(inner(x[:, None], w)[:, 0], inner(x, w))


@pytest.mark.parametrize(("rows", "features"), [(2, 288), (5, 1536), (5, 149), (300, 288)])
def test_a_product_of_few_rows_and_one_of_many_sum_up_the_same(rows, features):
    x, w = random(rows, features), random(features, 32)
    assert_close(linear(x, w), x.astype(np.float64) @ w.astype(np.float64))


def test_no_rows_make_an_empty_product():
    assert linear(random(0, 288), random(288, 32)).shape == (0, 32)
    assert inner(random(2, 0, 40), random(300, 40)).shape == (2, 0, 300)
