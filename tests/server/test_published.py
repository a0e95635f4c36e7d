"""Published schemas: shorter than pydantic's, and the same contract."""

from typing import Annotated, Literal

import jsonschema
import pytest
from pydantic import Field

from schemas.base import Strict
from server import published


class Leaf(Strict):
    title: str = Field(description="a field that is called title")
    size: int


class Twice(Strict):
    left: Leaf
    right: Leaf | None = None
    way: Literal["up", "down"] | list[int] | None = None
    flag: bool = False
    count: int = 0
    explicit: int | None


ARGUMENTS = published.arguments(Twice.model_json_schema())
RESULT = published.result(Twice.model_json_schema(mode="serialization"))
LEAF = {"title": "a", "size": 1}


def test_a_null_or_false_that_is_the_default_is_not_offered() -> None:
    fields = ARGUMENTS["properties"]
    assert fields["flag"] == {"type": "boolean"}
    assert fields["count"] == {"type": "integer", "default": 0}
    assert [option.get("type") for option in fields["way"]["anyOf"]] == ["string", "array"]
    assert "null" in fields["explicit"]["type"]


def test_a_field_called_title_or_description_stays() -> None:
    assert ARGUMENTS["$defs"]["Leaf"]["properties"]["title"]["description"] == "a field that is called title"
    assert RESULT["$defs"]["Leaf"]["properties"]["title"] == {"type": "string"}


def test_a_choice_of_plain_types_is_a_list_of_types() -> None:
    class Prompt(Strict):
        text: str | list[int]
        either: Annotated[str, Field(min_length=2)] | int

    for properties in (ARGUMENTS["properties"], RESULT["properties"]):
        assert properties["explicit"] == {"type": ["integer", "null"]}
        assert len(properties["way"]["anyOf"]) == 2
    made = published.arguments(Prompt.model_json_schema())["properties"]
    assert made["text"] == {"type": ["string", "array"], "items": {"type": "integer"}}
    assert len(made["either"]["anyOf"]) == 2, "a limit of one type is none of the other"


def test_a_definition_used_once_stands_where_it_is_used() -> None:
    class Once(Strict):
        leaf: Leaf

    made = published.arguments(Once.model_json_schema())
    assert "$defs" not in made
    assert made["properties"]["leaf"]["properties"].keys() == {"title", "size"}


@pytest.mark.parametrize(
    ("value", "valid"),
    [
        ({"left": LEAF, "explicit": None}, True),
        ({"left": LEAF, "explicit": 1, "way": [2], "right": LEAF}, True),
        ({"left": LEAF}, False),
        ({"left": LEAF, "explicit": 1, "more": 1}, False),
        ({"left": LEAF | {"more": 1}, "explicit": 1}, False),
        ({"left": LEAF, "explicit": 1, "way": "sideways"}, False),
        ({"left": {"title": "a"}, "explicit": 1}, False),
    ],
)
def test_what_the_published_arguments_allow_is_what_the_model_takes(value: dict, valid: bool) -> None:
    assert jsonschema.Draft202012Validator(ARGUMENTS).is_valid(value) is valid
    if valid:
        Twice.model_validate(value)
    else:
        with pytest.raises(ValueError, match="validation error"):
            Twice.model_validate(value)


def test_a_client_with_an_older_list_accepts_a_field_that_came_later() -> None:
    result = {"left": LEAF | {"new": 1}, "explicit": None, "newer": 2}
    jsonschema.validate(result, RESULT)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"left": LEAF}, RESULT)
