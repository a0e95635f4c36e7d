"""What tools say of tokens without a row of the embedding, and of rows without a token."""

from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import tiny_files
from clients import ask, connected, refused
from mcp import Client

from server.app import build_server
from server.lab import Lab

pytestmark = pytest.mark.anyio
ROWLESS = "token id 262 is the tokenizer's 'and', which the model has no embedding for"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Without a row for "and", the last token."""
    tensors = tiny_files.weights()
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:-1]
    made = tiny_files.hf_directory(tmp_path / "short", tensors, vocab_size=262)
    (made / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    return made


@pytest.fixture
async def client(path: Path) -> AsyncIterator[Client]:
    async with connected(build_server(Lab())) as client:
        await ask(client, "load_model", model=str(path))
        yield client


CALLS = {
    "tokenize": {"text": "the and"},
    "logit_lens": {"prompt": "the and"},
    "track_token": {"prompt": "the", "token": "and"},
    "track_race": {"prompt": "the", "tokens": ["the", "and"]},
    "embedding_neighbors": {"token": "and"},
    "forward_ablate": {"prompt": "the the", "layers": [0], "token": "and"},
    "causal_trace": {"clean": "the the", "corrupt": "the an", "token": "and"},
    "kv_inject_test": {"recipient": "the the", "donor": "an the", "target": "and"},
    "generate_with_hooks": {"prompt": "and"},
}


@pytest.mark.parametrize("tool", CALLS)
async def test_a_token_without_a_row_is_refused_by_name(tool: str, client: Client) -> None:
    assert (await refused(client, tool, **CALLS[tool])).startswith(ROWLESS)


async def test_and_so_it_is_in_a_chat(client: Client) -> None:
    assert (await refused(client, "tokenize", text="and", chat=True)).startswith(ROWLESS)
    assert (await ask(client, "tokenize", text="the", chat=True))["count"] == 1


async def test_rows_without_a_token_show_as_such_in_rankings(tmp_path: Path) -> None:
    tensors = tiny_files.weights()
    embed = tensors["model.embed_tokens.weight"]
    tensors["model.embed_tokens.weight"] = np.concatenate([embed, 50 * embed[:1], -50 * embed[:1]])
    path = tiny_files.hf_directory(tmp_path / "long", tensors, vocab_size=265)
    async with connected(build_server(Lab())) as client:
        await ask(client, "load_model", model=str(path))
        found = await ask(client, "embedding_neighbors", token=0, k=2)
        lens = await ask(client, "logit_lens", prompt="the", layers=[1], k=1)
    assert {token["text"] for token in found["top"]} == {"<|start|>", "[no token 263]"}
    assert "[no token 26" in str(lens)
