"""Rows of many prompts are those of passes one by one, in the prompts' order, however they are run together."""

import numpy as np
import pytest
from tolerances import assert_close, assert_moved

from engine import Model, RecordHook, blas, forward, load_model, pooled_rows, pools
from engine.errors import PointError, PositionError
from engine.patching import by_position
from engine.pools import pooled_rows_cost

PROMPTS = [[5, 9, 2], [7, 7, 3, 1, 8], [4, 4, 6], [2], [9, 1, 3, 3, 2], [6, 6, 6], [1, 2, 3, 4, 5, 6, 7]]


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model("synthetic")


def one_by_one(model: Model, layer: int, point: str, positions: object) -> np.ndarray:
    found = []
    for prompt in PROMPTS:
        record = RecordHook([layer], [point], positions)
        forward(model, prompt, hook=record)
        found.append(by_position(record.get(point)[layer], point))
    return np.concatenate(found)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("most", [1, 6, 512])
@pytest.mark.parametrize(
    ("point", "positions"), [("resid_post", "last"), ("resid_post", "all"), ("z", "all"), ("k", [0, -1])]
)
def test_pooled_rows_are_those_of_passes_one_by_one(
    model: Model, monkeypatch: pytest.MonkeyPatch, point: str, positions: object, most: int, threads: int
) -> None:
    monkeypatch.setattr(blas, "threads", lambda: threads)
    monkeypatch.setattr(pools, "ROWS_AT_ONCE", most)
    found = pooled_rows(model, PROMPTS, [0, -1], point, positions)
    assert list(found) == [0, model.config.n_layers - 1]
    for layer, rows in found.items():
        expected = one_by_one(model, layer, point, positions)
        assert_close(rows, expected)
        assert_moved(rows, expected[::-1])


@pytest.mark.parametrize("threads", [1, 2])
def test_prompts_of_one_length_run_together_and_layers_are_counted(
    model: Model, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    monkeypatch.setattr(blas, "threads", lambda: threads)
    ticks: list[tuple[int, int]] = []
    pooled_rows(model, PROMPTS, [1], tick=lambda done, total, what: ticks.append((done, total)))
    cost = pooled_rows_cost(model, PROMPTS, [1], "resid_post")
    assert ticks == [(done, cost.layers) for done in range(cost.layers)]
    assert cost.layers == 4 * model.config.n_layers  # prompts of 1, 3, 5 and 7 tokens
    assert cost.rows + cost.steps == model.config.n_layers * sum(map(len, PROMPTS))


def test_raising_from_tick_stops_pooling(model: Model) -> None:
    def tick(done: int, total: int, what: str) -> None:
        if done == 3:
            raise KeyError

    with pytest.raises(KeyError):
        pooled_rows(model, PROMPTS, [1], tick=tick)


def test_a_position_that_one_of_the_prompts_does_not_have_is_refused(model: Model) -> None:
    with pytest.raises(PositionError, match="position 2 does not exist in a prompt of 1 tokens"):
        pooled_rows(model, PROMPTS, [1], positions=[2])


def test_patterns_are_not_pooled_and_no_prompts_give_nothing(model: Model) -> None:
    with pytest.raises(PointError, match="use z"):
        pooled_rows(model, PROMPTS, [1], "attn_pattern")
    assert pooled_rows(model, [], [1]) == {}
