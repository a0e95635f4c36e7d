"""The workspace folder: who may use it when, and `mechscope doctor --repair`."""

import json
import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from clients import SCRIPT

from server import index
from server.disk_store import DiskStore, open_store
from server.machine import physical_memory
from server.records import file_name
from server.repair import repair, state
from server.store import StoreError
from server.workspace import InUse, Workspace

TENSORS = {"a": np.zeros(10, np.float32)}
BUDGETS = 1 << 20, 1 << 20


def stored(root: Path, count: int = 3) -> list[str]:
    store = open_store(root, *BUDGETS)
    handles = [store.put("act", "x", "ann", TENSORS, {}) for _ in range(count)]
    store.close()
    return handles


def test_repair_removes_what_no_handle_refers_to_and_handles_whose_file_is_missing(tmp_path: Path) -> None:
    handles = stored(tmp_path)
    records = tmp_path / "records"
    (records / "act-stray-00.safetensors").write_bytes(b"x")
    (records / "act-half-00.writing").write_bytes(b"x")
    (records / file_name(handles[0])).unlink()
    (records / file_name(handles[1])).write_bytes(b"damaged")
    assert state(tmp_path)[0] is False
    said: list[str] = []
    repair(tmp_path, said.append)
    told = "\n".join(said)
    assert "removed act-stray-00.safetensors" in told
    assert "removed act-half-00.writing" in told
    assert f"removed the handle {handles[0]}: its file is missing" in told
    assert f"left {handles[1]}, whose file is damaged" in told
    assert {path.name for path in records.iterdir()} == set(map(file_name, handles[1:]))
    assert state(tmp_path)[0] is True
    store = open_store(tmp_path, *BUDGETS)
    assert [record.handle for record in store.records("ann")] == handles[1:]
    store.close()


def test_what_a_lost_index_knew_is_not_deleted(tmp_path: Path) -> None:
    stored(tmp_path)
    records = sorted((tmp_path / "records").iterdir())
    for path in tmp_path.glob("index*"):
        path.unlink()
    for path in records:
        os.utime(path, (time.time() - 60,) * 2)
    (kept,) = stored(tmp_path, 1)
    (tmp_path / "records" / "act-stray-00.safetensors").write_bytes(b"x")
    said: list[str] = []
    repair(tmp_path, said.append)
    assert sorted((tmp_path / "records").iterdir()) == sorted([*records, tmp_path / "records" / file_name(kept)])
    assert any("3 files" in line and "before the index" in line for line in said)
    sound, told = state(tmp_path)
    assert (sound, "before the index" in told) == (False, True)


def test_repair_is_refused_while_a_server_runs_and_a_server_waits_for_repairs(tmp_path: Path) -> None:
    store = open_store(tmp_path, *BUDGETS)
    assert state(tmp_path) == (True, "0 handles, 0B, files counted (--thorough reads them), in use by a server")
    with pytest.raises(InUse, match="1 servers run"):
        repair(tmp_path, print)
    store.close()
    repair(tmp_path, print)
    with Workspace(tmp_path).locked(), pytest.raises(InUse, match="another process"), Workspace(tmp_path).locked(0.1):
        pass


def test_the_doctor_repairs_the_workspace_it_is_given(tmp_path: Path) -> None:
    stored(tmp_path)
    stray = tmp_path / "records" / "act-stray-00.safetensors"
    stray.write_bytes(b"x")
    command = [SCRIPT, "doctor", "--repair", "--workspace", str(tmp_path)]
    store = open_store(tmp_path, *BUDGETS)
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 1
    assert "stop them" in refused.stdout
    assert stray.exists()
    store.close()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "act-stray-00" in done.stdout
    assert not stray.exists()


