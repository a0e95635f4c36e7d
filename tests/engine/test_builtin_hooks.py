"""RecordHook, ZeroAblateHook, SteerHook, ScaleHook, PatchHook, CompositeHook."""

import numpy as np
import pytest
from declared import has, points_of, refuses
from recording import Replace, everything
from tolerances import assert_close, assert_moved, assert_same

from engine import (
    CompositeHook,
    KVCache,
    LayerHook,
    PatchHook,
    RecordHook,
    ScaleHook,
    SteerHook,
    ZeroAblateHook,
    forward,
    generate,
)
from engine.edits import Edit, component_set, placed
from engine.errors import HookError, PointError, VectorError
from engine.hooks import EditHook


def vector(model, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(model.config.d_model).astype(np.float32)


@pytest.fixture
def layer(model) -> int:
    return model.config.n_layers // 2


@pytest.fixture(scope="module")
def clean(model, ids):
    return everything(model, ids)


def after(model, ids, hook, layer) -> np.ndarray:
    record = RecordHook.for_layers([layer])
    forward(model, ids, hook=CompositeHook([hook, record]))
    return record.post_layer[layer]


def test_a_record_holds_the_three_residual_points_by_default(model, ids, clean):
    record = RecordHook.for_layers([0, 1, 1])
    forward(model, ids, hook=record)
    assert list(record.pre_layer) == list(record.post_layer) == [0, 1]
    assert list(record.post_attention) == ([0, 1] if has(model, "resid_mid") else [])
    assert record.attention_weights == record.ffn_activation == {}
    for layer in (0, 1):
        assert_same(record.pre_layer[layer], clean["resid_pre", layer])
        assert_same(record.post_layer[layer], clean["resid_post", layer])
    for layer, mid in record.post_attention.items():
        assert_same(mid, clean["resid_mid", layer])
    assert record.positions.tolist() == list(range(len(ids)))


def test_a_record_of_every_point_copies_only_where_hooks_may_write_and_parts_of_something_larger(model, ids):
    """What is not copied must not change after it was shown: it equals the copies of a hook that copies."""
    copies, copied, points = {}, {"resid_mid", "resid_post"}, points_of(model)

    class Copies(LayerHook):
        def wants(self, point, layer):
            return point in points

        def at(self, point, layer, x, pos, key_pos=None):
            copies[point, layer] = x.copy()
            if x.base is not None and x.base.nbytes > x.nbytes:
                copied.add(point)

    record = RecordHook.for_layers(range(model.config.n_layers), points=points)
    forward(model, ids, hook=CompositeHook([Copies(), record]), logits_at="all")
    recorded = {(name, layer): rows for name in points for layer, rows in record.get(name).items()}
    assert recorded.keys() == copies.keys()
    for (name, layer), rows in recorded.items():
        assert_same(rows, copies[name, layer][0])
        assert rows.flags.writeable == (name in copied)
        assert rows.base is None or rows.base.nbytes == rows.nbytes, "nothing else stays in memory"
    assert {"v"} < copied <= {"resid_mid", "resid_post", "q", "k", "v"}


def test_a_record_copies_what_another_hook_returned_and_may_change(model, ids, clean, layer):
    held = []

    class Reuses(LayerHook):
        def on_ffn_activation(self, layer, x, pos):
            held.append(x.copy())
            return held[-1]

    record = RecordHook.for_layers([layer], points=["mlp_act"])
    forward(model, ids, hook=CompositeHook([Reuses(), record]))
    for array in held:
        array[:] = 0
    assert_same(record.get("mlp_act")[layer], clean["mlp_act", layer])


def test_a_record_can_add_attention_and_activations(model, ids, clean, layer):
    record = RecordHook.for_layers([layer], capture_attention=True, capture_activations=True)
    forward(model, ids, hook=record)
    assert_same(record.attention_weights[layer], clean["attn_pattern", layer])
    assert_same(record.ffn_activation[layer], clean["mlp_act", layer])


def test_a_record_keeps_snapshots_not_aliases(model, ids, clean, layer):
    def wipe(x):
        x[:] = 0

    for name in {"resid_mid", "resid_post"} & {*points_of(model)}:
        record = RecordHook.for_layers([layer], points=[name])
        result = forward(model, ids, hook=CompositeHook([record, Replace(name, layer, wipe)]))
        assert_same(record.get(name)[layer], clean[name, layer])
    record = RecordHook.for_layers([layer], points=["resid_post"])
    forward(model, ids, hook=record)
    record.post_layer[layer][:] = 7
    assert not (result.residual == 7).any()


def test_what_a_record_returns_is_not_the_arrays_of_the_run(synthetic):
    record = RecordHook.for_layers([3], points=["resid_post"])
    result = forward(synthetic, [1, 2, 3], hook=record)
    record.post_layer[3][:] = 7
    assert not (result.residual == 7).any()


def test_a_record_appends_the_rows_of_decode_steps(model, ids, layer):
    record, cache = RecordHook.for_layers([layer], capture_attention=True), KVCache.with_layers(model.config.n_layers)
    for chunk in (ids[:3], ids[3:4], ids[4:5]):
        forward(model, chunk, hook=record, cache=cache)
    whole = RecordHook.for_layers([layer], capture_attention=True)
    forward(model, ids[:5], hook=whole)
    assert record.positions.tolist() == [0, 1, 2, 3, 4]
    assert_close(record.post_layer[layer], whole.post_layer[layer])
    assert_close(record.attention_weights[layer], whole.attention_weights[layer])


def test_a_record_covers_generated_tokens_once_each(model, ids, layer):
    record = RecordHook.for_layers([layer])
    new = generate(model, ids, 4, hook=record).ids
    assert record.positions.tolist() == list(range(len(ids) + len(new) - 1))
    whole = RecordHook.for_layers([layer])
    forward(model, ids + new[:-1], hook=whole)
    assert_close(record.post_layer[layer], whole.post_layer[layer])


def test_a_new_run_clears_the_record(model, ids, donor, layer):
    record, other = RecordHook.for_layers([layer]), RecordHook.for_layers([layer])
    forward(model, donor, hook=record)
    forward(model, ids, hook=record)
    forward(model, ids, hook=other)
    assert_same(record.post_layer[layer], other.post_layer[layer])


@pytest.mark.parametrize(
    ("scope", "rows"), [("all", [0, 1, 2, 3]), ("last", [3]), ("prompt", [0, 1, 2, 3]), ([1, -1], [1, 3]), ([-4], [0])]
)
def test_a_record_can_hold_some_positions_only(model, ids, scope, rows):
    record, whole = (
        RecordHook.for_layers([1], positions=scope, capture_attention=True),
        RecordHook.for_layers([1], True),
    )
    forward(model, ids[:4], hook=record)
    forward(model, ids[:4], hook=whole)
    assert record.positions.tolist() == rows
    assert_same(record.post_layer[1], whole.post_layer[1][rows])
    assert_same(record.attention_weights[1], whole.attention_weights[1][:, rows])


def test_a_record_of_a_batch_keeps_the_batch_axis(model, ids, donor):
    record = RecordHook.for_layers([1])
    forward(model, [ids, donor], hook=record)
    assert record.post_layer[1].shape == (2, len(ids), model.config.d_model)
    forward(model, [ids], hook=record)
    assert record.post_layer[1].shape == (len(ids), model.config.d_model)


def test_a_record_of_an_unknown_point_is_refused_naming_the_points():
    with pytest.raises(PointError, match=r"no point 'resid'; the points are embed, resid_pre, .*final_norm"):
        RecordHook.for_layers([0], points=["resid"])


def test_a_record_or_an_edit_of_a_point_that_the_blocks_lack_is_refused_with_the_reason(model, ids):
    hooks = [RecordHook.for_layers([0], points=["resid_mid"]), ScaleHook.for_layers([0], 1.0, point="resid_mid")]
    for hook in [*hooks, CompositeHook(hooks)]:
        if has(model, "resid_mid"):
            forward(model, ids, hook=hook)
        else:
            with refuses("resid_mid"):
                forward(model, ids, hook=hook)


def test_zero_ablation_clears_all_rows_or_the_named_ones(model, ids, clean, layer):
    assert not after(model, ids, ZeroAblateHook.for_layers([layer, layer]), layer).any()
    some = after(model, ids, ZeroAblateHook.for_layers([layer], positions=[0, -2]), layer)
    expected = clean["resid_post", layer].copy()
    expected[[0, -2]] = 0
    assert_same(some, expected)


def test_steering_adds_alpha_times_the_vector_to_the_last_row(model, ids, clean, layer):
    steered = after(model, ids, SteerHook().add(layer, vector(model), 3.0), layer)
    expected = clean["resid_post", layer].copy()
    expected[-1] += np.float32(3) * vector(model)
    assert_same(steered, expected)
    assert_moved(steered, clean["resid_post", layer])


def test_steering_reaches_the_rows_it_is_told_to(model, ids, clean, layer):
    everywhere = after(model, ids, SteerHook().add(layer, vector(model), 3.0, positions="all"), layer)
    assert_same(everywhere, clean["resid_post", layer] + np.float32(3) * vector(model))
    one = after(model, ids, SteerHook().add(layer, vector(model), 3.0, positions=[1]), layer)
    assert np.flatnonzero((one != clean["resid_post", layer]).any(-1)).tolist() == [1]


def test_several_vectors_at_one_layer_add_up(model, ids, clean, layer):
    both = SteerHook().add(layer, vector(model, 1), 2.0).add(layer, vector(model, 2), -5.0)
    expected = clean["resid_post", layer].copy()
    expected[-1] += 2 * vector(model, 1) - 5 * vector(model, 2)
    assert_close(after(model, ids, both, layer), expected)


def test_steering_by_zero_is_the_identity_and_by_more_is_not(model, ids):
    baseline = forward(model, ids).logits[0]
    for alpha in (0.0, 3.0):
        steered = forward(model, ids, hook=SteerHook().add(1, vector(model), alpha)).logits[0]
        (assert_moved if alpha else assert_close)(steered, baseline)


def test_scaling_by_one_is_the_identity_and_by_two_is_not(model, ids, clean, layer):
    baseline = forward(model, ids).logits[0]
    for factor in (1.0, 2.0):
        hook = ScaleHook.for_layers([layer, layer], factor)
        scaled = forward(model, ids, hook=hook).logits[0]
        (assert_close if factor == 1 else assert_moved)(scaled, baseline)
        assert_same(after(model, ids, hook, layer), clean["resid_post", layer] * np.float32(factor))


def test_scaling_reaches_the_point_and_rows_it_is_told_to(model, ids, clean, layer):
    record = RecordHook.for_layers([layer], points=["mlp_out"])
    hook = ScaleHook.for_layers([layer], 0.5, point="mlp_out", positions=[2])
    forward(model, ids, hook=CompositeHook([hook, record]))
    expected = clean["mlp_out", layer].copy()
    expected[2] *= np.float32(0.5)
    assert_same(record.get("mlp_out")[layer], expected)


def test_patching_writes_the_given_rows(model, ids, clean, layer):
    rows = {(layer, 1): vector(model, 1), (layer, -1): vector(model, 2)}
    expected = clean["resid_post", layer].copy()
    expected[1], expected[-1] = vector(model, 1), vector(model, 2)
    assert_same(after(model, ids, PatchHook(rows), layer), expected)


STRETCHED = {
    "one number for all features": lambda v: SteerHook().add(1, v[:1], 1.0),
    "several rows": lambda v: SteerHook().add(1, np.stack([v, v]), 1.0),
    "no axis": lambda v: SteerHook().add(1, v[0], 1.0),
    "too few features": lambda v: SteerHook().add(1, v[:-1], 1.0),
    "an alpha for each feature": lambda v: SteerHook().add(1, v, v),
    "a factor for each feature": lambda v: ScaleHook.for_layers([1], v),
    "one number in place of a row": lambda v: PatchHook({(1, 0): v[:1]}),
    "a bare number in place of a row": lambda v: PatchHook({(1, 0): v[0]}),
    "rows in place of a row": lambda v: PatchHook({(1, 0): np.stack([v, v])}),
    "a component along one number": lambda v: EditHook([Edit("resid_post", 1, component_set(v[:1], 1.0))]),
    "one number placed": lambda v: EditHook([Edit("resid_post", 1, placed(lambda p: v[:1]))]),
}


@pytest.mark.parametrize("name", STRETCHED)
def test_no_hook_stretches_a_vector_over_features_rows_or_heads(synthetic, name):
    with pytest.raises((VectorError, HookError), match="shape"):
        forward(synthetic, [1, 2, 3], hook=STRETCHED[name](vector(synthetic)))


def test_two_rows_for_one_position_are_refused_and_both_named(synthetic):
    row = vector(synthetic)
    hook = PatchHook({(1, 2): row, (1, -1): 2 * row, (2, -1): row})
    said = r"patch \(positions \[-1\]\) and patch \(positions \[2\]\) both set position 2 at resid_post, layer 1: give"
    with pytest.raises(HookError, match=said):
        forward(synthetic, [1, 2, 3], hook=hook)
    forward(synthetic, [1, 2, 3, 4], hook=hook)
    assert [edit.fired for edit in hook.edits] == [1, 1, 1]


def test_ablation_then_steering_leaves_the_steering_vector(model, ids, layer):
    ablate, steer = ZeroAblateHook.for_layers([layer]), SteerHook().add(layer, vector(model), 2.0)
    left = after(model, ids, CompositeHook([ablate, steer]), layer)
    assert_same(left[-1], 2 * vector(model))
    assert not left[:-1].any()
    with pytest.raises(HookError, match=r"zero \(positions all\) would leave nothing of steer \(positions last\)"):
        forward(model, ids, hook=CompositeHook([steer, ablate]))


def test_two_hooks_that_patch_one_row_are_refused_whichever_way_they_come(synthetic):
    row = vector(synthetic)
    one, other = PatchHook({(1, 2): row}), PatchHook({(1, -1): 2 * row, (1, 0): row})
    for hooks in ([one, other], [CompositeHook([one]), RecordHook.for_layers([1]), other]):
        with pytest.raises(HookError, match="both set position 2 at resid_post, layer 1: give each row to one of them"):
            forward(synthetic, [1, 2, 3], hook=CompositeHook(hooks))
    forward(synthetic, [1, 2, 3, 4], hook=CompositeHook([one, other]))
    assert [edit.fired for edit in (*one.edits, *other.edits)] == [1, 1, 1]


def test_a_patch_leaves_what_else_is_generated_to_the_edit_before_it(synthetic):
    steer = SteerHook().add(1, vector(synthetic), 1.0, "generated")
    patch = PatchHook({(1, 3): vector(synthetic)})
    generate(synthetic, [1, 2, 3], 3, hook=CompositeHook([steer, patch]))
    assert [edit.fired for edit in (*steer.edits, *patch.edits)] == [2, 1]
    with pytest.raises(HookError, match="would leave nothing of steer"):
        generate(synthetic, [1, 2, 3], 2, hook=CompositeHook([steer, patch]))


def test_pieces_of_a_prompt_are_judged_as_the_whole(synthetic):
    row = vector(synthetic)
    both = CompositeHook([ZeroAblateHook.for_layers([1]), PatchHook({(1, 0): row, (1, 2): row})])
    cache = KVCache.with_layers(synthetic.config.n_layers)
    for token in (1, 2, 3):
        forward(synthetic, [token], hook=both, cache=cache, prompt_length=3, logits_at="none")
    assert [edit.fired for edit in both.named_edits()] == [3, 1, 1]


def test_what_is_set_in_part_by_a_later_edit_keeps_the_rest(synthetic):
    row, last = vector(synthetic), synthetic.config.n_layers - 1
    zero = ZeroAblateHook.for_layers
    for first in (zero([last]), ScaleHook.for_layers([last], 0), SteerHook().add(last, row, 1.0, "all")):
        forward(synthetic, [1, 2, 3], hook=CompositeHook([first, zero([last], [2])]))
    found = forward(synthetic, [1, 2, 3], hook=CompositeHook([zero([last]), PatchHook({(last, 1): row})])).residual[0]
    assert np.array_equal(found, np.stack([0 * row, row, 0 * row]))
    halves = CompositeHook([SteerHook().add(last, row, 1.0, [0, 1]), zero([last], [0]), PatchHook({(last, 1): row})])
    with pytest.raises(HookError, match=r"leave nothing of steer \(positions \[0, 1\]\)"):
        forward(synthetic, [1, 2, 3], hook=halves)


def test_the_advice_is_an_order_that_goes(synthetic):
    patch, zero = PatchHook({(1, 1): vector(synthetic)}), ZeroAblateHook.for_layers([1])
    for erasing in (zero, ScaleHook.for_layers([1], 0)):
        with pytest.raises(HookError, match=r"leave one of them out, or list the other one after it$"):
            forward(synthetic, [1, 2, 3], hook=CompositeHook([patch, erasing]))
        forward(synthetic, [1, 2, 3], hook=CompositeHook([erasing, patch]))
    with pytest.raises(HookError, match=r"leave one of them out$"):
        forward(synthetic, [1, 2, 3], hook=CompositeHook([zero, ZeroAblateHook.for_layers([1])]))


def test_the_same_content_may_name_a_row_twice(synthetic):
    same = [ZeroAblateHook.for_layers([1], [0, 1]), ScaleHook.for_layers([1], 0, positions=[1, 2])]
    forward(synthetic, [1, 2, 3], hook=CompositeHook(same))
    with pytest.raises(HookError, match="both set position 1"):
        forward(synthetic, [1, 2, 3], hook=CompositeHook([same[0], PatchHook({(1, 1): vector(synthetic)})]))


def test_a_record_sees_what_the_hooks_before_it_left(model, ids, clean, layer):
    before, later = RecordHook.for_layers([layer]), RecordHook.for_layers([layer])
    forward(model, ids, hook=CompositeHook([before, ZeroAblateHook.for_layers([layer]), later]))
    assert_same(before.post_layer[layer], clean["resid_post", layer])
    assert not later.post_layer[layer].any()


def test_a_composite_wants_the_union(model):
    composite = CompositeHook([RecordHook.for_layers([0], points=["q"]), RecordHook.for_layers([1], points=["z"])])
    wanted = {(p, i) for p in ("q", "k", "z") for i in (0, 1) if composite.wants(p, i)}
    assert wanted == {("q", 0), ("z", 1)}


@pytest.mark.parametrize("name", ["resid_mid", "resid_post"])
def test_editing_a_replacement_leaves_the_hooks_own_array_alone(synthetic, name):
    mine = np.ones((1, 3, 64), np.float32)
    composite = CompositeHook([Replace(name, 1, lambda x: mine), ScaleHook.for_layers([1], 2.0, point=name)])
    forward(synthetic, [1, 2, 3], hook=composite)
    assert (mine == 1).all()


def test_edits_count_the_rows_they_changed(model, ids):
    hook = (
        SteerHook()
        .add(1, vector(model), 1.0)
        .add(2, vector(model), 1.0, positions="all")
        .add(3, vector(model), 1.0, [99])
    )
    forward(model, ids, hook=hook)
    assert [edit.fired for edit in hook.edits] == [1, len(ids), 0]
