"""A pass whose operations are done in parts on several threads gives what it gives in one."""

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from tolerances import SAME

from engine import Model, RecordHook, blas, fast, forward, ops, split
from engine.activations import ACTIVATIONS
from engine.cost import of_pass, working_bytes
from engine.errors import InputError
from engine.pools import pooled_rows_cost
from engine.split import ROWS_OF_A_PART, Work, by_parts, in_parts, parts_of

ENOUGH = 2 * ROWS_OF_A_PART


@pytest.fixture(autouse=True)
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As many as products have, and products have them again after the test."""
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    found = blas.library()
    if found is None or found.get_threads is None or found.set_threads is None:
        pytest.skip("the number of threads cannot be changed")
    before = found.get_threads()
    found.set_threads(2)
    try:
        yield
        assert found.get_threads() == 2
    finally:
        found.set_threads(before)


def parts_taken(n: int) -> list[tuple[slice, int, int]]:
    """(slice, thread, threads of a product meanwhile) of each part, in order."""
    seen = []
    by_parts(lambda part: seen.append((part, threading.get_ident(), blas.threads_now())), n)
    return sorted(seen, key=lambda one: one[0].start)


@pytest.mark.parametrize("n", [ENOUGH, 9, 2])
def test_each_thread_has_a_part_and_products_have_one_meanwhile(n: int) -> None:
    with in_parts(ENOUGH):
        (first, here, _), (second, there, _) = parts = parts_taken(n)
    assert [*range(n)[first], *range(n)[second]] == list(range(n))
    assert abs(len(range(n)[first]) - len(range(n)[second])) <= 1
    assert here == threading.get_ident() != there
    assert {threads for *_, threads in parts} == {1}


@pytest.mark.parametrize("n", [0, 1])
def test_what_cannot_be_parted_stays_in_one(n: int) -> None:
    with in_parts(ENOUGH):
        assert parts_taken(n) == [(slice(0, n), threading.get_ident(), 1)]


def test_fewer_rows_stay_in_one_and_so_does_what_is_done_within_a_pass_or_elsewhere() -> None:
    alone = [(slice(0, 9), threading.get_ident(), 2)]
    with in_parts(ENOUGH - 1):
        assert parts_taken(9) == alone
    with in_parts(ENOUGH), in_parts(9):
        assert parts_taken(9) == [(slice(0, 9), threading.get_ident(), 1)]
    assert parts_taken(9) == alone


def test_where_products_have_one_thread_so_has_the_rest() -> None:
    with blas.single_threaded():
        assert parts_of(10 * ENOUGH) == 1
    assert parts_of(ENOUGH) == 2


def test_with_kernels_in_use_there_is_one_part_because_they_have_threads_of_their_own() -> None:
    pytest.importorskip("numba")
    with fast.using(True):
        assert parts_of(10 * ENOUGH) == 1


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("gates", [True, False])
def test_an_activation_in_parts_is_that_activation(activation: str, gates: bool) -> None:
    x, *up = np.random.default_rng(0).standard_normal((1 + gates, 3, 7, 40), np.float32)
    with fast.using(False):
        alone = ops.activated(activation, x, *up)
        with in_parts(ENOUGH):
            together = ops.activated(activation, x, *up)
    assert (alone == together).all()
    assert np.abs(alone - ACTIVATIONS[activation](x) * (up[0] if up else 1)).max() == 0


def test_passes_at_the_same_time_do_not_wait_for_each_other() -> None:
    begun = threading.Barrier(3, timeout=10)

    def one(_: int) -> int:
        with in_parts(ENOUGH):
            begun.wait()
            return len(parts_taken(9))

    with ThreadPoolExecutor(3) as pool:
        assert set(pool.map(one, range(3))) <= {1, 2}


@pytest.mark.parametrize("where", ["here", "there"])
def test_what_a_part_raises_is_raised_when_all_are_done(where: str) -> None:
    done = []

    def work(part: slice) -> None:
        if (part.start == 0) == (where == "here"):
            raise InputError(where)
        done.append(part)

    with in_parts(ENOUGH), pytest.raises(InputError, match=where):
        by_parts(work, 9)
    assert len(done) == 1


def test_parts_for_an_ended_pool_are_done_by_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    with ThreadPoolExecutor(1) as ended:
        pass
    monkeypatch.setattr(split, "_pool", lambda: ended)
    with in_parts(ENOUGH):
        assert [part for part, *_ in parts_taken(9)] == [slice(0, 4), slice(4, 9)]


def test_a_part_that_waits_for_a_thread_which_cannot_be_had_is_done_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_more(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    done: list[slice] = []
    with ThreadPoolExecutor(1) as pool, in_parts(ENOUGH):
        monkeypatch.setattr(split, "_pool", lambda: pool)
        with monkeypatch.context() as without:
            without.setattr(threading.Thread, "start", no_more)
            by_parts(done.append, 9)
        pool.submit(int).result()  # a thread at last: it finds the part as well
    assert done == [slice(0, 4), slice(4, 9)]


def test_parts_treat_errors_of_floats_as_their_caller_does() -> None:
    with np.errstate(divide="raise"), in_parts(ENOUGH), pytest.raises(FloatingPointError):
        by_parts(lambda part: part.start and np.ones(part.start) / 0, 9)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own() -> None:
    with in_parts(ENOUGH):
        parts_taken(9)
    if (child := os.fork()) == 0:
        signal.alarm(10)
        with in_parts(ENOUGH):
            os._exit(0 if len({thread for _, thread, _ in parts_taken(9)}) == 2 else 1)
    assert os.waitpid(child, 0)[1] == 0


def parts_of_a_layer(model: Model, monkeypatch: pytest.MonkeyPatch, batch: int, length: int) -> list[int]:
    """Of each operation that may have several."""
    parts: list[int] = []

    def counted(work: Work, n: int) -> None:
        seen: list[int] = []
        by_parts(lambda part: (seen.append(0), work(part)), n)
        parts.append(len(seen))

    monkeypatch.setattr("engine.ops.by_parts", counted)
    with fast.using(False):
        forward(model, [[7] * length] * batch, stop=1, logits_at="none")
    return parts


@pytest.mark.parametrize(("batch", "length"), [(1, ENOUGH), (9, -(-ENOUGH // 9))])
def test_a_long_pass_does_its_layers_in_parts(synthetic, monkeypatch, batch: int, length: int) -> None:
    parts = parts_of_a_layer(synthetic, monkeypatch, batch, length)
    assert parts == [2] * 6  # queries with keys and values, attention, o, gate with up, act, down


def test_a_short_pass_does_not(synthetic, monkeypatch) -> None:
    assert {*parts_of_a_layer(synthetic, monkeypatch, 1, 9)} == {1}


def test_the_scores_of_all_parts_are_counted_as_memory(synthetic) -> None:
    cfg = synthetic.config
    with fast.using(False):
        together = of_pass(cfg, ENOUGH).nbytes
        with blas.single_threaded():
            assert of_pass(cfg, ENOUGH).nbytes == together, "whatever else is done meanwhile"
    assert together - working_bytes(cfg, ENOUGH, ENOUGH) == 2 * cfg.n_heads * ops.QUERY_BLOCK * ENOUGH * 4


def test_so_they_are_for_a_long_prompt_in_a_pool(synthetic) -> None:
    with fast.using(False):
        needed = of_pass(synthetic.config, ENOUGH).nbytes
        assert pooled_rows_cost(synthetic, [[0] * ENOUGH], [0]).nbytes > needed


@pytest.mark.parametrize("batch", [1, 3])
def test_a_long_pass_is_the_same_on_any_number_of_threads(synthetic, batch: int) -> None:
    ids = np.random.default_rng(0).integers(0, synthetic.config.d_vocab, (batch, -(-ENOUGH // batch))).tolist()
    points = ("attn_pattern", "z", "mlp_act", "resid_post")
    records = [RecordHook.for_layers(range(4), points=points) for _ in range(2)]
    with fast.using(False):
        together = forward(synthetic, ids, hook=records[0], logits_at="all").logits
        with blas.single_threaded():
            alone = forward(synthetic, ids, hook=records[1], logits_at="all").logits
    assert np.abs(together - alone).max() <= SAME * np.abs(alone).max()
    for point in points:
        for layer, expected in records[1].get(point).items():
            assert np.abs(records[0].get(point)[layer] - expected).max() <= SAME * np.abs(expected).max()


@pytest.mark.parametrize("threads", [2, 3, 5])
@pytest.mark.parametrize(("batch", "queries", "cached"), [(1, 300, 0), (1, 257, 40), (4, 70, 9)])
@pytest.mark.parametrize(("window", "cap"), [(None, None), (90, 5.0)])
def test_attention_in_parts_is_attention(monkeypatch, threads, batch, queries, cached, window, cap) -> None:
    monkeypatch.setattr(split, "parts_of", lambda rows, most=None: threads)
    drawn = np.random.default_rng(0)
    q, k, v = (
        drawn.standard_normal((batch, heads, n, 8), np.float32)
        for heads, n in ((4, queries), (2, cached + queries), (2, cached + queries))
    )
    key_pos = np.arange(cached + queries)
    patterns: list[np.ndarray] = []

    def attend() -> np.ndarray:
        return ops.attend(
            q, k, v, key_pos[cached:], key_pos, scale=0.3, window=window, cap=cap,
            on_weights=lambda pattern: patterns.append(pattern) or pattern,
        )  # fmt: skip

    with fast.using(False):
        alone = attend()
        with in_parts(ENOUGH):
            together = attend()
    assert np.abs(together - alone).max() <= SAME * np.abs(alone).max()
    assert np.abs(patterns[0] - patterns[1]).max() <= SAME
