"""Arguments mean what their sender means: text is text, null leaves out, and errors speak of what was sent."""

from collections.abc import Iterator
from typing import Any

import pytest
from clients import ask, connected, refused
from mcp.server.mcpserver.tools import Tool
from pydantic import BaseModel

from schemas.arguments import HandleVector, Steer, Target
from schemas.interventions import Intervention
from server.app import build_server
from server.jobs import Jobs
from server.lab import Lab
from server.toolbox import instrument
from server.tools import TOOLS
from server.watch import Watch

pytestmark = pytest.mark.anyio

JSON = ("[1, 2, 3]", '{"a": 1}', "null", "true", "3", '"quoted"', "[]")
P = {"prompt": "hello"}


def tools() -> list[Tool]:
    lab = Lab()
    jobs = Jobs(lab.store, Watch(lab).gate, lambda *ended: None)
    return [instrument(lab, jobs, function) for function in TOOLS]


def texts(tool: Tool) -> Iterator[str]:
    """The arguments that take any text, as the published schema has them; it does not repeat the names of points."""
    for name, schema in tool.parameters["properties"].items():
        options = schema.get("anyOf", [schema])
        if any(option.get("type") == "string" and "enum" not in option for option in options) and name != "point":
            yield name


@pytest.mark.parametrize("tool", tools(), ids=lambda tool: tool.name)
async def test_no_text_that_looks_like_json_is_read_as_json(tool: Tool) -> None:
    for name in texts(tool):
        for text in JSON:
            assert tool.fn_metadata.pre_parse_json({name: text}) == {name: text}


async def test_most_tools_take_text() -> None:
    assert sum(bool(list(texts(tool))) for tool in tools()) > 15


@pytest.mark.parametrize("text", JSON)
async def test_a_prompt_that_looks_like_json_is_as_many_tokens_as_it_has_letters(lab: Lab, text: str) -> None:
    async with connected(build_server(lab)) as client:
        told = await ask(client, "tokenize", text=text)
        assert "".join(token["text"] for token in told["tokens"]) == text
        held = await ask(client, "capture_residuals", prompt=text)
        ids = [token["id"] for token in told["tokens"]]
        assert held["prompt_tokens"] == len(text)
        by_ids = await ask(client, "capture_residuals", prompt=ids)
        assert by_ids["norms"] == held["norms"]
        await ask(client, "compare", a=text, b="other", layers=[-1])
        assert "template" in await refused(client, "logit_lens", prompt=text, chat=True)


async def test_a_token_that_looks_like_json_is_named_by_its_text(lab: Lab) -> None:
    async with connected(build_server(lab)) as client:
        assert "'null' is 4 tokens" in await refused(client, "track_token", **P, token="null")
        assert "'[1]' is 3 tokens" in await refused(client, "embedding_neighbors", token="[1]")
        assert (await ask(client, "track_token", **P, token="3"))["token"] == {"id": 51, "text": "3"}


async def test_lists_and_objects_sent_as_text_are_read_where_no_text_is_taken(lab: Lab) -> None:
    async with connected(build_server(lab)) as client:
        plain = await ask(client, "logit_lens", **P, layers=[0, 2], positions=[1], k=1)
        sent = await ask(client, "logit_lens", **P, layers="[0, 2]", positions="[1]", k=1)
        assert sent["rows"] == plain["rows"]
        steers = '[{"layer": 1, "vector": {"random_seed": 1}, "alpha": "much"}]'
        assert "steers.0.alpha" in await refused(client, "forward_steer", **P, steers=steers)


@pytest.mark.parametrize("tool", tools(), ids=lambda tool: tool.name)
async def test_null_leaves_out_what_has_a_default(tool: Tool) -> None:
    required = set(tool.parameters.get("required", ()))
    given = dict.fromkeys(tool.parameters["properties"])
    assert tool.fn_metadata.pre_parse_json(given).keys() == required


def with_default(model: type[BaseModel]) -> Iterator[str]:
    return (name for name, field in model.model_fields.items() if not field.is_required())


@pytest.mark.parametrize(
    ("model", "least"),
    [
        (HandleVector, {"handle": "act:x"}),
        (Target, {"layer": 1}),
        (Intervention, {"kind": "zero", "layers": [1]}),
        (Steer, {"layer": 1, "vector": {"handle": "act:x", "position": None}, "alpha": 1.0}),
    ],
)
async def test_null_leaves_out_inside_arguments_too(model: type[BaseModel], least: dict[str, Any]) -> None:
    told = model.model_validate(dict.fromkeys(with_default(model)) | least)
    assert told == model.model_validate(least)


async def test_a_call_full_of_nulls_is_the_call_without_them(lab: Lab) -> None:
    nulls = dict.fromkeys(("chat", "k", "layers", "positions", "tensor", "model"))
    async with connected(build_server(lab)) as client:
        assert await ask(client, "logit_lens", **P, **nulls) == await ask(client, "logit_lens", **P)
        assert "prompt: Input should be" in await refused(client, "track_token", prompt=None, token="a")
        started = await ask(client, "start_job", tool="logit_lens", arguments=P | nulls, dry_run=None)
        assert (await ask(client, "get_job", run=started["run"], wait_seconds=20))["state"] == "done"


BRANCHES = {
    "an item of the wrong type": ({"layers": ["a"]}, "layers.0: Input should be a valid integer"),
    "a value of no type that fits": ({"layers": 1.5}, "layers: Input should be a valid list or a valid string"),
    "a word that is not one of the words": (
        {"positions": "first"},
        "positions: Input should be 'last' or 'all' or a valid list",
    ),
    "an object whose key is the name of a branch": (
        {"prompt": {"str": 1}},
        "prompt: Input should be a valid string or a valid list",
    ),
    "an empty list": ({"prompt": []}, "prompt: List should have at least 1 item after validation, not 0"),
}


@pytest.mark.parametrize("name", BRANCHES)
async def test_an_error_tells_the_branch_that_fits_and_no_branchs_name(lab: Lab, name: str) -> None:
    arguments, said = BRANCHES[name]
    async with connected(build_server(lab)) as client:
        assert await refused(client, "logit_lens", **P | arguments) == f"logit_lens was not run. {said}"


async def test_an_error_names_no_class(lab: Lab) -> None:
    async with connected(build_server(lab)) as client:
        assert (await refused(client, "forward_steer", **P, steers=["x"])).endswith(
            "steers.0: Input should be an object"
        )
