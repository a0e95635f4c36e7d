"""The points: which fire, with which shapes, and the identities their names promise."""

import dataclasses

import numpy as np
import pytest
from declared import head, moves, offset, points_of, visible
from recording import Calls, everything
from tolerances import CONTROL, SAME, assert_close, assert_moved, assert_same

from engine import POINTS, KVCache, RecordHook, forward


@pytest.fixture(scope="module")
def acts(model, ids):
    return everything(model, ids)


def expected_calls(model) -> list[tuple[str, int]]:
    inside = [name for name in points_of(model) if name not in ("embed", "final_norm")]
    layers = [(name, layer) for layer in range(model.config.n_layers) for name in inside]
    return [("embed", 0), *layers, ("final_norm", model.config.n_layers - 1)]


def expected_shape(cfg, name: str, s: int, s_kv: int) -> tuple[int, ...]:
    sizes = {"batch": 1, "seq": s, "d_model": cfg.d_model, "d_mlp": cfg.d_mlp, "d_head": cfg.d_head, "key": s_kv}
    sizes["head"] = cfg.n_kv_heads if name in ("k", "v") else cfg.n_heads
    return tuple(sizes[axis] for axis in POINTS[name].axes)


def test_every_point_fires_once_per_layer_in_the_order_of_the_table(model, ids):
    calls = Calls()
    forward(model, ids, hook=calls)
    s = len(ids)
    assert [call[:2] for call in calls.seen] == expected_calls(model)
    for name, _, shape, pos, key_pos in calls.seen:
        assert shape == expected_shape(model.config, name, s, s)
        assert pos == list(range(s))
        assert key_pos == (list(range(s)) if name == "attn_pattern" else None)


def test_every_point_fires_at_every_step_of_cached_generation_with_absolute_positions(model, ids):
    cache, calls = KVCache.with_layers(model.config.n_layers), Calls()
    forward(model, ids, cache=cache)
    for position in (len(ids), len(ids) + 1):
        calls.seen.clear()
        forward(model, [ids[0]], hook=calls, cache=cache)
        assert [call[:2] for call in calls.seen] == expected_calls(model)
        for name, _, shape, pos, key_pos in calls.seen:
            assert shape == expected_shape(model.config, name, 1, position + 1)
            assert pos == [position]
            assert key_pos == (list(range(position + 1)) if name == "attn_pattern" else None)


def test_attention_adds_attn_out_and_the_mlp_adds_mlp_out(model, acts):
    """In parallel blocks both to the layer's input, and there is no residual between them."""
    for layer in range(model.config.n_layers):
        mid = acts["resid_pre", layer] + acts["attn_out", layer]
        if not model.config.parallel:
            assert_same(acts["resid_mid", layer], mid)
        assert_same(mid + acts["mlp_out", layer], acts["resid_post", layer])
        assert_moved(acts["resid_pre", layer], mid)
        assert_moved(mid, acts["resid_post", layer])


def test_a_layer_reads_what_the_layer_below_wrote(model, acts):
    assert_same(acts["embed", 0], acts["resid_pre", 0])
    for layer in range(model.config.n_layers - 1):
        assert_same(acts["resid_post", layer], acts["resid_pre", layer + 1])


def test_the_stream_starts_with_the_embedding_rows(model, ids, acts):
    rows = np.stack([model.embedding_for(token) for token in ids])
    learned = 0 if model.params.positions is None else model.params.positions[: len(ids)]
    assert_same(acts["embed", 0], rows + learned)


def test_heads_sum_to_attn_proj(model, acts):
    width = model.config.d_head
    for layer in range(model.config.n_layers):
        z, o = acts["z", layer], model.params.layer(layer).o
        heads = [z[:, h] @ o.weight[h * width : (h + 1) * width] for h in range(model.config.n_heads)]
        assert_close(np.sum(heads, 0) + offset(o), acts["attn_proj", layer])
        assert_moved(np.sum(heads[1:], 0) + offset(o), acts["attn_proj", layer])


