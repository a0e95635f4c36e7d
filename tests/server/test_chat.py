"""chat=true: texts go through the model's own template, and the answer shows exactly what the model read."""

import dataclasses
from pathlib import Path

import pytest
import tiny_files
from clients import ERAS, ask, connected, refused

from engine import forward, generate, load_model
from engine.chat import ChatTemplate
from engine.distribution import kl_divergence
from engine.tokenizer import Tokenizer
from server.app import build_server
from server.lab import Lab
from server.tools import TOOLS

pytestmark = pytest.mark.anyio

TEMPLATE = ChatTemplate("[{{ messages[0].role[0] }}]{{ messages[0].content }}[a]")


@pytest.fixture
def talking(lab: Lab) -> Lab:
    """The synthetic model, with a chat template."""
    slot = lab.slots[0]
    assert slot.loaded is not None
    words = slot.loaded.model.tokenizer
    slot.loaded.model = dataclasses.replace(
        slot.loaded.model, tokenizer=Tokenizer(words.backend, words.bos, words.eos, lambda: TEMPLATE)
    )
    return lab


@pytest.mark.parametrize("mode", ERAS)
async def test_the_tokens_are_those_of_the_templated_text(talking: Lab, mode: str) -> None:
    async with connected(build_server(talking), mode) as client:
        answer = await ask(client, "tokenize", text="hi", chat=True)
        plain = await ask(client, "tokenize", text="hi")
    assert "".join(token["text"] for token in answer["tokens"]) == "[u]hi[a]"
    ids = [token["id"] for token in answer["tokens"]]
    assert f"'[u]hi[a]' (tokens {ids})" in answer["notice"]
    assert plain["count"] == 2
    assert "template" not in plain["notice"]


async def test_a_templated_prompt_is_the_same_as_its_ids(talking: Lab) -> None:
    ids = talking.models[0].model.encode("[u]hi[a]")
    async with connected(build_server(talking)) as client:
        chat = await ask(client, "logit_lens", prompt="hi", chat=True)
        same = await ask(client, "logit_lens", prompt=ids, chat=True)
    assert chat["rows"] == same["rows"]


@pytest.mark.parametrize("text", ["true", "True", "false", "FALSE", " null ", "None"])
async def test_a_truth_value_sent_as_a_text_begins_no_answer(talking: Lab, text: str) -> None:
    meant = text == text.lower() == "true" or text == "True"
    async with connected(build_server(talking)) as client:
        answers = [await ask(client, "tokenize", text="hi", chat=chat) for chat in (text, meant)]
    assert answers[0] == answers[1]
    assert answers[0]["count"] == (len("[u]hi[a]") if meant else len("hi"))


async def test_every_prompt_of_a_call_is_templated_and_shown(talking: Lab) -> None:
    model = talking.models[0].model
    base, donor = (forward(model, model.encode(f"[u]{text}[a]")).logits[0, -1] for text in ("hello", "jelly"))
    targets = [{"layer": -1, "position": -1}]
    over = {"kind": "mean", "layers": [0], "point": "attn_out", "over": ["other"], "positions": [0]}
    async with connected(build_server(talking)) as client:
        answer = await ask(client, "patch_activations", donor="jelly", recipient="hello", targets=targets, chat=True)
        averaged = await ask(client, "forward_ablate", prompt="hello", interventions=[over], chat=True)
    assert answer["kl"] == pytest.approx(kl_divergence(donor, base), rel=1e-4)
    assert all(f"'[u]{text}[a]' (tokens [" in answer["notice"] for text in ("hello", "jelly"))
    assert "'[u]other[a]'" in averaged["notice"]


async def test_a_job_takes_chat_too(talking: Lab) -> None:
    arguments = {"prompt": "hi", "chat": True}
    async with connected(build_server(talking)) as client:
        run = (await ask(client, "start_job", tool="logit_lens", arguments=arguments))["run"]
        job = await ask(client, "get_job", run=run)
    assert "'[u]hi[a]'" in job["result"]["notice"]


async def test_a_model_without_a_template_says_so(lab: Lab) -> None:
    async with connected(build_server(lab)) as client:
        assert "no chat template" in await refused(client, "logit_lens", prompt="hi", chat=True)


async def test_every_tool_that_takes_a_prompt_takes_chat() -> None:
    prompted = {"prompt", "donor", "recipient", "clean", "corrupt", "a", "b", "text"}
    async with connected(build_server()) as client:
        for tool in (await client.list_tools()).tools:
            arguments = set(tool.input_schema["properties"])
            assert ("chat" in arguments) == bool(arguments & prompted), tool.name
    assert len(TOOLS) > 20


async def test_a_directory_brings_its_template(tmp_path: Path) -> None:
    path = tiny_files.hf_directory(tmp_path / "tiny")
    (path / "chat_template.jinja").write_text("the {{ messages[0].content }} the")
    lab = Lab()
    model = load_model(str(path))
    async with connected(build_server(lab)) as client:
        await ask(client, "load_model", model=str(path))
        answer = await ask(client, "tokenize", text="the", chat=True)
    assert [token["id"] for token in answer["tokens"]] == list(model.tokenizer.backend.encode("the the the"))


@pytest.mark.parametrize("mode", ERAS)
async def test_an_answer_may_be_begun_and_its_next_token_read(talking: Lab, mode: str) -> None:
    ids = talking.models[0].model.encode("[u]hello[a]It is")
    async with connected(build_server(talking), mode) as client:
        begun = await ask(client, "logit_lens", prompt="hello", chat="It is")
        same = await ask(client, "logit_lens", prompt=ids)
        assert "chat" in await refused(client, "logit_lens", prompt="hello", chat="")
        assert "chat" in await refused(client, "logit_lens", prompt="hello", chat=1)
    assert begun["rows"] == same["rows"]
    assert f"'[u]hello[a]It is' (tokens {ids})" in begun["notice"]


@pytest.fixture
def begun(lab: Lab) -> Lab:
    """The synthetic model, its end-of-text token as BOS."""
    slot = lab.slots[0]
    assert slot.loaded is not None
    words = slot.loaded.model.tokenizer
    slot.loaded.model = dataclasses.replace(slot.loaded.model, tokenizer=Tokenizer(words.backend, 256, ()))
    return lab


async def test_a_text_that_brings_its_bos_has_one_and_a_notice(begun: Lab) -> None:
    async with connected(build_server(begun)) as client:
        brought = await ask(client, "tokenize", text="<|end|>hi")
        plain = await ask(client, "tokenize", text="hi")
        rows = [(await ask(client, "logit_lens", prompt=text))["rows"] for text in ("<|end|>hi", "hi")]
    assert [token["id"] for token in brought["tokens"]] == [token["id"] for token in plain["tokens"]] == [256, *b"hi"]
    assert "BOS stands there already" in brought["notice"]
    assert "'<|end|>hi'" in brought["notice"]
    assert "BOS" not in plain["notice"]
    assert rows[0] == rows[1]


async def test_a_prompt_that_continues_a_cache_has_no_bos(begun: Lab) -> None:
    model = begun.models[0].model
    async with connected(build_server(begun)) as client:
        kept = await ask(client, "prefill_inject", recipient="hello", donor="hello", max_new_tokens=1, keep=True)
        after = await ask(client, "generate_with_hooks", prompt="o there", cache=kept["handle"], max_new_tokens=8)
        named = await ask(client, "generate_with_hooks", prompt=[*b"o there"], cache=kept["handle"], max_new_tokens=8)
    whole = generate(model, model.encode("hello there"), 8)
    assert after["baseline"]["ids"] == named["baseline"]["ids"] == whole.ids
