"""Working memory: what tools say they will hold is what they then hold, and more than the budget is refused first."""

import re
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clients import ask, connected, refused
from mcp import MCPError
from slow_model import Entered

from engine import Model, blas
from engine.cost import Cost, what_fits
from engine.synthetic import CONFIG, synthetic
from server.app import build_server
from server.call import LOCAL
from server.disk_store import open_store
from server.lab import Lab
from server.memory import TooMuchMemory, WorkingMemory
from server.store import RESERVED, MemoryStore, OutOfSpace, run_body

pytestmark = pytest.mark.anyio

N = 500
PROMPT, OTHER = [1, *(i % 251 for i in range(1, N))], [2, *(i % 251 for i in range(1, N))]
LONG = [1, *(1000 + i % 4000 for i in range(1, 4001))]
STEER = {"layer": 1, "vector": {"random_seed": 1}, "alpha": 2.0}
CUT = {"kind": "knockout", "layers": [1], "keys": [0]}
PATCH = {"kind": "patch", "layers": "all", "point": "mlp_act", "donor": OTHER}

CUTS = [CUT | {"keys": [key], "layers": [layer]} for key, layer in ((0, 1), (1, 1), (0, 2), (0, 3))]

CALLS: list[tuple[str, dict[str, Any]]] = [
    ("capture_residuals", {"prompt": PROMPT, "points": ["mlp_act", "z"], "positions": "all"}),
    ("capture_residuals", {"prompt": PROMPT, "points": ["attn_pattern"], "positions": "all"}),
    ("capture_residuals", {"prompt": PROMPT, "points": ["attn_pattern"], "positions": "last"}),
    ("logit_lens", {"prompt": PROMPT, "layers": [1], "positions": list(range(450)), "k": 1}),
    ("track_token", {"prompt": PROMPT, "token": "c"}),
    ("track_race", {"prompt": PROMPT}),
    ("attention_pattern", {"prompt": PROMPT, "layers": "all"}),
    ("forward_ablate", {"prompt": PROMPT, "layers": [1], "point": "attn_pattern"}),
    ("forward_ablate", {"prompt": PROMPT, "layers": [0], "point": "attn_pattern", "interventions": CUTS}),
    ("forward_ablate", {"prompt": PROMPT, "layers": "all", "point": "mlp_act", "mode": "mean", "mean_over": [OTHER]}),
    ("forward_steer", {"prompt": PROMPT, "steers": [STEER], "interventions": [CUT]}),
    ("forward_steer", {"prompt": PROMPT, "interventions": [PATCH]}),
    ("patch_activations", {"donor": OTHER, "recipient": PROMPT, "targets": [{"layer": 2, "position": 400}]}),
    ("causal_trace", {"clean": OTHER, "corrupt": PROMPT, "token": "c", "positions": [-1]}),
    ("generate_with_hooks", {"prompt": PROMPT, "max_new_tokens": 2, "steers": [STEER]}),
    ("prefill_inject", {"recipient": PROMPT, "donor": OTHER, "max_new_tokens": 2, "keep": True}),
    ("kv_inject_test", {"recipient": PROMPT, "donor": OTHER, "target": "d", "layers": [0, 2]}),
    ("compare", {"a": PROMPT, "b": OTHER}),
]


@pytest.mark.parametrize(("tool", "arguments"), CALLS, ids=[f"{tool}-{i}" for i, (tool, _) in enumerate(CALLS)])
async def test_a_call_holds_what_its_dry_run_says(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, tool: str, arguments: dict[str, Any]
) -> None:
    monkeypatch.setattr(blas, "most_threads", lambda: 1)  # several seldom hold the most at one time
    async with connected(build_server(lab)) as client:
        said = (await ask(client, "start_job", tool=tool, arguments=arguments, dry_run=True))["estimate"]["bytes"]
        await ask(client, tool, **arguments)
        tracemalloc.start()
        await ask(client, tool, **arguments)
        held = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert 0.8 * held < said < 2.5 * held


