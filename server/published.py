"""A tool's schemas and results as agents see them: the same contract in fewer bytes; every agent pays for `tools/list`.

Arguments: an option of null that is also the default goes, because leaving the argument out says the same (null is
still accepted); so does a default of false. Results: descriptions go, they are in docs/tools.md; objects are open, so
that a client with an older list accepts a field that came later; which fields are always there is said of the result
itself, not of its parts. A definition that is used once stands where it is used, a choice of plain types is a list.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

Schema = dict[str, Any]

NAMED = ("properties", "$defs")
"""Keywords whose keys are names: a field may be called title or description."""

NULL = {"type": "null"}


def arguments(schema: Schema) -> Schema:
    """The input schema to publish."""
    made: Schema = _listed(_inlined(_rewritten(schema, frozenset({"title"}))))
    return made


def result(schema: Schema) -> Schema:
    """The output schema to publish."""
    short = _rewritten(schema, frozenset({"title", "description", "additionalProperties", "required"}))
    always = {"required": schema["required"]} if "required" in schema else {}
    made: Schema = _listed(_inlined(short | always))
    return made


def content(result: BaseModel) -> Schema:
    """A result as it is sent: what is null by default is left out."""
    return result.model_dump(mode="json", exclude_defaults=True)


def _rewritten(node: Any, without: frozenset[str]) -> Any:
    if isinstance(node, list):
        return [_rewritten(item, without) for item in node]
    if not isinstance(node, dict):
        return node
    made = {
        key: {name: _rewritten(inner, without) for name, inner in value.items()}
        if key in NAMED
        else _rewritten(value, without)
        for key, value in node.items()
        if not (key in without and not isinstance(value, dict))
    }
    if "anyOf" in made:
        made = _without_null(made)
    return {key: value for key, value in made.items() if not (key == "default" and (value is None or value is False))}


def _without_null(node: Schema) -> Schema:
    """Options of options stand side by side; null goes where it is the default."""
    flat = [option for item in node["anyOf"] for option in _options(item)]
    described = next((item["description"] for item in node["anyOf"] if "description" in item), None)
    rest = {key: value for key, value in node.items() if key != "anyOf"}
    if described is not None:
        rest.setdefault("description", described)
    if rest.get("default", ...) is None:
        del rest["default"]
        flat = [option for option in flat if option != NULL]
    return {**flat[0], **rest} if len(flat) == 1 else {"anyOf": flat, **rest}


def _listed(node: Any) -> Any:
    """Options of different types as one list of types, where only the array says more of itself."""
    if isinstance(node, list):
        return [_listed(item) for item in node]
    if not isinstance(node, dict):
        return node
    made = {key: _listed(value) for key, value in node.items()}
    options = made.get("anyOf")
    if isinstance(options, list) and all(_plain(option) for option in options):
        del made["anyOf"]
        made |= {key: value for option in options for key, value in option.items()}
        made["type"] = [option["type"] for option in options]
    return made


def _plain(option: Schema) -> bool:
    of_arrays = {"items", "minItems", "maxItems"} if option.get("type") == "array" else set()
    return isinstance(option.get("type"), str) and set(option) <= {"type"} | of_arrays


def _options(item: Schema) -> list[Schema]:
    return item["anyOf"] if set(item) <= {"anyOf", "description"} and "anyOf" in item else [item]


def _inlined(schema: Schema) -> Schema:
    """Definitions used once are put where they are used, and go from the list."""
    definitions = dict(schema.get("$defs", {}))
    used = Counter(_references(schema))
    once = {name for name in definitions if used[f"#/$defs/{name}"] == 1}

    def placed(node: Any) -> Any:
        if isinstance(node, list):
            return [placed(item) for item in node]
        if not isinstance(node, dict):
            return node
        name = str(node.get("$ref", "")).removeprefix("#/$defs/")
        if name in once:
            return placed({**definitions[name], **{key: value for key, value in node.items() if key != "$ref"}})
        return {key: placed(value) for key, value in node.items()}

    kept = {name: placed(inner) for name, inner in definitions.items() if name not in once}
    made: Schema = placed({key: value for key, value in schema.items() if key != "$defs"})
    return made | ({"$defs": kept} if kept else {})


def _references(node: Any) -> Iterator[str]:
    if isinstance(node, list):
        for item in node:
            yield from _references(item)
    elif isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for value in node.values():
            yield from _references(value)
