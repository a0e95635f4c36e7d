"""An operation in parts on several threads gives what it gives in one."""

import os
import signal
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from tolerances import SAME

from engine import RecordHook, blas, fast, forward
from engine.errors import InputError
from engine.split import ROWS_WORTH_A_THREAD, Work, by_parts

ENOUGH = 2 * ROWS_WORTH_A_THREAD


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """As many as products have, and products have them again after the test."""
    found = blas.library()
    if found is None or found.get_threads is None or found.set_threads is None:
        pytest.skip("the number of threads cannot be changed")
    before = found.get_threads()
    found.set_threads(2)
    yield
    assert found.get_threads() == 2
    found.set_threads(before)


def parts_of(n: int, rows: int = 1) -> list[tuple[slice, int, int]]:
    """(slice, thread, threads of a product meanwhile) of each part, in order."""
    seen = []
    by_parts(lambda part: seen.append((part, threading.get_ident(), blas.threads_now())), n, rows)
    return sorted(seen, key=lambda one: one[0].start)


@pytest.mark.parametrize(("n", "rows"), [(ENOUGH, 1), (ENOUGH + 1, 1), (8, ENOUGH // 8), (2, ENOUGH), (3, ENOUGH)])
def test_each_thread_has_a_part_and_products_have_one_meanwhile(n: int, rows: int) -> None:
    (first, here, _), (second, there, _) = parts = parts_of(n, rows)
    assert [*range(n)[first], *range(n)[second]] == list(range(n))
    assert abs(len(range(n)[first]) - len(range(n)[second])) <= 1
    assert here == threading.get_ident() != there
    assert {threads for *_, threads in parts} == {1}


@pytest.mark.parametrize(("n", "rows"), [(ENOUGH - 1, 1), (0, 1), (1, ENOUGH), (7, ENOUGH // 8)])
def test_fewer_rows_and_what_cannot_be_parted_stay_in_one(n: int, rows: int) -> None:
    assert parts_of(n, rows) == [(slice(0, n), threading.get_ident(), 2)]


def test_where_products_have_one_thread_so_has_the_rest() -> None:
    with blas.single_threaded():
        assert parts_of(ENOUGH) == [(slice(0, ENOUGH), threading.get_ident(), 1)]


@pytest.mark.parametrize("where", ["here", "there"])
def test_what_a_part_raises_is_raised_when_all_are_done(where: str) -> None:
    done = []

    def work(part: slice) -> None:
        if (part.start == 0) == (where == "here"):
            raise InputError(where)
        done.append(part)

    with pytest.raises(InputError, match=where):
        by_parts(work, ENOUGH)
    assert len(done) == 1


def test_parts_treat_errors_of_floats_as_their_caller_does() -> None:
    with np.errstate(divide="raise"), pytest.raises(FloatingPointError):
        by_parts(lambda part: part.start and np.ones(part.start) / 0, ENOUGH)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own() -> None:
    parts_of(ENOUGH)
    if (child := os.fork()) == 0:
        signal.alarm(10)
        os._exit(0 if len(parts_of(ENOUGH)) == 2 else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_long_pass_has_its_products_attention_and_gates_in_parts(synthetic, monkeypatch) -> None:
    parts: list[int] = []

    def counted(work: Work, n: int, rows: int = 1) -> None:
        parts.append(0)

        def one(part: slice) -> None:
            parts[-1] += 1
            work(part)

        by_parts(one, n, rows)

    monkeypatch.setattr("engine.ops.by_parts", counted)
    with fast.using(False):
        forward(synthetic, list(range(256)) * (ENOUGH // 256), stop=1, logits_at="none")
    assert parts == [2] * 6  # queries with keys and values, attention, o, gate with up, act, down


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