def test_an_index_that_is_no_database_is_told_and_left_alone(tmp_path: Path) -> None:
    stored(tmp_path)
    for path in tmp_path.glob("index.sqlite*"):
        path.unlink()
    (tmp_path / "index.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(StoreError, match="doctor --repair"):
        open_store(tmp_path, *BUDGETS)
    sound, said = state(tmp_path)
    assert (sound, "doctor --repair" in said) == (False, True)
    with pytest.raises(StoreError, match="keep a copy"):
        repair(tmp_path, print)
    assert len(list((tmp_path / "records").iterdir())) == 3


def test_an_index_of_a_newer_mechscope_is_refused(tmp_path: Path) -> None:
    stored(tmp_path)
    connection = sqlite3.connect(tmp_path / "index.sqlite")
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(StoreError, match="newer mechscope"):
        open_store(tmp_path, *BUDGETS)


def test_an_older_index_is_brought_up_to_date(tmp_path: Path, monkeypatch) -> None:
    handles = stored(tmp_path)
    monkeypatch.setattr(index, "MIGRATIONS", (*index.MIGRATIONS, "ALTER TABLE records ADD COLUMN note TEXT"))
    for _ in range(2):
        store = open_store(tmp_path, *BUDGETS)
        assert [record.handle for record in store.records("ann")] == handles
        store.close()
    connection = sqlite3.connect(tmp_path / "index.sqlite")
    assert "note" in {row[1] for row in connection.execute("PRAGMA table_info(records)")}
    connection.close()


def test_an_index_that_did_not_say_how_weights_were_kept_learns_it(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(index, "MIGRATIONS", index.MIGRATIONS[:2])
    stored(tmp_path)
    connection = sqlite3.connect(tmp_path / "index.sqlite")
    for name, layers, fingerprint in (("a", None, "f"), ("b", 2, "f"), ("c", None, "f:bf16")):
        connection.execute(
            "INSERT INTO models (handle, name, source, dense_layers, fingerprint, bytes) VALUES (?, ?, ?, ?, ?, 1)",
            (f"model:{name}", json.dumps(name), json.dumps(f"/{name}"), layers, fingerprint),
        )
    connection.commit()
    connection.close()
    monkeypatch.undo()
    store = open_store(tmp_path, *BUDGETS)
    assert [(model.source, model.weights) for model in store.models()] == [
        ("/a", "dense"),
        ("/b", "scoped"),
        ("/c", "bf16"),
    ]
    store.close()


def test_nobody_else_may_read_a_workspace(tmp_path: Path) -> None:
    stored(tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.name != "lock" and path.stat().st_mode & 0o077] == []


def test_a_machines_memory_is_that_of_its_container(tmp_path: Path) -> None:
    limit = tmp_path / "memory.max"
    machine = physical_memory(limit)
    assert machine is not None
    assert machine > 1 << 28
    limit.write_text("max\n")
    assert physical_memory(limit) == machine
    limit.write_text("1000000\n")
    assert physical_memory(limit) == 1_000_000


def test_a_workspace_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="cannot be made"):
        open_store(tmp_path / "file" / "workspace", *BUDGETS)


@pytest.mark.parametrize(("name", "says"), [("lock", "cannot be locked"), ("index.sqlite", "must be able to write")])
def test_a_workspace_that_cannot_be_written_to_is_told(tmp_path: Path, name: str, says: str) -> None:
    Workspace(tmp_path).create()
    (tmp_path / name).mkdir()
    with pytest.raises(StoreError, match=says):
        open_store(tmp_path, *BUDGETS)


WRITER = """
import sys
from pathlib import Path
import numpy as np
from server.disk_store import open_store
for line in sys.stdin:
    store = open_store(Path(line.strip()), 1 << 20, 1 << 20)
    handles = [store.put("act", "x", "ann", {"a": np.zeros(10, np.float32)}, {}) for _ in range(3)]
    run = store.start_run("ann", "t", {}, {})
    store.close()
    print(*handles, flush=True)
"""


def test_two_processes_that_open_a_new_workspace_at_once_lose_nothing_fifty_times(tmp_path: Path) -> None:
    def writer() -> subprocess.Popen[str]:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen([sys.executable, "-c", WRITER], text=True, bufsize=1, **pipes)

    with writer() as one, writer() as two:
        for number in range(50):
            root = tmp_path / str(number)
            for process in (one, two):
                assert process.stdin is not None
                process.stdin.write(f"{root}\n")
            answers = [_line(process) for process in (one, two)]
            store: DiskStore = open_store(root, *BUDGETS)
            assert {record.handle for record in store.records("ann")} == set(" ".join(answers).split())
            assert [run.state for run in store.runs("ann")] == ["interrupted"] * 2
            store.close()
        for process in (one, two):
            assert process.stdin is not None
            process.stdin.close()


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    if line := process.stdout.readline():
        return line
    assert process.stderr is not None
    raise AssertionError(process.stderr.read())
