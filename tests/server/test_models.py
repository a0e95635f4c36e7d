"""Models are shared, loaded once, let go by budget, and come back under their handle."""

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
import tiny_files
from clients import ask, connected, refused

import server.lab
from engine import Model, load_model
from engine.errors import DamagedConversion, InputError, ModelError, UnknownModel
from server.app import build_server
from server.lab import Lab
from server.sources import Sources
from server.store import MemoryStore
from server.tools.session import held

IDS = [1, 2, 3]


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    """Three models of one size."""
    return [str(tiny_files.hf_directory(tmp_path / f"m{i}", tiny_files.weights(i))) for i in range(3)]


@pytest.fixture
def size(paths: list[str]) -> int:
    return load_model(paths[0]).params.nbytes


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sources that are really read, in order."""
    read: list[str] = []

    def counted(source: str, *arguments: Any, **named: Any) -> Model:
        read.append(source)
        return load_model(source, *arguments, **named)

    monkeypatch.setattr(server.lab, "load_model", counted)
    return read


def in_memory(lab: Lab) -> list[str]:
    return [model.source for model in lab.models]


def test_a_model_is_loaded_once_however_many_ask_at_a_time(paths: list[str], loads: list[str]) -> None:
    lab = Lab()
    handles: list[str] = []
    threads = [threading.Thread(target=lambda: handles.append(lab.load(paths[0], "dense").handle)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(handles) == 8
    assert len(set(handles)) == 1
    assert loads == [paths[0]]


def test_the_least_recently_used_model_goes_and_comes_back_the_same(
    paths: list[str], size: int, loads: list[str]
) -> None:
    lab = Lab(model_budget=2 * size)
    first, second = (lab.load(path, "dense") for path in paths[:2])
    lab.model(first.handle)
    lab.load(paths[2], "dense")
    assert in_memory(lab) == [paths[0], paths[2]]
    again = lab.model(second.handle)
    assert again.handle == second.handle
    assert loads == [*paths, paths[1]]
    np.testing.assert_array_equal(
        again.model.forward_with_capture(IDS, [1])[1], second.model.forward_with_capture(IDS, [1])[1]
    )


def test_ten_times_as_many_models_as_fit_never_take_more_than_the_budget(tmp_path: Path, size: int) -> None:
    lab = Lab(model_budget=2 * size)
    handles = []
    for i in range(20):
        path = tiny_files.hf_directory(tmp_path / f"n{i}", tiny_files.weights(i))
        handles.append(lab.load(str(path), "dense").handle)
        assert sum(model.model.params.nbytes for model in lab.models) <= 2 * size
    assert [lab.model(handle).handle for handle in handles] == handles


def test_a_model_that_cannot_fit_is_refused_before_it_is_read_and_the_others_stay(paths: list[str], size: int) -> None:
    lab = Lab(model_budget=size)
    lab.load(paths[0], "dense")
    small = Lab(model_budget=size - 1)
    layers: list[int] = []
    with pytest.raises(ModelError, match="--model-budget"):
        small.load(paths[1], "dense", tick=lambda done, total, what: layers.append(done))
    assert layers == [1]
    assert in_memory(small) == []
    assert in_memory(lab) == [paths[0]]


@pytest.mark.anyio
async def test_a_model_that_is_worked_with_is_not_released(paths: list[str], size: int) -> None:
    lab = Lab()
    handle = lab.load(paths[0], "dense").handle
    slot = lab.find(handle)
    async with slot.turn():
        with pytest.raises(InputError, match="being worked with"):
            lab.release_model(handle)
    assert in_memory(lab) == [paths[0]]
    assert lab.release_model(handle) == size
    assert in_memory(lab) == []
    assert lab.model(handle).handle == handle


@pytest.mark.anyio
async def test_a_model_that_is_worked_with_stays(paths: list[str], size: int) -> None:
    lab = Lab(model_budget=2 * size)
    first, _ = (lab.load(path, "dense") for path in paths[:2])
    async with lab.find(first.handle).turn():
        lab.load(paths[2], "dense")
        assert in_memory(lab) == [paths[0], paths[2]]
    lab.load(paths[1], "dense")
    assert in_memory(lab) == [paths[1], paths[2]]


def test_scoped_weights_come_back_scoped_with_their_budget(paths: list[str], size: int) -> None:
    lab = Lab(model_budget=size)
    for layers in (None, 2):
        handle = lab.load(paths[0], "scoped", dense_layers=layers).handle
        lab.load(paths[1], "dense")
        again = lab.model(handle).model
        assert (again.weights, again.params.keep) == ("scoped", layers or 1)


def test_packed_weights_come_back_packed(paths: list[str], tmp_path: Path) -> None:
    blocks = str(tiny_files.gguf_file(tmp_path / "blocks.gguf"))
    lab = Lab(model_budget=load_model(blocks).params.nbytes)
    packed, dense = (lab.load(blocks, weights).handle for weights in ("packed", "dense"))
    assert packed != dense
    for handle, weights in ((packed, "packed"), (dense, "dense"), (packed, "packed")):
        lab.load(paths[0], "dense")
        assert lab.model(handle).model.weights == weights


def test_another_process_of_the_workspace_knows_the_handle_and_the_name(paths: list[str], loads: list[str]) -> None:
    store = MemoryStore()
    handle = Lab(store).load(paths[0], "dense").handle
    assert Lab(store).model(handle).handle == handle
    assert Lab(store).model("m0").handle == handle
    assert Lab(store).load(paths[0], "dense").handle == handle
    with pytest.raises(UnknownModel, match=r"Known from before, and loaded when used: m0$"):
        Lab(store).model(None)


def test_other_weights_do_not_come_back_under_the_old_handle(paths: list[str], tmp_path: Path) -> None:
    store = MemoryStore()
    handle = Lab(store).load(paths[0], "dense").handle
    Path(paths[0]).rename(tmp_path / "old")
    with pytest.raises(ModelError, match=f"{handle} cannot be loaded again: .*no model"):
        Lab(store).model(handle)
    tiny_files.hf_directory(Path(paths[0]), tiny_files.weights(9))
    lab = Lab(store)
    with pytest.raises(ModelError, match="other weights now"):
        lab.model(handle)
    assert lab.load(paths[0], "dense").handle != handle


def test_a_model_that_a_server_may_not_open_does_not_come_back_there(paths: list[str], tmp_path: Path) -> None:
    store = MemoryStore()
    handle = Lab(store).load(paths[0], "dense").handle
    (tmp_path / "empty").mkdir()
    elsewhere = Lab(store, Sources([tmp_path / "empty"]))
    for reference in (handle, "m0", None):
        with pytest.raises(UnknownModel) as refused:
            elsewhere.model(reference)
        assert paths[0] not in str(refused.value)
        assert reference is not None or "m0" not in str(refused.value)
    assert held(elsewhere, "local").models == []
    assert [item.handle for item in held(Lab(store), "local").models] == [handle]


def test_naming_a_model_that_is_gone_leaves_the_other_the_only_one(paths: list[str], tmp_path: Path) -> None:
    store = MemoryStore()
    gone = Lab(store).load(paths[0], "dense").handle
    Path(paths[0]).rename(tmp_path / "elsewhere")
    lab = Lab(store)
    only = lab.load(paths[1], "dense").handle
    with pytest.raises(ModelError, match="cannot be loaded again"):
        lab.model(gone)
    assert lab.model(None).handle == only
    (tmp_path / "elsewhere").rename(paths[0])
    assert lab.model(gone).handle == gone
    with pytest.raises(UnknownModel, match=r"2 models are loaded; name one of them: m1, m0$"):
        lab.model(None)


def test_a_model_that_left_memory_and_is_gone_is_not_in_use(paths: list[str], tmp_path: Path, size: int) -> None:
    lab = Lab(model_budget=size)
    gone, only = (lab.load(path, "dense").handle for path in paths[:2])
    Path(paths[0]).rename(tmp_path / "elsewhere")
    with pytest.raises(UnknownModel, match="2 models"):
        lab.model(None)
    with pytest.raises(ModelError, match="cannot be loaded again"):
        lab.model(gone)
    assert lab.model(None).handle == only


def test_models_of_one_name_are_told_apart_by_their_handles(paths: list[str]) -> None:
    lab = Lab()
    dense, scoped, other = lab.load(paths[0], "dense"), lab.load(paths[0], "scoped"), lab.load(paths[1], "dense")
    with pytest.raises(UnknownModel, match=f"name one of them: {dense.handle}, {scoped.handle}, m1$"):
        lab.model(None)
    assert lab.model("m1") is other


@pytest.mark.anyio
async def test_tools_bring_a_model_back_while_the_server_answers_others(
    paths: list[str], size: int, monkeypatch
) -> None:
    lab = Lab(model_budget=size)
    first, second = (lab.load(path, "dense").handle for path in paths[:2])
    reading, go_on = threading.Event(), threading.Event()

    def slow(*arguments: Any, **named: Any) -> Model:
        reading.set()
        assert go_on.wait(30)
        return load_model(*arguments, **named)

    monkeypatch.setattr(server.lab, "load_model", slow)
    async with connected(build_server(lab)) as client, anyio.create_task_group() as group:
        answers: list[Any] = []
        heard: list[str | None] = []

        async def hear(progress: float, total: float | None, message: str | None) -> None:
            heard.append(message)

        async def call() -> None:
            arguments = {"text": "the", "model": first}
            result = await client.call_tool("tokenize", arguments, progress_callback=hear)
            answers.append(result.structured_content)

        group.start_soon(call)
        await anyio.to_thread.run_sync(reading.wait)
        listed = await ask(client, "list_session")
        assert {row["handle"]: row["in_memory"] for row in listed["models"]} == {first: False, second: False}
        go_on.set()
    assert answers[0]["model"] == first
    assert heard[0] == "reading layer 0"
    assert in_memory(lab) == [paths[0]]


@pytest.mark.anyio
async def test_two_models_that_do_not_fit_together_cannot_be_compared_and_the_error_says_why(
    paths: list[str], size: int
) -> None:
    lab = Lab(model_budget=size)
    first, second = (lab.load(path, "dense").handle for path in paths[:2])
    async with connected(build_server(lab)) as client:
        text = await refused(client, "compare", a=first, b=second, prompt="the")
        assert "--model-budget" in text
        await ask(client, "tokenize", text="the", model=second)


@pytest.mark.anyio
async def test_weights_in_bfloat16_are_another_model_and_every_result_says_so(lab: Lab) -> None:
    async with connected(build_server(lab)) as client:
        dense = await ask(client, "load_model", model="synthetic")
        rounded = await ask(client, "load_model", model="synthetic", weights="bf16")
        assert rounded["model"] != dense["model"]
        assert rounded["weights"] == "bf16"
        assert (await ask(client, "load_model", model="synthetic", weights="bf16"))["model"] == rounded["model"]
        for tool in ("tokenize", "logit_lens", "capture_residuals"):
            argument = {"text" if tool == "tokenize" else "prompt": "hello"}
            assert "bfloat16" in (await ask(client, tool, model=rounded["model"], **argument))["notice"]
            assert "bfloat16" not in (await ask(client, tool, model=dense["model"], **argument)).get("notice", "")
        await ask(client, "release", handle=rounded["model"])
        again = await ask(client, "logit_lens", prompt="hello", model=rounded["model"])
        assert "bfloat16" in again["notice"]
        held = await ask(client, "capture_residuals", prompt="hello", model=rounded["model"])
        said = await refused(client, "logit_lens", tensor=held["handle"], model=dense["model"])
        assert "another model" in said


def test_a_model_that_another_call_loads_while_damage_is_found_stays(lab: Lab, monkeypatch) -> None:
    slot = lab.slots[0]
    assert slot.loaded is not None
    fresh = replace(slot.loaded)

    class Damaged:
        def require_all(self) -> None:
            slot.loaded = fresh  # as the call that loads it again places it
            raise DamagedConversion("bytes differ")

    monkeypatch.setattr(slot.loaded.model.params, "vouched", Damaged())
    assert lab._in_memory(slot) is None
    assert slot.loaded is fresh
