"""`start_job(dry_run=true)`: what a call would take, told before any of it and equal to what it then takes."""

from typing import Any

import pytest
from clients import ask, connected, refused
from slow_model import Entered

from server.app import build_server
from server.lab import Lab

pytestmark = pytest.mark.anyio

OTHERS = [[1, 2, 3], "other text"]
PATCH = {"kind": "patch", "layers": [2, 3], "donor": "jelly"}
MEAN = {"kind": "mean", "layers": [1], "point": "attn_out", "over": OTHERS}
STEER = {"layer": 1, "vector": {"random_seed": 1}, "alpha": 2.0}

CALLS: list[tuple[str, dict[str, Any]]] = [
    ("capture_residuals", {"prompt": "hello", "points": ["resid_post", "z"], "positions": "all"}),
    ("logit_lens", {"prompt": "hello", "layers": [1]}),
    ("track_token", {"prompt": "hello", "token": "c"}),
    ("track_race", {"prompt": "hello"}),
    ("attention_pattern", {"prompt": "hello", "layers": [0, 2]}),
    ("forward_ablate", {"prompt": "hello", "layers": [1], "interventions": [PATCH, MEAN]}),
    ("forward_ablate", {"prompt": "hello", "layers": [1], "point": "mlp_out", "mode": "mean", "mean_over": OTHERS}),
    ("forward_steer", {"prompt": "hello", "steers": [STEER], "interventions": [PATCH]}),
    ("patch_activations", {"donor": "jelly", "recipient": "hello", "targets": [{"layer": 2, "position": 1}]}),
    ("causal_trace", {"clean": "hello", "corrupt": "hallo", "token": "c", "point": "z", "by": "head"}),
    ("generate_with_hooks", {"prompt": "hello", "max_new_tokens": 6, "steers": [STEER], "interventions": [MEAN]}),
    ("prefill_inject", {"recipient": "hello", "donor": "world!", "max_new_tokens": 5}),
    ("kv_inject_test", {"recipient": "hello", "donor": "world!", "target": "d", "layers": [0, 2]}),
    ("compare", {"a": "hello", "b": "jelly beans", "layers": [0, 2]}),
]


@pytest.mark.parametrize(("tool", "arguments"), CALLS, ids=[f"{tool}-{i}" for i, (tool, _) in enumerate(CALLS)])
async def test_the_progress_of_every_tool_ends_at_the_total_it_said_at_first(
    lab: Lab, slow: Entered, tool: str, arguments: dict
) -> None:
    seen: list[tuple[float, float | None]] = []

    async def told(done: float, total: float | None, what: str | None) -> None:
        seen.append((done, total))

    async with connected(build_server(lab)) as client:
        result = await client.call_tool(tool, arguments, progress_callback=told)
    assert not result.is_error, result.content[0].text
    assert {total for _, total in seen} == {slow.count}
    assert seen[-1][0] == slow.count


@pytest.mark.parametrize(("tool", "arguments"), CALLS, ids=[f"{tool}-{i}" for i, (tool, _) in enumerate(CALLS)])
async def test_a_dry_run_says_what_a_call_takes_and_keeps_nothing(lab: Lab, tool: str, arguments: dict) -> None:
    async with connected(build_server(lab)) as client:
        answer = await ask(client, "start_job", tool=tool, arguments=arguments, dry_run=True)
        session = await ask(client, "list_session")
    assert session["handles"] == []
    assert answer.keys() == {"estimate"}
    estimate = answer["estimate"]
    assert estimate["forwards"] >= 0.4
    assert 0 < estimate["seconds"] < 5
    assert estimate["bytes"] > 0


async def test_a_dry_run_counts_passes_of_the_prompt_and_decoded_tokens(lab: Lab) -> None:
    async with connected(build_server(lab)) as client:
        estimates = [
            (await ask(client, "start_job", tool=tool, arguments=arguments, dry_run=True))["estimate"]["forwards"]
            for tool, arguments in [
                ("logit_lens", {"prompt": "hello"}),
                ("generate_with_hooks", {"prompt": "hello", "max_new_tokens": 6, "steers": [STEER]}),
                ("embedding_neighbors", {"token": "c"}),
            ]
        ]
    assert estimates == [1, 12, 0]


async def test_a_dry_run_checks_the_arguments_as_the_tool_does(lab: Lab) -> None:
    bad = {"clean": "hello", "corrupt": "hi", "token": "c"}
    async with connected(build_server(lab)) as client:
        text = await refused(client, "start_job", tool="causal_trace", arguments=bad, dry_run=True)
        assert text == await refused(client, "causal_trace", **bad)
        assert "without loading" in await refused(client, "start_job", tool="load_model", arguments={}, dry_run=True)
