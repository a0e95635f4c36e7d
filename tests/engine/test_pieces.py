"""Pieces inside a text: SentencePiece's mark of a space is kept, in tokenizer.json and in GGUF; BOS comes once."""

from pathlib import Path

import gguf_ids
import pytest
import tokenizer_dirs
import tokenizers

from engine.errors import TokenError
from engine.gguf_tokenizer import from_gguf
from engine.tokenizer import Tokenizer
from engine.tokenizer_files import from_directory

IDS = gguf_ids.read()


def words(path: Path, kind: str) -> tuple[Tokenizer, dict[str, int]]:
    """A directory's tokenizer, and the ids of its tokens."""
    at = tokenizer_dirs.directory(path / "words", kind)
    return from_directory(at, {}), tokenizers.Tokenizer.from_file(str(at / "tokenizer.json")).get_vocab()


@pytest.mark.parametrize("kind", tokenizer_dirs.SENTENCEPIECE)
def test_a_word_with_its_space_and_one_without_are_two_tokens_that_print_differently(kind, tmp_path):
    tokenizer, ids = words(tmp_path, kind)
    assert tokenizer.single(" Paris") == ids["\u2581Paris"]
    assert tokenizer.single("Paris") == ids["Paris"] != ids["\u2581Paris"]
    assert tokenizer.piece(ids["\u2581Paris"]) == " Paris"
    assert tokenizer.piece(ids["Paris"]) == "Paris"
    assert tokenizer.piece(ids["\u2581"]) == " "


def test_a_word_of_a_gguf_file_too():
    metadata = IDS.metadata("llama")
    tokenizer, tokens = from_gguf(metadata), metadata["tokenizer.ggml.tokens"]
    for word in ("com", "Mi"):
        marked, plain = tokens.index(f"\u2581{word}"), tokens.index(word)
        assert (tokenizer.single(f" {word}"), tokenizer.single(word)) == (marked, plain)
        assert (tokenizer.piece(marked), tokenizer.piece(plain)) == (f" {word}", word)
        assert tokenizer.encode(word) == [tokenizer.bos, marked]
        assert tokenizer.encode(word, inside=True) == [plain]


@pytest.mark.parametrize("kind", tokenizer_dirs.SENTENCEPIECE)
def test_a_prompt_still_begins_with_a_space_and_a_continuation_does_not(kind, tmp_path):
    tokenizer, ids = words(tmp_path, kind)
    assert tokenizer.encode("Paris in") == [1, ids["\u2581Paris"], ids["\u2581in"]]
    assert tokenizer.encode("Paris in", inside=True) == [ids["Paris"], ids["\u2581in"]]
    assert tokenizer.encode(" in Paris", inside=True) == [ids["\u2581in"], ids["\u2581Paris"]]
    assert tokenizer.decode([ids["\u2581Paris"], ids["\u2581in"]]) == "Paris in"
    assert tokenizer.decode([ids["\u2581in"], ids["Paris"]], inside=True) == " inParis"


@pytest.mark.parametrize("kind", tokenizer_dirs.SENTENCEPIECE)
@pytest.mark.parametrize("text", ["in</s>Paris", " in</s> Paris", "</s>in", "Paris", "in Paris</s>"])
def test_what_follows_a_special_token_is_the_same_inside_a_text(kind, text, tmp_path):
    """A text of two parts has the ids of its parts, whichever way this kind treats the beginning of a stretch."""
    tokenizer, ids = words(tmp_path, kind)
    assert tokenizer.encode(f"Paris{text}") == [*tokenizer.encode("Paris"), *tokenizer.encode(text, inside=True)]
    assert ids["</s>"] == 2


def test_bytes_of_a_character_and_byte_level_pieces_are_as_they_were(tmp_path):
    tokenizer, ids = words(tmp_path / "spm", "prepended")
    assert tokenizer.piece(ids["<0xC3>"]) == "\ufffd"
    assert tokenizer.decode([ids["<0xC3>"], ids["<0xA9>"]], inside=True) == "\u00e9"
    plain, ids = words(tmp_path / "bytes", "byte level")
    assert (plain.single(" the"), plain.single("the")) == (ids["\u0120the"], ids["the"])
    assert plain.encode("the and", inside=True) == plain.encode("the and")


def test_a_word_that_is_no_token_without_its_space_says_so(tmp_path):
    tokenizer, _ = words(tmp_path, "prepended")
    with pytest.raises(TokenError, match=r"'Par' is 2 tokens, not one: 'Pa' \(\d+\), 'r' \(\d+\).*starts with a space"):
        tokenizer.single("Par")


@pytest.mark.parametrize("kind", tokenizer_dirs.SENTENCEPIECE)
def test_a_text_that_begins_with_bos_gets_one(kind, tmp_path):
    tokenizer, ids = words(tmp_path, kind)
    assert tokenizer.encode("<s>") == [1]
    assert tokenizer.encode("<s>Paris")[:2] == [1, tokenizer.backend.encode("<s>Paris")[1]]
    assert tokenizer.encode("Paris<s>") == [1, ids["\u2581Paris"], 1]
    assert tokenizer.has_bos("<s>Paris")
    assert not any(map(tokenizer.has_bos, ("Paris<s>", "Paris", "</s>")))


def test_a_text_that_begins_with_bos_gets_one_from_a_gguf_file():
    tokenizer = from_gguf(IDS.metadata("llama"))
    assert tokenizer.encode("<s>x")[0] == 1
    assert tokenizer.encode("<s>x").count(1) == 1
    assert from_gguf(IDS.metadata("llama-bpe without BOS")).has_bos("<|im_start|>x") is False
