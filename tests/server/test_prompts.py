"""Prompts: protocols whose every call is a call the server answers."""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from clients import ERAS, ask, connected
from mcp import Client, MCPError

from engine.planted import CIRCUITS
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
LETTERS: dict[str, dict[str, str]] = {
    "factual_recall": {"prompt": "abcabcab", "answer": "c", "rival": "d"},
    "where_is_it_computed": {"clean": "abcabcab", "corrupt": "abdabdab", "answer": "c", "rival": "d"},
    "find_induction_heads": {},
    "steer_and_audit": {"prompt": "abcabcab", "toward": "d", "away": "c"},
    "compare_prompts": {"a": "abcabcab", "b": "abdabdab"},
    "transplant_kv_cache": {"recipient": "abcabcab", "donor": "abdabdab", "answer": "d"},
}
"""For models of one token per character."""

Found = dict[str, Any]


class Agent:
    """Makes a prompt's calls in order, with what it found in place of words in capitals."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.found: Found = {}
        self.made: list[tuple[str, dict[str, Any], dict[str, Any]]] = []
        """(tool, arguments, answer) of every call."""

    async def play(self, name: str, **given: str) -> str:
        text = (await self._client.get_prompt(name, given)).messages[0].content.text
        for tool, call in CALL.findall(text):
            if tool == "attention_pattern" and not self.of(tool):
                await self._choose(call)
            await self._make(tool, json.loads(self._filled(call)))
        return text

    async def _make(self, tool: str, arguments: dict[str, Any]) -> dict[str, Any]:
        answer = await ask(self._client, tool, **arguments)
        self.made.append((tool, arguments, answer))
        self.found |= _read(tool, arguments, answer, self.found)
        return answer

    async def _choose(self, call: str) -> None:
        """Of the candidates the first whose attention is as the step says: at the value, half of the way."""
        value = self.of("tokenize")[0]["count"] // 2
        for cell in self.of("causal_trace")[0]["top"]:
            answer = await ask(self._client, "attention_pattern", **json.loads(self._filled(call, _cell(cell))))
            if answer["rows"][0]["top"][0]["position"] == value:
                self.found |= _cell(cell)
                return

    def _filled(self, call: str, more: Found | None = None) -> str:
        for name, value in (self.found | (more or {})).items():
            call = re.sub(rf'"{name}"|(?<!\w){name}(?!\w)', lambda _, value=value: json.dumps(value), call)
        return call

    def of(self, tool: str, **with_these: Any) -> list[dict[str, Any]]:
        """The answers of a tool's calls that had these arguments."""
        return [a for t, given, a in self.made if t == tool and with_these.items() <= given.items()]


