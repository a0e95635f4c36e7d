"""Interventions as data: what each kind does at the point it names, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
from declared import has, points_of, refuses
from recording import everything
from tolerances import assert_close, assert_moved, assert_same

from engine import POINTS, EngineError, Intervention, KVCache, compile_interventions, forward, generate
from engine.errors import HookError, InputError, LayerError, PointError, PositionError, VectorError


@pytest.fixture
def layer(model) -> int:
    return model.config.n_layers // 2


@pytest.fixture(scope="module")
def clean(model, ids):
    return everything(model, ids)


def vector(width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(width).astype(np.float32)


def run(model, ids, *items: Intervention):
    return everything(model, ids, compile_interventions(model, items, len(ids)))


def logits(model, ids, *items: Intervention) -> np.ndarray:
    return forward(model, ids, hook=compile_interventions(model, items, len(ids))).logits[0]


def test_each_kind_follows_its_formula_at_the_rows_it_names(model, ids, clean, layer):
    h, vec = clean["resid_post", layer][[0, -1]], vector(model.config.d_model)
    u = vec / np.linalg.norm(vec)
    expected = {
        "zero": np.zeros_like(h),
        "mean": np.stack([vec, vec]),
        "patch": np.stack([vec, vec]),
        "scale": h * np.float32(2.5),
        "steer": h + np.float32(2.5) * vec,
        "set_component": h + np.outer(2.5 - h @ u, u),
        "project_out": h - np.outer(h @ u, u),
    }
    for kind, rows in expected.items():
        item = Intervention(kind, (layer,), positions=[0, -1], value=2.5, vector=vec)
        found = run(model, ids, item)["resid_post", layer]
        assert_close(found[[0, -1]], rows)
        assert_same(found[1:-1], clean["resid_post", layer][1:-1])


def test_steering_counts_in_raw_unit_or_row_norms(model, ids, clean, layer):
    h, vec = clean["resid_post", layer], vector(model.config.d_model)
    u = vec / np.linalg.norm(vec)
    steps = {"raw": vec, "unit": u, "row": np.linalg.norm(h, axis=-1, keepdims=True) * u}
    for unit, step in steps.items():
        item = Intervention("steer", (layer,), value=0.5, unit=unit, vector=vec)
        assert_close(run(model, ids, item)["resid_post", layer], h + np.float32(0.5) * step)


def test_a_patch_may_bring_a_row_for_each_position(model, ids, clean, layer):
    vec, other = vector(model.config.d_model), vector(model.config.d_model, 1)
    item = Intervention("patch", (layer,), rows={1: vec, -1: other})
    found = run(model, ids, item)["resid_post", layer]
    expected = clean["resid_post", layer].copy()
    expected[[1, -1]] = vec, other
    assert_same(found, expected)


def test_resampling_draws_rows_of_the_pool_and_depends_on_the_seed(model, ids, clean, layer):
    pool = np.stack([vector(model.config.d_model, i) for i in range(5)])

    def drawn(seed):
        item = Intervention("resample", (layer,), positions="all", vector=pool, seed=seed)
        return run(model, ids, item)["resid_post", layer]

    first = drawn(0)
    assert all(any(np.array_equal(row, one) for one in pool) for row in first)
    assert len({row.tobytes() for row in first}) > 1
    assert_same(first, drawn(0))
    assert not np.array_equal(first, drawn(1))


def test_resampling_may_keep_heads_apart(model, ids, clean):
    heads = model.config.n_heads
    pool = np.stack([[vector(model.config.d_head, 10 * i + h) for h in range(heads)] for i in range(3)])
    found = run(model, ids, Intervention("resample", (1,), "z", vector=pool))["z", 1]
    assert all(any(np.array_equal(row, one) for one in pool) for row in found)
    narrow = run(model, ids, Intervention("resample", (1,), "z", heads=(1,), vector=pool[:, 1]))["z", 1]
    assert_same(narrow[:, 0], clean["z", 1][:, 0])
    assert all(any(np.array_equal(row, one) for one in pool[:, 1]) for row in narrow[:, 1])


def test_every_kind_means_the_same_in_one_pass_and_token_by_token(model, ids):
    width, pool = model.config.d_model, np.stack([vector(model.config.d_model, i) for i in range(4)])
    items = [
        Intervention("steer", (1,), positions=(2, -1), value=0.1, unit="row", vector=vector(width)),
        Intervention("resample", (0,), "attn_out", positions=(0, 1, -2), vector=pool, seed=2),
        Intervention("patch", (1,), "mlp_out", rows={2: pool[0], -1: pool[1]}),
        Intervention("scale", (2,), "mlp_act", neurons=(0, 3), value=-3.0),
        Intervention("knockout", (1,), "attn_pattern", "last", keys=(0, -1)),
    ]
    whole = forward(model, ids, hook=compile_interventions(model, items, len(ids)), logits_at="all").logits[0]
    cache, hook = KVCache.with_layers(model.config.n_layers), compile_interventions(model, items, len(ids))
    steps = [forward(model, [t], hook=hook, cache=cache, prompt_length=len(ids)).logits[0, -1] for t in ids]
    assert_close(np.stack(steps), whole)
    assert_moved(whole, forward(model, ids, logits_at="all").logits[0])
    assert [edit.fired for edit in hook.edits] == [2, 3, 2, len(ids), 1]


def test_neurons_are_changed_alone(model, ids, clean):
    found = run(model, ids, Intervention("zero", (1,), "mlp_act", positions=[-1], neurons=(0, -1)))["mlp_act", 1]
    expected = clean["mlp_act", 1].copy()
    expected[-1, [0, -1]] = 0
    assert_same(found, expected)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (Intervention("zero", (1,), "mlp_act", neurons=(160,)), "neuron 160 does not exist; valid: 0 to 159"),
        (Intervention("zero", (1,), "mlp_act", neurons=()), "neurons is an empty list"),
        (Intervention("zero", (1,), "resid_post", neurons=(1,)), "resid_post has no neurons"),
        (Intervention("steer", (1,), vector=np.ones(64, "f4"), unit="feet"), "valid: raw, unit, row"),
        (Intervention("steer", (1,), vector=np.zeros(64, "f4"), unit="row"), "zero vector has no direction"),
        (Intervention("resample", (1,), vector=np.ones(64, "f4")), "rows to draw from"),
        (Intervention("resample", (1,), vector=np.ones((2, 63), "f4")), "vector of 64 finite numbers"),
        (
            Intervention("resample", (1,), vector=np.array([[0.0] * 64, [np.inf] * 64])),
            "of resample holds NaN or infinity",
        ),
        (Intervention("patch", (1,), rows={-1: np.ones(64, "f4"), 2: np.ones(64, "f4")}), "gives position 2 two rows"),
        (Intervention("patch", (1,), rows={}), "this run computes positions 0 to 2"),
        (Intervention("patch", (1,), rows={3: np.ones(64, "f4")}), "this run computes positions 0 to 2"),
        (Intervention("patch", (1,), rows={0: np.ones(64, "f4"), 1: np.ones(63, "f4")}), "vector of 64 finite numbers"),
        (Intervention("patch", (1,), rows={0: np.ones(64, "f4"), 1: np.full(64, np.nan)}), "of patch holds NaN"),
    ],
)
def test_details_that_do_not_fit_are_refused(synthetic, item, message):
    with pytest.raises(EngineError, match=message):
        compile_interventions(synthetic, [item], 3)


def test_setting_a_component_gives_that_component_and_no_other_change(model, ids, clean, layer):
    vec = vector(model.config.d_model)
    u = vec / np.linalg.norm(vec)
    h = clean["resid_post", layer]
    found = run(model, ids, Intervention("set_component", (layer,), value=7.0, vector=vec))["resid_post", layer]
    assert np.abs(found @ u - 7).max() < 1e-3
    assert_close(found - np.outer(found @ u, u), h - np.outer(h @ u, u), 1e-4)


def test_setting_a_component_to_what_it_is_changes_nothing(model, ids, clean, layer):
    vec, baseline = vector(model.config.d_model), forward(model, ids).logits[0]
    component = float(clean["resid_post", layer][-1] @ vec / np.linalg.norm(vec))

    def item(value):
        return Intervention("set_component", (layer,), positions="last", value=value, vector=vec)

    assert_close(logits(model, ids, item(component)), baseline)
    size = float(np.linalg.norm(clean["resid_post", layer][-1]))
    assert_moved(logits(model, ids, item(component + size)), baseline)


@pytest.mark.parametrize("name", [name for name in POINTS if POINTS[name].axes[-1] != "key"])
def test_a_vector_as_wide_as_the_point_can_be_added_there(model, ids, clean, name):
    layer = {"embed": 0, "final_norm": model.config.n_layers - 1}.get(name, 1)
    if not has(model, name):
        with refuses(name):
            run(model, ids, Intervention("steer", (layer,), name, vector=vector(model.config.d_model)))
        return
    width = clean[name, layer].shape[-1]
    item = Intervention("steer", (layer,), name, positions="all", value=2.0, vector=vector(width))
    assert_same(run(model, ids, item)[name, layer], clean[name, layer] + 2 * vector(width))


@pytest.mark.parametrize("kind", ["mean", "patch"])
@pytest.mark.parametrize("name", ["z", "q", "v"])
def test_rows_of_chosen_heads_become_the_vector(model, ids, clean, name, kind):
    vec = vector(model.config.d_head)
    found = run(model, ids, Intervention(kind, (1,), name, positions=[0, -1], heads=(0, 1), vector=vec))
    axes = [axis for axis in POINTS[name].axes if axis != "batch"]
    old, new = (np.moveaxis(a[name, 1], (axes.index("seq"), axes.index("head")), (0, 1)) for a in (clean, found))
    expected = old.copy()
    expected[[[0], [-1]], [0, 1]] = vec
    assert_same(new, expected)


@pytest.mark.parametrize("name", ["resid_post", "mlp_act", "z", "k"])
def test_a_vector_of_another_width_is_refused_naming_the_right_one(synthetic, name):
    width = {"resid_post": 64, "mlp_act": 160, "z": 16, "k": 16}[name]
    for kind in ("steer", "set_component", "project_out", "mean", "patch"):
        for bad in (vector(width + 1), vector(1), vector(width)[None], np.float32(1), None):
            with pytest.raises(VectorError, match=f"{kind} at {name} needs a vector of {width} finite numbers"):
                compile_interventions(synthetic, [Intervention(kind, (1,), name, vector=bad)], 3)
        with pytest.raises(VectorError, match=f"the vector of {kind} holds NaN"):
            compile_interventions(synthetic, [Intervention(kind, (1,), name, vector=vector(width) * np.nan)], 3)


def test_a_head_of_the_pattern_can_be_silenced_but_not_steered(synthetic):
    found = run(synthetic, [1, 2, 3], Intervention("zero", (1,), "attn_pattern", heads=(2,)))
    assert not found["attn_pattern", 1][2].any()
    assert not found["z", 1][:, 2].any()
    with pytest.raises(PointError, match="does not act at attn_pattern"):
        run(synthetic, [1, 2, 3], Intervention("steer", (1,), "attn_pattern", vector=vector(3)))


def test_scaling_by_one_is_the_identity_at_every_point(model, ids):
    baseline = forward(model, ids).logits[0]
    ones, halves = ([Intervention("scale", (1,), name, value=x) for name in points_of(model)] for x in (1.0, 0.5))
    assert_close(logits(model, ids, *ones), baseline)
    assert_moved(logits(model, ids, *halves), baseline)


def test_a_knock_out_renormalises_what_is_left(model, ids, clean, layer):
    found = run(
        model, ids, Intervention("knockout", (layer,), "attn_pattern", positions=[-1], keys=(1, -2), heads=(0,))
    )
    pattern, n = clean["attn_pattern", layer].astype(np.float64), len(ids)
    expected = pattern[0, -1].copy()
    expected[[1, n - 2]] = 0
    assert_close(found["attn_pattern", layer][0, -1], expected / expected.sum())
    assert_same(found["attn_pattern", layer][0, :-1], clean["attn_pattern", layer][0, :-1])
    assert_same(found["attn_pattern", layer][1:], clean["attn_pattern", layer][1:])


def test_a_row_with_nothing_left_attends_to_nothing(model, ids, layer):
    found = run(model, ids, Intervention("knockout", (layer,), "attn_pattern", positions=[0], keys=(0,)))
    assert not found["attn_pattern", layer][:, 0].any()
    assert not found["z", layer][0].any()
    assert found["z", layer][1:].any(-1).all()


def test_a_token_that_nobody_may_attend_to_does_not_matter(model, ids, donor):
    p, layers = len(ids) - 3, tuple(range(model.config.n_layers))
    rows = list(range(p + 1, len(ids)))
    cut = Intervention("knockout", layers, "attn_pattern", positions=rows, keys=(p,))
    other = [*ids[:p], donor[0], *ids[p + 1 :]]
    assert_close(logits(model, other, cut), logits(model, ids, cut))
    assert_moved(forward(model, other).logits[0], forward(model, ids).logits[0])


def test_interventions_apply_in_order_and_count_their_rows(model, ids, layer):
    vec = vector(model.config.d_model)
    zero = Intervention("zero", (layer,))
    steer = Intervention("steer", (layer, layer - model.config.n_layers), positions="last", value=2.0, vector=vec)
    hook = compile_interventions(model, [zero, steer], len(ids))
    found = everything(model, ids, hook)["resid_post", layer]
    assert_same(found[-1], 2 * vec)
    assert [edit.fired for edit in hook.edits] == [len(ids), 1]
    half = Intervention("scale", (layer,), positions="last", value=0.5)
    after = (
        run(model, ids, zero, steer, half)["resid_post", layer],
        run(model, ids, zero, half, steer)["resid_post", layer],
    )
    assert_same(np.stack([rows[-1] for rows in after]), np.stack([vec, 2 * vec]))


def test_key_value_heads_are_counted_at_keys_and_values(model, ids, clean):
    last = model.config.n_kv_heads - 1
    found = run(model, ids, Intervention("zero", (1,), "v", heads=(-1,)))
    assert not found["v", 1][last].any()
    readers = list(model.config.query_heads(last))
    others = [head for head in range(model.config.n_heads) if head not in readers]
    assert sorted(h for kv in range(last + 1) for h in model.config.query_heads(kv)) == sorted(others + readers)
    assert not found["z", 1][:, readers].any()
    if others:
        assert_close(found["z", 1][:, others], clean["z", 1][:, others])
    with pytest.raises(InputError, match=f"key-value head {last + 1} does not exist; valid: 0 to {last}"):
        compile_interventions(model, [Intervention("zero", (1,), "v", heads=(last + 1,))], 3)


def test_positions_may_reach_into_the_tokens_to_be_generated(model, ids):
    n = len(ids)
    hook = compile_interventions(model, [Intervention("zero", (1,), positions=[n + 1])], n, new_tokens=3)
    generate(model, ids, 3, hook=hook)
    assert hook.edits[0].fired == 1
    with pytest.raises(InputError, match=f"this run computes positions 0 to {n + 1}"):
        compile_interventions(model, [Intervention("zero", (1,), positions=[n + 2])], n, new_tokens=3)


def test_points_that_exist_once_fire_whatever_layers_are_named(model, ids, clean):
    last = model.config.n_layers - 1
    found = run(model, ids, Intervention("scale", (0, 1), "final_norm", value=2.0))
    assert_same(found["final_norm", last], 2 * clean["final_norm", last])


@pytest.mark.parametrize(
    ("item", "error", "message"),
    [
        (Intervention("zero", (4,)), LayerError, "valid: 0 to 3"),
        (Intervention("zero", (-5,)), LayerError, "valid: 0 to 3"),
        (Intervention("zero", ()), InputError, "names no layer"),
        (Intervention("zero", (0,), "resid"), PointError, "the points are embed"),
        (Intervention("zero", (0,), positions=[3]), InputError, "positions 0 to 2"),
        (Intervention("zero", (0,), positions=[]), InputError, "positions 0 to 2"),
        (Intervention("zero", (0,), positions=[-4]), PositionError, "prompt of 3 tokens"),
        (Intervention("zero", (0,), "z", heads=(4,)), InputError, "valid: 0 to 3"),
        (Intervention("zero", (0,), "z", heads=()), InputError, "empty list"),
        (Intervention("zero", (0,), heads=(0,)), PointError, "points with heads"),
        (Intervention("scale", (0,), value=float("nan")), InputError, "not finite"),
        (Intervention("steer", (0,), value=float("inf"), vector=vector(64)), InputError, "not finite"),
        (Intervention("project_out", (0,), vector=np.zeros(64)), VectorError, "no direction"),
        (Intervention("knockout", (0,), "attn_pattern"), InputError, "needs `keys`"),
        (Intervention("knockout", (0,), keys=(0,)), InputError, "attn_pattern"),
        (Intervention("knockout", (0,), "attn_pattern", keys=(3,)), InputError, "positions 0 to 2"),
        (Intervention("erase", (0,)), InputError, "valid: zero, mean, resample, scale"),
    ],
)
def test_what_cannot_be_done_is_refused_naming_what_can(synthetic, item, error, message):
    with pytest.raises(error, match=message):
        compile_interventions(synthetic, [item], 3)


def test_what_replaces_other_heads_neurons_or_rows_goes_together(synthetic):
    def act(point: str, positions: object, **parts: tuple[int, ...]) -> Intervention:
        return Intervention("zero", (1,), point, positions, **parts)

    apart = [
        act("z", "all", heads=(0, 2)),
        act("z", "all", heads=(1,)),
        act("mlp_act", "prompt", neurons=(3,)),
        act("mlp_act", "prompt", neurons=(4, 5)),
        act("mlp_act", "generated"),
    ]
    hook = compile_interventions(synthetic, apart, 4, new_tokens=3)
    generate(synthetic, [1, 2, 3, 4], 3, hook=hook)
    assert [edit.fired for edit in hook.edits] == [6, 6, 4, 4, 2]


ERASED = {
    "heads": [
        Intervention("scale", (1,), "z", heads=(0,), value=2.0),
        Intervention("zero", (1,), "z", heads=(0, 2)),
    ],
    "neurons": [
        Intervention("scale", (1,), "mlp_act", neurons=(3,), value=2.0),
        Intervention("zero", (1,), "mlp_act", neurons=(3, 4)),
    ],
    "new tokens": [
        Intervention("steer", (1,), positions=[5], value=1.0),
        Intervention("zero", (1,), positions="generated"),
    ],
    "a component": [
        Intervention("project_out", (1,), positions=[2]),
        Intervention("set_component", (1,), value=3.0),
    ],
}


@pytest.mark.parametrize("case", ERASED)
def test_what_leaves_nothing_of_another_comes_before_it(synthetic, case):
    erased, erasing = (
        replace(item, vector=vector(synthetic.config.d_model))
        if item.kind in ("steer", "set_component", "project_out")
        else item
        for item in ERASED[case]
    )
    with pytest.raises(HookError, match=f"^{erasing.kind} .*would leave nothing of {erased.kind} "):
        compile_interventions(synthetic, [erased, erasing], 4, new_tokens=4)
    if case != "a component":  # where either sets it
        compile_interventions(synthetic, [erasing, erased], 4, new_tokens=4)
