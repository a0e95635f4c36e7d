"""What cannot be done is refused before the first layer is entered: places that do not exist, and rows given twice."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import tiny_files
from clients import ask, connected, refused
from mcp import Client
from slow_model import Entered

from server.app import build_server
from server.lab import Lab

pytestmark = pytest.mark.anyio
PROMPT, DONOR = "abcabcabcab", "abdabdabdab"


@pytest.fixture
def entered(lab: Lab) -> Entered:
    made = Entered(lab.models[0].model)
    lab.models[0].model = made.model
    return made


@pytest.fixture
async def client(lab: Lab, entered: Entered) -> AsyncIterator[Client]:
    async with connected(build_server(lab)) as client:
        yield client


def item(kind: str, **more: Any) -> dict[str, Any]:
    """An intervention at layer 1; a patch and a mean take rows of other runs."""
    needs = {
        "patch": {"donor": DONOR},
        "mean": {"over": [DONOR]},
        "steer": {"vector": {"random_seed": 1}, "value": 2.0},
    }
    return {"kind": kind, "layers": [1]} | needs.get(kind, {}) | more


ITSELF: dict[str, dict[str, Any]] = {
    "forward_ablate": {"prompt": PROMPT, "layers": [0]},
    "forward_steer": {"prompt": PROMPT, "interventions": [{"kind": "zero", "layers": [1]}]},
    "patch_activations": {"donor": DONOR, "recipient": PROMPT, "targets": [{"layer": 2, "position": 3}]},
    "causal_trace": {"clean": DONOR, "corrupt": PROMPT},
}


@pytest.mark.parametrize("tool", ITSELF)
async def test_a_token_against_itself(client: Client, entered: Entered, tool: str) -> None:
    said = await refused(client, tool, **ITSELF[tool], token="c", against=ord("c"))
    assert "token and against are one token, 99" in said
    assert entered.count == 0


IDLE: dict[str, tuple[str, dict[str, Any], str]] = {
    "match": ("forward_ablate", {"match": "pooled"}, "say which layers"),
    "positions": ("forward_steer", {"positions": [2]}, "positions are those of steers"),
}


@pytest.mark.parametrize("case", IDLE)
async def test_arguments_of_a_change_that_is_not_asked_for(client: Client, entered: Entered, case: str) -> None:
    tool, given, told = IDLE[case]
    said = await refused(client, tool, prompt=PROMPT, **given, interventions=[item("zero")])
    assert told in said
    assert entered.count == 0


NOWHERE = {
    "layer": (item("patch", layers=[9]), "layer 9 does not exist"),
    "layer of a pair": (item("mean", layers=None, point="z", heads=[[7, 0]]), "layer 7 does not exist"),
    "head": (item("mean", point="z", heads=[4]), "head 4 does not exist"),
    "heads where there are none": (item("mean", point="mlp_out", heads=[1]), "mlp_out has no heads"),
    "position": (item("mean", positions=[40]), "this run computes positions 0 to 10"),
    "position of a donor": (item("patch", pairs=[[11, 2]]), "position 11 does not exist in a prompt of 11"),
    "position of a patch": (item("patch", pairs=[[2, 11]]), "position 11 does not exist in a prompt of 11"),
    "no row": (item("mean", positions="generated"), "never fires"),
    "neuron": (item("mean", point="mlp_act", neurons=[100_000]), "neuron 100000 does not exist"),
    "point of a patch": (item("patch", point="attn_pattern"), "does not act at attn_pattern"),
    "layer of a point that exists once": (item("patch", point="embed"), "embed exists once, at layer 0"),
    "width": (item("steer", vector={"values": [1.0, 2.0]}), "must have 64"),
}
OWN: dict[str, dict[str, Any]] = {
    "forward_ablate": {"prompt": PROMPT, "layers": [0], "mode": "mean", "mean_over": [DONOR]},
    "forward_steer": {"prompt": PROMPT},
    "patch_activations": {"donor": DONOR, "recipient": PROMPT, "targets": [{"layer": 2, "position": 3}]},
    "generate_with_hooks": {"prompt": PROMPT, "max_new_tokens": 1},
}


@pytest.mark.parametrize("case", NOWHERE)
@pytest.mark.parametrize("tool", OWN)
async def test_interventions_that_cannot_act(client: Client, entered: Entered, tool: str, case: str) -> None:
    given, told = NOWHERE[case]
    wrong = {key: value for key, value in given.items() if value is not None}
    said = await refused(client, tool, **OWN[tool], interventions=[item("patch", layers=[3]), wrong])
    assert told in said
    assert entered.count == 0


TWICE = {
    "two patches": ([item("patch", positions=[4]), item("patch", pairs=[[2, 4]])], "patch (positions [4])"),
    "two means": ([item("mean", positions=[4]), item("mean")], "mean (positions [4])"),
    "steering, then nothing": ([item("steer", positions=[4]), item("scale", value=0)], "steer (positions [4])"),
    "an ablation, then a patch": (
        [item("zero", positions=[4]), item("patch", positions=[3, 4])],
        "zero (positions [4])",
    ),
    "a patch, then an ablation": ([item("patch", positions=[4]), item("zero")], "patch (positions [4])"),
    "steering, then a patch": ([item("steer", positions=[4]), item("patch", positions=[4])], "steer (positions [4])"),
    "a head, then all": (
        [item("zero", point="z", heads=[2], positions=[4]), item("mean", point="z")],
        "zero (positions [4], heads [2])",
    ),
    "one direction twice": (
        [item("steer", positions=[4]), item("project_out", vector={"random_seed": 1})],
        "steer (positions [4])",
    ),
}


@pytest.mark.parametrize("case", TWICE)
@pytest.mark.parametrize("tool", OWN)
async def test_an_intervention_that_leaves_nothing_of_another(
    client: Client, entered: Entered, tool: str, case: str
) -> None:
    given, erased = TWICE[case]
    said = await refused(client, tool, **OWN[tool], interventions=given)
    place = f"at {given[0].get('point', 'resid_post')}, layer 1"
    assert f"would leave nothing of {erased} {place}" in said or f"and {erased} both set position 4 {place}" in said
    assert entered.count == 0


async def test_the_tools_own_change_counts_too(client: Client, entered: Entered) -> None:
    own = {"forward_ablate": "mean (positions all)", "generate_with_hooks": "zero (positions all)"}
    more = {"generate_with_hooks": {"ablate_layers": [2]}}
    for tool, kind in own.items():
        again = item("zero", layers=[0 if tool == "forward_ablate" else 2])
        said = await refused(client, tool, **OWN[tool] | more.get(tool, {}), interventions=[again])
        assert f"zero (positions all) would leave nothing of {kind}" in said
    said = await refused(
        client,
        "patch_activations",
        **OWN["patch_activations"],
        interventions=[item("patch", layers=[2], positions=[3])],
    )
    assert "both set position 3" in said
    assert entered.count == 0


APART = {
    "other heads": [item("zero", point="z", heads=[2]), item("mean", point="z", heads=[1, 3])],
    "other rows": [item("patch", positions=[3]), item("zero", positions=[4])],
    "all rows, then one": [item("mean"), item("patch", positions=[4])],
    "other points": [item("zero", point="mlp_out"), item("patch", positions=[4])],
    "replaced, then changed": [item("patch", positions=[4]), item("steer", positions=[4]), item("scale", value=0.5)],
    "two directions": [item("steer", positions=[4]), item("project_out", vector={"random_seed": 2})],
    "keys one by one": [item("knockout", keys=[0]), item("knockout", keys=[1])],
}


@pytest.mark.parametrize("case", APART)
async def test_interventions_that_leave_each_other_their_due_go_together(client: Client, case: str) -> None:
    answer = await ask(client, "forward_ablate", prompt=PROMPT, interventions=APART[case])
    assert all(row["fired"] > 0 for row in answer["applied"])
    assert len(answer["applied"]) == len(APART[case])


async def test_runs_that_cannot_be_compared(lab: Lab, client: Client, entered: Entered, tmp_path: Path) -> None:
    other = lab.load(str(tiny_files.hf_directory(tmp_path / "tiny")), "dense").handle
    mine = lab.models[0].handle
    held = await ask(client, "capture_residuals", model=mine, prompt=PROMPT, layers=[0], positions=[4])
    above = await ask(client, "capture_residuals", model=mine, prompt=PROMPT, layers=[2], positions=[4])
    entered.count = 0

    async def told(**arguments: Any) -> str:
        return await refused(client, "compare", **{"model": mine} | arguments)

    assert "different vocabularies" in await told(a=mine, b=other, prompt="the")
    assert "layer 2" in await told(a=PROMPT, b=held["handle"], layers=[2], position=4)
    assert "no layer is in both" in await told(a=above["handle"], b=held["handle"], position=4)
    assert "position 3 not in act:" in await told(a=PROMPT, b=held["handle"], layers=[0], position=3)
    assert "prompt is for comparing two models" in await told(a=PROMPT, b=DONOR, prompt="the")
    assert "give the prompt" in await told(a=PROMPT, b=mine)
    assert entered.count == 0


async def test_transplants_that_do_not_lie_in_the_caches(client: Client, entered: Entered) -> None:
    wrong = {
        "source": ({"source": [3, 20]}, "[3, 20)"),
        "no row": ({"source": [3, 3]}, "[3, 3)"),
        "dest": ({"source": [0, 5], "dest": 8}, "[8, 13)"),
        "dest alone": ({"dest": 12}, "dest 12"),
        "heads": ({"heads": [2]}, "head 2 does not exist"),
        "layer": ({"layers": [4]}, "layer 4 does not exist"),
        "token": ({"token": "two tokens"}, "is 10 tokens"),
    }
    for given, told in wrong.values():
        assert told in await refused(client, "prefill_inject", recipient=PROMPT, donor=DONOR, **given)
        assert entered.count == 0
    assert "one-token prompt" in await refused(client, "prefill_inject", recipient=PROMPT, donor="a")
    assert entered.count == 0


async def test_tokens_that_are_none(client: Client, entered: Entered) -> None:
    for tool, own in OWN.items():
        if tool != "generate_with_hooks":
            more = {"interventions": [item("patch")]} if tool == "forward_steer" else {}
            for token in ({"token": "two tokens"}, {"against": "a"}):
                await refused(client, tool, **own, **more, **token)
    trace = {"clean": DONOR, "corrupt": PROMPT}
    for given in (
        {"token": "two tokens"},
        {},
        {"token": "a", "layers": [4]},
        {"token": "a", "positions": [11]},
        {"token": "a", "by": "head"},
        {"token": "a", "point": "attn_pattern"},
        {"token": "a", "corrupt": "abc"},
    ):
        await refused(client, "causal_trace", **trace | given)
    await refused(client, "kv_inject_test", recipient=PROMPT, donor="a", target="a")
    assert entered.count == 0
