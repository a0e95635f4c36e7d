"""The store on disk: what it answered for survives it, budgets hold, and damage is told."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
from clients import ask, connected, refused
from safetensors.numpy import load_file

from server.app import build_server
from server.disk_store import DiskStore, open_store
from server.lab import Lab
from server.records import TensorCache, file_name
from server.store import DamagedRecord, OutOfSpace, StoreError, UnknownHandle

MANY = 1 << 30
Opened = Callable[..., DiskStore]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opened]:
    """Open the same workspace again and again, as processes would."""
    stores = []

    def open_one(memory: int = MANY, disk: int = MANY) -> DiskStore:
        stores.append(open_store(tmp_path, memory, disk))
        return stores[-1]

    yield open_one
    for store in stores:
        store.close()


def block(number: int, size: int = 1000) -> dict[str, np.ndarray]:
    return {"z": np.full(size, number, np.float32), "a": np.arange(6, dtype=np.float32).reshape(2, 3).T}


def path_of(tmp_path: Path, handle: str) -> Path:
    return tmp_path / "records" / file_name(handle)


def test_a_record_is_the_same_in_another_process_and_its_tensors_keep_their_order(opened: Opened) -> None:
    handle = opened().put("act", "Paris", "ann", block(3), {"about": "x", "prompt_ids": [1, 2]})
    record = opened().get(handle, "ann")
    assert not record.in_memory
    assert list(record.tensors) == ["z", "a"]
    for name, tensor in block(3).items():
        np.testing.assert_array_equal(record.tensors[name], tensor)
    assert record.provenance["prompt_ids"] == [1, 2]
    assert record.provenance["tensors"]["a"] == {"dtype": "float32", "shape": [3, 2]}


def test_provenance_has_the_files_sha256_and_the_file_says_what_it_is(opened: Opened, tmp_path: Path) -> None:
    store = opened()
    handle = store.put("act", "Paris", "ann", block(3), {"about": "x"})
    path = path_of(tmp_path, handle)
    assert store.get(handle, "ann").provenance["sha256"] == sha256(path.read_bytes()).hexdigest()
    np.testing.assert_array_equal(load_file(path)["z"], block(3)["z"])
    assert handle.encode() in path.read_bytes()
    assert path.parent.stat().st_mode & 0o077 == 0


def test_memory_stays_below_its_budget_while_ten_times_as_much_is_used(opened: Opened) -> None:
    budget = 10 * 4024
    store = opened(memory=budget)
    handles = [store.put("act", "x", "ann", block(i), {}) for i in range(100)]
    for i in [*range(100), *range(99, -1, -1)]:
        assert store.get(handles[i], "ann").tensors["z"][0] == i
        assert store.bytes_in_memory <= budget
    assert store.get(handles[0], "ann").in_memory
    assert not store.get(handles[99], "ann").in_memory


def test_the_least_recently_used_tensors_leave_memory_first() -> None:
    cache = TensorCache(3 * 4024)
    for name in "abc":
        cache.keep(name, block(0))
    cache.get("a")
    cache.keep("d", block(0))
    assert [name in cache for name in "abcd"] == [True, False, True, True]
    cache.keep("huge", block(0, 10_000))
    assert "huge" not in cache
    assert cache.nbytes <= 3 * 4024


def test_the_disk_stays_below_its_budget_whoever_writes(opened: Opened, tmp_path: Path) -> None:
    budget = 50_000
    stores = [opened(disk=budget), opened(disk=budget)]
    handles: list[str] = []
    for i in range(100):  # ten times as much
        try:
            handles.append(stores[i % 2].put("act", "x", "ann", block(i), {}))
        except OutOfSpace as refused:
            assert any(handle in str(refused) for handle in handles)  # noqa: PT017
        assert sum(path.stat().st_size for path in (tmp_path / "records").iterdir()) <= budget
    assert 5 < len(handles) < 20
    assert {path.name for path in (tmp_path / "records").iterdir()} == set(map(file_name, handles))
    stores[0].release(handles.pop(), "ann")
    handles.append(stores[1].put("act", "x", "ann", block(1), {}))


def test_the_disk_stays_below_its_budget_when_all_write_at_once(opened: Opened, tmp_path: Path) -> None:
    stores = [opened(disk=10_000), opened(disk=10_000)]
    together = Barrier(16)

    def put(number: int) -> bool:
        together.wait()
        with suppress(OutOfSpace):
            stores[number % 2].put("act", "x", "ann", block(number), {})
            return True
        return False

    with ThreadPoolExecutor(16) as threads:
        assert sum(threads.map(put, range(16))) == 2
    assert stores[0].bytes_on_disk <= 10_000
    assert len(list((tmp_path / "records").iterdir())) == 2


def test_a_disk_that_takes_no_more_is_an_error_and_leaves_nothing(opened: Opened, tmp_path: Path, monkeypatch) -> None:
    store = opened()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutOfSpace, match="No space left"):
        store.put("act", "x", "ann", block(1), {})
    monkeypatch.undo()
    assert list((tmp_path / "records").iterdir()) == []
    assert store.records("ann") == []


def test_a_folder_that_cannot_be_written_to_is_not_called_full(opened: Opened, tmp_path: Path) -> None:
    store = opened()
    (tmp_path / "records").rmdir()
    with pytest.raises(StoreError, match="make it writable") as told:
        store.put("act", "x", "ann", block(1), {})
    assert not isinstance(told.value, OutOfSpace)


def test_an_index_on_a_full_disk_says_so_and_works_again_when_there_is_room(opened: Opened) -> None:
    store = opened()
    (pages,) = store._index._writer.execute("PRAGMA page_count").fetchone()
    store._index._writer.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StoreError, match="free the disk") as told:
        store.put("act", "x", "ann", block(1), {"about": "x" * 20_000})
    assert "doctor" not in str(told.value)
    assert store.records("ann") == []
    store._index._writer.execute("PRAGMA max_page_count = 1000000")
    assert store.get(store.put("act", "x", "ann", block(1), {}), "ann").nbytes == store.bytes_in_memory


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (flip, "was damaged on disk"),
        (lambda path: path.write_bytes(path.read_bytes()[:-10]), "was damaged on disk"),
        (Path.unlink, "is missing"),
    ],
)
def test_a_damaged_file_is_reported_as_such_and_can_be_released(
    opened: Opened, tmp_path: Path, harm: Callable[[Path], object], says: str
) -> None:
    handle = opened().put("act", "x", "ann", block(1), {})
    harm(path_of(tmp_path, handle))
    store = opened()
    record = store.get(handle, "ann")
    with pytest.raises(DamagedRecord, match=says) as told:
        record.tensors["z"]
    assert handle in str(told.value)
    assert "release" in str(told.value)
    assert [held.handle for held in store.records("ann")] == [handle]
    assert store.release(handle, "ann") == record.nbytes
    assert not path_of(tmp_path, handle).exists()


@pytest.mark.anyio
async def test_tools_tell_damage_and_want_of_room_in_words_an_agent_can_act_on(opened: Opened, tmp_path: Path) -> None:
    lab = Lab(opened(disk=20_000))
    lab.load("synthetic", "dense")
    async with connected(build_server(lab)) as client:
        handle = (await ask(client, "capture_residuals", prompt="hello"))["handle"]
        flip(path_of(tmp_path, handle))
        lab.store = opened(disk=20_000)
        assert "was damaged on disk" in await refused(client, "read_tensor", handle=handle)
        assert "was damaged on disk" in await refused(client, "logit_lens", tensor=handle)
        text = await refused(client, "capture_residuals", prompt="hello " * 20, positions="all")
        assert "Release" in text
        assert handle in text
        assert [row["handle"] for row in (await ask(client, "list_session"))["handles"]] == [handle]
        await ask(client, "release", handle=handle)
        assert (await ask(client, "list_session"))["handles"] == []


def test_what_one_process_releases_is_gone_in_another_that_has_it_in_memory(opened: Opened) -> None:
    first, second = opened(), opened()
    handle = first.put("act", "x", "ann", block(1), {})
    record = second.get(handle, "ann")
    second.release(handle, "ann")
    with pytest.raises(UnknownHandle):
        first.get(handle, "ann")
    with pytest.raises(UnknownHandle):
        record.tensors["z"]


def test_runs_survive_and_those_of_a_process_that_is_gone_are_interrupted(opened: Opened) -> None:
    first, second = opened(), opened()
    going, done = (first.start_run("ann", "causal_trace", {"clean": "a"}, {}) for _ in range(2))
    first.save_run(replace(going, done=3, total=9))
    first.save_run(replace(done, state="done", result={"cells": 3}, ended=5.0))
    assert second.run(going.handle, "ann").state == "running"
    assert first.run(going.handle, "ann").done == 3
    first.close()
    for store in (second, opened()):
        assert [run.state for run in store.runs("ann")] == ["interrupted", "done"]
        assert store.run(done.handle, "ann").result == {"cells": 3}
        assert store.run(going.handle, "ann").error is not None


def test_a_run_that_has_ended_is_not_overtaken_by_its_own_progress(opened: Opened) -> None:
    store, other = opened(), opened()
    with ThreadPoolExecutor(4) as threads:
        for _ in range(30):
            run = store.start_run("ann", "causal_trace", {}, {})
            late = [threads.submit(store.save_run, replace(run, done=i)) for i in range(8)]
            late[0].result()
            store.save_run(replace(run, state="done", result={}))
            for saved in late:
                saved.result()
            assert other.run(run.handle, "ann").state == "done"


def start_many(store: DiskStore, count: int) -> None:
    for _ in range(count):
        store.start_run("ann", "causal_trace", {"clean": "a"}, {})


def test_runs_count_against_the_disk_budget_and_one_too_large_to_keep_says_so(opened: Opened) -> None:
    store = opened(disk=30_000)
    run = store.start_run("ann", "causal_trace", {}, {})
    store.save_run(replace(run, state="done", result={"rows": "x" * 40_000}))
    kept = store.run(run.handle, "ann")
    assert (kept.state, kept.result) == ("failed", None)
    assert "could not be kept" in str(kept.error)
    assert 0 < store.bytes_on_disk < 30_000
    with pytest.raises(OutOfSpace):
        start_many(store, 100)
    assert store.bytes_on_disk <= 30_000
