"""Rows of many prompts are those of passes one by one, in the prompts' order, however they are run together."""

import tracemalloc
from typing import Any

import numpy as np
import pytest
from tolerances import assert_close, assert_moved, assert_same

from engine import Model, RecordHook, blas, fast, forks, forward, load_model, pooled_rows, pools
from engine.errors import InputError, PointError, PositionError
from engine.patching import by_position
from engine.pools import pooled_points, pooled_rows_cost

PROMPTS = [[5, 9, 2], [7, 7, 3, 1, 8], [4, 4, 6], [2], [9, 1, 3, 3, 2], [6, 6, 6], [1, 2, 3, 4, 5, 6, 7]]
LAYERS = 4


@pytest.fixture(scope="module")
def small() -> Model:
    return load_model("synthetic")


@pytest.fixture(params=[1, 3], ids="{} threads".format)
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """However little there is to do, so many threads do it."""
    monkeypatch.setattr(blas, "most_threads", lambda: request.param)
    monkeypatch.setattr("engine.shares.ROWS_WORTH_A_THREAD", 0)
    monkeypatch.setattr("engine.shares.MOST_UNEVEN", np.inf)
    number: int = request.param
    return number


def one_by_one(model: Model, layer: int, point: str, positions: Any) -> np.ndarray:
    found = []
    for prompt in PROMPTS:
        record = RecordHook([layer], [point], positions)
        forward(model, prompt, hook=record)
        found.append(by_position(record.get(point)[layer], point))
    return np.concatenate(found)


def check(model: Model, point: str, positions: Any) -> None:
    found = pooled_rows(model, PROMPTS, [0, -1], point, positions=positions)
    assert list(found) == [0, model.config.n_layers - 1]
    for layer, rows in found.items():
        expected = one_by_one(model, layer, point, positions)
        assert_close(rows, expected)
        assert_moved(rows, expected[::-1])


@pytest.mark.parametrize("most", [1, 6, 512])
@pytest.mark.parametrize(
    ("point", "positions"), [("resid_post", "last"), ("resid_post", "all"), ("z", "all"), ("k", [0, -1])]
)
def test_pooled_rows_are_those_of_passes_one_by_one(
    small: Model, monkeypatch: pytest.MonkeyPatch, threads: int, point: str, positions: Any, most: int
) -> None:
    monkeypatch.setattr(pools, "ROWS_AT_ONCE", most)
    check(small, point, positions)


def test_every_familys_pooled_rows_are_those_of_passes_one_by_one(model: Model) -> None:
    check(model, "z", [0, -1])


@pytest.mark.parametrize("point", ["embed", "final_norm"])
def test_points_that_exist_once_are_pooled_whatever_the_layers(small: Model, point: str) -> None:
    ((layer, rows),) = pooled_rows(small, PROMPTS, [1], point, positions="last").items()
    assert_close(rows, one_by_one(small, layer, point, "last"))


def test_several_points_are_of_one_run(small: Model) -> None:
    ticks: list[int] = []
    both = pooled_points(small, PROMPTS, [1], ["z", "mlp_out"], tick=lambda done, total, what: ticks.append(done))
    for point, rows in both.items():
        assert [len(array) for array in rows[1]] == [len(prompt) for prompt in PROMPTS]
        assert_same(np.concatenate(rows[1]), pooled_rows(small, PROMPTS, [1], point)[1])
    assert len(ticks) == pooled_rows_cost(small, PROMPTS, [1], "z").layers


def test_prompts_of_one_length_run_together_and_layers_are_counted(small: Model, threads: int) -> None:
    ticks: list[tuple[int, int]] = []
    pooled_rows(small, PROMPTS, [-1], tick=lambda done, total, what: ticks.append((done, total)))
    cost = pooled_rows_cost(small, PROMPTS, [-1])
    assert ticks == [(done + 1, cost.layers) for done in range(cost.layers)]
    assert cost.layers == LAYERS * (4 if threads == 1 else 5)  # of 1, 3, 5 and 7 tokens; 9 rows of 3 are a third
    assert (cost.rows, cost.steps) == (LAYERS * 26, LAYERS * 1)


def test_one_token_prompts_in_a_batch_are_rows_that_go_together(small: Model) -> None:
    cost = pooled_rows_cost(small, [[1], [2], [3]], [-1])
    assert (cost.layers, cost.rows, cost.steps) == (LAYERS, 3 * LAYERS, 0)


def test_only_the_layers_that_are_asked_for_are_run(small: Model) -> None:
    ticks: list[int] = []
    pooled_rows(small, PROMPTS[:1], [0, 1], tick=lambda done, total, what: ticks.append(total))
    assert ticks == [2, 2]


def test_few_or_uneven_prompts_scoped_weights_and_compiled_kernels_are_one_threads(
    small: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blas, "most_threads", lambda: 2)

    def shares(*lengths: int) -> int:
        return len(pools._shares(small, pools._ids(small, [[0] * length for length in lengths])))

    assert [shares(400, 400), shares(400, 5), shares(6, 6), shares(*[40] * 20)] == [2, 1, 1, 2]
    monkeypatch.setattr(fast, "kernels", lambda: forks)
    assert shares(400, 400) == 1
    monkeypatch.setattr(fast, "kernels", lambda: None)
    monkeypatch.setattr(small.params, "keep", small.config.n_layers - 1)
    assert shares(400, 400) == 1


@pytest.mark.parametrize(("positions", "length"), [("all", 90), ("last", 90), ("last", 9)])
def test_the_bytes_of_pooled_rows_are_those_they_hold(small: Model, positions: Any, length: int) -> None:
    prompts = np.random.default_rng(0).integers(0, 99, (60, length)).tolist()
    cost = pooled_rows_cost(small, prompts, range(LAYERS), positions=positions)
    tracemalloc.start()
    pooled_rows(small, prompts, range(LAYERS), positions=positions)
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 0.4 * held < cost.nbytes < 2.5 * held


def test_raising_from_tick_stops_pooling(small: Model, threads: int) -> None:
    def tick(done: int, total: int, what: str) -> None:
        if done == 3:
            raise KeyError

    with pytest.raises(KeyError):
        pooled_rows(small, PROMPTS, [-1], tick=tick)


def test_an_error_in_any_threads_batch_reaches_the_caller(
    small: Model, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(model: Model, batch: list[list[int]], **options: Any) -> Any:
        if len(batch[0]) == 1:
            raise KeyError
        return forward(model, batch, **options)

    monkeypatch.setattr(pools, "forward", failing)
    with pytest.raises(KeyError):
        pooled_rows(small, PROMPTS, [-1])


@pytest.mark.parametrize(
    ("layers", "positions", "error", "message"),
    [
        ([1], [2], PositionError, "position 2 does not exist in a prompt of 1 tokens"),
        ([1], "generated", InputError, "take no row of a prompt"),
        ([1], [], InputError, "take no row of a prompt"),
        ([], "all", InputError, "name at least one layer"),
    ],
)
def test_what_names_no_row_is_refused_before_any_run(
    small: Model, layers: list[int], positions: Any, error: type[Exception], message: str
) -> None:
    for pooling in (pooled_rows, pooled_rows_cost):
        with pytest.raises(error, match=message):
            pooling(small, PROMPTS, layers, positions=positions)  # type: ignore[operator]


def test_patterns_are_not_pooled_and_no_prompts_give_nothing(small: Model) -> None:
    with pytest.raises(PointError, match="use z"):
        pooled_rows(small, PROMPTS, [1], "attn_pattern")
    assert pooled_rows(small, [], [1]) == {}
