"""Mean and resample ablation: which rows of other prompts take the place of which, and that it is told."""

import numpy as np
import pytest
from declared import points_of
from recording import everything
from tolerances import assert_close, assert_moved, assert_same

from engine import KVCache, compile_interventions, forward, generate, replacements
from engine.errors import HookError, InputError, PointError, PositionError
from engine.interventions import Intervention
from engine.patching import by_position

KINDS = ("mean", "resample")


def logits(model, ids, items) -> np.ndarray:
    return forward(model, ids, hook=compile_interventions(model, items, len(ids))).logits[0]


def rows_of(model, ids, point, layer) -> np.ndarray:
    return by_position(everything(model, ids)[point, layer], point)


def put(model, ids, *args, **options) -> np.ndarray:
    """The rows of layer 1 as a run has them whose rows there are replaced: (seq, [heads,] width)."""
    (item,) = replacements(model, len(ids), *args, **options)
    found = everything(model, ids, compile_interventions(model, [item], len(ids)))
    return by_position(found[item.point, 1], item.point)


@pytest.mark.parametrize("kind", KINDS)
def test_over_the_prompt_itself_nothing_changes_at_any_point(model, ids, donor, kind):
    baseline, everywhere = forward(model, ids).logits[0], range(model.config.n_layers)
    for point in points_of(model):
        if point == "attn_pattern":
            continue
        for layers in ([1], everywhere):
            assert_same(logits(model, ids, replacements(model, len(ids), kind, [ids], layers, point)), baseline)
        other = replacements(model, len(ids), kind, [donor], [1], point)
        assert_moved(logits(model, ids, other)[None], baseline[None])


@pytest.mark.parametrize("point", ["mlp_out", "z", "k"])
def test_prompts_of_the_same_length_are_averaged_position_by_position(model, ids, donor, point):
    expected = (rows_of(model, ids, point, 1) + rows_of(model, donor, point, 1)) / np.float32(2)
    found = put(model, ids, "mean", [ids, donor], [1], point)
    assert_close(found.reshape(len(ids), -1), expected.reshape(len(ids), -1))
    assert_moved(found.reshape(len(ids), -1), rows_of(model, ids, point, 1).reshape(len(ids), -1))


def test_resampling_draws_from_the_same_position(synthetic):
    prompts = [[i, i + 50, i + 100, i + 150] for i in range(8)]
    pools = np.stack([rows_of(synthetic, prompt, "mlp_out", 1) for prompt in prompts], 1)  # (seq, prompts, d_model)
    runs = [put(synthetic, [1, 2, 3, 4], "resample", prompts, [1], "mlp_out", seed=seed) for seed in range(4)]
    for found in runs:
        for row, pool in zip(found, pools, strict=True):
            assert np.abs(pool - row).max(-1).min() < 1e-5
    assert len({found.tobytes() for found in runs}) == 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", [None, (1, -1)])
def test_prompts_of_other_lengths_are_pooled_but_for_first_rows_and_the_first_row_stays(model, ids, donor, kind, heads):
    others = [donor[:3], donor]
    rest = np.concatenate([rows_of(model, other, "z", 1)[1:] for other in others])
    own = rows_of(model, ids, "z", 1)
    found = put(model, ids, kind, others, [1], "z", heads=heads)
    assert_same(found[0], own[0])
    for head in range(model.config.n_heads):
        if heads is not None and head not in (1, model.config.n_heads - 1):
            assert_same(found[:, head], own[:, head])
        elif kind == "mean":
            assert_close(found[1:, head], np.broadcast_to(rest[:, head].mean(0), found[1:, head].shape))
        else:
            assert all(np.abs(rest[:, head] - row).max(-1).min() < 1e-5 for row in found[1:, head])


def test_pooled_means_every_row_for_every_row(model, ids, donor):
    pool = np.concatenate([rows_of(model, other, "mlp_out", 1) for other in (ids, donor)])
    found = put(model, ids, "mean", [ids, donor], [1], "mlp_out", match="pooled")
    assert_close(found, np.broadcast_to(pool.mean(0), found.shape))
    assert_moved(logits(model, ids, replacements(model, len(ids), "mean", [ids], [1], "mlp_out", match="pooled"))[None],
                 forward(model, ids).logits)  # fmt: skip


SOURCES = [
    ([[1, 2, 3]], {}, "mean at mlp_out: position by position over 1 prompt of 3 tokens"),
    ([[1, 2, 3], [4, 5]], {}, "mean at mlp_out: 3 rows of 2 prompts of 2 to 3 tokens, the first of each left out; "
     "the prompt changed has 3, and its first row stays"),
    ([[1, 2, 3], [4, 5, 6]], {"match": "pooled"}, "mean at mlp_out: all 6 rows of 2 prompts of 3 tokens"),
]  # fmt: skip