WIDE = 60_000
"""Tokens of a vocabulary beside which the rest of a short prompt's work is small."""
SHORT = {"prompt": PROMPT[:20]}
PAIR = {"recipient": PROMPT[:20], "donor": OTHER[:20]}
OF_VOCABULARY: list[tuple[str, dict[str, Any]]] = [
    ("capture_residuals", {**SHORT, "positions": "all", "lens_k": 1}),
    ("capture_residuals", {"prompt": PROMPT, "layers": [1], "positions": list(range(300)), "lens_k": 1}),
    ("logit_lens", {**SHORT, "positions": "all"}),
    ("logit_lens", {**SHORT, "positions": "all", "layers": [1]}),
    ("logit_lens", {"tensor": "HANDLE", "layers": [1], "positions": list(range(300)), "k": 1}),
    ("logit_lens", {"tensor": "HANDLE", "layers": [1], "k": 1}),
    ("track_token", {**SHORT, "token": "c"}),
    ("track_race", SHORT),
    ("compare", {"a": PROMPT[:20], "b": OTHER[:20]}),
    ("embedding_neighbors", {"token": "c"}),
    ("project_through_unembed", {"token": "c"}),
    ("forward_ablate", {**SHORT, "layers": [1]}),
    ("forward_ablate", {**SHORT, "layers": [1], "token": "c", "against": "d"}),
    ("forward_steer", {**SHORT, "steers": [STEER]}),
    ("patch_activations", {**PAIR, "targets": [{"layer": 2, "position": 3}], "token": "c"}),
    ("causal_trace", {"clean": OTHER[:20], "corrupt": PROMPT[:20], "token": "c", "metric": "probability"}),
    ("generate_with_hooks", {**SHORT, "max_new_tokens": 2, "steers": [STEER]}),
    ("prefill_inject", {**PAIR, "max_new_tokens": 2, "token": "c"}),
    ("kv_inject_test", {**PAIR, "target": "d"}),
]


@pytest.fixture(scope="module")
def wide() -> Model:
    return synthetic(config=replace(CONFIG, d_vocab=WIDE))


@pytest.mark.parametrize(
    ("tool", "arguments"), OF_VOCABULARY, ids=[f"{t}-{i}" for i, (t, _) in enumerate(OF_VOCABULARY)]
)
async def test_arrays_of_the_vocabularys_size_count(
    lab: Lab, wide: Model, monkeypatch: pytest.MonkeyPatch, tool: str, arguments: dict[str, Any]
) -> None:
    monkeypatch.setattr(blas, "most_threads", lambda: 1)
    lab.models[0].model = wide
    async with connected(build_server(lab)) as client:
        given = dict(arguments)
        if "tensor" in given:
            made = await ask(client, "capture_residuals", prompt=PROMPT, layers=[1], positions="all")
            given["tensor"] = made["handle"]
        said = (await ask(client, "start_job", tool=tool, arguments=given, dry_run=True))["estimate"]["bytes"]
        await ask(client, tool, **given)
        tracemalloc.start()
        await ask(client, tool, **given)
        held = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert 0.8 * held < said < 2.5 * held, (said / WIDE, held / WIDE)


def small_lab(budget: int, store: MemoryStore | None = None) -> tuple[Lab, Entered]:
    """A lab of so little memory, and the layers that its model enters."""
    lab = Lab(store, memory_budget=budget)
    lab.load("synthetic", "dense")
    entered = Entered(lab.models[0].model)
    lab.models[0].model = entered.model
    return lab, entered


@pytest.mark.parametrize(("tool", "arguments"), CALLS, ids=[f"{tool}-{i}" for i, (tool, _) in enumerate(CALLS)])
async def test_more_than_the_budget_is_refused_before_a_layer_runs(tool: str, arguments: dict[str, Any]) -> None:
    lab, entered = small_lab(1 << 20)
    async with connected(build_server(lab)) as client:
        said = await refused(client, tool, **arguments)
        assert said == await refused(client, "start_job", tool=tool, arguments=arguments, dry_run=True)
    assert entered.count == 0
    assert re.match(r"this needs \S+ while it works, and 1.0MiB of the 1.0MiB for calls and captures are free", said)
    assert "What would fit: " in said


async def test_what_is_said_to_fit_fits() -> None:
    lab, _ = small_lab(25 << 20)
    patterns = {"points": ["attn_pattern"], "positions": "all", "prompt": PROMPT}
    async with connected(build_server(lab)) as client:
        said = await refused(client, "capture_residuals", **patterns)
        layers, positions = map(int, re.search(r"fit: (\d+) layers or (\d+) positions", said).groups())
        assert (layers, 0 < positions < N) == (1, True)
        kept = await ask(client, "capture_residuals", **patterns | {"layers": [0]})
        await ask(client, "release", handle=kept["handle"])
        await refused(client, "capture_residuals", **patterns | {"layers": [0, 1]})
        await ask(client, "capture_residuals", **patterns | {"positions": list(range(positions))})
    lab, _ = small_lab(2 << 20)
    async with connected(build_server(lab)) as client:
        said = await refused(client, "logit_lens", prompt=PROMPT)
        tokens = int(re.search(r"fit: a prompt of (\d+) tokens", said)[1])
        await ask(client, "logit_lens", prompt=PROMPT[:tokens])


