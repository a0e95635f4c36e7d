"""The logit lens and the vocabulary views, against plain formulas over the weights."""

import numpy as np
import pytest
from declared import final_logits
from tolerances import CONTROL, SAME, assert_close, assert_moved, assert_same

import engine
from engine import RecordHook, forward, trace_forward
from engine.decoder import unembed
from engine.distribution import softmax_of
from engine.errors import TokenError, VectorError
from engine.lens import emergence_layer, leads


@pytest.fixture(scope="module")
def residuals(model, ids):
    return model.forward_with_capture(ids, range(model.config.n_layers))


@pytest.fixture(scope="module")
def probabilities(model, ids):
    logits = forward(model, ids, logits_at="all").logits[0].astype(np.float64)
    exp = np.exp(logits - logits.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


def test_the_lens_of_the_last_layer_is_the_models_distribution(model, residuals, probabilities):
    last, n = residuals[model.config.n_layers - 1], model.config.d_vocab
    for row, expected in zip(last, probabilities, strict=True):
        lens = np.zeros(n)
        for token, probability in model.logit_lens(row, k=n):
            lens[token] = probability
        assert_close(lens, expected)
    assert_moved(last, residuals[model.config.n_layers - 2])


def test_the_lens_normalises_before_it_unembeds(model, residuals):
    layer = model.config.n_layers // 2
    logits = final_logits(model, residuals[layer][-1])
    expected = np.exp(logits - logits.max())
    expected /= expected.sum()
    best = int(expected.argmax())
    assert model.logit_lens(residuals[layer][-1], k=1)[0][0] == best
    assert abs(model.track_token_at(residuals[layer][-1], best) - expected[best]) < SAME * CONTROL * expected[best]
    for token in (0, 7, model.config.d_vocab - 1):
        assert model.track_token_at(residuals[layer][-1], token) == pytest.approx(expected[token], rel=1e-3, abs=1e-12)


def test_the_lens_ignores_the_length_of_a_residual(model, residuals):
    row = residuals[model.config.n_layers - 1][-1]
    (_, before), (_, doubled) = model.logit_lens(row, 1)[0], model.logit_lens(2 * row, 1)[0]
    assert before == pytest.approx(doubled, rel=1e-3)


def test_the_lens_ranks_best_first(model, residuals, probabilities):
    ranked = model.logit_lens(residuals[model.config.n_layers - 1][-1], k=5)
    assert [token for token, _ in ranked] == np.argsort(-probabilities[-1], kind="stable")[:5].tolist()
    values = [p for _, p in ranked]
    assert values == sorted(values, reverse=True)
    assert all(isinstance(token, int) and isinstance(p, float) for token, p in ranked)


def test_several_residuals_give_lists_of_the_single_results(model, residuals):
    rows = residuals[1][-3:]
    for row, many, probability in zip(rows, model.logit_lens(rows, 4), model.track_token_at(rows, 3), strict=True):
        one = model.logit_lens(row, 4)
        assert [t for t, _ in many] == [t for t, _ in one]
        assert [p for _, p in many] == pytest.approx([p for _, p in one], rel=1e-4)
        assert probability == pytest.approx(model.track_token_at(row, 3), rel=1e-4)


def test_a_race_is_the_lens_of_each_layer(model, ids):
    last = model.capture_residuals(ids, [0, 2, -1])
    assert list(last) == [0, 2, model.config.n_layers - 1]
    race = model.track_race(last, k=3)
    for layer, row in last.items():
        alone = model.logit_lens(row, 3)
        assert [token for token, _ in race[layer]] == [token for token, _ in alone]
        assert [p for _, p in race[layer]] == pytest.approx([p for _, p in alone], rel=1e-4)
    assert engine.track_race(model, last, k=3) == race


def test_projections_are_raw_products_with_the_unembedding(model):
    vec = np.random.default_rng(0).standard_normal(model.config.d_model).astype(np.float32)
    scores = model.params.unembed.astype(np.float64) @ vec
    ranked = model.project_through_unembed(vec, 5)
    assert [token for token, _ in ranked] == np.argsort(-scores)[:5].tolist()
    assert [s for _, s in ranked] == pytest.approx(sorted(scores, reverse=True)[:5], rel=1e-4)
    doubled = model.project_through_unembed(2 * vec, 5)
    assert [s for _, s in doubled] == pytest.approx([2 * s for _, s in ranked], rel=1e-5)


def test_neighbours_are_ranked_by_cosine_with_the_embeddings(model):
    token = 65
    row = model.embedding_for(token, scaled=False).astype(np.float64)
    w_e = model.params.embed.astype(np.float64)
    lengths = np.linalg.norm(w_e, axis=1)
    cosines = w_e @ row / np.where(lengths > 0, lengths, 1) / np.linalg.norm(row)
    ranked = model.embedding_neighbors(100 * row.astype(np.float32), 5)
    assert ranked[0] == (token, pytest.approx(1, abs=1e-5))
    assert [t for t, _ in ranked] == np.argsort(-cosines)[:5].tolist()
    assert [c for _, c in ranked] == pytest.approx(np.sort(cosines)[::-1][:5], abs=1e-5)


def test_rows_are_copies_of_the_weights(model):
    scale = np.float32(model.config.embed_scale)
    for row, weights, factor in (
        (model.embedding_for(5), model.params.embed, scale),
        (model.embedding_for(5, scaled=False), model.params.embed, 1),
        (model.unembedding_for(5), model.params.unembed, 1),
        (engine.embedding_row(model, 5), model.params.embed, 1),
        (engine.embedding_row_scaled(model, 5), model.params.embed, scale),
        (engine.unembedding_row(model, 5), model.params.unembed, 1),
    ):
        assert_same(row, weights[5] * factor)
        row[:] = 7
        assert not (weights[5] == 7).all()


def test_zeroing_the_last_residual_leaves_the_uniform_distribution(model, ids):
    """Or what the biases of the last norm and the unembedding say, in models that have them."""
    hook = engine.ZeroAblateHook.for_layers([model.config.n_layers - 1])
    probabilities = softmax_of(trace_forward(model, ids, hook=hook).logits)
    uniform = model.params.final_norm.bias is None and model.params.unembed_bias is None
    logits = np.zeros(model.config.d_vocab) if uniform else final_logits(model, np.zeros(model.config.d_model))
    assert_close(probabilities, softmax_of(logits))
    assert softmax_of(trace_forward(model, ids).logits).max() * model.config.d_vocab > 1 + CONTROL * SAME


def test_lens_functions_equal_the_models_methods(model, residuals):
    row = residuals[1][-1]
    assert engine.logit_lens_topk(model, row, 3) == model.logit_lens(row, 3)
    assert engine.track_token(model, row, 3) == model.track_token_at(row, 3)
    assert engine.project_through_unembed(model, row, 3) == model.project_through_unembed(row, 3)
    assert engine.embedding_neighbors(model, row, 3) == model.embedding_neighbors(row, 3)


@pytest.mark.parametrize("name", ["logit_lens", "embedding_neighbors", "project_through_unembed"])
def test_a_vector_that_is_no_residual_is_refused(synthetic, name):
    view = getattr(synthetic, name)
    good = np.ones(64, np.float32)
    for bad, message in (
        (good[:-1], r"it must be \(64,\)"),
        (np.ones((1, 1, 64)), r"it must be \(64,\)"),
        (good * np.nan, "NaN or infinity"),
        (good * np.inf, "NaN or infinity"),
        ("no vector", "64 numbers"),
    ):
        with pytest.raises(VectorError, match=message):
            view(bad)
    assert len(view(good, 3)) == 3


def test_a_zero_vector_has_no_neighbours(synthetic):
    with pytest.raises(VectorError, match="no direction"):
        synthetic.embedding_neighbors(np.zeros(64, np.float32))


@pytest.mark.parametrize("token", [-1, 257, True, 1.0, "a"])
def test_a_token_that_does_not_exist_is_refused(synthetic, token):
    for view in (
        synthetic.embedding_for,
        synthetic.unembedding_for,
        lambda t: synthetic.track_token_at(np.ones(64), t),
    ):
        with pytest.raises(TokenError, match=r"valid: 0 to 256|whole number"):
            view(token)


def test_reading_a_residual_leaves_it_alone(model, ids):
    record = RecordHook.for_layers([1], points=["resid_post"])
    forward(model, ids, hook=record)
    row = record.post_layer[1]
    before = row.copy()
    model.logit_lens(row)
    model.project_through_unembed(row)
    model.embedding_neighbors(row)
    assert_same(row, before)


def test_a_race_of_many_rows_is_the_lens_of_each_layer(model, residuals, monkeypatch):
    monkeypatch.setattr("engine.lens.READ_AT_ONCE", 3)  # cuts through layers
    mixed = {layer: rows if layer % 2 else rows[-1] for layer, rows in residuals.items()}
    race = model.track_race(mixed, k=3)
    assert list(race) == list(mixed)
    for layer, found in race.items():
        alone = model.logit_lens(mixed[layer], k=3)
        assert np.shape(found) == np.shape(alone) == ((len(residuals[0]), 3, 2) if layer % 2 else (3, 2))
        assert_close(np.array(found)[..., 1], np.array(alone)[..., 1])
    assert model.track_race({}, k=3) == {}


def test_what_is_unembedded_at_a_time_is_bounded(synthetic, monkeypatch):
    model, shapes = synthetic, []
    monkeypatch.setattr("engine.lens.unembed", lambda model, x: shapes.append(x.shape) or unembed(model, x))
    model.track_race({layer: np.ones((100, model.config.d_model), np.float32) for layer in range(3)}, k=1)
    assert [rows for rows, _ in shapes] == [128, 128, 44]


def test_a_token_leads_by_more_than_chance_or_not_at_all():
    flat = np.zeros(257, np.float32)
    noisy = flat + np.random.default_rng(0).normal(0, 0.3, 257).astype(np.float32)
    decided, tied = flat.copy(), flat.copy()
    decided[7], tied[[7, 8]] = 6, 6
    best = int(noisy.argmax())
    assert not leads(flat, 7)
    assert not leads(noisy, best)
    assert leads(decided, 7)
    assert not leads(decided, 8)
    assert not leads(tied, 7)
    tied[7] += 1e-4
    assert not leads(tied, 7), "by rounding"
    tied[7] += 0.1
    assert leads(tied, 7)


@pytest.mark.parametrize("d_vocab", [5, 257, 50_000])
def test_a_leader_has_half_of_the_nats_from_uniform_to_certain(d_vocab):
    for share, found in ((0.9, False), (1.1, True)):
        p = share * d_vocab**-0.5
        logits = np.full(d_vocab, np.log((1 - p) / (d_vocab - 1)), np.float32)
        logits[3] = np.log(p)
        assert leads(logits, 3) == (found and p > 1 / d_vocab)


def test_a_token_emerges_at_the_layer_from_which_it_leads_to_the_end():
    flat, mine, other = np.zeros((3, 257), np.float32)
    mine[7], other[8] = 9, 9
    assert emergence_layer({0: mine, 1: other, 2: mine, 5: mine}, 7) == 2
    assert emergence_layer({0: mine, 1: flat, 2: mine}, 7) == 2
    assert emergence_layer({0: mine, 1: other}, 7) is None
    assert emergence_layer({0: flat, 1: flat}, 0) is None
