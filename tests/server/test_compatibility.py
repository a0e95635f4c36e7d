"""The present tools keep what the published contract promised, and the check finds every kind of broken promise."""

import json
from collections.abc import Callable

import pytest
from clients import connected
from compatibility import Contract, breaks, contract, published

from server.app import build_server


@pytest.mark.anyio
async def test_clients_of_the_published_contract_still_work() -> None:
    async with connected(build_server()) as client:
        tools = (await client.list_tools()).tools
    present = contract([tool.model_dump(mode="json", by_alias=True, exclude_none=True) for tool in tools])
    assert breaks(published(), present) == []


def schema(**fields: object) -> dict:
    required = [name for name in fields if not name.endswith("_")]
    properties = {name.rstrip("_"): field for name, field in fields.items()}
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


NULL, TEXT, WHOLE = {"type": "null"}, {"type": "string", "maxLength": 9}, {"type": "integer", "minimum": 0}
STEER = {"layer": WHOLE, "alpha": {"type": "number"}, "unit_": {"enum": ["raw", "row"]}}
WAS: Contract = {
    "look": {
        "input": schema(prompt={"anyOf": [TEXT, {"type": "array", "items": WHOLE}]}, k_=WHOLE, steer_=schema(**STEER))
        | {"$defs": {"Where": {"enum": ["last", "all"], "type": "string"}}},
        "output": schema(
            rows={"type": "array", "items": schema(layer=WHOLE, text=TEXT)}, notice_={"anyOf": [TEXT, NULL]}
        ),
    },
    "list": {"input": schema(), "output": schema(bytes=WHOLE)},
}
WAS["look"]["input"]["properties"]["where"] = {"anyOf": [{"$ref": "#/$defs/Where"}, NULL]}
Change = Callable[[dict, dict], object]
"""Of the properties of look's arguments, and of its result."""


def changed(change: Change) -> Contract:
    now = json.loads(json.dumps(WAS))
    change(now["look"]["input"], now["look"]["output"])
    return now


def row(output: dict) -> dict:
    return output["properties"]["rows"]["items"]


BREAKS: dict[str, tuple[Change, list[str]]] = {
    "an argument removed": (lambda i, o: i["properties"].pop("k"), ["look.k is gone"]),
    "an argument renamed": (
        lambda i, o: i["properties"].update(top=i["properties"].pop("k")),
        ["look.k is gone"],
    ),
    "a new required argument": (
        lambda i, o: (i["properties"].update(seed=WHOLE), i["required"].append("seed")),
        ["look.seed must be given now"],
    ),
    "an argument that became required": (lambda i, o: i["required"].append("k"), ["look.k must be given now"]),
    "a field of an argument removed": (
        lambda i, o: i["properties"]["steer"]["properties"].pop("unit"),
        ["look.steer.unit is gone"],
    ),
    "a field of an argument that became required": (
        lambda i, o: i["properties"]["steer"]["required"].append("unit"),
        ["look.steer.unit must be given now"],
    ),
    "an enum value removed": (
        lambda i, o: i["$defs"]["Where"]["enum"].remove("all"),
        ["look.where no longer takes 'all'"],
    ),
    "free text made an enum": (
        lambda i, o: i["properties"]["prompt"]["anyOf"][0].update(enum=["a"]),
        ["look.prompt no longer takes 'other values'"],
    ),
    "null no longer taken": (
        lambda i, o: i["properties"].update(where={"$ref": "#/$defs/Where"}),
        ["look.where no longer takes null"],
    ),
    "one of two types no longer taken": (
        lambda i, o: i["properties"]["prompt"]["anyOf"].pop(),
        ["look.prompt no longer takes array"],
    ),
    "a number narrowed to an integer": (
        lambda i, o: i["properties"]["steer"]["properties"].update(alpha=WHOLE),
        ["look.steer.alpha no longer takes number"],
    ),
    "items narrowed": (
        lambda i, o: i["properties"]["prompt"]["anyOf"][1].update(items={"type": "integer", "minimum": 5}),
        ["look.prompt[] is now held to minimum 5"],
    ),
    "a new upper limit": (
        lambda i, o: i["properties"].update(k=WHOLE | {"maximum": 5}),
        ["look.k is now held to maximum 5"],
    ),
    "a shorter text": (
        lambda i, o: i["properties"]["prompt"]["anyOf"].__setitem__(0, TEXT | {"maxLength": 8}),
        ["look.prompt is now held to maxLength 8"],
    ),
    "a field of the result gone": (lambda i, o: o["properties"].pop("rows"), ["look ->.rows is gone"]),
    "an optional field of the result gone": (lambda i, o: o["properties"].pop("notice"), ["look ->.notice is gone"]),
    "a nested field of the result gone": (
        lambda i, o: row(o)["properties"].pop("text"),
        ["look ->.rows[].text is gone"],
    ),
    "a field of the result that may be missing": (
        lambda i, o: row(o)["required"].remove("text"),
        ["look ->.rows[].text may be missing now"],
    ),
    "a field of the result that may be null": (
        lambda i, o: row(o)["properties"].update(layer={"anyOf": [WHOLE, NULL]}),
        ["look ->.rows[].layer may now be null"],
    ),
    "a field of the result of another type": (
        lambda i, o: row(o)["properties"].update(layer=TEXT),
        ["look ->.rows[].layer may now be string"],
    ),
    "a promise about a result dropped": (
        lambda i, o: row(o)["properties"].update(layer={"type": "integer"}),
        ["look ->.rows[].layer is no longer held to minimum 0"],
    ),
}

HARMLESS: dict[str, Change] = {
    "nothing": lambda i, o: None,
    "a new optional argument": lambda i, o: i["properties"].update(seed=WHOLE),
    "an argument that became optional": lambda i, o: i["required"].remove("prompt"),
    "a new enum value": lambda i, o: i["$defs"]["Where"]["enum"].append("first"),
    "an integer widened to a number": lambda i, o: i["properties"].update(k={"type": "number"}),
    "an argument that takes anything": lambda i, o: i["properties"].update(k={}),
    "a limit lifted": lambda i, o: i["properties"]["steer"]["properties"]["layer"].pop("minimum"),
    "a reference written out": lambda i, o: i["properties"].update(
        where={"type": ["string", "null"], "enum": ["last", "all", None]}
    ),
    "an open argument": lambda i, o: i["properties"].update(steer={"type": "object"}),
    "a new field of the result": lambda i, o: row(o)["properties"].update(logit={"type": "number"}),
    "a field of the result that is always there now": lambda i, o: o["required"].append("notice"),
    "a field of the result that is never null": lambda i, o: o["properties"].update(notice=TEXT),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_promise_is_named(name: str) -> None:
    change, expected = BREAKS[name]
    assert breaks(WAS, changed(change)) == expected


@pytest.mark.parametrize("name", HARMLESS)
def test_a_change_that_breaks_no_client_is_let_through(name: str) -> None:
    assert breaks(WAS, changed(HARMLESS[name])) == []


def test_a_removed_tool_is_named_and_a_new_one_is_not() -> None:
    assert breaks(WAS, {"list": WAS["list"]}) == ["look is gone"]
    assert breaks({"list": WAS["list"]}, WAS) == []


def test_a_removal_from_any_published_tool_is_found() -> None:
    for tool, schemas in published().items():
        for side, words in (("input", f"{tool}.{{}} is gone"), ("output", f"{tool} ->.{{}} is gone")):
            for name in schemas[side]["properties"]:
                now = json.loads(json.dumps(schemas))
                del now[side]["properties"][name]
                assert words.format(name) in breaks({tool: schemas}, {tool: now})
