"""Every wrong call gets an error that says what is valid, and the server goes on serving."""

from typing import Any

import pytest
from clients import ask, connected, refused
from pydantic import ValidationError

import server.toolbox
from server.app import build_server
from server.lab import Lab
from server.tools import TOOLSETS

pytestmark = pytest.mark.anyio

P = {"prompt": "hello"}
STEER = {"layer": 1, "vector": {"random_seed": 1}, "alpha": 1.0}


def steers(**changes: object) -> dict:
    return P | {"steers": [STEER | changes]}


def change(kind, **fields):
    return P | {"interventions": [{"kind": kind, "layers": [1]} | fields]}


CASES = {
    "unknown model": ("load_model", {"model": "gpt-7"}, ["gpt-7", "smollm2-135m-instruct", "directory"]),
    "layers to keep dense in a dense model": (
        "load_model",
        {"model": "synthetic", "dense_layers": 2},
        ["dense_layers", 'weights="scoped"'],
    ),
    "no layer to keep dense": (
        "load_model",
        {"model": "synthetic", "weights": "scoped", "dense_layers": 0},
        ["dense_layers", "1"],
    ),
    "model not loaded": ("logit_lens", P | {"model": "other"}, ["other", "load_model"]),
    "layer out of range": ("logit_lens", P | {"layers": [4]}, ["layer 4", "0 to 3"]),
    "negative layer out of range": ("track_token", P | {"token": "a", "layers": [-5]}, ["-5", "0 to 3"]),
    "layers that say nothing": ("logit_lens", P | {"layers": "5:"}, ["5:", "start:stop:step"]),
    "no layers": ("forward_ablate", P | {"layers": []}, ["empty", "0 to 3"]),
    "position out of range": ("logit_lens", P | {"positions": [5]}, ["position 5", "0 to 4"]),
    "position of a track": ("track_race", P | {"position": -6}, ["-6", "5 tokens"]),
    "ablated position": ("forward_ablate", P | {"layers": [1], "positions": [7]}, ["[7]", "0 to 4"]),
    "patch position": (
        "patch_activations",
        {"donor": "hi", "recipient": "hello", "targets": [{"layer": 0, "position": 3}]},
        ["position 3", "2 tokens"],
    ),
    "patch without position": (
        "patch_activations",
        {"donor": "hi", "recipient": "hello", "targets": [{"layer": 0}]},
        ["donor_position"],
    ),
    "no such head": ("forward_ablate", P | {"layers": [1], "point": "z", "heads": [4]}, ["4", "0 to 3"]),
    "no such key-value head": ("forward_ablate", P | {"layers": [1], "point": "k", "heads": [2]}, ["2", "0 to 1"]),
    "heads where there are none": ("forward_ablate", P | {"layers": [1], "heads": [0]}, ["resid_post", "no heads"]),
    "intervention that never fires": (
        "forward_ablate",
        P | {"layers": [1], "positions": "generated"},
        ["never fires", "0 to 4"],
    ),
    "unknown point": ("capture_residuals", P | {"points": ["resid"]}, ["points.0", "resid_post"]),
    "mean without prompts": ("forward_ablate", P | {"layers": [1], "mode": "mean"}, ["mean_over"]),
    "NaN in a vector": ("forward_steer", steers(vector={"values": [float("nan")] * 64}), ["values.0", "number"]),
    "vector of the wrong length": ("forward_steer", steers(vector={"values": [1.0] * 63}), ["63", "64"]),
    "infinite alpha": ("forward_steer", steers(alpha=float("inf")), ["alpha", "number"]),
    "alpha beyond float32": ("forward_steer", steers(alpha=1e300), ["steer", "1e+300", "1e+15"]),
    "vector beyond float32": ("forward_steer", steers(vector={"values": [3e38] * 64}), ["3e+38", "1e+15"]),
    "vector to look at beyond float32": (
        "embedding_neighbors",
        {"vector": {"values": [1e300] * 64}},
        ["1e+300", "1e+15"],
    ),
    "steers that add up beyond float32": (
        "forward_steer",
        P | {"steers": [STEER | {"vector": {"values": [9e14] * 64}, "alpha": 2}]},
        ["steer", "resid_post, layer 1", "1e+15"],
    ),
    "vector of a stale handle": ("forward_steer", steers(vector={"handle": "act:gone-00"}), ["no such handle"]),
    "vector of no kind": ("forward_steer", steers(vector={"color": 1}), ["vector"]),
    "unknown field in a vector": ("forward_steer", steers(vector={"random_seed": 1, "x": 2}), ["vector.x"]),
    "vector of no form": ("embedding_neighbors", {"vector": {}}, ["a vector is {handle", "random_seed"]),
    "vector that is text": ("embedding_neighbors", {"vector": "act:gone-00"}, ["a vector is {handle"]),
    "token's vector of no space": (
        "forward_steer",
        steers(vector={"minus": [{"token": "a"}, {"random_seed": 1}]}),
        ["was not run. steers.0.vector.minus.0.space: Field required"],
    ),
    "difference of differences": (
        "embedding_neighbors",
        {"vector": {"minus": [{"minus": []}, {"random_seed": 1}]}},
        ["vector.minus.0", "a vector is"],
    ),
    "handle for a prompt": ("logit_lens", {"prompt": f"act:hello-{'0' * 32}"}, ["is a handle", "give a prompt"]),
    "handle for a scan's donor": (
        "kv_inject_test",
        {"recipient": "hello", "donor": f"kv:hello-{'0' * 32}", "target": "d"},
        ["is a handle", "give a prompt"],
    ),
    "prompts that nothing is taken from": (
        "forward_ablate",
        P | {"layers": [1], "mode": "zero", "mean_over": ["other"]},
        ["mode zero takes no mean_over"],
    ),
    "a match of nothing": ("forward_ablate", P | {"layers": [1], "match": "pooled"}, ["mode zero takes no match"]),
    "the first row of prompts of other lengths": (
        "forward_ablate",
        P | {"layers": [1], "mode": "mean", "mean_over": ["other one"], "positions": [0]},
        ["position 0 stays as it is", "give prompts of 5 tokens, or match pooled"],
    ),
    "target with a position too many": (
        "patch_activations",
        {
            "donor": "hello",
            "recipient": "world",
            "targets": [{"layer": 1, "position": 2, "donor_position": 1, "recipient_position": 3}],
        },
        ["{layer, position}, or {layer, donor_position, recipient_position}"],
    ),
    "unknown field in a steer": ("forward_steer", steers(norm=True), ["steers.0.norm", "unknown"]),
    "text for a number": ("forward_steer", steers(layer="1"), ["steers.0.layer", "integer"]),
    "true for a number": ("forward_steer", steers(layer=True), ["steers.0.layer", "integer"]),
    "true for a layer": ("logit_lens", P | {"layers": [True]}, ["layers.0", "integer"]),
    "fraction for a number": ("logit_lens", P | {"k": 2.5}, ["k", "integer"]),
    "no steers": ("forward_steer", P | {"steers": []}, ["steers"]),
    "empty prompt": ("logit_lens", {"prompt": ""}, ["prompt", "1"]),
    "empty list of ids": ("logit_lens", {"prompt": []}, ["prompt", "1"]),
    "id outside the vocabulary": ("logit_lens", {"prompt": [257]}, ["257", "0 to 256"]),
    "prompt beyond the context": ("logit_lens", {"prompt": "x" * 513}, ["513", "512"]),
    "text that is not Unicode": ("tokenize", {"text": "\ud800"}, ["unicode"]),
    "token of several pieces": ("track_token", P | {"token": "ab"}, ["2 tokens", "'a' (97)", "'b' (98)"]),
    "token outside the vocabulary": ("track_token", P | {"token": 999}, ["999", "0 to 256"]),
    "one runner": ("track_race", P | {"tokens": ["a"]}, ["tokens"]),
    "the same runner twice": ("track_race", P | {"tokens": ["a", 97]}, ["two different"]),
    "against without token": ("forward_ablate", P | {"layers": [1], "against": "a"}, ["token"]),
    "neither prompt nor tensor": ("logit_lens", {}, ["prompt", "tensor"]),
    "both token and vector": (
        "embedding_neighbors",
        {"token": "a", "vector": {"random_seed": 1}},
        ["token", "vector", "exactly one"],
    ),
    "direction of zero": ("embedding_neighbors", {"vector": {"values": [0.0] * 64}}, ["zero"]),
    "handle of any length": ("read_tensor", {"handle": "x" * 9000}, ["no such handle"]),
    "model of any length": ("logit_lens", P | {"model": "x" * 9000}, ["no model"]),
    "an id in quotes": ("track_token", P | {"token": "105"}, ["3 tokens", "an id is a number without quotes"]),
    "layers of more digits than Python reads": ("logit_lens", P | {"layers": "0-" + "9" * 5000}, ["start:stop:step"]),
    "layers of any length": ("logit_lens", P | {"layers": "x" * 9000}, ["start:stop:step"]),
    "token of any length": ("track_token", P | {"token": "x" * 9000}, ["9000 tokens"]),
    "positions of any number": ("forward_ablate", P | {"layers": [1], "positions": [9] * 9000}, ["0 to 4"]),
    "pieces of any length": ("compare", {"a": "hello", "b": "act:" + "x" * 9000}, ["no such handle"]),
    "stale handle": ("read_tensor", {"handle": "act:gone-00"}, ["act:gone-00", "list_session"]),
    "stale handle to release": ("release", {"handle": "kv:gone-00"}, ["no such handle"]),
    "stale cache": ("generate_with_hooks", P | {"cache": "kv:gone-00"}, ["no such handle"]),
    "unknown argument": ("tokenize", {"text": "a", "extra": 1}, ["extra", "unknown argument", "text"]),
    "an argument of another tool": ("list_session", {"x": 1}, ["x: unknown argument", "valid: start"]),
    "a name that would redraw the screen": (
        "tokenize",
        {"text": "a", "\x1b[31m": 1},
        ["'\\x1b[31m': unknown argument"],
    ),
    "a name without an end": ("tokenize", {"text": "a", "x" * 5000: 1}, ["xxx", "unknown argument"]),
    "missing argument": ("tokenize", {}, ["text", "required"]),
    "too much at once": ("logit_lens", {"prompt": "x" * 300, "positions": "all"}, ["fewer"]),
    "one-token prompt for surgery": (
        "prefill_inject",
        {"recipient": "a", "donor": "hello"},
        ["one-token", "two tokens"],
    ),
    "span outside the donor": (
        "prefill_inject",
        {"recipient": "hello", "donor": "world", "source": [2, 9]},
        ["[2, 9)", "4"],
    ),
    "destination outside the recipient": (
        "prefill_inject",
        {"recipient": "hello", "donor": "world", "source": [0, 3], "dest": 2},
        ["[2, 5)", "4"],
    ),
    "destination beyond the end": ("prefill_inject", {"recipient": "hello", "donor": "world", "dest": 9}, ["4"]),
    "backwards span": ("prefill_inject", {"recipient": "hello", "donor": "world", "source": [3, 1]}, ["[3, 1)"]),
    "no such key-value head to move": (
        "prefill_inject",
        {"recipient": "hello", "donor": "world", "heads": [2]},
        ["2", "0 to 1"],
    ),
    "prompts of different lengths": (
        "causal_trace",
        {"clean": "abc", "corrupt": "ab", "token": "a"},
        ["3", "2", "same"],
    ),
    "metric without its token": ("causal_trace", {"clean": "ab", "corrupt": "cd"}, ["logit needs token"]),
    "metric with a token too many": (
        "causal_trace",
        {"clean": "ab", "corrupt": "cd", "metric": "kl", "token": "a"},
        ["kl takes no token"],
    ),
    "unknown metric": ("causal_trace", {"clean": "ab", "corrupt": "cd", "metric": "beauty"}, ["metric", "probability"]),
    "grid by head where there are none": (
        "causal_trace",
        {"clean": "ab", "corrupt": "cd", "token": "a", "by": "head"},
        ["resid_post has no heads"],
    ),
    "no such head to look at": ("attention_pattern", P | {"layers": [0], "heads": [9]}, ["head 9", "0 to 3"]),
    "models without a prompt": ("compare", {"a": "model:synthetic", "b": "model:synthetic"}, ["no model"]),
    "prompts with a prompt": ("compare", {"a": "ab", "b": "cd", "prompt": "ef"}, ["model: handles"]),
    "stale capture to compare": ("compare", {"a": "ab", "b": "act:gone-00"}, ["no such handle"]),
    "nothing to change": ("forward_ablate", P, ["nothing would be changed"]),
    "unknown kind": ("forward_ablate", change("erase"), ["interventions.0.kind", "zero"]),
    "scale without a factor": ("forward_ablate", change("scale"), ["interventions.0", "scale needs value"]),
    "zero with a factor": ("forward_ablate", change("zero", value=1.0), ["zero takes no value"]),
    "patch with positions and pairs": (
        "forward_ablate",
        change("patch", donor="ab", positions=[1], pairs=[[1, 1]]),
        ["pairs or positions, not both", "[[3, 3]]"],
    ),
    "patch at generated positions": (
        "forward_ablate",
        change("patch", donor="ab", positions="generated"),
        ["[[3, 3]]"],
    ),
    "patch from another length": ("forward_ablate", change("patch", donor="ab"), ["2 tokens", "5", "pairs"]),
    "knock-out elsewhere": ("forward_ablate", change("knockout", keys=[0], point="z"), ["attn_pattern"]),
    "knock-out of no key": ("forward_ablate", change("knockout", keys=[]), ["interventions.0.keys"]),
    "neurons of the residual": ("forward_ablate", change("zero", neurons=[1]), ["no neurons", "mlp_act"]),
    "unknown field in an intervention": ("forward_ablate", change("zero", when="now"), ["interventions.0.when"]),
    "vector narrower than the point": (
        "forward_ablate",
        change("steer", value=1.0, vector={"values": [1.0] * 64}, point="z"),
        ["64 features", "16"],
    ),
    "stale job": ("get_job", {"run": "run:gone-00"}, ["run:gone-00", "list_session"]),
    "stale job to cancel": ("cancel_job", {"run": "run:gone-00"}, ["no such handle"]),
    "no job's handle": ("get_job", {"run": "act:gone-00"}, ["no such handle"]),
    "too long a wait": ("get_job", {"run": "run:gone-00", "wait_seconds": 21}, ["wait_seconds", "20"]),
    "job of no tool": ("start_job", {"tool": "dream", "arguments": {}}, ["'dream'", "causal_trace"]),
    "job of a tool with an endless name": ("start_job", {"tool": "x" * 10_000, "arguments": {}}, ["causal_trace"]),
    "job without arguments": ("start_job", {"tool": "logit_lens"}, ["arguments", "required"]),
    "job with a wrong argument": (
        "start_job",
        {"tool": "forward_steer", "arguments": steers(layer=True)},
        ["forward_steer was not run", "steers.0.layer", "integer"],
    ),
    "too many new tokens": ("generate_with_hooks", P | {"max_new_tokens": 501}, ["max_new_tokens", "500"]),
}