def test_neurons_sum_to_mlp_proj(model, acts):
    for layer in range(model.config.n_layers):
        act, down = acts["mlp_act", layer][-1].astype(np.float64), model.params.layer(layer).down
        neurons = act[:, None] * down.weight
        assert_close(neurons.sum(0) + offset(down), acts["mlp_proj", layer][-1])
        strongest = np.abs(act).argmax()
        assert_moved(np.delete(neurons, strongest, 0).sum(0) + offset(down), acts["mlp_proj", layer][-1])


def test_attention_patterns_are_causal_and_their_rows_sum_to_one(model, ids, acts):
    for layer in range(model.config.n_layers):
        pattern, seen = acts["attn_pattern", layer], visible(model, layer, len(ids))
        assert not pattern[:, ~seen].any()
        assert np.abs(pattern.sum(-1) - 1).max() < 1e-5
        assert (pattern[:, seen] > 0).mean() > 0.9


def test_z_mixes_the_values_of_the_heads_own_group(model, acts):
    cfg = model.config
    for layer in range(cfg.n_layers):
        v, pattern, z = acts["v", layer], acts["attn_pattern", layer], acts["z", layer]
        mixed = [pattern[h] @ v[h // cfg.group] for h in range(cfg.n_heads)]
        assert_close(np.stack(mixed, 1), z)
        wrong = [pattern[h] @ v[(h // cfg.group + 1) % cfg.n_kv_heads] for h in range(cfg.n_heads)]
        assert_moved(np.stack(wrong, 1), z)


def test_final_norm_is_what_the_unembedding_reads(model, ids, acts):
    logits = forward(model, ids, logits_at="all").logits[0]
    assert_close(head(model, acts["final_norm", model.config.n_layers - 1]), logits)


def test_what_the_parts_write_sums_to_the_logit_before_its_softcap(model, ids, acts):
    """Direct contributions of the embedding and of every attention and MLP, with the last norm's scale held fixed: no
    remainder is left, relative to the sum of their absolute values.
    """
    cfg, ends = dataclasses.replace(model.config, final_softcap=None), model.params
    token = int(forward(model, ids).logits[0, -1].argmax())
    parts = [acts["embed", 0], *(acts[n, i] for n in ("attn_out", "mlp_out") for i in range(cfg.n_layers))]
    rows = np.stack([part[-1] for part in parts]).astype(np.float64)
    rows = rows - rows.mean(-1, keepdims=True) if cfg.norm == "layer" else rows
    scale = np.sqrt(np.mean(rows.sum(0) ** 2) + cfg.norm_eps)
    direction = cfg.logit_scale * ends.unembed[token].astype(np.float64)
    contributions = rows / scale * ends.final_norm.weight @ direction
    constant = offset(ends.final_norm) @ direction
    constant += 0 if ends.unembed_bias is None else cfg.logit_scale * ends.unembed_bias[token]
    logit = forward(dataclasses.replace(model, config=cfg), ids).logits[0, -1, token]
    total = np.abs(contributions).sum() + abs(constant)
    assert abs(contributions.sum() + constant - logit) <= SAME * total
    without = np.delete(contributions, np.abs(contributions).argmax())
    assert abs(without.sum() + constant - logit) >= CONTROL * SAME * total


def test_everything_is_float32(model, ids, acts):
    result = forward(model, ids)
    assert {array.dtype for array in acts.values()} == {np.dtype(np.float32)}
    assert result.logits.dtype == result.residual.dtype == np.float32


def test_queries_and_keys_are_shown_before_rotary(model, ids):
    """A token's queries and keys are those it has alone at position 0; at its own where positions are learned."""
    shifted, plain = (RecordHook.for_layers([0], points=["q", "k"]) for _ in range(2))
    forward(model, [ids[1]], hook=plain, positions=np.array([0 if moves(model) else 1]))
    forward(model, ids[:2], hook=shifted)
    for name in ("q", "k"):
        assert_close(shifted.get(name)[0][:, 1], plain.get(name)[0][:, 0])
