"""A sweep's variants equal runs one by one, and cost only the layers and rows that can differ."""

import importlib
import tracemalloc

import numpy as np
import pytest
from tolerances import SAME, assert_close, assert_moved, assert_same, far_out
from variants import everywhere, kinds, puts_in_noise

from engine import Intervention, KVCache, RecordHook, blas, compile_interventions, forward
from engine.errors import InputError, LayerError
from engine.forks import Variant
from engine.sweep import base_run, sweep


def solo(model, ids, variant):
    """The next-token logits of one variant in a run of its own."""
    hook = compile_interventions(model, variant.interventions, len(ids))
    return forward(model, ids, hook=hook).logits[0, -1], [edit.fired for edit in hook.edits]


@pytest.mark.parametrize("variants", [everywhere, kinds])
def test_variants_equal_runs_one_by_one(model, ids, variants):
    chosen = variants(model)
    run = sweep(model, ids, chosen)
    assert_close(run.baseline, forward(model, ids).logits[0, -1])
    assert_close(run.logits, run.baseline)
    for variant, found, edits in zip(chosen, run.values, run.edits, strict=True):
        logits, fired = solo(model, ids, variant)
        assert_close(found, logits, far_out(model) if puts_in_noise(variant) else SAME)
        assert [edit.fired for edit in edits] == fired
    assert_moved(run.values, np.broadcast_to(run.baseline, run.values.shape))


def test_no_variants_give_the_base_run(synthetic):
    run = sweep(synthetic, [1, 2, 3], [])
    assert run.values.shape == (0, synthetic.config.d_vocab)
    assert_close(run.baseline, forward(synthetic, [1, 2, 3]).logits[0, -1])


def test_a_variant_without_changes_is_the_base_run(model, ids):
    run = sweep(model, ids, [Variant()])
    assert_close(run.values[0], run.baseline)


def test_a_base_run_beside_another_prompt_is_the_base_run(model, ids, donor):
    chosen, seen = everywhere(model), RecordHook([1], ["v"])
    base = base_run(model, ids, beside=[donor], hook=seen)
    assert_close(base.beside_logits[0], forward(model, donor).logits[0, -1])
    assert_close(seen.get("v")[1][1], base.cache.layer(1).filled()[1][0])
    alone, beside = sweep(model, ids, chosen), sweep(model, ids, chosen, base=base)
    assert_close(beside.logits, alone.logits)
    for variant, mine, other in zip(chosen, beside.values, alone.values, strict=True):
        assert_close(mine, other, far_out(model) if puts_in_noise(variant) else SAME)


def test_a_base_run_keeps_nothing_of_the_prompt_beside(synthetic):
    base = base_run(synthetic, [1, 2, 3], beside=[[4, 5, 6], [7, 8, 9]])
    assert base.cache.layer(0).k.shape[0] == 1
    assert all(x.base is None and x.shape == (3, synthetic.config.d_model) for x in base.inputs.values())


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        ([1, 2, 4], {}, "another prompt"),
        ([1, 2], {}, "another prompt"),
        ([1, 2, 3], {"first": 2}, "leaves the base run at layer 1, which was kept from 2 on"),
        ([1, 2, 3], {"beside": [[1, 2]]}, "same length beside it"),
        ([[1, 2, 3], [1, 2, 3]], {}, "one prompt"),
    ],
)
def test_a_base_run_that_does_not_fit_is_refused(synthetic, ids, options, message):
    with pytest.raises(InputError, match=message):
        sweep(
            synthetic,
            [1, 2, 3],
            [Variant((Intervention("zero", (1,), "z"),))],
            base=base_run(synthetic, ids, **options),
        )


def counted(monkeypatch):
    """A list that receives the number of rows of every layer computed."""
    rows: list[int] = []
    decoder, sweeps = map(importlib.import_module, ("engine.decoder", "engine.sweep"))
    block = decoder.block

    def counting(x, *rest):
        rows.append(x.shape[0] * x.shape[1])
        return block(x, *rest)

    monkeypatch.setattr(decoder, "block", counting)
    monkeypatch.setattr(sweeps, "block", counting)
    return rows


