"""The scenario that every client plays (scenario.json), and how its answers are judged.

play          with the Python client; clients/play.mjs does the same for the TypeScript SDKs
filled        a step's arguments, with what earlier answers gave in place of its names
complaints    what is wrong with the answers, step by step
differences   where the answers of two clients differ
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcp import Client

SCENARIO = json.loads(Path(__file__).with_name("scenario.json").read_text("utf-8"))
STEPS: list[dict[str, Any]] = SCENARIO["steps"]
VARYING = ("seconds", "bytes_in_memory")
"""What depends on the machine, and on what a shared server has done before."""


@dataclass
class Played:
    """What a client saw: the names of the tools, each answer as it is on the wire, and the handles kept from them."""

    tools: list[str]
    answers: list[dict[str, Any]]
    kept: dict[str, str]

    def keep(self, step: dict[str, Any], answer: dict[str, Any]) -> None:
        self.answers.append(answer)
        self.kept |= {name: answer["structuredContent"][field] for name, field in step.get("keep", {}).items()}


async def play(client: Client) -> Played:
    played = Played([tool.name for tool in (await client.list_tools()).tools], [], {})
    for step in STEPS:
        result = await client.call_tool(step["tool"], filled(step["arguments"], played.kept))
        played.keep(step, result.model_dump(mode="json", by_alias=True))
    return played


def filled(value: Any, kept: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: filled(inner, kept) for key, inner in value.items()}
    if isinstance(value, list):
        return [filled(inner, kept) for inner in value]
    return kept.get(value, value) if isinstance(value, str) else value


def complaints(played: Played) -> list[str]:
    assert len(played.answers) == len(STEPS)
    found = []
    for number, (step, answer) in enumerate(zip(STEPS, played.answers, strict=True)):
        where = f"step {number}, {step['tool']}"
        found += _refused(step, answer, played.kept, where) if "error" in step else _answered(step, answer, where)
    return found


def _refused(step: dict[str, Any], answer: dict[str, Any], kept: dict[str, str], where: str) -> list[str]:
    text = step["error"]
    for name, handle in kept.items():
        text = text.replace(name, handle)
    return missing({"isError": True, "content": [{"type": "text", "text": text}]}, answer, where)


def _answered(step: dict[str, Any], answer: dict[str, Any], where: str) -> list[str]:
    """The expected fields are there, and a host that shows a model text only shows it the same."""
    if answer.get("isError"):
        return [f"{where}: {answer['content'][0]['text']}"]
    text = json.loads(answer["content"][0]["text"])
    structured = answer["structuredContent"]
    return missing(step["expect"], structured, where) + missing(text, structured, f"{where}, text")


def differences(one: Played, other: Played) -> list[str]:
    first, second = _comparable(one), _comparable(other)
    return list(dict.fromkeys([*missing(first, second), *missing(second, first)]))


def _comparable(played: Played) -> dict[str, Any]:
    text = json.dumps([{key: a.get(key) for key in ("structuredContent", "isError")} for a in played.answers])
    for name, handle in played.kept.items():
        text = text.replace(handle, name)
    return {"tools": played.tools, "answers": json.loads(text, object_hook=_steady)}


def _steady(found: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in found.items() if key not in VARYING}


def missing(expected: Any, found: Any, where: str = "") -> list[str]:
    """What of `expected` is not in `found`. Numbers agree to 1e-5; an object may have more fields, a list no more."""
    if isinstance(expected, dict) and isinstance(found, dict):
        lacking = [f"{where}: no {key!r}" for key in expected.keys() - found.keys()]
        shared = [key for key in expected if key in found]
        return lacking + [text for key in shared for text in missing(expected[key], found[key], f"{where}.{key}")]
    if isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        pairs = enumerate(zip(expected, found, strict=True))
        return [text for i, (a, b) in pairs for text in missing(a, b, f"{where}[{i}]")]
    return [] if _same(expected, found) else [f"{where}: {found!r} instead of {expected!r}"]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, float) or isinstance(b, float):
        return (
            isinstance(a, int | float) and isinstance(b, int | float) and math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-6)
        )
    return bool(a == b)