@pytest.mark.parametrize("name", CASES)
async def test_a_wrong_call_says_what_is_valid_and_loses_nothing(lab: Lab, name: str) -> None:
    tool, arguments, expected = CASES[name]
    async with connected(build_server(lab)) as client:
        held = await ask(client, "capture_residuals", prompt="hello")
        before = await ask(client, "list_session")
        text = await refused(client, tool, **arguments)
        after = await ask(client, "list_session")
        assert (await ask(client, "read_tensor", handle=held["handle"]))["shape"] == [1, 64]
    assert [word for word in expected if word not in text] == [], text
    assert len(text) < 1000
    assert after == before


HUGE = {
    "a prompt": ("logit_lens", {"prompt": ["a"] * 300_000}, "prompt.0: Input should be a valid integer"),
    "layers": ("logit_lens", P | {"layers": ["a"] * 300_000}, "layers.0: Input should be a valid integer"),
    "a vector": (
        "forward_steer",
        steers(vector={"values": ["a"] * 300_000}),
        "values.0: Input should be a valid number",
    ),
    "an object": ("list_session", {str(i): i for i in range(100_000)}, "arguments: more than 100 fields"),
    "an object inside": (
        "forward_steer",
        steers(**{str(i): i for i in range(100_000)}),
        "steers.0: more than 100 fields",
    ),
}


