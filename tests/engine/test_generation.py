"""Generation: greedy and sampled, hooks at every step, windows, stopping."""

import copy
from dataclasses import replace

import numpy as np
import pytest
from recording import Calls
from tolerances import CONTROL, DECIDED, SAME

from engine import CompositeHook, KVCache, RecordHook, SteerHook, ZeroAblateHook, forward, generate
from engine.errors import InputError, PromptError

STEPS = 5


def vector(model) -> np.ndarray:
    return np.random.default_rng(3).standard_normal(model.config.d_model).astype(np.float32)


def uncached(model, ids, steps, hook=None) -> list[int]:
    tokens = list(ids)
    for _ in range(steps):
        logits = forward(model, tokens, hook=hook, prompt_length=len(ids)).logits[0, -1]
        best, second = np.sort(logits)[[-1, -2]]
        assert best - second > DECIDED * np.abs(logits).max(), "too close to call"
        tokens.append(int(logits.argmax()))
    return tokens[len(ids) :]


@pytest.fixture(scope="module")
def greedy(model, ids):
    return generate(model, ids, STEPS)


def test_greedy_text_is_what_full_passes_choose(model, ids, greedy):
    assert greedy.ids == uncached(model, ids, STEPS)
    assert greedy.text == model.tokenizer.decode(greedy.ids)
    assert greedy.stopped == "length"


def test_greedy_generation_is_deterministic(model, ids, greedy):
    assert generate(model, ids, STEPS, seed=7) == greedy


def hooks(model) -> CompositeHook:
    return CompositeHook([ZeroAblateHook.for_layers([0]), SteerHook().add(0, vector(model), 2.0)])


def test_hooks_act_at_every_step_as_in_full_passes(model, ids, greedy):
    made = generate(model, ids, STEPS, hook=hooks(model)).ids
    assert made == uncached(model, ids, STEPS, hooks(model))
    assert made != greedy.ids


def test_generate_with_hooks_ablates_then_steers(model, ids, greedy):
    steers = [(0, vector(model), 2.0)]
    text, made = model.generate_with_hooks(ids, STEPS, ablate_layers=[0, 0, -model.config.n_layers], steers=steers)
    assert made == generate(model, ids, STEPS, hook=hooks(model)).ids
    assert text == model.tokenizer.decode(made)
    assert model.generate_with_hooks(ids, STEPS) == (greedy.text, greedy.ids)
    assert model.generate_with_hooks(ids, STEPS, steers=[(0, vector(model), 0.0)]) == (greedy.text, greedy.ids)


def test_steering_counts_one_row_per_new_token(model, ids):
    hook = SteerHook().add(1, vector(model), 0.5)
    generate(model, ids, STEPS, hook=hook)
    assert hook.edits[0].fired == STEPS


def test_sampling_is_repeatable_by_its_seed(model, ids):
    one, again, other = (generate(model, ids, 8, temperature=2.0, seed=seed).ids for seed in (1, 1, 2))
    assert one == again
    assert one != other


def test_the_smallest_nucleus_is_greedy(model, ids, greedy):
    assert generate(model, ids, STEPS, temperature=1.0, top_p=1e-9, seed=0).ids == greedy.ids


def test_the_nucleus_is_the_smallest_set_that_reaches_top_p():
    from engine.generate import pick

    logits = np.log(np.array([0.1, 0.4, 0.2, 0.3], np.float32))
    rng = np.random.default_rng(0)
    for top_p, kept in ((0.39, {1}), (0.41, {1, 3}), (0.71, {1, 2, 3}), (1.0, {0, 1, 2, 3})):
        assert {pick(logits, 1.0, top_p, rng) for _ in range(200)} == kept


def test_a_low_temperature_sharpens_and_a_high_one_flattens():
    from engine.generate import pick

    logits, rng = np.array([2.0, 0.0], np.float32), np.random.default_rng(0)
    share = [np.mean([pick(logits, t, 1.0, rng) for _ in range(2000)]) for t in (0.5, 1.0, 4.0)]
    expected = [1 / (1 + np.exp(2 / t)) for t in (0.5, 1.0, 4.0)]
    assert np.abs(np.array(share) - expected).max() < 0.04


