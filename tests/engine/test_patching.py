"""trace_forward, capture_donor_state, patch_and_trace, patch_activations, map_pre_o_head, single layers."""

import numpy as np
import pytest
from declared import bias_free, has, refuses, turns
from recording import Calls, everything
from tolerances import assert_close, assert_moved, assert_same

from engine import (
    POINTS,
    DonorState,
    Intervention,
    ScaleHook,
    SteerHook,
    capture_donor_state,
    compile_interventions,
    forward,
    map_pre_o_head,
    patch_and_trace,
    run_layer_with_mapped_pre_o_head,
    trace_forward,
)
from engine.errors import HookError, InputError, LayerError, PointError, PositionError


@pytest.fixture
def layer(model) -> int:
    return model.config.n_layers // 2


@pytest.fixture(scope="module")
def clean(model, ids):
    return everything(model, ids)


@pytest.fixture(scope="module")
def logits(model, ids):
    return forward(model, ids).logits[0]


@pytest.fixture(scope="module")
def donor_logits(model, donor):
    return forward(model, donor).logits[0]


def zero(x: np.ndarray) -> np.ndarray:
    return np.zeros_like(x)


def test_a_trace_captures_residuals_after_the_hook(model, ids, clean, logits, layer):
    trace = trace_forward(model, ids, capture_layers=[layer, -1])
    assert list(trace.residuals) == [layer, model.config.n_layers - 1]
    assert_same(trace.residuals[layer], clean["resid_post", layer])
    assert_same(trace.logits[None], logits)
    scaled = trace_forward(model, ids, hook=ScaleHook.for_layers([layer], 2.0), capture_layers=[layer])
    assert_same(scaled.residuals[layer], 2 * clean["resid_post", layer])


def test_hooks_above_the_highest_captured_layer_fire_too(model, ids):
    calls = Calls(["resid_post"])
    trace_forward(model, ids, hook=calls, capture_layers=[0])
    assert [layer for _, layer, *_ in calls.seen] == list(range(model.config.n_layers))


def test_a_trace_can_stop_early_but_not_below_what_it_captures(model, ids, clean):
    calls = Calls(["resid_post"])
    trace = trace_forward(model, ids, hook=calls, capture_layers=[1], stop=2)
    assert trace.logits is None
    assert_same(trace.residuals[1], clean["resid_post", 1])
    assert [layer for _, layer, *_ in calls.seen] == [0, 1]
    with pytest.raises(InputError, match="layer 2 cannot be captured in a run that stops before layer 2"):
        trace_forward(model, ids, capture_layers=[2], stop=2)


def test_captures_of_the_model_are_rows_of_the_trace(model, ids, clean, layer):
    whole, last = model.forward_with_capture(ids, [layer, layer]), model.capture_residuals(ids, [layer])
    assert_same(whole[layer], clean["resid_post", layer])
    assert_same(last[layer], clean["resid_post", layer][-1])
    assert_moved(whole[layer][-2], last[layer])


def test_two_donor_rows_for_one_place_are_refused_and_both_named(synthetic):
    state = capture_donor_state(synthetic, [1, 2, 3, 4], [(1, 0), (1, 2), (2, 1)])
    with pytest.raises(PositionError, match="layer 1: the donor's positions 0 and 2 both go to position 1; one row"):
        patch_and_trace(synthetic, [5, 6, 7], state, to={0: 1, 2: 1})
    patch_and_trace(synthetic, [5, 6, 7], state, to={2: 1})
    with pytest.raises(PositionError, match="positions 3 and 2 both go to position 2"):
        synthetic.patch_activations([1, 2, 3, 4], [5, 6, 7], [(1, -1), (1, 2)], [-1])


@pytest.mark.parametrize("name", POINTS)
def test_a_donor_state_holds_the_rows_asked_for(model, ids, clean, layer, name):
    at = {"embed": 0, "final_norm": model.config.n_layers - 1}.get(name, layer)
    if not has(model, name):
        with refuses(name):
            capture_donor_state(model, ids, [(at, 1)], point=name)
        return
    state = capture_donor_state(model, ids, [(at, 1), (at - model.config.n_layers, -1)], point=name)
    assert list(state.rows) == [(at, 1), (at, len(ids) - 1)]
    axis = POINTS[name].seq_axis - 1
    for (_, position), row in state.rows.items():
        assert_same(row, np.take(clean[name, at], position, axis))


@pytest.mark.parametrize(
    "name", ["embed", "resid_pre", "attn_out", "resid_mid", "mlp_act", "z", "q", "k", "attn_pattern"]
)
def test_patching_a_prompt_into_itself_changes_nothing(model, ids, donor, logits, name):
    layer = 0 if name == "embed" else 1
    targets = [(layer, position) for position in range(len(ids))]
    if not has(model, name):
        with refuses(name):
            capture_donor_state(model, ids, targets, point=name)
        return
    own = patch_and_trace(model, ids, capture_donor_state(model, ids, targets, point=name))
    assert_close(own.logits[None], logits)
    other = patch_and_trace(model, ids, capture_donor_state(model, donor, targets, point=name))
    assert_moved(other.logits[None], logits)


