"""Prompts: protocols whose every call is a call the server answers."""

import json
from typing import Any

import pytest
from clients import ERAS, ask, connected
from mcp import MCPError

from server.app import build_server
from server.lab import Lab
from server.prompts import CALL, PROMPTS

pytestmark = pytest.mark.anyio

FRANCE, ITALY = "The capital of France is", "The capital of Italy is"
GIVEN: dict[str, dict[str, str]] = {
    "factual_recall": {"prompt": FRANCE, "answer": " Paris", "rival": " London"},
    "where_is_it_computed": {"clean": FRANCE, "corrupt": ITALY, "answer": " Paris", "rival": " Rome"},
    "find_induction_heads": {},
    "steer_and_audit": {"prompt": FRANCE, "toward": " London", "away": " Paris"},
    "compare_prompts": {"a": FRANCE, "b": ITALY},
    "transplant_kv_cache": {"recipient": FRANCE, "donor": ITALY, "answer": " Rome"},
}
FOUND: dict[str, Any] = {"LAYER": 15, "POSITION": 3, "HEAD": 2, "ALPHA": 10.0, "RANDOM_ALPHA": 40.0}


def filled(value: Any, found: dict[str, Any]) -> Any:
    """Arguments as an agent sends them: what it found in place of words in capitals."""
    if isinstance(value, dict):
        return {name: filled(inner, found) for name, inner in value.items()}
    if isinstance(value, list):
        return [filled(inner, found) for inner in value]
    return found.get(value, value) if isinstance(value, str) else value


@pytest.fixture(scope="module")
def real() -> Lab:
    lab = Lab()
    lab.load("smollm2-135m-instruct", "dense")
    return lab


@pytest.mark.real
@pytest.mark.parametrize("name", GIVEN)
async def test_every_call_of_a_prompt_is_answered(real: Lab, name: str) -> None:
    async with connected(build_server(real)) as client:
        text = (await client.get_prompt(name, GIVEN[name])).messages[0].content.text
        calls = [(tool, json.loads(arguments)) for tool, arguments in CALL.findall(text)]
        assert calls[0] == ("load_model", {})
        assert len(calls) >= 6
        found, answers = dict(FOUND), {}
        for tool, arguments in calls:
            if tool == "attention_pattern":
                arguments |= {"layers": "0:10"}
            answers[tool] = await ask(client, tool, **filled(arguments, found))
            found["RUN"] = answers[tool].get("run", found.get("RUN"))
    if name == "compare_prompts":
        assert all(row["kl"] < 1e-6 for row in answers["compare"]["rows"]), "the control compares a prompt with itself"
    if name == "transplant_kv_cache":
        assert answers["prefill_inject"]["kl"] < 1e-6, "the control transplants the recipient's own cache"


@pytest.mark.real
async def test_the_words_to_look_for_induction_with_are_one_token_each(real: Lab) -> None:
    async with connected(build_server(real)) as client:
        text = (await client.get_prompt("find_induction_heads")).messages[0].content.text
        prompts = {json.loads(arguments).get("prompt") for _, arguments in CALL.findall(text)} - {None}
        for prompt in prompts:
            tokens = await ask(client, "tokenize", text=prompt)
            assert tokens["count"] == len(prompt.split()) == 11


@pytest.mark.parametrize("mode", ERAS)
async def test_every_prompt_is_listed_with_its_arguments_and_says_what_to_conclude(lab: Lab, mode: str) -> None:
    async with connected(build_server(lab), mode) as client:
        prompts = {prompt.name: prompt for prompt in (await client.list_prompts()).prompts}
        texts = [(await client.get_prompt(name, GIVEN[name])).messages[0].content.text for name in prompts]
    assert list(prompts) == [function.__name__ for function in PROMPTS] == list(GIVEN)
    for name, prompt in prompts.items():
        assert {a.name for a in prompt.arguments if a.required} == set(GIVEN[name])
        assert all(argument.description for argument in prompt.arguments)
        assert len(prompt.title) < 40
        assert len(prompt.description) < 120
    for text in texts:
        assert all(word in text for word in ("Conclude:", "Do not conclude:", "Control"))
        assert len(text) < 6000


async def test_every_tool_and_argument_that_a_prompt_names_exists(lab: Lab) -> None:
    async with connected(build_server(lab)) as client:
        tools = {tool.name: set(tool.input_schema["properties"]) for tool in (await client.list_tools()).tools}
        for name, given in GIVEN.items():
            text = (await client.get_prompt(name, given | {"model": "synthetic"})).messages[0].content.text
            calls = CALL.findall(text)
            assert text.count("`") == 2 * len(calls), f"{name} has backticks around something else"
            for tool, arguments in calls:
                assert set(json.loads(arguments)) <= tools[tool], f"{name}: {tool}"
                if "model" in tools[tool]:
                    assert json.loads(arguments)["model"] == "synthetic", f"{name}: {tool}"


async def test_what_is_wrong_with_a_prompts_arguments_is_told(lab: Lab) -> None:
    async with connected(build_server(lab)) as client:
        with pytest.raises(MCPError, match=r"answer is required; rival is required; x is unknown.*model \(optional\)"):
            await client.get_prompt("factual_recall", {"prompt": "a", "answer": "", "x": "1"})
        with pytest.raises(MCPError, match="no prompt 'recall'; valid: factual_recall"):
            await client.get_prompt("recall", {})
        empty = await client.get_prompt("find_induction_heads", {"words": "", "model": ""})
        assert empty.messages == (await client.get_prompt("find_induction_heads")).messages


async def test_a_toolset_offers_the_prompts_that_can_be_followed_with_it(lab: Lab) -> None:
    async with connected(build_server(lab, toolset="core")) as client:
        assert {prompt.name for prompt in (await client.list_prompts()).prompts} == {"factual_recall"}
