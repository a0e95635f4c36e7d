"""What clients rely on: the list of tools, their schemas, and the names the design fixes."""

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from clients import ERAS, connected

from server.app import INSTRUCTIONS, build_server
from server.tools import TOOLS

SNAPSHOT = Path(__file__).parent / "tools_list.json"

ARGUMENTS = {
    "load_model": {"model", "weights", "dense_layers"},
    "list_session": set(),
    "release": {"handle"},
    "tokenize": {"text"},
    "capture_residuals": {"prompt", "layers", "points", "positions"},
    "logit_lens": {"prompt", "tensor", "layers", "positions", "k"},
    "track_token": {"prompt", "token", "layers", "position"},
    "track_race": {"prompt", "tokens", "layers", "position"},
    "attention_pattern": {"prompt", "layers", "heads", "positions"},
    "forward_ablate": {"interventions", "prompt", "layers", "point", "positions", "heads", "mode"},
    "forward_steer": {"prompt", "steers", "interventions"},
    "patch_activations": {"donor", "recipient", "targets", "point", "interventions"},
    "causal_trace": {"clean", "corrupt", "token", "against", "point", "metric"},
    "compare": {"a", "b"},
    "generate_with_hooks": {"prompt", "max_new_tokens", "ablate_layers", "steers", "interventions", "cache"},
    "prefill_inject": {"recipient", "donor", "layers", "source", "dest", "what", "rope", "max_new_tokens"},
    "kv_inject_test": {"recipient", "donor", "target", "layers"},
    "embedding_neighbors": {"token", "vector", "k"},
    "project_through_unembed": {"token", "vector", "k"},
    "read_tensor": {"handle", "start", "count"},
    "start_job": {"tool", "arguments"},
    "get_job": {"run", "wait_seconds"},
    "cancel_job": {"run"},
}


async def listed(mode: str) -> list[dict]:
    async with connected(build_server(), mode) as client:
        tools = (await client.list_tools()).tools
    return [tool.model_dump(mode="json", by_alias=True, exclude_none=True) for tool in tools]


@pytest.mark.anyio
@pytest.mark.parametrize("mode", ERAS)
async def test_the_tools_are_those_of_the_snapshot_in_both_eras(mode: str) -> None:
    assert await listed(mode) == json.loads(SNAPSHOT.read_text()), "a deliberate change? run `make snapshot`"


@pytest.mark.anyio
async def test_every_tool_has_the_argument_names_the_design_fixes() -> None:
    tools = {tool["name"]: set(tool["inputSchema"]["properties"]) for tool in await listed("auto")}
    assert tools.keys() == ARGUMENTS.keys()
    assert {name: ARGUMENTS[name] - found for name, found in tools.items() if not ARGUMENTS[name] <= found} == {}


@pytest.mark.anyio
async def test_every_schema_is_valid_and_arguments_are_closed() -> None:
    for tool in await listed("auto"):
        for schema in (tool["inputSchema"], tool["outputSchema"]):
            jsonschema.Draft202012Validator.check_schema(schema)
            assert tool["inputSchema"]["additionalProperties"] is False, tool["name"]


def objects(schema: Any) -> Iterator[dict]:
    """Every object that is described field by field, at any depth."""
    if isinstance(schema, list):
        for item in schema:
            yield from objects(item)
    elif isinstance(schema, dict):
        if "properties" in schema and schema.get("type") == "object":
            yield schema
        for value in schema.values():
            yield from objects(value)


@pytest.mark.anyio
async def test_arguments_are_closed_at_every_depth() -> None:
    described = [(tool["name"], part) for tool in await listed("auto") for part in objects(tool["inputSchema"])]
    assert len(described) > len(TOOLS)
    assert [(name, part) for name, part in described if part.get("additionalProperties") is not False] == []


@pytest.mark.anyio
@pytest.mark.parametrize("mode", ERAS)
async def test_the_whole_list_fits_in_ten_thousand_tokens(mode: str) -> None:
    whole = json.dumps(await listed(mode), separators=(",", ":"), ensure_ascii=False)
    assert len(whole.encode()) < 40_000


@pytest.mark.anyio
async def test_annotations_say_what_a_tool_changes() -> None:
    hints = {tool["name"]: tool["annotations"] for tool in await listed("auto")}
    assert {name for name, hint in hints.items() if hint.get("destructiveHint")} == {"release", "cancel_job"}
    making = {"capture_residuals", "causal_trace", "prefill_inject", "start_job"}
    assert {name for name, hint in hints.items() if hint.get("idempotentHint") is False} == making
    changing = making | {"load_model", "release", "cancel_job"}
    assert {name for name, hint in hints.items() if not hint["readOnlyHint"]} == changing
    assert {name for name, hint in hints.items() if hint["openWorldHint"]} == {"load_model", "start_job"}


@pytest.mark.anyio
async def test_descriptions_and_instructions_are_short_enough_for_every_host() -> None:
    assert len(INSTRUCTIONS) < 2000
    for tool in await listed("auto"):
        assert 40 < len(tool["description"]) < 1000, tool["name"]
        assert len(tool["name"]) <= 40


def test_every_tool_takes_the_call_first_and_declares_its_result() -> None:
    for function in TOOLS:
        signature = inspect.signature(function, eval_str=True)
        assert next(iter(signature.parameters)) == "call", function.__name__
        assert hasattr(signature.return_annotation, "model_fields"), function.__name__
