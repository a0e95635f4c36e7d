"""A vocabulary and an embedding of different lengths: tokens without a row, and rows without a token."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_files
from gguf import GGUFWriter
from tiny_files import TOKENS, VOCABULARY, Weights

from engine import Metric, Model, forward, generate, kv_inject_test, load_model
from engine.errors import TokenError

AND, THE = VOCABULARY["and"], VOCABULARY["the"]
ROWLESS = "token id 262 is the tokenizer's 'and', which the model has no embedding for; valid: 0 to 261"


def with_rows(rows: int) -> Weights:
    """The tiny model's weights with so many rows of embedding."""
    tensors = tiny_files.weights()
    embed = tensors["model.embed_tokens.weight"]
    more = np.random.default_rng(1).standard_normal((max(rows - len(embed), 0), embed.shape[1])).astype(np.float32)
    return tensors | {"model.embed_tokens.weight": np.concatenate([embed[:rows], more])}


@pytest.fixture
def short(tmp_path: Path) -> Model:
    """Lacks a row for the last token, "and"."""
    path = tiny_files.hf_directory(tmp_path / "short", with_rows(len(TOKENS) - 1), vocab_size=len(TOKENS) - 1)
    template = {"chat_template": "{{ messages[0]['content'] }}"}
    (path / "tokenizer_config.json").write_text(json.dumps(template))
    return load_model(path)


@pytest.fixture(params=["directory", "gguf"])
def long(request: pytest.FixtureRequest, tmp_path: Path) -> Model:
    """Has three rows more than there are tokens."""
    tensors, rows = with_rows(len(TOKENS) + 3), len(TOKENS) + 3
    if request.param == "directory":
        return load_model(tiny_files.hf_directory(tmp_path / "long", tensors, vocab_size=rows))

    def sized(writer: GGUFWriter, _: Weights) -> None:
        writer.add_uint32("llama.vocab_size", rows)

    leave_out = ("llama.vocab_size",)
    return load_model(tiny_files.gguf_file(tmp_path / "long.gguf", tensors, {}, change=sized, leave_out=leave_out))


def test_a_model_with_fewer_rows_than_tokens_computes_as_if_the_others_did_not_exist(short, tmp_path):
    whole = load_model(tiny_files.hf_directory(tmp_path / "whole"))
    assert (short.config.d_vocab, short.tokenizer.vocabulary) == (262, 263)
    ids = short.encode("the an the")
    assert ids == whole.encode("the an the")
    found, expected = (forward(model, ids, logits_at="all").logits for model in (short, whole))
    np.testing.assert_allclose(found, expected[..., :262], rtol=1e-5, atol=1e-5)


USES = {
    "a prompt": lambda model: forward(model, model.encode("the and")),
    "a chat": lambda model: forward(model, model.encode_chat("the and")),
    "generation": lambda model: generate(model, model.encode("and"), 1),
    "a metric": lambda model: Metric("logit", AND).check(model),
    "a token that is tracked": lambda model: model.track_token_at(np.ones(32, np.float32), AND),
    "an embedding": lambda model: model.embedding_for(AND),
    "an unembedding": lambda model: model.unembedding_for(AND),
    "a target": lambda model: kv_inject_test(model, [5, 6, 7], [8, 9, 7], AND),
}


@pytest.mark.parametrize("use", USES)
def test_a_token_without_a_row_is_an_error_where_it_is_used(use, short):
    with pytest.raises(TokenError) as refusal:
        USES[use](short)
    assert str(refusal.value) == ROWLESS


def test_an_id_beyond_rows_and_tokens_does_not_exist(short):
    for unknown in (263, 1 << 40, -1):
        with pytest.raises(TokenError, match=rf"token id {unknown} does not exist; valid: 0 to 261"):
            short.check_token(unknown)


def test_a_row_without_a_token_shows_as_such(long):
    row = len(TOKENS) + 1
    assert long.tokenizer.piece(row) == "[no token 264]"
    assert long.tokenizer.decode([THE, row, row, THE]) == "the[no token 264][no token 264]the"
    assert long.tokenizer.decode([THE, THE]) == "thethe"
    assert long.tokenizer.decode([]) == ""


def test_generation_that_writes_a_row_without_a_token_shows_it(long):
    row, told = len(TOKENS) + 1, []
    long.params.unembed[row] *= 100
    made = generate(long, [THE, THE], 40, on_token=lambda token, text: told.append((token, text)))
    assert (row, "[no token 264]") in told
    assert made.text == "".join(long.tokenizer.decode([token]) for token in made.ids)


def test_rows_and_tokens_are_told_apart_in_mapped_models_too(tmp_path, monkeypatch):
    monkeypatch.setattr("engine.load.LEAST", 0)
    monkeypatch.setattr("engine.converted.directory", lambda: tmp_path / "converted")
    path = tiny_files.hf_directory(tmp_path / "long", with_rows(len(TOKENS) + 3), vocab_size=len(TOKENS) + 3)
    load_model(path)
    mapped = load_model(path)
    assert mapped.conversion == "used"
    assert mapped.tokenizer.piece(264) == "[no token 264]"
