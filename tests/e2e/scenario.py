"""The scenario that every client plays (scenario.json), and how its answers are judged.

request       a step as the protocol has it: its method, and its params with what earlier answers gave filled in
play          with the Python client; clients/play.mjs does the same for the TypeScript SDKs
complaints    what is wrong with the answers, step by step
differences   where the answers of two clients differ
"""

import json
import math
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcp import Client
from mcp.types import PromptReference, ResourceTemplateReference
from pydantic import BaseModel

SCENARIO = json.loads(Path(__file__).with_name("scenario.json").read_text("utf-8"))
STEPS: list[dict[str, Any]] = SCENARIO["steps"]
VARYING = ("seconds", "bytes_in_memory", "started", "ended", "sha256")
"""What depends on the machine, on what a shared server has done before, and on whether it has a workspace."""

CONTENT = ("structuredContent", "resources", "prompts", "messages", "completion")
"""Where the answers to requests have their content."""

REFERENCES = {"ref/prompt": PromptReference, "ref/resource": ResourceTemplateReference}
ASK: dict[str, Callable[[Client, dict[str, Any]], Awaitable[BaseModel]]] = {
    "tools/call": lambda client, p: client.call_tool(p["name"], p["arguments"]),
    "resources/list": lambda client, p: client.list_resources(),
    "resources/read": lambda client, p: client.read_resource(p["uri"]),
    "prompts/list": lambda client, p: client.list_prompts(),
    "prompts/get": lambda client, p: client.get_prompt(p["name"], p["arguments"]),
    "completion/complete": lambda client, p: client.complete(REFERENCES[p["ref"]["type"]](**p["ref"]), p["argument"]),
}

Answer = dict[str, Any]


@dataclass
class Played:
    """What a client saw: the names of the tools, each answer as it is on the wire, and the handles kept from them.

    An answer is None where the client has no such request.
    """

    tools: list[str]
    answers: list[Answer | None]
    kept: dict[str, str]

    def keep(self, step: dict[str, Any], answer: Answer | None) -> None:
        self.answers.append(answer)
        self.kept |= {name: (answer or {})["structuredContent"][field] for name, field in step.get("keep", {}).items()}


async def play(client: Client) -> Played:
    played = Played([tool.name for tool in (await client.list_tools()).tools], [], {})
    for step in STEPS:
        method, params = request(step, played.kept)
        result = await ASK[method](client, params)
        played.keep(step, result.model_dump(mode="json", by_alias=True))
    return played


def request(step: dict[str, Any], kept: Mapping[str, str]) -> tuple[str, dict[str, Any]]:
    """(method, params); a step that names a tool calls it."""
    if "tool" in step:
        return "tools/call", {"name": step["tool"], "arguments": filled(step["arguments"], kept)}
    return step["method"], filled(step.get("params", {}), kept)


def filled(value: Any, kept: Mapping[str, str]) -> Any:
    """The value with the handles that answers gave in place of their names, inside of texts too."""
    text = json.dumps(value)
    for name, handle in kept.items():
        text = text.replace(name, handle)
    return json.loads(text)


def complaints(played: Played) -> list[str]:
    found = []
    for number, (step, answer) in enumerate(zip(STEPS, played.answers, strict=True)):
        where = f"step {number}, {step.get('tool') or step['method']}"
        if answer is not None:
            found += _complaints(filled(step, played.kept), answer, where)
    return found


def _complaints(step: dict[str, Any], answer: Answer, where: str) -> list[str]:
    if "error" in step:
        return missing({"isError": True, "content": [{"type": "text", "text": step["error"]}]}, answer, where)
    if answer.get("isError"):
        return [f"{where}: {answer['content'][0]['text']}"]
    return missing(step["expect"], shown(answer), where) + _text_alone(answer, where)


def _text_alone(answer: Answer, where: str) -> list[str]:
    """A host that shows a model only the text of a tool's answer shows it the same."""
    structured = answer.get("structuredContent")
    return [] if structured is None else missing(json.loads(answer["content"][0]["text"]), structured, f"{where}, text")


def shown(answer: Answer) -> Any:
    """The content of an answer; the rest is how the protocol packs it. Resources are JSON."""
    if "contents" in answer:
        return {item["uri"]: json.loads(item["text"]) for item in answer["contents"]}
    return next((answer[key] for key in CONTENT if answer.get(key) is not None), answer.get("content"))


def differences(one: Played, other: Played) -> list[str]:
    pairs = [pair for pair in zip(_comparable(one), _comparable(other), strict=True) if None not in pair]
    found = [text for a, b in pairs for text in (*missing(a, b), *missing(b, a))]
    return list(dict.fromkeys(found))


def _comparable(played: Played) -> list[Any]:
    """The tools, and each answer without handles and what varies."""
    names = {handle: name for name, handle in played.kept.items()}
    answers = [
        answer and filled(_steady(shown(answer), (*VARYING, *step.get("varying", ()))), names)
        for step, answer in zip(STEPS, played.answers, strict=True)
    ]
    return [played.tools, *answers]


def _steady(found: Any, varying: Collection[str]) -> Any:
    """Without the fields that vary, and those that are null: clients differ in whether they keep them."""
    if isinstance(found, dict):
        return {k: _steady(value, varying) for k, value in found.items() if k not in varying and value is not None}
    return [_steady(value, varying) for value in found] if isinstance(found, list) else found


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
