"""The decoder against naive.py: a second decoder in float64 that shares no line with it."""

import numpy as np
import pytest
from naive import Activations, naive
from recording import cached, everything
from tolerances import CONTROL, PATTERN, REFERENCE, assert_close, assert_moved, row_error

from engine import KVCache, forward


@pytest.fixture(scope="module")
def reference(model, ids) -> Activations:
    return naive(model, ids)


@pytest.fixture
def tolerance(model) -> float:
    return REFERENCE[model.name if model.name in REFERENCE else "synthetic"]


def test_logits_at_every_position_equal_the_reference(model, ids, reference, tolerance):
    assert_close(forward(model, ids, logits_at="all").logits[0], reference.logits, tolerance)


def test_the_reference_tells_prompts_apart(model, donor, reference, tolerance):
    assert_moved(forward(model, donor, logits_at="all").logits[0], reference.logits, tolerance)


def test_points_hold_what_the_reference_computes(model, ids, reference, tolerance):
    found = everything(model, ids)
    for layer in range(model.config.n_layers):
        assert_close(found["resid_post", layer], reference.residual[layer], tolerance)
        assert_close(found["mlp_act", layer], reference.mlp_act[layer], tolerance)
        assert_close(found["z", layer].reshape(len(ids), -1), reference.z[layer].reshape(len(ids), -1), tolerance)
        assert_close(found["attn_pattern", layer], reference.pattern[layer], PATTERN)


def test_cached_keys_are_rotated_to_their_absolute_positions(model, ids, reference, tolerance):
    cache = KVCache.with_layers(model.config.n_layers)
    forward(model, ids[:-2], cache=cache)
    forward(model, ids[-2:], cache=cache)
    for layer in range(model.config.n_layers):
        k, v, pos = cache.layer(layer).filled()
        assert_close(k[0], reference.keys[layer], tolerance)
        assert_close(v[0], reference.values[layer], tolerance)
        assert pos.tolist() == list(range(len(ids)))


def test_a_prompt_longer_than_a_block_of_queries_equals_the_reference(synthetic):
    tokens = np.random.default_rng(5).integers(0, 256, 150).tolist()
    expected = naive(synthetic, tokens).logits
    whole = forward(synthetic, tokens, logits_at="all").logits[0]
    pieces, _ = cached(synthetic, tokens, [130, 1, 19])
    assert_close(whole, expected, REFERENCE["synthetic"])
    assert_close(pieces, expected, REFERENCE["synthetic"])
    swapped = [tokens[1], tokens[0], *tokens[2:]]
    moved = row_error(forward(synthetic, swapped, logits_at="all").logits[0], expected)
    assert moved > CONTROL * REFERENCE["synthetic"]


@pytest.mark.real
def test_smollm2_knows_the_capital_of_france(smollm2):
    tokens = smollm2.encode("The capital of France is")
    best = forward(smollm2, tokens).logits[0, -1].argmax()
    assert smollm2.tokenizer.piece(int(best)) == " Paris"