@pytest.mark.real
async def test_long_prompts_on_a_real_model_are_refused_before_a_layer_runs() -> None:
    lab = Lab(memory_budget=2 << 30)
    lab.load("smollm2-135m-instruct", "dense")
    entered = Entered(lab.models[0].model)
    lab.models[0].model = entered.model
    patterns = {"prompt": LONG[:2001], "points": ["attn_pattern"], "positions": "all"}
    async with connected(build_server(lab)) as client:
        entries = await refused(client, "logit_lens", prompt=LONG, positions="all")
        assert "30 layers x 4001 positions x 3 tokens are more than 500 entries" in entries
        said = await refused(client, "capture_residuals", **patterns)
        layers, positions = map(int, re.search(r"fit: (\d+) layers or (\d+) positions", said).groups())
        assert 30 > layers > 0 < positions < 2001
        await refused(client, "capture_residuals", **patterns | {"layers": [*range(layers + 1)]})
        await refused(client, "capture_residuals", **patterns | {"positions": [*range(positions + 1)]})
    assert entered.count == 0
    whole = 4 * lab.models[0].model.config.n_heads * 2001**2  # of one layer
    assert 30 * whole > 2 << 30 > layers * whole


async def test_more_entries_than_an_answer_has_are_refused_before_a_layer_runs() -> None:
    lab, entered = small_lab(1 << 30)
    async with connected(build_server(lab)) as client:
        assert "500 entries" in await refused(client, "logit_lens", prompt=PROMPT, positions="all")
        assert "500 entries" in await refused(client, "capture_residuals", prompt=PROMPT, positions="all", lens_k=1)
    assert entered.count == 0


@pytest.mark.parametrize("tool", ["capture_residuals", "causal_trace", "prefill_inject"])
async def test_a_store_without_room_refuses_before_a_layer_runs(tool: str) -> None:
    lab, entered = small_lab(1 << 30, MemoryStore(100))
    arguments = {
        "capture_residuals": {"prompt": PROMPT, "positions": "all"},
        "causal_trace": {"clean": OTHER, "corrupt": PROMPT, "token": "c"},
        "prefill_inject": {"recipient": PROMPT, "donor": OTHER, "keep": True},
    }
    async with connected(build_server(lab)) as client:
        assert "0B of 100B are used: nothing was kept" in await refused(client, tool, **arguments[tool])
    assert entered.count == 0


async def test_room_is_given_back_when_a_call_ends_however_it_does() -> None:
    lab, _ = small_lab(6 << 20)
    async with connected(build_server(lab)) as client:
        for _ in range(3):
            await ask(client, "track_token", prompt=PROMPT, token="c")
            await refused(client, "forward_ablate", prompt=PROMPT, layers=[1], token="no token")
    lab.memory.take("another", Cost(nbytes=6 << 20), 1)
    lab.memory.give_back("another")


def test_calls_together_stay_within_the_budget_and_captures_count() -> None:
    store = MemoryStore()
    memory = WorkingMemory(store, 1000)
    memory.take("a", Cost(nbytes=600), 10)
    with pytest.raises(TooMuchMemory, match=r"400B of the 1000B .* calls that work now hold 600B: call again"):
        memory.take("b", Cost(nbytes=500), 10)
    memory.take("a", Cost(nbytes=900), 10)
    memory.give_back("a")
    handle = store.put("act", "x", LOCAL, {"a": np.zeros(200, np.float32)}, {})
    with pytest.raises(TooMuchMemory, match=r"200B of the 1000B .* captures and caches hold 800B: release"):
        memory.take("b", Cost(nbytes=500), 10)
    store.release(handle, LOCAL)
    memory.take("b", Cost(nbytes=500), 10)


def test_captures_that_are_on_the_disk_make_room_for_work(tmp_path: Path) -> None:
    store = open_store(tmp_path, 1000, 1 << 20)
    handles = [store.put("act", "x", LOCAL, {"a": np.full(100, i, np.float32)}, {}) for i in range(2)]
    assert store.bytes_in_memory == 800
    WorkingMemory(store, 1000).take("a", Cost(nbytes=500), 1)
    assert store.bytes_in_memory == 400
    assert [store.get(handle, LOCAL).tensors["a"][0] for handle in handles] == [0, 1]
    store.close()


READS: dict[str, tuple[str, dict[str, Any]]] = {
    "read_tensor": ("act", {}),
    "logit_lens": ("act", {"layers": [1]}),
    "compare": ("act", {"b": "abc"}),
    "project_through_unembed": ("act", {}),
    "forward_steer": ("act", {"prompt": "abc"}),
    "generate_with_hooks": ("kv", {"prompt": "a"}),
    "prefill_inject": ("kv", {"recipient": "abc"}),
}
ARGUMENT = {"read_tensor": "handle", "logit_lens": "tensor", "compare": "a", "generate_with_hooks": "cache"}


