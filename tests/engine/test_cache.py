"""KVCache: fork, crop, keep_last, and surgery on layers, positions, heads, keys and values."""

import numpy as np
import pytest
from declared import moves, refuses_to_move, turns
from tolerances import assert_close, assert_moved, assert_same

from engine import KVCache, forward
from engine.errors import CacheError, LayerError


def filled(model, tokens) -> KVCache:
    cache = KVCache.with_layers(model.config.n_layers)
    forward(model, tokens, cache=cache, logits_at="none")
    return cache


def state(cache: KVCache) -> list[np.ndarray]:
    return [array.copy() for layer in range(len(cache.layers)) for array in cache.layer(layer).filled()]


def assert_equal_caches(a: KVCache, b: KVCache) -> None:
    for x, y in zip(state(a), state(b), strict=True):
        assert_same(x, y)


@pytest.fixture
def mine(model, ids) -> KVCache:
    return filled(model, ids)


@pytest.fixture
def theirs(model, donor) -> KVCache:
    return filled(model, donor)


@pytest.fixture
def layer(model) -> int:
    return model.config.n_layers - 1


def test_a_fork_is_independent(model, ids, mine):
    before, fork = state(mine), mine.fork()
    fork.layer(0).k[:] = 7
    fork.crop(1)
    for old, new in zip(before, state(mine), strict=True):
        assert_same(old, new)
    forward(model, ids[:1], cache=mine)
    assert fork.length == 1


def test_cropping_keeps_the_first_positions(model, ids, mine):
    mine.crop(2)
    assert_equal_caches(mine, _sliced(filled(model, ids), slice(0, 2)))
    assert (mine.length, mine.next_position) == (2, 2)
    mine.crop(99)
    assert mine.length == 2
    mine.crop(0)
    assert (mine.length, mine.next_position) == (0, 0)
    with pytest.raises(CacheError, match="-1"):
        mine.crop(-1)


def _sliced(cache: KVCache, rows: slice) -> KVCache:
    for kv in cache.layers:
        k, v, pos = (array.copy() for array in (kv.k[:, :, rows], kv.v[:, :, rows], kv.pos[rows]))
        kv.k, kv.v, kv.pos, kv.length = k, v, pos, len(pos)
    return cache


def test_keeping_the_last_positions_leaves_them_at_their_places(model, ids, mine):
    n = len(ids)
    mine.keep_last(2)
    assert_equal_caches(mine, _sliced(filled(model, ids), slice(n - 2, n)))
    assert (mine.length, mine.next_position) == (2, n)
    mine.keep_last(99)
    assert mine.length == 2
    with pytest.raises(CacheError, match="at least one"):
        mine.keep_last(0)


def test_bytes_held_are_counted(model, ids, mine):
    cfg = model.config
    assert mine.nbytes == 2 * 4 * cfg.n_layers * cfg.n_kv_heads * cfg.d_head * len(ids)
    assert KVCache.with_layers(3).nbytes == 0


