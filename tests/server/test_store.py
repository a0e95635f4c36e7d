"""The session store: unguessable handles that belong to one principal."""

from dataclasses import replace

import numpy as np
import pytest

from server.store import MemoryStore, UnknownHandle, mint

TENSORS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3)}


def test_a_handle_has_a_readable_part_and_128_random_bits() -> None:
    first, second = (mint("act", " Paris is, L18!") for _ in range(2))
    assert first != second
    readable, random = first.rsplit("-", 1)
    assert readable == "act:paris-is-l18"
    assert len(random) == 32
    int(random, 16)


def test_a_record_comes_back_as_it_was_put() -> None:
    store = MemoryStore()
    handle = store.put("act", "x", "ann", TENSORS, {"about": "y"})
    record = store.get(handle, "ann")
    np.testing.assert_array_equal(record.tensors["a"], TENSORS["a"])
    assert (record.owner, record.nbytes, record.provenance) == ("ann", 24, {"about": "y"})


def test_to_another_principal_a_handle_does_not_exist() -> None:
    store = MemoryStore()
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


def test_a_released_handle_is_gone() -> None:
    store = MemoryStore()
    handle = store.put("vec", "x", "ann", TENSORS, {})
    assert store.release(handle, "ann") == 24
    with pytest.raises(UnknownHandle, match="list_session"):
        store.get(handle, "ann")


def test_a_run_is_kept_as_it_was_last_saved_and_belongs_to_one_principal() -> None:
    store = MemoryStore()
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


def test_a_released_run_stays_forgotten_when_its_end_is_saved() -> None:
    store = MemoryStore()
    run = store.start_run("ann", "causal_trace", {}, {})
    assert store.release(run.handle, "ann") == 0
    store.save_run(replace(run, state="done"))
    assert store.runs("ann") == []