def test_each_new_token_is_reported_with_its_text(model, ids, greedy):
    told = []
    generate(model, ids, STEPS, on_token=lambda token, text: told.append((token, text)))
    assert told == [(token, model.tokenizer.piece(token)) for token in greedy.ids]


def test_generation_stops_at_the_end_of_text_without_emitting_it(model, ids, greedy):
    words = copy.copy(model.tokenizer)
    words.eos = (greedy.ids[2],)
    first = greedy.ids.index(greedy.ids[2])
    stopped = generate(replace(model, tokenizer=words), ids, STEPS)
    assert stopped.ids == greedy.ids[:first]
    assert stopped.stopped == "end_of_text"


def test_generation_stops_where_the_context_ends(model, ids, greedy):
    small = replace(model, config=replace(model.config, n_ctx=len(ids) + 2))
    made = generate(small, ids, STEPS)
    assert made.ids == greedy.ids[:3]
    assert made.stopped == "context"


def test_generation_goes_on_from_a_cache(model, ids, greedy):
    cache = KVCache.with_layers(model.config.n_layers)
    forward(model, ids[:2], cache=cache)
    assert generate(model, ids[2:], STEPS, cache=cache).ids == greedy.ids
    assert cache.length == len(ids) + STEPS - 1


def test_scopes_count_positions_already_in_the_cache(model, ids):
    cache = KVCache.with_layers(model.config.n_layers)
    forward(model, ids[:2], cache=cache)
    record, last = (RecordHook.for_layers([1], positions=scope) for scope in ([1, 3, -3], "last"))
    generate(model, ids[2:5], 3, cache=cache, hook=CompositeHook([record, last]))
    assert record.positions.tolist() == [2, 3]
    assert last.positions.tolist() == [4, 5, 6]


def test_a_window_keeps_the_last_positions_at_their_absolute_places(model, ids):
    calls, n = Calls(["attn_pattern"]), len(ids)
    generate(model, ids, 4, window=3, hook=calls)
    steps = [(pos, keys) for _, layer, _, pos, keys in calls.seen if layer == 0]
    assert steps[1:] == [([p], list(range(p - 3, p + 1))) for p in (n, n + 1, n + 2)]


def test_a_window_wider_than_the_run_changes_nothing_and_a_narrow_one_does(model, ids):
    assert generate(model, ids, STEPS, window=99).ids == generate(model, ids, STEPS).ids
    runs = []
    for window in (None, 1):
        cache = KVCache.with_layers(model.config.n_layers)
        made = generate(model, ids, 2, window=window, cache=cache).ids
        runs.append(forward(model, made[-1:], cache=cache).logits[0, -1])
    error = np.linalg.norm(runs[0] - runs[1]) / np.linalg.norm(runs[0])
    assert error > CONTROL * SAME


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 0}, "at least 1"),
        ({"temperature": -1.0}, "0 .greedy. or a number above"),
        ({"temperature": float("nan")}, "0 .greedy. or a number above"),
        ({"temperature": float("inf")}, "0 .greedy. or a number above"),
        ({"top_p": 0.0}, "above 0 and at most 1"),
        ({"top_p": 1.5}, "above 0 and at most 1"),
        ({"top_p": float("nan")}, "above 0 and at most 1"),
        ({"tokens": [[1, 2], [3, 4]]}, "one prompt at a time"),
        ({"tokens": []}, "at least one token"),
        ({"window": 0}, "at least one position"),
    ],
)
def test_settings_that_make_no_sense_are_refused(synthetic, arguments, message):
    with pytest.raises(InputError, match=message):
        generate(synthetic, **({"tokens": [1, 2], "max_new_tokens": 2} | arguments))


def test_a_prompt_longer_than_the_context_is_refused(synthetic):
    with pytest.raises(PromptError, match="513 tokens are more than the context of 512"):
        generate(synthetic, [1] * 513, 1)
    assert len(generate(synthetic, [1] * 512, 3).ids) == 1
