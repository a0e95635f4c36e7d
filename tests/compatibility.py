"""Whether clients written for a published list of tools still work: `breaks`.

Arguments may come to take more, results may come to tell more; never the other way round. The published contract is
tests/server/published_contract.json, which changes with a release only: `python tests/compatibility.py` prints the
breaks since then, and with --publish makes the tools of the snapshot the contract.
"""

import json
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

Schema = dict[str, Any]
Contract = dict[str, dict[str, Schema]]
"""tool -> {"input": schema, "output": schema}"""

PUBLISHED = Path(__file__).parent / "server" / "published_contract.json"
SNAPSHOT = PUBLISHED.with_name("tools_list.json")
LEAST = ("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties")
MOST = ("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties")
KINDS = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null", list: "array"}


def breaks(published: Contract, present: Contract) -> list[str]:
    """What a client of `published` can no longer rely on, one line each."""
    found = [f"{name} is gone" for name in published if name not in present]
    for name in published:
        if name in present:
            found += _Taken(published[name]["input"], present[name]["input"]).breaks(name)
            found += _Told(published[name]["output"], present[name]["output"]).breaks(f"{name} ->")
    return found


class _Comparison:
    """Whether every value of the schema `narrow` is one of `wide`."""

    no_fit = less = required = ""

    def __init__(self, narrow: Schema, wide: Schema) -> None:
        self.narrow, self.wide = narrow, wide

    def breaks(self, name: str) -> list[str]:
        return list(dict.fromkeys(self._between(name, self.narrow, self.wide)))

    def _between(self, place: str, narrow: Schema, wide: Schema) -> Iterator[str]:
        """Every alternative of `narrow` needs one of `wide` that takes it; told is what the nearest lacks."""
        others = list(_alternatives(wide, self.wide))
        for one in _alternatives(narrow, self.narrow):
            kind = one.get("type")
            alike = [other for other in others if other.get("type") in (None, kind, _wider(kind))]
            if alike:
                yield from min((list(self._lacks(place, one, other)) for other in alike), key=len)
            else:
                yield f"{place} {self.no_fit} {kind or 'anything'}"

    def _lacks(self, place: str, one: Schema, other: Schema) -> Iterator[str]:
        values = other.get("enum")
        if values is not None:
            missing = [value for value in one["enum"] if value not in values] if "enum" in one else ["other values"]
            yield from (f"{place} {self.no_fit} {value!r}" for value in missing)
        yield from (f"{place} {self.less} {key} {other[key]}" for key in _tighter(one, other))
        yield from self._fields(place, one, other)
        if "items" in other and other.get("type") in (None, "array"):  # of one of several types, it is of arrays only
            yield from self._between(f"{place}[]", one.get("items", {}), other["items"])

    def _fields(self, place: str, one: Schema, other: Schema) -> Iterator[str]:
        mine, theirs = one.get("properties", {}), other.get("properties", {})
        rest = [schema.get("additionalProperties", True) for schema in (one, other)]
        for name in mine:
            wide = theirs.get(name, rest[1])
            if isinstance(wide, dict):
                yield from self._between(f"{place}.{name}", mine[name], wide)
        if all(isinstance(schema, dict) for schema in rest):
            yield from self._between(f"{place}.*", *rest)
        yield from (f"{place}.{name} is gone" for name in self._gone(one, other))
        demanded = set(other.get("required", ())) & mine.keys() - set(one.get("required", ()))
        yield from (f"{place}.{name} {self.required}" for name in sorted(demanded))

    def _gone(self, one: Schema, other: Schema) -> list[str]:
        raise NotImplementedError


class _Taken(_Comparison):
    """Arguments: what was taken must be taken still."""

    no_fit, less, required = "no longer takes", "is now held to", "must be given now"

    def _gone(self, one: Schema, other: Schema) -> list[str]:
        if other.get("additionalProperties", True) is not False:
            return []
        return [name for name in one.get("properties", {}) if name not in other.get("properties", {})]

    def _fields(self, place: str, one: Schema, other: Schema) -> Iterator[str]:
        yield from super()._fields(place, one, other)
        known = one.get("properties", {})
        yield from (f"{place}.{name} {self.required}" for name in other.get("required", ()) if name not in known)
        if one.get("additionalProperties", True) is not False and other.get("additionalProperties", True) is False:
            yield f"{place} no longer takes fields of any name"


class _Told(_Comparison):
    """Results: what is told now must be what was told before, or beside it. The present schema is the narrow one."""

    no_fit, less, required = "may now be", "is no longer held to", "may be missing now"

    def __init__(self, published: Schema, present: Schema) -> None:
        super().__init__(present, published)

    def _gone(self, one: Schema, other: Schema) -> list[str]:
        return [name for name in other.get("properties", {}) if name not in one.get("properties", {})]


def _wider(kind: str | None) -> str | None:
    return "number" if kind == "integer" else kind


def _tighter(one: Schema, other: Schema) -> list[str]:
    """The limits by which `other` refuses what `one` takes."""
    low = [key for key in LEAST if key in other and one.get(key, float("-inf")) < other[key]]
    high = [key for key in MOST if key in other and one.get(key, float("inf")) > other[key]]
    return low + high + [key for key in ("pattern", "format") if key in other and one.get(key) != other[key]]


def _alternatives(schema: Schema, root: Schema) -> Iterator[Schema]:
    """The schema as alternatives of one type each, without references; one without a type takes anything."""
    schema = dict(schema)
    if "$ref" in schema:
        schema = root["$defs"][schema.pop("$ref").rpartition("/")[2]] | schema
    for parts in (schema.pop(word) for word in ("anyOf", "oneOf") if word in schema):
        for part in parts:
            yield from _alternatives(schema | part, root)
        return
    values = [schema.pop("const")] if "const" in schema else schema.pop("enum", None)
    kinds = list(dict.fromkeys(KINDS[type(v)] for v in values)) if values else schema.get("type")
    for kind in kinds if isinstance(kinds, list) else [kinds]:
        same = {"enum": [v for v in values if KINDS[type(v)] == kind]} if values and kind != "null" else {}
        yield schema | ({} if kind is None else {"type": kind}) | same


def contract(tools: list[Schema]) -> Contract:
    """The answer to tools/list, as far as clients depend on it."""
    return {
        tool["name"]: {"input": _bare(tool["inputSchema"]), "output": _bare(tool["outputSchema"])} for tool in tools
    }


def _bare(schema: Any, named: bool = False) -> Any:
    """Without words; `named` says that the keys are names of fields, not of JSON Schema."""
    if isinstance(schema, list):
        return [_bare(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: _bare(value, not named and key in ("properties", "$defs"))
        for key, value in schema.items()
        if named or key not in ("title", "description", "default")
    }


def published() -> Contract:
    tools: Contract = json.loads(PUBLISHED.read_text())["tools"]
    return tools


if __name__ == "__main__":
    made = contract(json.loads(SNAPSHOT.read_text()))
    if "--publish" in sys.argv:
        PUBLISHED.write_text(json.dumps({"version": version("mechscope"), "tools": made}, indent=1) + "\n")
    sys.exit("\n".join(breaks(published(), made)) or 0)