@pytest.mark.parametrize("tool", READS)
async def test_stored_tensors_that_have_to_be_read_count(tmp_path: Path, tool: str) -> None:
    """Nothing fits into the store's own memory, so that every use of a handle reads its file."""
    store = open_store(tmp_path, 0, 1 << 30)
    lab, entered = small_lab(1 << 30, store)
    kind, more = READS[tool]
    async with connected(build_server(lab)) as client:
        made = {
            "act": await ask(client, "capture_residuals", prompt=PROMPT, positions="all"),
            "kv": await ask(client, "prefill_inject", recipient=PROMPT, donor=OTHER, keep=True, max_new_tokens=1),
        }
        handle = made[kind]["handle"]
        vector = {"handle": handle, "layer": 1, "position": 3}
        given = {
            "project_through_unembed": {"vector": vector},
            "forward_steer": {"steers": [{"layer": 1, "vector": vector, "alpha": 1.0}]},
            "prefill_inject": {"donor": handle},
        }.get(tool, {ARGUMENT.get(tool, ""): handle})
        entered.count, size = 0, store.get(handle, LOCAL).nbytes
        lab.memory.budget = 2 * size - 1
        said = await refused(client, tool, **more, **given)
        assert re.match(r"this needs \S+ while it works, and \S+ of the \S+ for calls", said)
        assert entered.count == 0
        lab.memory.budget = 64 << 20
        await ask(client, tool, **more, **given)
    store.close()


async def test_a_resource_of_stored_tensors_is_read_within_the_budget(tmp_path: Path) -> None:
    store = open_store(tmp_path, 0, 1 << 30)
    lab, _ = small_lab(1 << 30, store)
    async with connected(build_server(lab)) as client:
        handle = (await ask(client, "capture_residuals", prompt=PROMPT, positions="all"))["handle"]
        uri = f"mechscope://tensors/{handle}"
        assert handle in (await client.read_resource(uri)).contents[0].text
        lab.memory.budget = 2 * store.get(handle, LOCAL).nbytes - 1
        with pytest.raises(MCPError, match="this needs"):
            await client.read_resource(uri)
    store.close()


@pytest.mark.parametrize("tool", ["logit_lens", "tokenize"])
async def test_a_text_is_refused_before_it_is_split(tool: str) -> None:
    lab, entered = small_lab(1 << 20)
    name = "text" if tool == "tokenize" else "prompt"
    async with connected(build_server(lab)) as client:
        said = await refused(client, tool, **{name: "x" * 5000})
        assert "this needs 2.4MiB while it works" in said
        assert "What would fit: 2048 characters" in said
        await ask(client, "tokenize", text="x" * 500)
    assert entered.count == 0


def test_what_fits_is_told_in_what_bytes_grow_with() -> None:
    patterns = Cost(nbytes=100).holding(900, layers=30, positions=2000)
    assert what_fits(patterns, 2000, 550) == "15 layers or 1000 positions"
    assert what_fits(patterns, 2000, 50) == "a prompt of 100 tokens"
    assert what_fits(patterns, 10, 0) == "nothing of this kind"


def test_the_runs_of_a_store_in_memory_count() -> None:
    store = MemoryStore(10_000)
    run = store.start_run(LOCAL, "logit_lens", {"prompt": "x" * 3000}, {})
    assert 7000 < store.bytes_in_memory < 8000
    with pytest.raises(OutOfSpace, match="nothing was kept"):
        store.start_run(LOCAL, "logit_lens", {"prompt": "x" * 3000}, {})
    store.save_run(replace(run, state="done", result={"rows": "x" * 20_000}))
    ended = store.run(run.handle, LOCAL)
    assert (ended.state, ended.result) == ("failed", None)
    assert "could not be kept" in (ended.error or "")
    assert store.bytes_in_memory == len(run_body(ended))
    store.release(run.handle, LOCAL)
    assert store.bytes_in_memory == 0


def test_runs_that_are_kept_are_not_written_out_again_at_each_look(monkeypatch: pytest.MonkeyPatch) -> None:
    store, sizes = MemoryStore(1 << 20), []
    runs = [store.start_run(LOCAL, "logit_lens", {"prompt": "x" * 100}, {}) for _ in range(20)]
    monkeypatch.setattr("server.store.run_body", lambda run: sizes.append(run.handle) or run_body(run))
    store.put("act", "x", LOCAL, {"a": np.zeros(10, np.float32)}, {})
    WorkingMemory(store).take("a", Cost(nbytes=5), 1)
    assert sizes == []
    store.save_run(replace(runs[3], state="done", result={"rows": "x" * 500}))
    assert sizes == [runs[3].handle]
    going = sum(len(run_body(run)) + RESERVED for run in runs if run is not runs[3])
    assert store.bytes_in_memory == 40 + going + len(run_body(store.run(runs[3].handle, LOCAL)))