def _read(tool: str, arguments: dict[str, Any], answer: dict[str, Any], found: Found) -> Found:
    """What an agent takes down from an answer, as the steps say."""
    match tool:
        case "track_race":
            return {"_race": answer["rows"][-1]["leader"]}
        case "track_token" if "_race" in found:
            layer = answer.get("emergence_layer") or answer["rows"][-1]["layer"]
            return {"LAYER": layer, "EARLIER": layer // 2}
        case "causal_trace" if arguments.get("point") in (None, "resid_post", "z") and "LAYER" not in found:
            return _cell(answer["top"][0])
        case "causal_trace" if arguments.get("point") == "z" and "HEAD" not in found:
            return _cell(answer["top"][0])
        case "capture_residuals":
            layer = answer["layers"][3 * len(answer["layers"]) // 4]
            (norm,) = [row["mean_norm"] for row in answer["norms"] if row["layer"] == layer]
            return {"LAYER": layer, "_norm": norm}
        case "project_through_unembed":
            push = found["_norm"] / 4
            return {"ALPHA": push / answer["norm"], "RANDOM_ALPHA": push}
        case "kv_inject_test":
            spans = [cell["layers"] for cell in reversed(answer["from_last"]) if (cell.get("recovered") or 0) > 0.8]
            return {"LAYERS": list(range(int((spans or ["0"])[-1].partition("-")[0]), len(answer["per_layer"])))}
        case "start_job":
            return {"RUN": answer["run"]}
        case "generate_with_hooks" if arguments.get("chat"):
            return {"OPENING": answer["baseline"]["text"].partition(" Paris")[0]}
    return {}


def _cell(cell: dict[str, Any]) -> Found:
    return {key.upper(): cell[key] for key in ("layer", "position", "head") if cell.get(key) is not None}


@pytest.fixture(scope="module")
def real() -> Lab:
    lab = Lab()
    lab.load("smollm2-135m-instruct", "dense")
    return lab


@pytest.mark.parametrize("model", ["synthetic", "synthetic:induction"])
@pytest.mark.parametrize("name", LETTERS)
async def test_a_prompt_runs_through_on_a_model_of_characters(name: str, model: str) -> None:
    lab = Lab()
    lab.load(model, "dense")
    async with connected(build_server(lab)) as client:
        agent = Agent(client)
        text = await agent.play(name, **LETTERS[name])
    assert f"The model is {model}, which is loaded" in text
    assert len(agent.made) >= 5


@pytest.mark.real
@pytest.mark.parametrize("name", GIVEN)
async def test_a_prompt_runs_through_on_the_real_model(real: Lab, name: str) -> None:
    async with connected(build_server(real)) as client:
        agent = Agent(client)
        await agent.play(name, **GIVEN[name])
    assert len(agent.made) >= 5
    CHECKS[name](agent)


def recalls(agent: Agent) -> None:
    (race,), (lens,) = agent.of("track_race"), agent.of("logit_lens")
    assert race["rows"][-1]["leader"] == " Paris"
    assert lens["identity_error"] < 1e-4
    assert agent.found["LAYER"] > 20, "where the lens shows the answer, not where noise crosses"
    assert agent.found["EARLIER"] >= 10


def locates(agent: Agent) -> None:
    trace = agent.of("causal_trace")[0]
    assert trace["clean"] > trace["corrupt"] + 0.3
    restored, identity = agent.of("patch_activations")
    assert restored["effect"][0]["text"] == " Paris"
    assert identity["kl"] < 1e-6
    assert all(agent.of("causal_trace", point=point, by="head") for point in "zqkv")
    (ablated,) = agent.of("forward_ablate")
    assert ablated["logit_difference"]["effect"] < ablated["logit_difference"]["baseline"] - 1


def finds_induction(agent: Agent) -> None:
    """Step 3 does not end it, and the candidate passes every test at the real model."""
    (tracked,) = agent.of("track_token")
    assert tracked["rows"][-1]["rank"] == 0
    repeated, fresh, farther = (answer["rows"][0]["top"][0] for answer in agent.of("attention_pattern"))
    value = agent.of("tokenize")[0]["count"] // 2
    assert repeated["position"] == farther["position"] == value
    assert min(repeated["weight"], farther["weight"]) > 0.3
    assert fresh["position"] != value
    here, control = (answer["token"] for answer in agent.of("forward_ablate"))
    assert here["baseline_logit"] - here["logit"] > 2 * abs(control["baseline_logit"] - control["logit"])


def steers(agent: Agent) -> None:
    steered, random, unrelated = (a["logit_difference"] for a in agent.of("forward_steer"))
    assert steered["effect"] - steered["baseline"] > 2 * abs(random["effect"] - random["baseline"])
    assert unrelated["effect"] > unrelated["baseline"]


def compares(agent: Agent) -> None:
    assert all(row["kl"] < 1e-6 for row in agent.of("compare")[1]["rows"]), "the control compares a prompt with itself"
    assert agent.of("patch_activations")[0]["effect"][0]["text"] == " Paris"


def transplants(agent: Agent) -> None:
    some, whole, values, keys, own = agent.of("prefill_inject")
    assert some["injected"][0]["text"] == whole["injected"][0]["text"] == " Rome"
    assert len(some["layers"]) < len(whole["layers"])
    assert values["kl"] > keys["kl"]
    assert own["kl"] < 1e-6, "the control transplants the recipient's own cache"


CHECKS: dict[str, Callable[[Agent], None]] = {
    "factual_recall": recalls,
    "where_is_it_computed": locates,
    "find_induction_heads": finds_induction,
    "steer_and_audit": steers,
    "compare_prompts": compares,
    "transplant_kv_cache": transplants,
}


@pytest.mark.real
async def test_in_chat_the_answer_is_next_once_its_opening_is_appended(real: Lab) -> None:
    question = "What is the capital of France?"
    async with connected(build_server(real)) as client:
        agent = Agent(client)
        await agent.play("factual_recall", prompt=question, answer=" Paris", rival=" London")
        bare = await ask(client, "track_token", prompt=question, token=" Paris", chat=True)
    assert agent.found["OPENING"] == "The capital of France is"
    assert agent.of("track_token")[-1]["rows"][-1]["rank"] == 0
    assert bare["rows"][-1]["rank"] > 100, "the first token of the reply is the opening's"


async def test_corrupting_the_key_shows_the_planted_head_that_corrupting_the_value_hides() -> None:
    heads = CIRCUITS["induction"].heads
    lab = Lab()
    lab.load("synthetic:induction", "dense")
    async with connected(build_server(lab)) as client:
        agent = Agent(client)
        await agent.play("find_induction_heads")
    value, key, query, *_ = (_moving(answer) for answer in agent.of("causal_trace"))
    assert value == query == {heads["induction"]}
    assert key == {heads["previous token"], heads["induction"]}
    assert (agent.found["LAYER"], agent.found["HEAD"]) == heads["induction"]
    places = [answer["rows"][0]["top"][0]["position"] for answer in agent.of("attention_pattern")]
    assert places[0] == places[2] == 7
    assert places[1] != 7


def _moving(trace: dict[str, Any]) -> set[tuple[int, int]]:
    return {
        (cell["layer"], cell.get("head", cell.get("kv_head"))) for cell in trace["top"] if abs(cell["recovered"]) > 0.2
    }


@pytest.mark.real
async def test_words_to_look_for_induction_with_fit_the_model_that_is_meant(real: Lab, lab: Lab) -> None:
    async with connected(build_server(real)) as client:
        assert " table river" in await _text(client)
        with pytest.raises(MCPError, match="words: ' abracadabra' are not one token each"):
            await _text(client, words="apple abracadabra tree")
        with pytest.raises(MCPError, match="words: give 3 different words"):
            await _text(client, words="apple apple tree")
        assert '" tree apple stone tree apple"' in await _text(client, words="tree apple stone")
    async with connected(build_server(lab)) as client:
        assert '"qwertyuiqwertyu"' in await _text(client)
        assert '"xyzxy"' in await _text(client, words="xyz")
        assert " table river" in await _text(client, model="smollm2-135m-instruct"), "not loaded, so supposed"


async def _text(client: Client, **given: str) -> str:
    text: str = (await client.get_prompt("find_induction_heads", given)).messages[0].content.text
    return text


async def test_a_token_that_is_several_of_the_models_tokens_is_refused(lab: Lab) -> None:
    async with connected(build_server(lab)) as client:
        with pytest.raises(MCPError, match="answer: ' Paris' is 6 tokens, not one"):
            await client.get_prompt("factual_recall", GIVEN["factual_recall"])
        with pytest.raises(MCPError, match="away: "):
            await client.get_prompt("steer_and_audit", {"prompt": "a", "toward": "b", "away": "bc"})


async def test_a_prompt_for_a_model_that_is_not_loaded_loads_it_first() -> None:
    async with connected(build_server()) as client:
        for name, given in GIVEN.items():
            text = (await client.get_prompt(name, given)).messages[0].content.text
            assert text.partition("\n1. ")[2].startswith("`load_model {}`: "), name


@pytest.mark.parametrize("mode", ERAS)
async def test_every_prompt_is_listed_with_its_arguments_and_says_what_to_conclude(lab: Lab, mode: str) -> None:
    async with connected(build_server(lab), mode) as client:
        prompts = {prompt.name: prompt for prompt in (await client.list_prompts()).prompts}
        texts = [(await client.get_prompt(name, LETTERS[name])).messages[0].content.text for name in prompts]
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
        for name, given in LETTERS.items():
            text = (await client.get_prompt(name, given | {"model": "synthetic"})).messages[0].content.text
            calls = CALL.findall(text)
            assert text.count("`") == 2 * len(calls), f"{name} has backticks around something else"
            for tool, call in calls:
                arguments = json.loads(re.sub(r"(?<![\w\"])[A-Z_]{2,}(?![\w\"])", "0", call))
                assert set(arguments) <= tools[tool], f"{name}: {tool}"
                if "model" in tools[tool]:
                    assert arguments["model"] == "synthetic", f"{name}: {tool}"


async def test_words_in_capitals_are_quoted_where_texts_belong_and_nowhere_else() -> None:
    async with connected(build_server()) as client:
        for name, given in GIVEN.items():
            text = (await client.get_prompt(name, given)).messages[0].content.text
            assert set(re.findall(r'"([A-Z_]{2,})"', text)) <= {"RUN", "OPENING"}, name


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