@pytest.mark.parametrize(("over", "options", "told"), SOURCES)
def test_what_is_averaged_is_told(synthetic, over, options, told):
    assert [item.source for item in replacements(synthetic, 3, "mean", over, [0, 1], "mlp_out", **options)] == [
        told
    ] * 2


SCOPES = [
    ("all", 3, [1, 2]),
    ("prompt", 3, [1, 2]),
    ("last", 3, [2]),
    ("all_but_first", 3, [1, 2]),
    ([1, -1], 3, [1, 2]),
]


@pytest.mark.parametrize(("scope", "length", "changed"), SCOPES)
def test_of_other_lengths_each_scope_leaves_the_first_row(synthetic, scope, length, changed):
    ids = [7, 8, 9][:length]
    found = put(synthetic, ids, "mean", [[1, 2]], [1], "mlp_out", positions=scope)
    own = rows_of(synthetic, ids, "mlp_out", 1)
    assert [p for p in range(length) if not np.array_equal(found[p], own[p])] == changed


REFUSED = [
    ({"positions": [0, 2]}, [[1, 2]], 3, "position 0 stays as it is, .* give prompts of 3 tokens, or match pooled"),
    ({"positions": [-3]}, [[1, 2]], 3, "position 0 stays as it is"),
    ({"positions": "last"}, [[1, 2]], 1, "position 0 stays as it is"),
    ({"positions": "prompt"}, [[1, 2]], 1, "position 0 stays as it is"),
    ({}, [[1], [2]], 3, "the prompts have one token each"),
    ({}, [], 3, "needs at least one prompt"),
    ({"match": "end"}, [[1, 2, 3]], 3, "valid: position, pooled"),
]


@pytest.mark.parametrize(("options", "over", "length", "message"), REFUSED)
def test_what_cannot_be_matched_is_refused_before_any_run(synthetic, options, over, length, message):
    ticks = []
    with pytest.raises(InputError, match=message):
        replacements(synthetic, length, "mean", over, [1], tick=lambda *done: ticks.append(done), **options)
    assert ticks == []


def test_only_mean_and_resample_put_in_rows_of_prompts(synthetic):
    with pytest.raises(InputError, match="valid: mean, resample"):
        replacements(synthetic, 3, "zero", [[1, 2, 3]], [1])
    with pytest.raises(PointError, match="use z"):
        replacements(synthetic, 3, "mean", [[1, 2, 3]], [1], "attn_pattern")
    with pytest.raises(PositionError, match="prompt of 3 tokens"):
        compile_interventions(synthetic, replacements(synthetic, 3, "mean", [[1, 2, 3]], [1], positions=[-4]), 3)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_new_tokens_get_what_is_pooled_cached_or_not(model, ids, donor, kind):
    items = replacements(model, len(ids), kind, [ids, donor], [1], "mlp_out")
    hook = compile_interventions(model, items, len(ids), 4)
    made = generate(model, ids, 4, hook=hook)
    assert [edit.fired for edit in hook.edits] == [len(ids) + 3]
    whole = [*ids, *made.ids[:3]]
    both = compile_interventions(model, items, len(ids), 4)
    at_once = forward(model, whole, hook=both, logits_at="all", prompt_length=len(ids)).logits[0]
    cache = KVCache.with_layers(model.config.n_layers)
    steps = [forward(model, [t], hook=both, cache=cache, prompt_length=len(ids)).logits[0, -1] for t in whole]
    assert_close(np.stack(steps), at_once)
    if kind == "mean":
        rest = np.concatenate([rows_of(model, other, "mlp_out", 1)[1:] for other in (ids, donor)]).mean(0)
        assert_close(items[0].vector[None], rest[None])


def test_a_mean_of_some_rows_has_none_for_others_and_says_so(synthetic):
    row = np.ones(64, np.float32)
    hook = compile_interventions(synthetic, [Intervention("mean", (1,), positions="all", rows={0: row, -1: row})], 3)
    with pytest.raises(HookError, match=r"mean at resid_post has no row for position 1; it has \[0, 2\]"):
        forward(synthetic, [1, 2, 3], hook=hook)


def test_one_token_prompts_match_a_one_token_prompt(synthetic):
    (item,) = replacements(synthetic, 1, "mean", [[5], [6]], [1], "mlp_out")
    expected = (rows_of(synthetic, [5], "mlp_out", 1)[0] + rows_of(synthetic, [6], "mlp_out", 1)[0]) / 2
    assert_close(item.rows[0][None], expected[None])
    assert_close(item.vector[None], expected[None])