def test_cloning_a_layer_copies_it(mine, theirs, layer):
    before = state(mine)
    mine.clone_layer_from(theirs, layer)
    after, donated = state(mine), state(theirs)
    for i, (old, new, given) in enumerate(zip(before, after, donated, strict=True)):
        assert_same(new, given if i // 3 == layer else old)
    assert_moved(after[3 * layer + 1], before[3 * layer + 1])
    theirs.layer(layer).k[:] = 7
    assert not (mine.layer(layer).k == 7).all()


def test_a_cache_assembled_from_a_donors_layers_decodes_like_the_donor(model, donor, theirs):
    built = KVCache.with_layers(model.config.n_layers)
    theirs.crop(len(donor) - 1)
    for index in range(model.config.n_layers):
        built.clone_layer_from(theirs, index)
    expected = forward(model, donor).logits[0]
    assert_close(forward(model, donor[-1:], cache=built.fork()).logits[0], expected)
    assert built.transplant(theirs, [0], (0, 1), 0) == 1


def test_cloning_a_range_of_positions_leaves_only_the_range(mine, theirs, layer):
    mine.clone_layer_position_range(theirs, layer, 1, 3)
    k, v, pos = mine.layer(layer).filled()
    assert pos.tolist() == [1, 2]
    assert_same(k, theirs.layer(layer).k[:, :, 1:3])
    assert_same(v, theirs.layer(layer).v[:, :, 1:3])
    for start, end in ((-1, 2), (2, 2), (3, 1), (0, 99)):
        with pytest.raises(CacheError, match=rf"\[{start}, {end}\) (do not lie in the|hold no row)"):
            mine.clone_layer_position_range(theirs, layer, start, end)


def test_a_ragged_cache_is_refused_at_decoding_naming_the_layers(model, ids, mine, theirs):
    mine.clone_layer_position_range(theirs, 1, 0, 2)
    mine.layers[2] = None
    usual = len(ids)
    with pytest.raises(CacheError, match=f"most layers hold {usual} positions, but layer 1 holds 2, layer 2 holds 0"):
        forward(model, ids[:1], cache=mine)


def test_a_range_of_every_layer_decodes_at_the_positions_it_came_from(model, ids, theirs):
    built, n = KVCache.with_layers(model.config.n_layers), len(ids)
    for index in range(model.config.n_layers):
        built.clone_layer_position_range(theirs, index, 1, n)
    assert (built.length, built.next_position) == (n - 1, n)
    forward(model, ids[:1], cache=built)
    assert built.layer(0).filled()[2].tolist() == list(range(1, n + 1))


def test_transplanting_a_caches_own_rows_to_their_places_changes_nothing(model, mine):
    before = state(mine)
    written = mine.transplant(mine.fork(), range(model.config.n_layers), (0, 3), 0)
    assert written == 3 * model.config.n_layers
    for old, new in zip(before, state(mine), strict=True):
        assert_same(old, new)


def test_a_transplant_writes_the_donors_rows_and_no_others(model, ids, mine, theirs, layer):
    before = state(mine)
    assert mine.transplant(theirs, [layer, layer], (2, 4), 2) == 2
    for i, (old, new, given) in enumerate(zip(before, state(mine), state(theirs), strict=True)):
        expected = old
        if i // 3 == layer and i % 3 < 2:
            expected[:, :, 2:4] = given[:, :, 2:4]
        assert_same(new, expected)
    assert_moved(mine.layer(layer).v, filled(model, ids).layer(layer).v)


@pytest.mark.parametrize("what", ["k", "v"])
def test_keys_or_values_can_be_transplanted_alone(mine, theirs, layer, what):
    old = [array.copy() for array in mine.layer(layer).filled()]
    mine.transplant(theirs, [layer], (0, 4), 0, what=what)
    k, v, _ = mine.layer(layer).filled()
    given = theirs.layer(layer)
    assert_same(k[:, :, :4], (given.k if what == "k" else old[0])[:, :, :4])
    assert_same(v[:, :, :4], (given.v if what == "v" else old[1])[:, :, :4])
    assert_moved(given.k[:, :, :4], old[0][:, :, :4])


def test_single_heads_can_be_transplanted(mine, theirs, layer):
    old = [array.copy() for array in mine.layer(layer).filled()]
    mine.transplant(theirs, [layer], (0, 4), 0, heads=[1, 1])
    k, v, _ = mine.layer(layer).filled()
    assert_same(k[:, 1, :4], theirs.layer(layer).k[:, 1, :4])
    assert_same(v[:, 1, :4], theirs.layer(layer).v[:, 1, :4])
    others = [head for head in range(k.shape[1]) if head != 1]
    assert_same(k[:, others], old[0][:, others])
    assert_same(v[:, others], old[1][:, others])


def test_realigned_keys_equal_keys_computed_at_the_new_place(model, ids):
    """Layer 0 keys depend only on the token and its place, so a moved key can be computed afresh."""
    donor, moved = filled(model, [*ids[:2], ids[3]]), filled(model, [ids[3], *ids[:2]])
    recipient = filled(model, ids[:3])
    if not moves(model):
        with refuses_to_move():
            recipient.transplant(donor, [0], (2, 3), 0)
        return
    recipient.transplant(donor, [0], (2, 3), 0)
    assert_close(recipient.layer(0).k[:, :, 0], moved.layer(0).k[:, :, 0])
    assert_moved(donor.layer(0).k[:, :, 2], moved.layer(0).k[:, :, 0])
    recipient.transplant(donor, [0], (0, 1), 2)
    far = filled(model, [ids[1], ids[1], ids[0]])
    assert_close(recipient.layer(0).k[:, :, 2], far.layer(0).k[:, :, 2])


def test_kept_keys_stay_as_they_were(model, ids, mine, theirs, layer):
    if not moves(model):
        with refuses_to_move():
            mine.transplant(theirs, [layer], (0, 2), 2, rope="keep")
        return
    mine.transplant(theirs, [layer], (0, 2), 2, rope="keep")
    assert_same(mine.layer(layer).k[:, :, 2:4], theirs.layer(layer).k[:, :, :2])
    other = filled(model, ids)
    other.transplant(theirs, [layer], (0, 2), 2)
    compare = assert_moved if turns(model, layer) else assert_same
    compare(other.layer(layer).k[:, :, 2:4], mine.layer(layer).k[:, :, 2:4])
    assert_same(other.layer(layer).v[:, :, 2:4], mine.layer(layer).v[:, :, 2:4])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": (0, 99)}, r"\[0, 99\) do not lie in the"),
        ({"source": (2, 2)}, r"\[2, 2\) hold no row"),
        ({"source": (-1, 2)}, r"\[-1, 2\) do not lie in the"),
        ({"dest": 99}, r"\[99, 101\) do not lie in the"),
        ({"dest": -1}, r"\[-1, 1\) do not lie in the"),
        ({"heads": [2]}, "valid: 0 to 1"),
        ({"heads": [-1]}, "valid: 0 to 1"),
        ({"heads": []}, "valid: 0 to 1"),
        ({"what": "q"}, "what = kv, k or v"),
        ({"rope": "turn"}, "rope = realign or keep"),
    ],
)
def test_a_transplant_that_does_not_fit_is_refused_and_changes_nothing(synthetic, arguments, message):
    mine, theirs = filled(synthetic, [1, 2, 3, 4]), filled(synthetic, [5, 6, 7, 8])
    before = state(mine)
    with pytest.raises(CacheError, match=message):
        mine.transplant(theirs, **({"layers": [0, 1], "source": (0, 2), "dest": 0} | arguments))
    for old, new in zip(before, state(mine), strict=True):
        assert_same(old, new)


def test_surgery_on_a_layer_that_does_not_exist_is_refused(synthetic):
    mine, theirs = filled(synthetic, [1, 2, 3]), filled(synthetic, [4, 5, 6])
    for index in (-1, 4):
        with pytest.raises(LayerError, match="layers 0 to 3"):
            mine.clone_layer_from(theirs, index)
        with pytest.raises(LayerError, match="layers 0 to 3"):
            mine.transplant(theirs, [index], (0, 1), 0)
    with pytest.raises(CacheError, match="layer 2 of the cache is empty"):
        mine.clone_layer_from(KVCache.with_layers(4), 2)
    with pytest.raises(CacheError, match="at least one layer"):
        KVCache.with_layers(0)


def test_a_batch_that_does_not_match_the_cache_is_refused(synthetic):
    with pytest.raises(CacheError, match="holds 1 sequences, the tokens are 2"):
        forward(synthetic, [[1], [2]], cache=filled(synthetic, [1, 2, 3]))
