"""The named scans: each cell is what a run of its own gives, and the grid says what it did."""

import importlib
from dataclasses import replace

import numpy as np
import pytest
from declared import has, points_of
from tolerances import SAME, assert_close, assert_moved

from engine import (
    POINTS,
    Intervention,
    Metric,
    ablation_scan,
    alpha_sweep,
    capture_donor_state,
    compile_interventions,
    forward,
    knockout_scan,
    patching_grid,
    pooled_rows,
    replacements,
)
from engine.distribution import kl_divergence, softmax_of
from engine.errors import InputError, LayerError, PointError, PositionError, PromptError, TokenError
from engine.metrics import rounding
from engine.patching import patch_hook

LOGIT = Metric("logit", 65)


def logits(model, ids, *items):
    hook = compile_interventions(model, items, len(ids)) if items else None
    return forward(model, ids, hook=hook).logits[0, -1]


def close(a, b, model, ids):
    """Two logits of one token, within SAME of the size of a logit."""
    scale = np.abs(logits(model, ids)).max()
    assert np.abs(np.asarray(a) - np.asarray(b)).max() <= SAME * scale


@pytest.fixture(scope="module")
def some(model):
    return [0, model.config.n_layers // 2, model.config.n_layers - 1]


def test_a_cell_of_a_grid_is_a_patch_of_its_own(model, ids, donor, some):
    n = len(ids)
    for point in ("resid_post", "attn_out", "mlp_out", "v"):
        grid = patching_grid(model, donor, ids, LOGIT, point, layers=some, positions=[1, -2, -1])
        assert grid.axes == {"layer": tuple(some), "position": (1, n - 2, n - 1)}
        for i, layer in enumerate(some):
            for j, position in enumerate((1, n - 2, n - 1)):
                state = capture_donor_state(model, donor, [(layer, position)], point)
                patched = forward(model, ids, hook=patch_hook(model, ids, state)).logits[0, -1]
                close(grid.values[i, j], patched[65], model, ids)
        close(grid.baseline, logits(model, ids)[65], model, ids)
        close(grid.donor, logits(model, donor)[65], model, ids)


def moved_most(model, ids, donor) -> Metric:
    """The logit that differs most between the prompts."""
    return Metric("logit", int(np.abs(logits(model, donor) - logits(model, ids)).argmax()))


def test_patching_the_last_row_of_the_last_layer_recovers_everything(model, ids, donor):
    grid = patching_grid(model, donor, ids, moved_most(model, ids, donor), layers=[-1])
    recovered = grid.recovered()
    assert recovered[0, -1] == pytest.approx(1, abs=1e-3)
    assert np.abs(recovered[0, :-1]).max() < 1e-3
    assert grid.largest(1)[0][0] == (model.config.n_layers - 1, len(ids) - 1)


@pytest.mark.parametrize("point", ["z", "q", "k", "v"])
def test_a_grid_by_head_patches_one_head_at_all_positions(model, ids, donor, point):
    heads = model.config.n_kv_heads if point in ("k", "v") else model.config.n_heads
    grid = patching_grid(model, donor, ids, LOGIT, point, by="head", layers=[1])
    assert grid.axes == {"layer": (1,), "kv_head" if point in ("k", "v") else "head": tuple(range(heads))}
    rows = pooled_rows(model, [donor], [1], point)[1]
    for head in range(heads):
        item = Intervention("patch", (1,), point, heads=(head,), rows=dict(enumerate(rows[:, [head]])))
        close(grid.values[0, head], logits(model, ids, item)[65], model, ids)


def test_a_grid_by_head_and_position_has_a_cell_for_each(synthetic):
    ids, donor = [1, 2, 3, 4], [5, 6, 7, 4]
    grid = patching_grid(synthetic, donor, ids, LOGIT, "z", by="head_position", layers=[2], positions=[0, 3])
    assert list(grid.axes) == ["layer", "head", "position"]
    assert grid.values.shape == (1, synthetic.config.n_heads, 2)
    row = pooled_rows(synthetic, [donor], [2], "z")[2][3, [1]]
    item = Intervention("patch", (2,), "z", heads=(1,), rows={3: row})
    close(grid.values[0, 1, 1], logits(synthetic, ids, item)[65], synthetic, ids)


def test_the_ends_of_a_scan_are_signed_and_leave_out_what_is_below_the_floor(model, ids, donor):
    metric = moved_most(model, ids, donor)
    grid = patching_grid(model, donor, ids, metric, "mlp_out")
    cells = {(layer, p): grid.values[layer, p] for layer, p in np.ndindex(grid.values.shape)}
    found = {cell: value for cell, value in cells.items() if abs(value - np.float32(grid.baseline)) >= grid.floor}
    highest = sorted((c for c in found if found[c] > grid.baseline), key=lambda c: -found[c])
    lowest = sorted((c for c in found if found[c] < grid.baseline), key=lambda c: found[c])
    raised, lowered = grid.ends(3)
    assert [cell for cell, _ in raised] == highest[:3]
    assert [cell for cell, _ in lowered] == lowest[:3]
    assert all(value == found[cell] for cell, value in raised + lowered)
    assert sum(map(len, grid.ends(10**6))) == len(found) < grid.values.size
    assert grid.floor >= abs(grid.donor - grid.baseline) / 100


def test_without_a_donor_the_floor_is_what_rounding_can_do(synthetic):
    ids = [1, 2, 3, 4]
    scan = ablation_scan(synthetic, ids, LOGIT)
    assert scan.floor == rounding(LOGIT, logits(synthetic, ids))
    same = ablation_scan(synthetic, ids, LOGIT, mode="mean", over=[ids])
    assert same.ends(50) == ([], [])
    sure = replace(
        same,
        values=np.full_like(same.values, same.baseline),
        metric=Metric("probability", 65),
        logits=np.where(np.arange(257) == 65, 1e3, 0),
    )
    assert (sure.floor, sure.ends(50)) == (0, ([], [])), "what does not change is no finding even without a floor"


def test_cells_before_the_first_difference_are_answered_without_a_run(synthetic):
    ids, donor = [1, 2, 3, 4, 5], [1, 2, 9, 4, 5]
    grid = patching_grid(synthetic, donor, ids, LOGIT)
    assert grid.identical[:, :2].all()
    assert not grid.identical[:, 2:].any()
    assert (grid.values[:, :2] == np.float32(grid.baseline)).all()
    n = synthetic.config.n_layers
    assert grid.layer_rows == n * 5 + sum((n - 1 - layer) * (5 - p) for layer in range(n) for p in (2, 3, 4))
    assert patching_grid(synthetic, ids, ids, LOGIT).identical.all()


def test_equal_prompts_have_nothing_to_recover(model, ids, monkeypatch):
    seen = []
    run = importlib.import_module("engine.scans").base_run
    monkeypatch.setattr("engine.scans.base_run", lambda *a, **k: seen.append(run(*a, **k)) or seen[-1])
    grid = patching_grid(model, ids, ids, LOGIT, layers=[1])
    assert grid.donor == grid.baseline
    assert grid.recovered() is None
    assert len(seen[0].beside_logits) == 0  # rows of one batch may differ in their last bits on other processors


@pytest.mark.parametrize(("metric", "layers"), [(Metric("logit", 10**6), None), (LOGIT, [])])
def test_a_grid_that_cannot_be_read_is_refused_before_any_layer_runs(synthetic, metric, layers):
    ticks = []
    with pytest.raises((InputError, TokenError)):
        patching_grid(synthetic, [1, 2], [3, 2], metric, layers=layers, tick=lambda *done: ticks.append(done))
    assert ticks == []


def test_every_point_of_a_grid_can_be_patched_or_says_why_not(model, ids, donor):
    for point in POINTS:
        if point in points_of(model) and point != "attn_pattern":
            grid = patching_grid(model, donor, ids, LOGIT, point, layers=[1], positions=[-1])
            assert np.isfinite(grid.values).all()
    if not has(model, "resid_mid"):
        with pytest.raises(PointError, match="parallel"):
            patching_grid(model, donor, ids, LOGIT, "resid_mid")


@pytest.mark.parametrize(
    ("mode", "match", "short"),
    [("zero", "position", False)]
    + [
        (mode, match, short)
        for mode in ("mean", "resample")
        for match, short in (("position", False), ("pooled", False), ("position", True))
    ],
)
@pytest.mark.parametrize("by", ["layer", "component", "head"])
def test_a_cell_of_an_ablation_scan_is_an_ablation_of_its_own(model, ids, donor, by, mode, match, short):
    over = None if mode == "zero" else [donor, ids[:3] if short else ids]
    scan = ablation_scan(model, ids, LOGIT, by, mode, over, match, layers=[1], seed=5)

    def away(name, heads=None):
        if over is None:
            return Intervention(mode, (1,), name, heads=heads)
        (item,) = replacements(model, len(ids), mode, over, [1], name, heads=heads, seed=5, match=match)
        return item

    if by == "head":
        cells = [[away("z", (head,))] for head in range(model.config.n_heads)]
    else:
        both = [away("attn_out"), away("mlp_out")]
        cells = [both] if by == "layer" else [[item] for item in both]
    for value, items in zip(scan.values.ravel(), cells, strict=True):
        close(value, logits(model, ids, *items)[65], model, ids)
    assert scan.applied == (len(ids) - short) * sum(map(len, cells))
    assert scan.source == ". ".join(dict.fromkeys(item.source for items in cells for item in items if item.source))


def test_a_scan_over_the_prompt_itself_changes_nothing(model, ids, donor):
    for mode in ("mean", "resample"):
        own, other = (ablation_scan(model, ids, LOGIT, "head", mode, [over], layers=[1]) for over in (ids, donor))
        close(own.values, own.baseline, model, ids)
        assert np.abs(other.values - other.baseline).max() > 100 * np.abs(own.values - own.baseline).max()


def test_prompts_that_do_not_match_are_refused_before_any_layer_runs(synthetic):
    ticks = []
    with pytest.raises(InputError, match="position 0 stays as it is"):
        ablation_scan(
            synthetic, [1, 2, 3], LOGIT, mode="mean", over=[[1, 2]], positions=[0], tick=lambda *t: ticks.append(t)
        )
    assert ticks == []


def test_a_cell_of_a_knockout_scan_is_a_knockout_of_its_own(model, ids):
    n = model.config.n_layers
    by_key = knockout_scan(model, ids, LOGIT, keys=[-2, -1], layers=[1, n - 1], width=2)
    assert by_key.axes == {"layer": (1, n - 1), "key": (len(ids) - 2, len(ids) - 1)}
    for i, span in enumerate([(1, 2), (n - 1,)]):
        for j, key in enumerate((-2, -1)):
            item = Intervention("knockout", span, "attn_pattern", "last", keys=(key,))
            close(by_key.values[i, j], logits(model, ids, item)[65], model, ids)
    by_head = knockout_scan(model, ids, LOGIT, keys=[-1, -2], by="head", layers=[1])
    item = Intervention("knockout", (1,), "attn_pattern", "last", heads=(1,), keys=(-1, -2))
    close(by_head.values[0, 1], logits(model, ids, item)[65], model, ids)


@pytest.mark.parametrize("unit", ["raw", "unit", "row"])
def test_an_alpha_sweep_steers_with_each_strength(model, ids, unit):
    vec = np.random.default_rng(0).standard_normal(model.config.d_model).astype(np.float32)
    scan = alpha_sweep(model, ids, 1, vec, [0.0, 0.5, -2.0], LOGIT, unit)
    assert scan.axes == {"alpha": (0.0, 0.5, -2.0)}
    for alpha, value in zip((0.0, 0.5, -2.0), scan.values, strict=True):
        item = Intervention("steer", (1,), positions="last", value=alpha, unit=unit, vector=vec)
        close(value, logits(model, ids, item)[65], model, ids)
    close(scan.values[0], scan.baseline, model, ids)


def test_metrics_read_what_they_are_called(synthetic):
    ids, donor = [1, 2, 3, 4], [5, 6, 7, 4]
    item = capture_donor_state(synthetic, donor, [(2, 3)])
    patched = forward(synthetic, ids, hook=patch_hook(synthetic, ids, item)).logits[0, -1]
    base = logits(synthetic, ids)
    expected = {
        Metric("probability", 7): softmax_of(patched)[7],
        Metric("logit", 7): patched[7],
        Metric("logit_difference", 7, 9): patched[7] - patched[9],
        Metric("kl"): kl_divergence(patched, base),
    }
    for metric, value in expected.items():
        grid = patching_grid(synthetic, donor, ids, metric, layers=[2], positions=[3])
        assert grid.values[0, 0] == pytest.approx(float(value), rel=1e-3, abs=1e-5)
    assert_close(logits(synthetic, ids)[None], base[None])
    assert_moved(patched[None], base[None])


def test_the_kl_of_the_baseline_is_zero_and_of_the_donor_is_not(synthetic):
    grid = patching_grid(synthetic, [5, 6, 7, 4], [1, 2, 3, 4], Metric("kl"))
    assert grid.baseline == 0
    assert grid.donor > 1e-3


REFUSED = [
    (lambda m: patching_grid(m, [1, 2, 3], [1, 2], LOGIT), PromptError, "donor has 3 tokens, the recipient 2"),
    (lambda m: patching_grid(m, [1, 2], [3, 4], LOGIT, "attn_pattern"), PointError, "attn_pattern"),
    (lambda m: patching_grid(m, [1, 2], [3, 4], LOGIT, "resid_post", "head"), PointError, "no heads"),
    (lambda m: patching_grid(m, [1, 2], [3, 4], LOGIT, "nowhere"), PointError, "the points are"),
    (lambda m: patching_grid(m, [1, 2], [3, 4], LOGIT, by="row"), InputError, "valid: position, head"),
    (lambda m: patching_grid(m, [1, 2], [3, 4], LOGIT, layers=[4]), LayerError, "valid: 0 to 3"),
    (lambda m: patching_grid(m, [1, 2], [3, 4], LOGIT, layers=[]), InputError, "at least one layer"),
    (lambda m: patching_grid(m, [1, 2], [3, 4], LOGIT, positions=[2]), PositionError, "valid: 0 to 1"),
    (lambda m: patching_grid(m, [1, 2], [3, 4], Metric("logit")), InputError, "logit needs token"),
    (lambda m: patching_grid(m, [1, 2], [3, 4], Metric("kl", 3)), InputError, "takes no token"),
    (lambda m: patching_grid(m, [1, 2], [3, 4], Metric("logit", 999)), TokenError, "valid: 0 to 256"),
    (lambda m: patching_grid(m, [1, 2], [3, 4], Metric("beauty", 3)), InputError, "valid: probability"),
    (lambda m: ablation_scan(m, [1, 2], LOGIT, mode="mean"), InputError, "needs prompts"),
    (lambda m: ablation_scan(m, [1, 2], LOGIT, over=[[1]]), InputError, "takes no prompts"),
    (lambda m: ablation_scan(m, [1, 2], LOGIT, by="neuron"), InputError, "valid: layer, component, head"),
    (lambda m: ablation_scan(m, [1, 2], LOGIT, mode="noise"), InputError, "valid: zero, mean, resample"),
    (lambda m: knockout_scan(m, [1, 2], LOGIT, width=0), InputError, "at least 1 layer"),
    (lambda m: knockout_scan(m, [1, 2], LOGIT, keys=[2]), PositionError, "valid: 0 to 1"),
    (lambda m: alpha_sweep(m, [1, 2], 0, np.ones(64, "f4"), [], LOGIT), InputError, "at least one"),
    (lambda m: alpha_sweep(m, [1, 2], 0, np.ones(64, "f4"), [1.0], LOGIT, "inches"), InputError, "raw, unit, row"),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSED)
def test_what_cannot_be_scanned_is_refused_naming_what_can(synthetic, call, error, message):
    with pytest.raises(error, match=message):
        call(synthetic)