def test_all_positions_patched_at_a_layer_give_the_donors_logits(model, ids, donor, donor_logits, logits, layer):
    targets = [(layer, position) for position in range(len(ids))]
    patched = patch_and_trace(model, ids, capture_donor_state(model, donor, targets), capture_layers=[layer])
    assert_close(patched.logits[None], donor_logits)
    assert_moved(logits, donor_logits)
    all_but_one = [target for target in targets if target != (layer, len(ids) - 2)]
    some = patch_and_trace(model, ids, capture_donor_state(model, donor, all_but_one))
    assert_moved(some.logits[None], donor_logits)
    assert_moved(some.logits[None], logits)


def test_a_row_can_be_patched_to_another_position(model, ids, donor, clean, layer):
    state = capture_donor_state(model, donor, [(layer, 0)])
    moved = patch_and_trace(model, ids, state, [layer], to={0: -2}).residuals[layer]
    expected = clean["resid_post", layer].copy()
    expected[-2] = state.rows[layer, 0]
    assert_same(moved, expected)


def test_a_single_position_differs_from_another(model, ids, donor, logits, layer):
    runs = [
        patch_and_trace(model, ids, capture_donor_state(model, donor, [(layer, position)])).logits[None]
        for position in (1, -1, len(ids) - 1)
    ]
    assert_same(runs[1], runs[2])
    assert_moved(runs[0], runs[1])
    assert_moved(runs[1], logits)


def test_patch_activations_writes_the_donors_rows(model, ids, donor, layer):
    last = model.config.n_layers - 1
    everything_patched = [(layer, position) for position in range(len(ids))]
    patched = model.patch_activations(donor, ids, everything_patched, [layer, last])
    expected = model.capture_residuals(donor, [layer, last])
    assert_same(patched[layer], expected[layer])
    assert_close(patched[last], expected[last])
    assert_moved(patched[last], model.capture_residuals(ids, [last])[last])


def test_minus_one_is_the_last_position_of_each_prompt(model, ids, donor, layer):
    longer = [*donor, ids[1], ids[2]]
    expected = model.capture_residuals(longer, [layer])[layer]
    assert_same(model.patch_activations(longer, ids, [(layer, -1)], [layer])[layer], expected)
    both = [(layer, -1), (layer, len(longer) - 1)] if len(longer) <= len(ids) else [(layer, -1), (layer, 0)]
    assert_same(model.patch_activations(longer, ids, both, [layer])[layer], expected)


def test_two_targets_that_name_one_donor_row_are_both_patched(model, ids, donor, layer):
    """-1 is row n-1 of the donor, and so is n-1; in a longer recipient they are two different rows."""
    longer, n = [*ids, ids[1]], len(donor)
    row = model.forward_with_capture(donor, [layer])[layer][-1]
    for targets in ([(layer, -1), (layer, n - 1)], [(layer, n - 1), (layer, -1)]):
        patched = model.patch_activations(donor, longer, targets, [layer])[layer]
        assert_same(patched, row)


def test_ablating_and_steering_on_the_model_follow_their_definitions(model, ids, donor, clean, layer):
    last = model.config.n_layers - 1
    zeroed = model.forward_ablate(ids, [layer, layer - model.config.n_layers], [layer, last])
    assert not zeroed[layer].any()
    assert zeroed[last].any() != bias_free(model)
    assert_same(zeroed[last], model.forward_ablate(donor, [layer], [last])[last])
    vec = np.random.default_rng(0).standard_normal(model.config.d_model).astype(np.float32)
    steered = model.forward_steer(ids, [(layer, vec, 2.0), (layer, vec, 1.5)], [layer, last])
    assert_close(steered[layer], clean["resid_post", layer][-1] + 3.5 * vec)
    assert_moved(steered[last], clean["resid_post", last][-1])
    other = forward(model, ids, hook=SteerHook().add(layer, vec, 3.5), logits_at="none").residual[0, -1]
    assert_close(steered[last], other)


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        ([(4, 0)], LayerError, "valid: 0 to 3"),
        ([(-5, 0)], LayerError, "valid: 0 to 3"),
        ([(0, 3)], PositionError, "valid: 0 to 2"),
        ([(0, -4)], PositionError, "valid: 0 to 2"),
        ([], InputError, "at least one"),
    ],
)
def test_targets_that_do_not_exist_are_refused(synthetic, targets, error, message):
    with pytest.raises(error, match=message):
        capture_donor_state(synthetic, [1, 2, 3], targets)
    with pytest.raises(error, match=message):
        synthetic.patch_activations([1, 2, 3], [4, 5, 6], targets, [0])