@pytest.mark.parametrize(("point", "own"), [("resid_post", 0), ("resid_pre", 1), ("z", 1), ("mlp_out", 1)])
def test_a_grid_computes_the_rows_from_the_patch_on_in_the_layers_above_it(monkeypatch, synthetic, point, own):
    rows, ids, n = counted(monkeypatch), list(range(7)), synthetic.config.n_layers
    cells = [(layer, p) for layer in range(n) for p in range(len(ids))]
    run = sweep(synthetic, ids, [Variant((Intervention("zero", (layer,), point, (p,)),)) for layer, p in cells])
    needed = n * len(ids) + sum((n - 1 - layer + own) * (len(ids) - p) for layer, p in cells)
    assert sum(rows) == run.layer_rows == needed
    assert needed < 0.4 * n * len(ids) * len(cells)


def test_a_change_of_the_cache_costs_one_row_of_each_layer_above_it(monkeypatch, synthetic):
    ids, n = list(range(7)), synthetic.config.n_layers
    cache = KVCache.with_layers(n)
    forward(synthetic, ids[:-1], cache=cache)
    kv = {layer: tuple(x[0] for x in cache.layer(layer).filled()[:2]) for layer in range(n)}
    rows = counted(monkeypatch)
    run = sweep(synthetic, ids, [Variant(kv={layer: kv[layer]}) for layer in range(n)])
    assert sum(rows) == run.layer_rows == n * len(ids) + sum(n - layer for layer in range(n))


def test_the_variants_of_a_layer_go_through_it_in_one_batch(monkeypatch, synthetic):
    rows, n = counted(monkeypatch), synthetic.config.n_layers
    sweep(synthetic, list(range(6)), [Variant((Intervention("zero", (0,), "z", (p,)),)) for p in range(6)])
    assert len(rows) == 2 * n


@pytest.mark.parametrize(("point", "all_rows"), [("resid_pre", False), ("v", False), ("z", True), ("final_norm", True)])
def test_in_the_last_layer_only_last_rows_go_on_unless_another_row_is_changed_there(
    monkeypatch, synthetic, point, all_rows
):
    decoder, rows = importlib.import_module("engine.decoder"), []
    mlp = decoder.mlp
    monkeypatch.setattr(decoder, "mlp", lambda x, *rest: rows.append(x.shape[1]) or mlp(x, *rest))
    last = synthetic.config.n_layers - 1
    early = Variant((Intervention("scale", (1,), "mlp_out", (0,), value=0.5),))
    late = Variant((*early.interventions, Intervention("scale", (last,), point, (3,), value=0.5)))
    run = sweep(synthetic, list(range(6)), [early, late])
    assert rows[-1] == (1 + 6 if all_rows else 1 + 1)
    for variant, values in zip((early, late), run.values, strict=True):
        assert_close(values, solo(synthetic, list(range(6)), variant)[0])


def test_logits_of_a_few_tokens_are_those_of_all(synthetic):
    ids, variants = list(range(7)), everywhere(synthetic)
    whole, few = sweep(synthetic, ids, variants), sweep(synthetic, ids, variants, only=[9, 3])
    assert_close(few.values, whole.values[:, [9, 3]])
    assert_close(few.baseline, whole.baseline[[9, 3]])
    assert_same(few.logits, whole.logits)


def test_slices_change_nothing(synthetic, monkeypatch):
    monkeypatch.setattr(blas, "most_threads", lambda: 1)
    ids, variants = list(range(20)), everywhere(synthetic)
    whole, cut = sweep(synthetic, ids, variants), sweep(synthetic, ids, variants, budget=200_000)
    assert whole.slices == 1
    assert 4 < cut.slices < len(variants)
    assert whole.layer_rows == cut.layer_rows
    assert_close(cut.values, whole.values)


