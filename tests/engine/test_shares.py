"""Threads share a sweep's variants: nothing of what a caller sees depends on how many there are, and none is left."""

import gc
import threading
import weakref

import numpy as np
import pytest
from tolerances import SAME, assert_close, assert_same, far_out
from variants import everywhere, kinds, puts_in_noise
from waiting import PATIENCE

from engine import Intervention, blas, fast, forks
from engine.errors import InputError
from engine.forks import Variant
from engine.shares import side_by_side
from engine.sweep import sweep, sweep_cost

IDS = list(range(7))


class Cancelled(Exception):
    pass


@pytest.fixture(params=[2, 3], ids="{} threads".format)
def threads(request, monkeypatch):
    """However little there is to do, so many threads do it."""
    monkeypatch.setattr(blas, "most_threads", lambda: request.param)
    monkeypatch.setattr("engine.shares.ROWS_WORTH_A_THREAD", 0)
    monkeypatch.setattr("engine.shares.MOST_UNEVEN", np.inf)
    return request.param


@pytest.fixture(autouse=True)
def nothing_left():
    """No thread outlives a test, and products have as many threads as before."""
    running, found = threading.active_count(), blas.library()
    before = None if found is None else found.get_threads()
    yield
    assert threading.active_count() == running
    assert found is None or found.get_threads() == before


def zeroing(layers, positions=range(7)):
    return [Variant((Intervention("zero", (layer,), "z", (p,)),)) for layer in layers for p in positions]


@pytest.mark.parametrize("variants", [everywhere, kinds])
def test_results_do_not_depend_on_the_number_of_threads(model, ids, monkeypatch, threads, variants):
    chosen = variants(model)
    shared = sweep(model, ids, chosen)
    monkeypatch.setattr(blas, "most_threads", lambda: 1)
    alone = sweep(model, ids, chosen)
    assert (alone.slices, shared.slices) == (1, threads)
    assert shared.layer_rows == alone.layer_rows
    assert [[e.fired for e in edits] for edits in shared.edits] == [[e.fired for e in edits] for edits in alone.edits]
    for variant, found, expected in zip(chosen, shared.values, alone.values, strict=True):
        assert_close(found, expected, far_out(model) if puts_in_noise(variant) else SAME)


def test_every_thread_has_its_part_of_the_rows(synthetic, threads):
    length, chosen = forks.forks_of(synthetic, IDS, zeroing(range(4)))
    shares = forks.shares_of(synthetic, chosen, length, 2**30)
    rows = [forks.rows_entered(synthetic.config, [fork for part in share for fork in part], length) for share in shares]
    assert len(rows) == threads
    assert max(rows) - min(rows) < 0.1 * sum(rows) / threads


def test_a_budget_is_for_all_threads_together(synthetic, threads):
    length, chosen = forks.forks_of(synthetic, IDS, zeroing(range(4)))
    budget = forks.held_by(synthetic.config, [[chosen]], length) // 3
    shares = forks.shares_of(synthetic, chosen, length, budget)
    assert 0.7 * budget < forks.held_by(synthetic.config, shares, length) <= budget


def test_little_work_scoped_weights_and_compiled_kernels_are_one_threads(synthetic, monkeypatch):
    monkeypatch.setattr(blas, "most_threads", lambda: 2)
    some = zeroing([0])

    def shares(variants):
        length, chosen = forks.forks_of(synthetic, IDS, variants)
        return len(forks.shares_of(synthetic, chosen, length, 2**30))

    assert (shares(some), shares(20 * some)) == (1, 2)
    monkeypatch.setattr(fast, "kernels", lambda: forks)
    assert shares(20 * some) == 1
    monkeypatch.setattr(fast, "kernels", lambda: None)
    monkeypatch.setattr(synthetic.params, "keep", synthetic.config.n_layers - 1)
    assert shares(20 * some) == 1


def test_variants_that_cannot_be_dealt_out_evenly_are_one_threads(synthetic, monkeypatch):
    monkeypatch.setattr(blas, "most_threads", lambda: 2)
    monkeypatch.setattr("engine.shares.ROWS_WORTH_A_THREAD", 0)
    ids = list(range(200))
    alone, pair, three = (forks.forks_of(synthetic, ids, zeroing([0], [0] * n)) for n in (1, 2, 3))
    shares = [len(forks.shares_of(synthetic, chosen, length, 2**30)) for length, chosen in (alone, pair, three)]
    assert shares == [1, 2, 1]


