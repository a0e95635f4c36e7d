"""What a pass costs, counted: calls, copies and bytes, never seconds."""

import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from declared import points_of
from recording import Calls

import engine.decoder
import engine.hooks
from engine import Intervention, LayerHook, RecordHook, SteerHook, Variant, forward, generate, sweep
from engine.config import Rope
from engine.cost import row_size
from engine.hooks import NoopHook

COPIES = {"copy", "array", "take", "concatenate", "copyto", "ascontiguousarray", "stack", "pad", "astype"}


class CountedNumpy:
    """numpy, for a module that asks for its functions by name: those that copy are counted."""

    def __init__(self, seen: Counter[str]) -> None:
        self.seen = seen

    def __getattr__(self, name: str) -> Any:
        self.seen[name] += name in COPIES
        return getattr(np, name)


def called(run: Callable[[], object]) -> Counter[str]:
    """How often functions of hooks.py were called, and in decoder.py functions of numpy and methods that copy."""
    seen: Counter[str] = Counter()

    def note(frame, event, arg):
        if event == "call" and frame.f_code.co_filename == engine.hooks.__file__:
            seen[frame.f_code.co_qualname] += 1
        elif event == "c_call" and arg.__name__ in COPIES and frame.f_code.co_filename == engine.decoder.__file__:
            seen[arg.__name__] += 1

    before, numpy = sys.getprofile(), engine.decoder.np
    engine.decoder.np = CountedNumpy(seen)
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(before)
        engine.decoder.np = numpy
    return +seen


def held_and_peak(run: Callable[[], object]) -> tuple[int, int]:
    """Bytes that a call leaves behind in what it returns, and the most that there were meanwhile."""
    run()
    tracemalloc.start()
    try:
        kept = run()
        held, peak = tracemalloc.get_traced_memory()
        del kept
    finally:
        tracemalloc.stop()
    return held, peak


def test_without_a_hook_no_hook_is_called_and_nothing_is_copied(model, ids):
    seen = called(lambda: forward(model, ids, logits_at="all"))
    assert [name for name in seen if not name.startswith("Listeners.")] == []
    assert seen["Listeners.__init__"] == 1
    listening = called(lambda: forward(model, ids, hook=Calls(points_of(model)), logits_at="all"))
    assert 0 < seen["Listeners.fire"] <= listening["Listeners.fire"]
    assert listening["Calls.at"] == 0 < listening["LayerHook.begin_run"], "the measure sees calls of hooks.py"
    copied = called(lambda: forward(model, None, residual=forward(model, ids, stop=1).residual, start=1))
    assert copied["array"] > 0, "and copies by functions of numpy"
    placed = called(lambda: forward(model, ids, positions=np.arange(len(ids))))
    assert placed["astype"] == 1, "and by methods of arrays"


def test_a_hook_is_called_where_it_listens_and_nowhere_else(model, ids):
    calls = Calls(["z"])
    forward(model, ids, hook=calls)
    assert [(point, layer) for point, layer, *_ in calls.seen] == [("z", i) for i in range(model.config.n_layers)]


def test_a_hook_that_listens_to_nothing_allocates_what_no_hook_does(synthetic):
    ids = list(range(100))
    _, alone = held_and_peak(lambda: forward(synthetic, ids, logits_at="none"))
    _, beside = held_and_peak(lambda: forward(synthetic, ids, hook=NoopHook(), logits_at="none"))
    _, recording = held_and_peak(lambda: forward(synthetic, ids, hook=RecordHook.for_layers(range(4))))
    row = len(ids) * synthetic.config.d_model * 4
    assert abs(beside - alone) < row
    assert recording - alone > 8 * row, "the measure sees what is recorded"


def test_a_steered_decode_calls_its_hook_once_a_step(synthetic):
    steps = 12
    hook = SteerHook().add(2, np.ones(synthetic.config.d_model, np.float32), 1e-3)
    seen = called(lambda: generate(synthetic, [1, 2, 3], steps, hook=hook))
    made = hook.edits[0].fired
    assert made > 1
    assert seen["EditHook.at"] == made
    assert seen["EditHook.begin_run"] == made


@pytest.mark.parametrize("point", ["resid_post", "mlp_act", "z", "q", "k", "v"])
def test_a_captures_memory_and_calls_grow_linearly_in_layers(synthetic, point):
    ids, held, calls = list(range(100)), [], []

    class Counted(RecordHook):
        def at(self, *args, **kwargs):
            calls[-1] += 1
            super().at(*args, **kwargs)

    def capture(n: int) -> LayerHook:
        calls.append(0)
        record = Counted(range(n), [point])
        forward(synthetic, ids, hook=record, logits_at="none")
        return record

    for n in range(5):
        held.append(held_and_peak(lambda n=n: capture(n))[0])
        assert calls[-1] == n
    row_and_position = 4 * row_size(synthetic.config, point, len(ids)) + 8
    assert np.diff(held) == pytest.approx(len(ids) * row_and_position, rel=0.1)


def test_a_grids_work_grows_linearly_in_cells(synthetic):
    ids = list(range(12))

    def cell(layer: int, position: int) -> Variant:
        edit = Intervention("scale", (layer,), "resid_pre", [position], value=0.5)
        return Variant((edit,))

    def rows(cells: list[Variant]) -> int:
        return sweep(synthetic, ids, cells).layer_rows - synthetic.config.n_layers * len(ids)

    cells = [cell(layer, position) for layer in range(4) for position in range(len(ids))]
    alone = [rows([one]) for one in cells]
    assert alone == [(4 - layer) * (len(ids) - position) for layer in range(4) for position in range(len(ids))]
    for n in (1, 10, 25, len(cells)):
        assert rows(cells[:n]) == sum(alone[:n])


def test_a_grids_memory_is_bounded_however_many_cells_it_has(synthetic):
    ids, budget = list(range(40)), 1 << 20
    cells = [
        Variant((Intervention("scale", (layer,), "resid_pre", [position], value=0.5),))
        for layer in range(3)
        for position in range(len(ids))
    ]

    def run(some: list[Variant]) -> tuple[int, int]:
        found = []
        read = lambda logits, base: logits[:, 0]  # noqa: E731
        _, peak = held_and_peak(lambda: found.append(sweep(synthetic, ids, some, read, budget=budget)))
        return found[-1].slices, peak

    (few, small), (many, large) = run(cells[::2]), run(cells)  # in the last layer cells hardly cost anything
    assert many >= 2 * few - 1 > 2
    assert large < 1.3 * small


def test_a_table_of_angles_is_made_once_per_pass_however_many_layers_share_it(model, ids, monkeypatch):
    made, table = [], Rope.table
    monkeypatch.setattr(Rope, "table", lambda rope, *where: made.append(rope) or table(rope, *where))
    forward(model, ids)
    assert len(made) == len({rope for rope in model.config.ropes if rope is not None})
