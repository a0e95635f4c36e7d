"""Rotary frequencies that depend on the length of the sequence: caches of one side do not serve the other."""

import families
import numpy as np
import pytest
from declared import boundary
from recording import Calls, cached
from tolerances import assert_close, assert_moved, assert_same

from engine import CompositeHook, KVCache, LayerHook, Model, RecordHook, ScaleHook, SteerHook, forward, generate
from engine.cost import of_generation, of_pass
from engine.errors import CacheError

ROWS = [row for row in families.ROWS if boundary(families.tiny(row))]
REFUSED = "rotary frequencies change between .* run the whole sequence in one pass, without a cache"


@pytest.fixture(scope="module", params=ROWS)
def long(request: pytest.FixtureRequest) -> Model:
    return families.tiny(request.param)


@pytest.fixture(scope="module")
def edge(long: Model) -> int:
    """The greatest length with the frequencies of short sequences."""
    return boundary(long)[0]


@pytest.fixture(scope="module")
def tokens(edge: int) -> list[int]:
    return np.random.default_rng(4).integers(0, 256, edge + 12).tolist()


def whole(model: Model, ids: list[int]) -> np.ndarray:
    return forward(model, ids, logits_at="all").logits[0]


def test_both_kinds_of_dependence_have_a_row():
    assert {boundary(families.tiny(row))[1] for row in ROWS} == {True, False}


def test_up_to_the_boundary_cached_equals_uncached(long, edge, tokens):
    found, _ = cached(long, tokens[:edge], [edge - 5, 1, 4])
    assert_close(found, whole(long, tokens[:edge]))


@pytest.mark.parametrize("more", [1, 5])
def test_a_cache_is_refused_across_the_boundary_and_stays_as_it_was(long, edge, tokens, more):
    cache = KVCache.with_layers(long.config.n_layers)
    forward(long, tokens[: edge - 1], cache=cache)
    before = cache.to_tensors()
    with pytest.raises(CacheError, match=REFUSED):
        forward(long, tokens[edge - 1 : edge + more], cache=cache)
    for name, array in cache.to_tensors().items():
        assert_same(array, before[name])
    assert_close(forward(long, tokens[edge - 1 : edge], cache=cache).logits[0], whole(long, tokens[:edge])[-1:])


def test_beyond_the_boundary_a_cache_serves_where_the_frequencies_stay(long, edge, tokens):
    cache, rest = KVCache.with_layers(long.config.n_layers), tokens[edge + 4 :]
    forward(long, tokens[: edge + 4], cache=cache)
    if boundary(long)[1]:
        with pytest.raises(CacheError, match=REFUSED):
            forward(long, rest, cache=cache)
    else:
        found = forward(long, rest, cache=cache, logits_at="all").logits[0]
        assert_close(found, whole(long, tokens)[edge + 4 :])


def test_the_length_changes_earlier_rows_too(long, edge, tokens):
    """As transformers computes them: one pass has one set of frequencies."""
    assert_moved(whole(long, tokens)[:edge], whole(long, tokens[:edge]))
    shorter = whole(long, tokens[: edge - 3])
    assert_close(shorter, whole(long, tokens[:edge])[: edge - 3])


def greedy(model: Model, ids: list[int], steps: int, hook: LayerHook | None = None) -> tuple[list[int], np.ndarray]:
    """Tokens by passes without a cache, and the logits of the last pass."""
    new: list[int] = []
    for _ in range(steps):
        logits = forward(model, ids + new, hook=hook, prompt_length=len(ids)).logits[0, -1]
        new.append(int(logits.argmax()))
    return new, logits


@pytest.mark.parametrize("given", [True, False])
def test_generation_goes_on_across_the_boundary_as_without_a_cache(long, edge, tokens, given):
    cache = KVCache.with_layers(long.config.n_layers) if given else None
    made = generate(long, tokens[: edge - 2], 6, cache=cache)
    assert (made.ids, made.stopped, made.why) == (greedy(long, tokens[: edge - 2], 6)[0], "length", None)
    if cache is not None:
        assert cache.next_position == edge + 3


def test_hooks_go_on_across_the_boundary(long, edge, tokens):
    vector = np.random.default_rng(5).standard_normal(long.config.d_model).astype(np.float32)
    steer, record = SteerHook().add(1, vector, 2.0), RecordHook.for_layers([1], points=["resid_post"])
    found = generate(long, tokens[: edge - 2], 6, hook=CompositeHook([steer, record]))
    expected, _ = greedy(long, tokens[: edge - 2], 6, SteerHook().add(1, vector, 2.0))
    assert found.ids == expected
    assert expected != greedy(long, tokens[: edge - 2], 6)[0]
    assert record.positions.tolist() == list(range(edge + 3))


@pytest.mark.parametrize(("scope", "expected"), [("all", 3), ("generated", 5)])
def test_an_edit_counts_a_row_once_however_often_it_is_computed(long, edge, tokens, scope, expected):
    hook = ScaleHook.for_layers([1], 0.5, positions=scope)
    generate(long, tokens[: edge - 2], 6, hook=hook)
    assert [edit.fired for edit in hook.edits] == [expected + (edge if scope == "all" else 0)]


def test_what_a_generation_takes_counts_what_is_computed_anew(long, edge, tokens):
    calls = Calls(["resid_pre"])
    generate(long, tokens[: edge - 2], 6, hook=calls)
    rows = [len(pos) for _, _, _, pos, _ in calls.seen]
    cost = of_generation(long.config, edge - 2, 6)
    assert (cost.rows, cost.steps) == (sum(n for n in rows if n > 1), sum(n for n in rows if n == 1))
    assert cost.nbytes > of_pass(long.config, edge + 1).nbytes


def test_a_cache_of_unknown_tokens_or_a_window_ends_the_text_there(long, edge, tokens):
    cache = KVCache.with_layers(long.config.n_layers)
    forward(long, tokens[: edge - 3], cache=cache)
    expected, _ = greedy(long, tokens[: edge - 2], 3)
    for kept in ({"cache": cache}, {"window": edge}):
        made = generate(long, tokens[edge - 3 : edge - 2] if "cache" in kept else tokens[: edge - 2], 6, **kept)
        assert (made.ids, made.stopped) == (expected, "context")
        assert f"change after {edge} tokens" in made.why