def test_memory_stays_within_the_budget(synthetic):
    ids = np.random.default_rng(0).integers(0, 256, 100).tolist()
    cells = [(layer, p) for layer in range(synthetic.config.n_layers) for p in range(0, 100, 4)]
    variants = [Variant((Intervention("zero", (layer,), "z", (p,)),)) for layer, p in cells]

    def peak(budget):
        tracemalloc.start()
        sweep(synthetic, ids, variants, lambda logits, base: logits[:, 0], budget=budget)
        return tracemalloc.get_traced_memory()[1], tracemalloc.stop()

    idle = peak(1)[0]
    small, large = 4 * 2**20, 16 * 2**20
    assert peak(small)[0] < idle + small
    assert small < peak(large)[0] < idle + large


def test_progress_counts_every_layer_of_every_pass(synthetic):
    seen = []
    variants = [Variant((Intervention("zero", (layer,), "z", (1,)),)) for layer in range(4)]
    run = sweep(synthetic, [1, 2, 3], variants, budget=1, tick=lambda done, total, what: seen.append((done, total)))
    assert run.slices == 4
    total = 4 + 4 + 3 + 2 + 1
    assert seen == [(i + 1, total) for i in range(total)]


def test_raising_from_tick_stops_a_sweep_before_its_next_layer(monkeypatch, synthetic):
    rows = counted(monkeypatch)

    def stop(done, total, what):
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(synthetic, [1, 2, 3], [Variant((Intervention("zero", (0,), "z", (1,)),))], tick=stop)
    assert len(rows) == 6


def test_what_is_read_is_all_that_is_kept(synthetic):
    run = sweep(synthetic, [1, 2, 3], everywhere(synthetic), lambda logits, base: logits[:, [7, 8]] - base[7])
    assert run.values.shape == (len(everywhere(synthetic)), 2)
    assert run.baseline[0] == 0


def test_the_weights_are_left_as_they_were(synthetic):
    before = [array.copy() for _, array in synthetic.params.layer(1).arrays()]
    sweep(synthetic, [1, 2, 3], everywhere(synthetic))
    for old, (_, new) in zip(before, synthetic.params.layer(1).arrays(), strict=True):
        assert_same(old, new)


def test_an_edited_cache_gives_what_decoding_over_it_gives(model, ids, donor):
    n = model.config.n_layers
    mine, theirs = KVCache.with_layers(n), KVCache.with_layers(n)
    forward(model, ids[:-1], cache=mine)
    forward(model, donor[:-1], cache=theirs)
    for layers in ([0], [n - 1], list(range(n))):
        edited = mine.fork()
        edited.transplant(theirs, layers, (0, len(ids) - 1), 0)
        kv = {layer: tuple(x[0] for x in edited.layer(layer).filled()[:2]) for layer in layers}
        run = sweep(model, ids, [Variant(kv=kv)])
        decoded = forward(model, ids[-1:], cache=edited).logits[0, -1]
        assert_close(run.values[0], decoded)
        if len(layers) > 1:
            assert_moved(run.values[0], run.baseline, SAME / 10)


@pytest.mark.parametrize(
    ("variant", "error", "message"),
    [
        (Variant((Intervention("zero", (0,), "z", "generated"),)), InputError, "never fires"),
        (Variant((Intervention("zero", (9,), "z"),)), LayerError, "valid: 0 to 3"),
        (Variant(kv={0: (np.zeros((2, 2, 16), "f4"), np.zeros((2, 1, 16), "f4"))}), InputError, r"\(2, 2, 16\)"),
        (Variant(kv={4: (np.zeros((2, 2, 16), "f4"),) * 2}), LayerError, "valid: 0 to 3"),
        (
            Variant((Intervention("zero", (1,), "z", (0,)),), {0: (np.zeros((2, 2, 16), "f4"),) * 2}),
            InputError,
            "last row",
        ),
    ],
)
def test_variants_that_cannot_be_run_are_refused(synthetic, variant, error, message):
    with pytest.raises(error, match=message):
        sweep(synthetic, [1, 2, 3], [variant])


def test_a_sweep_takes_one_prompt(synthetic):
    with pytest.raises(InputError, match="one prompt, not 2"):
        sweep(synthetic, [[1, 2], [3, 4]], [])
