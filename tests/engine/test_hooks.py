"""The hook protocol: who is called, what may be changed, and that listening changes nothing."""

import numpy as np
import pytest
from declared import has, points_of, refuses
from recording import Calls, Replace, uneven
from tolerances import assert_close, assert_moved, assert_same

from engine import (
    POINTS,
    CompositeHook,
    EditHook,
    EngineError,
    KVCache,
    LayerHook,
    NoopHook,
    RecordHook,
    SteerHook,
    forward,
)
from engine.edits import Edit, times
from engine.errors import HookError, LayerError, PointError, PositionError

IN_PLACE = ("resid_mid", "resid_post")


def middle(model, name: str) -> int:
    return {"embed": 0, "final_norm": model.config.n_layers - 1}.get(name, model.config.n_layers // 2)


def logits(model, ids, hook=None):
    return forward(model, ids, hook=hook, logits_at="all").logits[0]


@pytest.fixture(scope="module")
def baseline(model, ids):
    return logits(model, ids)


@pytest.mark.parametrize("name", POINTS)
def test_listening_to_a_point_changes_no_bit(model, ids, baseline, name):
    calls = Calls([name])
    assert_same(logits(model, ids, calls), baseline)
    assert bool(calls.seen) == has(model, name)


def test_listening_everywhere_changes_no_bit_in_cached_decoding(model, ids):
    def decoded(hook):
        cache = KVCache.with_layers(model.config.n_layers)
        rows = [forward(model, [token], hook=hook, cache=cache).logits[0] for token in ids]
        return np.concatenate(rows)

    assert_same(decoded(Calls()), decoded(None))


@pytest.mark.parametrize("name", POINTS)
def test_a_returned_array_replaces_the_one_shown(model, ids, baseline, name):
    layer = middle(model, name)
    before, record = (RecordHook.for_layers([layer], points=[name]) for _ in range(2))
    hook = CompositeHook([before, Replace(name, layer, uneven), record])
    if not has(model, name):
        with refuses(name):
            logits(model, ids, hook)
        return
    changed = logits(model, ids, hook)
    assert_same(record.get(name)[layer], uneven(before.get(name)[layer]))
    assert_moved(changed, baseline)


@pytest.mark.parametrize("name", POINTS)
def test_returning_a_copy_of_what_was_shown_changes_no_bit_or_only_rounding(model, ids, baseline, name):
    assert_close(logits(model, ids, Replace(name, middle(model, name), np.array)), baseline)


@pytest.mark.parametrize("name", IN_PLACE)
def test_a_hook_may_write_in_place_into_the_residual(model, ids, baseline, name):
    def halve(x):
        x *= np.float32(0.5)

    layer = middle(model, name)
    written = logits(model, ids, Replace(name, layer, halve))
    assert_same(written, logits(model, ids, Replace(name, layer, lambda x: x * np.float32(0.5))))
    (assert_moved if has(model, name) else assert_same)(written, baseline)


@pytest.mark.parametrize("name", [name for name in POINTS if name not in IN_PLACE])
def test_writing_in_place_anywhere_else_is_refused(synthetic, name):
    def halve(x):
        x *= np.float32(0.5)

    with pytest.raises(ValueError, match="read-only"):
        forward(synthetic, [1, 2, 3], hook=Replace(name, middle(synthetic, name), halve))


@pytest.mark.parametrize("name", POINTS)
def test_a_replacement_of_another_shape_is_refused_naming_the_right_one(synthetic, name):
    layer = middle(synthetic, name)
    with pytest.raises(HookError, match=rf"{name}, layer {layer}, .*must be float32 \(1, "):
        forward(synthetic, [1, 2, 3], hook=Replace(name, layer, lambda x: x[..., :-1]))


@pytest.mark.parametrize("wrong", [np.float64, np.float16, np.int64])
def test_a_replacement_of_another_dtype_is_refused(synthetic, wrong):
    with pytest.raises(HookError, match="must be float32"):
        forward(synthetic, [1, 2, 3], hook=Replace("mlp_out", 1, lambda x: x.astype(wrong)))


@pytest.mark.parametrize("wrong", [0.0, [1.0], "zero", True])
def test_a_replacement_that_is_no_array_is_refused(synthetic, wrong):
    with pytest.raises(HookError, match="must be float32"):
        forward(synthetic, [1, 2, 3], hook=Replace("mlp_out", 1, lambda x: wrong))


class Counting(LayerHook):
    """Counts calls without wanting any."""

    calls = 0

    def wants(self, point, layer):
        return False

    def at(self, point, layer, x, pos, key_pos=None):
        self.calls += 1


def test_a_hook_that_wants_nothing_is_never_called(model, ids, baseline):
    quiet, loud = Counting(), Calls()
    assert_same(logits(model, ids, CompositeHook([quiet, NoopHook()])), baseline)
    forward(model, ids, hook=CompositeHook([quiet, loud]))
    assert quiet.calls == 0
    assert len(loud.seen) == (len(points_of(model)) - 2) * model.config.n_layers + 2


def test_a_pass_without_hooks_never_builds_the_attention_pattern(synthetic, monkeypatch):
    built = []
    from engine import decoder, ops

    def counting(*args, on_weights=None, **kwargs):
        built.append(on_weights is not None)
        return ops.attend(*args, on_weights=on_weights, **kwargs)

    monkeypatch.setattr(decoder, "attend", counting)
    forward(synthetic, [1, 2, 3], hook=RecordHook.for_layers(range(4)))
    assert built == [False] * 4
    built.clear()
    forward(synthetic, [1, 2, 3], hook=RecordHook.for_layers([2], capture_attention=True))
    assert built == [False, False, True, False]


def test_a_hook_wants_the_callbacks_it_overrides_and_gets_them(model, ids):
    class Two(LayerHook):
        def __init__(self):
            self.seen = []

        def on_qkv(self, layer, name, x, pos):
            self.seen.append((name, layer, x.shape[1]))

        def on_attention_weights(self, layer, weights, pos, key_pos):
            self.seen.append(("attn_pattern", layer, weights.shape[1]))

        def on_post_layer(self, layer, x, pos):
            self.seen.append(("resid_post", layer, x.shape[1]))

    hook, cfg, s = Two(), model.config, len(ids)
    forward(model, ids, hook=hook)
    one = [("q", cfg.n_heads), ("k", cfg.n_kv_heads), ("v", cfg.n_kv_heads), ("attn_pattern", cfg.n_heads)]
    assert hook.seen == [(n, layer, w) for layer in range(cfg.n_layers) for n, w in [*one, ("resid_post", s)]]
    assert {name for name in POINTS if hook.wants(name, 0)} == {"q", "k", "v", "attn_pattern", "resid_post"}


@pytest.mark.parametrize("name", [name for name in POINTS if name not in ("q", "k", "v", "attn_pattern")])
def test_each_point_calls_the_callback_of_its_row_in_the_table(synthetic, name):
    calls = []

    def callback(self, layer, x, pos):
        calls.append((layer, x.shape, pos.tolist()))

    hook = type("Hook", (LayerHook,), {POINTS[name].callback: callback})()
    forward(synthetic, [1, 2, 3], hook=hook)
    layers = {"embed": [0], "final_norm": [3]}.get(name, [0, 1, 2, 3])
    assert [call[0] for call in calls] == layers
    assert all(call[2] == [0, 1, 2] for call in calls)


def test_begin_run_says_where_the_prompt_ends_and_what_is_cached(synthetic):
    class Begins(LayerHook):
        seen = ()

        def begin_run(self, prompt_length, past):
            self.seen += ((prompt_length, past),)

    hook, cache = Begins(), KVCache.with_layers(4)
    forward(synthetic, [1, 2, 3], hook=CompositeHook([hook]), cache=cache, prompt_length=5)
    forward(synthetic, [4, 5], hook=CompositeHook([hook]), cache=cache, prompt_length=5)
    forward(synthetic, [6], hook=hook, cache=cache)
    assert hook.seen == ((5, 0), (5, 3), (6, 5))


def test_an_edit_of_heads_at_a_point_without_heads_is_refused():
    with pytest.raises(PointError, match="points with heads are q, k, v, attn_pattern and z"):
        Edit("resid_post", 0, times(2), heads=(0,))


@pytest.mark.parametrize("name", ["z", "q", "k", "v", "attn_pattern"])
def test_an_edit_of_one_head_leaves_the_others_alone(model, ids, name):
    from engine.hooks import EditHook

    layer, before = model.config.n_layers // 2, RecordHook.for_layers(range(model.config.n_layers), points=[name])
    after = RecordHook.for_layers([layer], points=[name])
    edit = EditHook([Edit(name, layer, times(2), [1, -1], heads=(1,))])
    forward(model, ids, hook=CompositeHook([before, edit, after]))
    axes = [axis for axis in POINTS[name].axes if axis != "batch"]
    old, new = (
        np.moveaxis(r.get(name)[layer], (axes.index("seq"), axes.index("head")), (0, 1)) for r in (before, after)
    )
    expected = old.copy()
    expected[[1, len(ids) - 1], 1] *= 2
    assert_same(new, expected)
    assert edit.edits[0].fired == 2


@pytest.mark.parametrize("scope", ["first", "Last", ""])
def test_an_unknown_scope_is_refused_naming_the_valid_ones(synthetic, scope):
    hook = SteerHook().add(1, np.ones(64, np.float32), 1, positions=scope)
    with pytest.raises(PositionError, match="last, all, all_but_first, prompt, generated or a list"):
        forward(synthetic, [1, 2, 3], hook=hook)


def test_an_error_in_a_hook_passes_through_unchanged(model, ids, baseline):
    class Broken(Exception):
        pass

    def broken(x):
        raise Broken("mine")

    with pytest.raises(Broken, match="mine"):
        forward(model, ids, hook=Replace("mlp_out", 1, broken))
    assert not issubclass(Broken, EngineError)
    assert_same(logits(model, ids), baseline)


@pytest.mark.parametrize("layer", [-1, 4, 99])
def test_a_built_in_hook_for_a_layer_the_model_lacks_is_refused(synthetic, layer):
    vec = np.ones(64, np.float32)
    for hook in (
        SteerHook().add(layer, vec, 1),
        RecordHook.for_layers([0, layer]),
        CompositeHook([SteerHook().add(layer, vec, 1)]),
    ):
        with pytest.raises(LayerError, match="valid: 0 to 3"):
            forward(synthetic, [1, 2, 3], hook=hook)


@pytest.mark.parametrize("base", [EditHook, RecordHook, CompositeHook])
def test_a_subclass_that_overrides_wants_is_heard(base, synthetic):
    heard = []

    class Listens(base):
        def wants(self, point, layer):
            return (point, layer) == ("z", 1)

        def at(self, point, layer, x, pos, key_pos=None):
            heard.append((point, layer))

    hook = Listens([], []) if base is RecordHook else Listens([])
    forward(synthetic, [1, 2, 3], hook=hook)
    assert heard == [("z", 1)]