def test_the_callers_thread_alone_is_told_of_every_layer_of_all_threads(synthetic, threads):
    told, readers = [], set()

    def read(logits, base):
        readers.add(threading.current_thread())
        return logits[:, 0]

    def tick(done, total, what):
        told.append((threading.get_ident(), done, total))

    sweep(synthetic, IDS, zeroing(range(4)), read, tick=tick)
    total = sweep_cost(synthetic, IDS, zeroing(range(4))).layers
    assert total == 4 * (1 + threads)
    assert told == [(threading.get_ident(), i + 1, total) for i in range(total)]
    assert len(readers) == threads


@pytest.mark.parametrize("at", ["the caller's layer", "another thread's layer"])
def test_raising_from_tick_stops_every_thread_within_a_layer(at, monkeypatch):
    """The others' first layers last until the caller waits for their threads to end."""
    entered, all_work, waits = [], threading.Barrier(3), threading.Event()
    join = threading.Thread.join
    monkeypatch.setattr("engine.shares.Thread.join", lambda thread: (waits.set(), join(thread)))

    def share(tick):
        for layer in range(100):
            tick(0, 0, "other")
            entered.append(layer)
            if layer == 0:
                all_work.wait(PATIENCE)
                waits.wait(PATIENCE)

    def own(tick):
        all_work.wait(PATIENCE)
        if at == "the caller's layer":
            tick(0, 0, "own")

    def tick(done, total, what):
        if (what == "own") == (at == "the caller's layer"):
            raise Cancelled

    with pytest.raises(Cancelled):
        side_by_side([own, share, share], tick)
    assert entered == [0, 0]


def test_layers_of_other_threads_are_told_while_the_caller_works():
    told, entered = [], threading.Event()

    def own(tick):
        assert entered.wait(PATIENCE)
        tick(0, 0, "own")

    def other(tick):
        tick(0, 0, "other")
        entered.set()

    side_by_side([own, other], lambda done, total, what: told.append(what))
    assert told == ["other", "own"]


def test_a_cancelled_sweep_leaves_a_model_that_works(synthetic, threads):
    whole = sweep(synthetic, IDS, zeroing(range(4)))

    def tick(done, total, what):
        if done == 9:
            raise Cancelled

    with pytest.raises(Cancelled):
        sweep(synthetic, IDS, zeroing(range(4)), tick=tick)
    assert_same(sweep(synthetic, IDS, zeroing(range(4))).values, whole.values)


def test_an_error_in_any_share_reaches_the_caller(synthetic, threads):
    caller, seen = threading.get_ident(), []

    def read(logits, base):
        if len(seen) and threading.get_ident() != caller:
            raise ZeroDivisionError
        seen.append(logits)
        return logits[:, 0]

    with pytest.raises(ZeroDivisionError):
        sweep(synthetic, IDS, zeroing(range(4)), read)


def test_shares_without_a_thread_are_done_by_the_caller(synthetic, threads, monkeypatch):
    expected = sweep(synthetic, IDS, everywhere(synthetic)).values
    started = threading.Thread.start
    left = [1]

    def start(thread):
        if not left.pop():
            raise RuntimeError("can't start new thread")
        left.append(0)
        started(thread)

    monkeypatch.setattr("engine.shares.Thread.start", start)
    assert_same(sweep(synthetic, IDS, everywhere(synthetic)).values, expected)


def test_an_error_that_came_after_another_keeps_no_arrays():
    held = np.ones(3)
    gone, second = weakref.ref(held), threading.Event()

    def fails(tick, held=held):
        second.wait(PATIENCE)
        raise InputError("of another thread")

    def first(tick):
        second.set()
        raise InputError("of the caller")

    gc.disable()
    try:
        with pytest.raises(InputError, match="of the caller"):
            side_by_side([first, fails], lambda *told: None)
        del fails, held
        assert gone() is None
    finally:
        gc.enable()


def test_other_threads_handle_floating_point_errors_as_the_callers(synthetic, threads):
    def read(logits, base):
        return np.full(len(logits), np.float32(3e38)) * np.float32(10)

    with np.errstate(over="ignore"):
        assert np.isinf(sweep(synthetic, IDS, zeroing(range(4)), read).values).all()
    with np.errstate(over="raise"), pytest.raises(FloatingPointError):
        side_by_side([lambda tick: None, lambda tick: read(np.zeros(1), None)], lambda *_: None)


def test_a_sweep_that_ends_within_another_leaves_products_single_threaded(synthetic, threads):
    found, seen = blas.library(), []
    if found is None or found.get_threads is None:
        pytest.skip("the number of threads cannot be asked for")

    def outer(logits, base):
        if len(logits) > 1:
            inner = threading.Thread(target=sweep, args=(synthetic, IDS, zeroing([1])))
            inner.start()
            inner.join(PATIENCE)
            seen.append(found.get_threads())
        return logits[:, 0]

    sweep(synthetic, IDS, zeroing(range(4)), outer)
    assert set(seen) == {1}
