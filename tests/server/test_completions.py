"""Completions of models, tokens and handles."""

from pathlib import Path

import pytest
import tiny_files
from clients import ERAS, ask, connected
from mcp import Client
from mcp.types import Completion, PromptReference, ResourceTemplateReference

from engine import Model
from server.app import build_server
from server.lab import Lab
from server.sources import Sources

pytestmark = pytest.mark.anyio


async def completed(client: Client, argument: str, value: str, **known: str) -> Completion:
    ref = PromptReference(type="ref/prompt", name="factual_recall")
    return (await client.complete(ref, {"name": argument, "value": value}, known or None)).completion


async def handles(client: Client, kind: str, value: str) -> list[str]:
    ref = ResourceTemplateReference(type="ref/resource", uri=f"mechscope://{kind}/{{handle}}")
    return (await client.complete(ref, {"name": "handle", "value": value})).completion.values


@pytest.mark.parametrize("mode", ERAS)
async def test_a_model_is_completed_from_what_is_loaded_and_what_is_known(lab: Lab, mode: str) -> None:
    async with connected(build_server(lab), mode) as client:
        every = await completed(client, "model", "")
        assert every.values[:2] == ["synthetic", lab.models[0].handle]
        assert every.total == len(every.values)
        assert (await completed(client, "model", "smol")).values == ["smollm2-135m-instruct"]
        assert (await completed(client, "model", "model:")).values == [lab.models[0].handle]


async def test_models_in_the_allowed_folders_are_completed_by_a_name_that_loads(tmp_path: Path) -> None:
    tiny_files.gguf_file(tmp_path / "tiny.gguf")
    (tmp_path / "notes.txt").write_text("no model")
    async with connected(build_server(Lab(sources=Sources([tmp_path])))) as client:
        assert (await completed(client, "model", "tin")).values == ["tiny.gguf"]
        assert (await completed(client, "model", "not")).values == []
        await ask(client, "load_model", model="tiny.gguf")


@pytest.mark.real
async def test_a_token_is_completed_from_the_vocabulary_and_its_leading_space_matters(smollm2: Model) -> None:
    lab = Lab()
    lab.load("smollm2-135m-instruct", "dense")
    async with connected(build_server(lab)) as client:
        spaced, plain = await completed(client, "answer", " Par"), await completed(client, "answer", "Par")
        assert " Paris" in spaced.values
        assert "Paris" not in spaced.values
        assert all(value.startswith("Par") for value in plain.values)
        assert {smollm2.tokenizer.piece(smollm2.tokenizer.single(value)) for value in spaced.values} == set(
            spaced.values
        )
        assert (spaced.total, spaced.has_more) == (len(spaced.values), False)
        many = await completed(client, "rival", " ")
        assert (len(many.values), many.has_more) == (100, True)
        assert many.total > 20_000


async def test_with_several_models_a_token_needs_to_know_which(lab: Lab) -> None:
    lab.load("synthetic", "scoped")
    async with connected(build_server(lab)) as client:
        assert (await completed(client, "answer", "a")).values == []
        assert (await completed(client, "answer", "a", model=lab.models[1].handle)).values == ["a"]


async def test_free_text_and_unknown_arguments_complete_to_nothing(lab: Lab) -> None:
    async with connected(build_server(lab)) as client:
        for argument in ("prompt", "no_such_argument"):
            assert (await completed(client, argument, "")).total == 0
        assert await handles(client, "elsewhere", "") == []


async def test_handles_are_completed_by_kind_for_their_owner_only(lab: Lab) -> None:
    lab.store.put("act", "theirs", "ann", {}, {})
    lab.store.start_run("ann", "logit_lens", {}, {})
    async with connected(build_server(lab)) as client:
        act = (await ask(client, "capture_residuals", prompt="hello"))["handle"]
        run = (await ask(client, "start_job", tool="logit_lens", arguments={"prompt": "hello"}))["run"]
        assert await handles(client, "tensors", "") == [act]
        assert await handles(client, "tensors", act[:-5]) == [act]
        assert await handles(client, "tensors", "kv:") == []
        assert await handles(client, "runs", "run:logit") == [run]
        await ask(client, "get_job", run=run)
