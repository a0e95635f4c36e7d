"""What work is said to take is what it then takes: layers entered, rows through layers, bytes held."""

import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest

from engine import (
    Intervention,
    Metric,
    Model,
    RecordHook,
    blas,
    forward,
    generate,
    kv_inject_test,
    load_model,
    patching_grid,
)
from engine import prefill_inject as injected
from engine.cost import Cost, of_generation, of_pass, row_size, seconds
from engine.forks import Variant
from engine.injection import kv_inject_cost, prefill_inject_cost
from engine.scans import patching_grid_cost
from engine.sweep import sweep, sweep_cost

DONOR, RECIPIENT = [5, 9, 2, 7, 7, 3], [5, 9, 4, 7, 1, 3]


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model("synthetic")


class Ticks:
    """Counts what is counted: layers."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, done: int, total: int, what: str) -> None:
        self.count += 1


def counted(run: Callable[[Ticks], object]) -> int:
    ticks = Ticks()
    run(ticks)
    return ticks.count


@pytest.mark.parametrize("stop", [None, 2])
def test_a_pass_enters_the_layers_it_is_said_to(model: Model, stop: int | None) -> None:
    run = counted(lambda tick: forward(model, DONOR, stop=stop, logits_at="none", tick=tick))
    cost = of_pass(model.config, len(DONOR), stop)
    assert cost.layers == run == (stop or model.config.n_layers)
    assert (cost.rows, cost.steps) == (run * len(DONOR), 0)


def test_a_generation_runs_each_token_but_the_last(model: Model) -> None:
    cost = of_generation(model.config, len(DONOR), 7)
    made = []
    run = counted(lambda tick: made.append(generate(model, DONOR, 7, tick=tick)))
    assert made[0].stopped == "length"
    assert cost.layers == run
    assert cost.rows == model.config.n_layers * len(DONOR)
    assert cost.steps == model.config.n_layers * 6


@pytest.mark.parametrize(
    ("point", "by"), [("resid_post", "position"), ("attn_out", "position"), ("z", "head"), ("k", "head_position")]
)
@pytest.mark.parametrize("budget", [2**28, 100_000])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_grid_takes_the_rows_it_is_said_to(
    model: Model, monkeypatch: pytest.MonkeyPatch, threads: int, point: str, by: str, budget: int
) -> None:
    monkeypatch.setattr(blas, "most_threads", lambda: threads)
    monkeypatch.setattr("engine.shares.ROWS_WORTH_A_THREAD", 0)
    monkeypatch.setattr("engine.shares.MOST_UNEVEN", 3)
    cost = patching_grid_cost(model, DONOR, RECIPIENT, point, by, budget=budget)
    grids = []
    ticks = counted(
        lambda tick: grids.append(
            patching_grid(model, DONOR, RECIPIENT, Metric("kl"), point, by, budget=budget, tick=tick)
        )
    )
    assert cost.layers == ticks
    assert cost.rows == grids[0].layer_rows + of_pass(model.config, len(DONOR)).rows
    assert (grids[0].slices > threads) == (budget < 2**28)


@pytest.mark.parametrize("layers", [None, [1, 3]])
def test_cache_surgery_takes_the_layers_it_is_said_to(model: Model, layers: list[int] | None) -> None:
    for donor in (DONOR, DONOR[1:]):
        scan = counted(lambda tick, donor=donor: kv_inject_test(model, RECIPIENT, donor, 7, layers, tick=tick))
        assert kv_inject_cost(model, RECIPIENT, donor, layers).layers == scan
    run = counted(lambda tick: injected(model, RECIPIENT, DONOR, layers, max_new_tokens=5, tick=tick))
    assert prefill_inject_cost(model, RECIPIENT, DONOR, 5).layers == run


@pytest.mark.parametrize(
    ("tokens", "options"),
    [(60, {}), (400, {"positions": [-1]}), (400, {"positions": [-1], "layers": [0], "point": "z", "by": "head"})],
)
def test_the_bytes_of_a_grid_are_those_it_holds(
    model: Model, monkeypatch: pytest.MonkeyPatch, tokens: int, options: dict[str, Any]
) -> None:
    monkeypatch.setattr(blas, "most_threads", lambda: 1)  # several seldom hold the most at one time
    donor, recipient = ([first, *(i % 99 for i in range(1, tokens))] for first in (1, 2))
    cost = patching_grid_cost(model, donor, recipient, **options)
    tracemalloc.start()
    patching_grid(model, donor, recipient, Metric("kl"), **options)
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 0.4 * held < cost.nbytes < 2.5 * held


def knocked(layer: int, head: int, key: int = 0, rows: str = "all") -> Variant:
    return Variant((Intervention("knockout", (layer,), "attn_pattern", rows, (head,), keys=(key,)),))


CHANGED_PATTERNS = {
    "heads": [knocked(layer, head) for layer in range(4) for head in range(4)],
    "keys of the last row": [knocked(layer, 0, key, "last") for layer in range(4) for key in range(0, 300, 8)],
    "one head": [Variant((Intervention("zero", (2,), "attn_pattern", heads=(1,)),))],
    "beside others": [knocked(2, 1), *(Variant((Intervention("scale", (1,), "z", heads=(i,)),)) for i in range(4))],
}


@pytest.mark.parametrize("budget", [2**28, 2**22])
@pytest.mark.parametrize("case", CHANGED_PATTERNS)
def test_patterns_that_a_sweep_changes_are_counted(
    model: Model, monkeypatch: pytest.MonkeyPatch, case: str, budget: int
) -> None:
    monkeypatch.setattr(blas, "most_threads", lambda: 1)  # several seldom hold the most at one time
    ids, variants = [i % 99 for i in range(300)], CHANGED_PATTERNS[case]
    cost = sweep_cost(model, ids, variants, budget)
    tracemalloc.start()
    run = sweep(model, ids, variants, lambda logits, base: logits[:, 0], budget=budget)
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 0.9 * held < cost.nbytes < 2.5 * held
    assert (run.slices > 1) == (budget < 2**28 and len(variants) > 1)


def test_a_row_is_as_large_as_what_is_recorded(model: Model) -> None:
    points = ["resid_post", "q", "k", "z", "mlp_act", "attn_pattern"]
    record = RecordHook([1], points)
    forward(model, DONOR, hook=record)
    for point in points:
        assert record.get(point)[1].size == len(DONOR) * row_size(model.config, point, len(DONOR)), point


def test_costs_add_up_and_the_largest_is_what_is_held() -> None:
    first, second = Cost(4, 20, 1, 300), Cost(2, 6, 0, 500)
    assert first + second == Cost(6, 26, 1, 500)
    assert first * 3 == Cost(12, 60, 3, 300)
    assert first.holding(50).nbytes == 350


def test_passes_are_counted_in_prompts_and_decoded_tokens(model: Model) -> None:
    assert of_generation(model.config, 6, 7).passes(model.config, 6) == 7
    assert sweep_cost(model, DONOR, [Variant()]).passes(model.config, 6) == 1


def test_a_long_prompt_takes_what_attention_adds_to_each_row(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.cost._timed", lambda model, length: length * (3.0 + length / 1000))
    layers = model.config.n_layers
    for length, batch in ((100, 1), (1024, 1), (8000, 1), (10, 300)):
        rows = length * batch
        found = seconds(model, Cost(layers, layers * rows), length)
        seen = length if length > 1024 else min(rows, 256)
        assert found == pytest.approx(rows * (3.0 + seen / 1000))


def test_more_work_is_said_to_take_longer(model: Model) -> None:
    once = of_pass(model.config, 64)
    assert 0 < seconds(model, once) < seconds(model, once * 50)