@pytest.mark.parametrize("name", HUGE)
async def test_a_million_mistakes_are_refused_at_the_first(
    lab: Lab, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool, arguments, expected = HUGE[name]
    found, explain = [0], server.toolbox.explain

    def counted(tool: str, error: ValidationError, *more: Any) -> str:
        found.append(error.error_count())
        return explain(tool, error, *more)

    monkeypatch.setattr(server.toolbox, "explain", counted)
    async with connected(build_server(lab)) as client:
        assert expected in await refused(client, tool, **arguments)
    assert sum(found) <= BRANCHES


BRANCHES = 10
"""Complaints about one place, at most: one of each branch of a union."""


@pytest.mark.parametrize("temperature", [5e-324, 1e-39, 1e-7])
async def test_so_cold_a_temperature_that_logits_overflow_is_greedy(lab: Lab, temperature: float) -> None:
    async with connected(build_server(lab)) as client:
        greedy = await ask(client, "generate_with_hooks", **P, max_new_tokens=5)
        cold = await ask(client, "generate_with_hooks", **P, max_new_tokens=5, temperature=temperature)
    assert cold["baseline"]["ids"] == greedy["baseline"]["ids"]


@pytest.mark.parametrize("toolset", TOOLSETS)
async def test_an_unknown_tool_gets_the_list_of_those_there_are_and_the_server_goes_on(lab: Lab, toolset: str) -> None:
    async with connected(build_server(lab, toolset)) as client:
        text = await refused(client, "no_such_tool")
        listed = {tool.name for tool in (await client.list_tools()).tools}
        assert "'no_such_tool'" in text
        assert set(text.partition("there are ")[2].split(", ")) == listed
        assert len(await refused(client, "x" * 10_000)) < 1000
        await ask(client, "list_session")


async def test_with_no_model_loaded_every_tool_says_to_load_one() -> None:
    async with connected(build_server(Lab())) as client:
        assert "load_model" in await refused(client, "logit_lens", prompt="hello")


async def test_with_two_models_loaded_a_call_must_name_one(lab: Lab) -> None:
    lab.load("synthetic", "scoped")
    async with connected(build_server(lab)) as client:
        text = await refused(client, "logit_lens", prompt="hello")
        handles = [held["handle"] for held in (await ask(client, "list_session"))["models"]]
        assert all(handle in text for handle in handles)
        assert (await ask(client, "logit_lens", prompt="hello", model=handles[1]))["model"] == handles[1]


async def test_a_defect_reaches_the_agent_as_a_defect_and_not_as_a_result(lab: Lab, monkeypatch) -> None:
    def broken(*asked: object) -> None:
        raise ZeroDivisionError("secret detail")

    async with connected(build_server(lab)) as client:
        monkeypatch.setattr(lab, "model", broken)
        result = await client.call_tool("logit_lens", {"prompt": "hello"})
        monkeypatch.undo()
        assert result.is_error
        assert "ZeroDivisionError" in result.content[0].text
        assert "secret detail" not in result.content[0].text
        await ask(client, "logit_lens", prompt="hello")