def test_a_donor_row_beyond_the_recipient_is_refused(synthetic):
    state = capture_donor_state(synthetic, [1, 2, 3], [(0, 2)])
    with pytest.raises(PositionError, match="prompt of 2 tokens; valid: 0 to 1"):
        patch_and_trace(synthetic, [1, 2], state)
    with pytest.raises(PositionError, match="prompt of 2 tokens; valid: 0 to 1"):
        synthetic.patch_activations([1, 2, 3], [1, 2], [(0, 2)], [0])


def test_a_point_that_exists_once_is_refused_at_other_layers(synthetic):
    for name, only in (("embed", 0), ("final_norm", 3)):
        with pytest.raises(LayerError, match=f"{name} exists once, at layer {only}"):
            capture_donor_state(synthetic, [1, 2, 3], [(2, 0)], point=name)
    with pytest.raises(PointError, match="there is no point 'resid'"):
        capture_donor_state(synthetic, [1, 2, 3], [(2, 0)], point="resid")


def test_a_donor_row_of_another_width_is_refused(synthetic):
    state = DonorState("resid_post", {(1, 0): np.zeros(63, np.float32)})
    with pytest.raises(HookError, match=r"\(63,\) cannot take the place of rows of shape \(64,\)"):
        patch_and_trace(synthetic, [1, 2], state)


@pytest.mark.parametrize("head", [0, 1, -1])
def test_mapping_a_head_by_the_identity_changes_nothing_and_to_zero_ablates_it(model, ids, logits, layer, head):
    same = map_pre_o_head(model, ids, layer, head, lambda x: x, capture_layers=[layer])
    assert_close(same.logits[None], logits)
    gone = map_pre_o_head(model, ids, layer - model.config.n_layers, head, zero)
    ablation = compile_interventions(model, [Intervention("zero", (layer,), "z", heads=(head,))], len(ids))
    assert_close(gone.logits[None], forward(model, ids, hook=ablation).logits[0])
    assert_moved(gone.logits[None], logits)


def test_the_function_is_given_the_heads_rows_before_the_output_projection(model, ids, clean, layer):
    seen = []

    def keep(x):
        seen.append(x.copy())
        return x

    map_pre_o_head(model, ids, layer, 1, keep)
    run_layer_with_mapped_pre_o_head(model, layer, clean["resid_pre", layer], 1, keep)
    for x in seen:
        assert_same(x, clean["z", layer][:, 1])
    assert len(seen) == 2


def test_one_layer_alone_equals_that_layer_in_a_full_pass(model, ids, clean, layer):
    def reversed_rows(x):
        return x[::-1] * np.float32(3)

    for function in (zero, reversed_rows, lambda x: x):
        alone = run_layer_with_mapped_pre_o_head(model, layer, clean["resid_pre", layer], 1, function)
        trace = map_pre_o_head(model, ids, layer, 1, function, capture_layers=[layer])
        assert_same(alone, trace.residuals[layer])
    assert_same(alone, clean["resid_post", layer])


def test_one_layer_alone_depends_on_how_far_apart_its_rows_are(model, ids, clean, layer):
    rows, n = clean["resid_pre", layer], len(ids)
    plain = run_layer_with_mapped_pre_o_head(model, layer, rows, 0, lambda x: x)
    shifted = run_layer_with_mapped_pre_o_head(model, layer, rows, 0, lambda x: x, positions=np.arange(9, 9 + n))
    assert_close(shifted, plain)
    spread = run_layer_with_mapped_pre_o_head(model, layer, rows, 0, lambda x: x, positions=3 * np.arange(n))
    (assert_moved if turns(model, layer) else assert_close)(spread, plain)


def test_a_mapped_head_must_exist_and_keep_its_shape(synthetic):
    for head in (4, -5, True):
        with pytest.raises(InputError, match="valid: 0 to 3"):
            map_pre_o_head(synthetic, [1, 2], 0, head, zero)
    for wrong in (lambda x: x[0], lambda x: x[:, :-1], lambda x: 0.0):
        with pytest.raises(HookError, match=r"must keep \(2, 16\)"):
            map_pre_o_head(synthetic, [1, 2], 0, 0, wrong)
    with pytest.raises(InputError, match="shares no keys"):
        run_layer_with_mapped_pre_o_head(synthetic, 0, np.ones((2, 64)), 0, zero, shared_kv=object())
    with pytest.raises(InputError, match="no per-layer embeddings"):
        run_layer_with_mapped_pre_o_head(synthetic, 0, np.ones((2, 64)), 0, zero, ple=object())
