"""Session stores, in memory and on disk: unguessable handles that belong to one principal."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from server.disk_store import open_store
from server.store import MemoryStore, OutOfSpace, SessionStore, UnknownHandle, mint

TENSORS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3)}
BUDGET = 40_000


@pytest.fixture(params=["memory", "disk"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SessionStore]:
    if request.param == "memory":
        yield MemoryStore(BUDGET)
        return
    made = open_store(tmp_path, memory_budget=10_000, disk_budget=BUDGET)
    yield made
    made.close()


def test_a_handle_has_a_readable_part_and_128_random_bits() -> None:
    first, second = (mint("act", " Paris is, L18!") for _ in range(2))
    assert first != second
    readable, random = first.rsplit("-", 1)
    assert readable == "act:paris-is-l18"
    assert len(random) == 32
    int(random, 16)


def test_a_record_comes_back_as_it_was_put(store: SessionStore) -> None:
    handle = store.put("act", "x", "ann", TENSORS, {"about": "y"})
    record = store.get(handle, "ann")
    np.testing.assert_array_equal(record.tensors["a"], TENSORS["a"])
    assert (record.owner, record.nbytes, record.provenance["about"]) == ("ann", 24, "y")
    assert record.provenance["tensors"] == {"a": {"dtype": "float32", "shape": [2, 3]}}


def test_a_budget_that_is_used_up_is_an_error_that_names_what_to_release(store: SessionStore) -> None:
    block = {"a": np.zeros(2000, np.float32)}
    handles, refused = [], None
    for i in range(BUDGET // 800):  # ten times the budget
        try:
            handles.append(store.put("act", f"block {i}", "ann", block, {}))
        except OutOfSpace as error:
            refused = str(error)
        assert store.bytes_in_memory <= BUDGET
        assert store.bytes_on_disk <= BUDGET
    assert refused is not None
    assert any(handle in refused for handle in handles)
    assert [record.handle for record in store.records("ann")] == handles
    store.release(handles[0], "ann")
    store.put("act", "block", "ann", block, {})


def test_a_model_keeps_its_handle_until_its_weights_change(store: SessionStore) -> None:
    first = store.remember_model("tiny", "/m/tiny", "dense", None, "f0", 10)
    strange = store.remember_model("\udcff", "/m/\udcff", "dense", None, "f0", 10)
    assert store.models() == [first, strange]
    assert first.handle.startswith("model:tiny-")
    assert store.remember_model("tiny", "/m/tiny", "dense", None, "f0", 10) == first
    otherwise = (("scoped", 1, "f0"), ("packed", None, "f0"), ("dense", None, "f1"))
    others = [store.remember_model("tiny", "/m/tiny", *other, 10) for other in otherwise]
    assert store.models() == [first, strange, *others]
    assert len({model.handle for model in store.models()}) == 5


def test_to_another_principal_a_handle_does_not_exist(store: SessionStore) -> None:
    handle = store.put("act", "x", "ann", TENSORS, {})
    with pytest.raises(UnknownHandle) as theirs:
        store.get(handle, "bob")
    with pytest.raises(UnknownHandle):
        store.release(handle, "bob")
    missing = handle[:-1] + ("0" if handle[-1] != "0" else "1")
    with pytest.raises(UnknownHandle) as nobody:
        store.get(missing, "ann")
    assert str(theirs.value).replace(handle, "H") == str(nobody.value).replace(missing, "H")
    assert store.records("bob") == []
    assert [r.handle for r in store.records("ann")] == [handle]


@pytest.mark.parametrize("text", ["", "act:", "act:\ud800-" + "0" * 32, "act:x\0", "model:x", "x" * 100_000, "run:x"])
def test_what_never_was_a_handle_is_no_handle(store: SessionStore, text: str) -> None:
    for look in (store.get, store.release, store.run):
        with pytest.raises(UnknownHandle) as told:
            look(text, "ann")
        assert len(str(told.value)) < 500
        str(told.value).encode()


def test_a_released_handle_is_gone(store: SessionStore) -> None:
    handle = store.put("vec", "x", "ann", TENSORS, {})
    assert store.release(handle, "ann") == 24
    with pytest.raises(UnknownHandle, match="list_session"):
        store.get(handle, "ann")


def test_a_run_is_kept_as_it_was_last_saved_and_belongs_to_one_principal(store: SessionStore) -> None:
    run = store.start_run("ann", "causal_trace", {"clean": "a"}, {"version": "0"})
    assert run.handle.startswith("run:causal-trace-")
    assert (run.state, run.done, run.result) == ("running", 0, None)
    store.save_run(replace(run, state="done", result={"cells": 3}))
    assert store.run(run.handle, "ann").result == {"cells": 3}
    assert [r.handle for r in store.runs("ann")] == [run.handle]
    assert store.runs("bob") == []
    for attempt in (store.run, store.release):
        with pytest.raises(UnknownHandle):
            attempt(run.handle, "bob")


def test_a_released_run_stays_forgotten_when_its_end_is_saved(store: SessionStore) -> None:
    run = store.start_run("ann", "causal_trace", {}, {})
    assert store.release(run.handle, "ann") == 0
    store.save_run(replace(run, state="done"))
    assert store.runs("ann") == []
