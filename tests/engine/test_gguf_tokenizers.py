"""Tokenizers rebuilt from GGUF metadata: llama.cpp's ids for every kind, on awkward text.

`make oracle-gguf` makes `tests/golden/gguf_ids.json`: small vocabularies, and what llama.cpp makes of each text.
"""

from itertools import combinations
from typing import Any

import gguf_ids
import pytest

from engine.errors import EngineError, TokenError
from engine.gguf_tokenizer import PRE_TOKENIZERS, from_gguf
from engine.tokenizer import Tokenizer

IDS = gguf_ids.read()
EQUAL = [{"llama-bpe", "llama-v3", "llama3"}, {"qwen2", "deepseek-r1-qwen"}]
"""Names for one thing."""


def words(kind: str, **changes: Any) -> Tokenizer:
    """`changes` to tokenizer.ggml.*; None takes an entry out."""
    changed = IDS.metadata(kind) | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    return from_gguf({key: value for key, value in changed.items() if value is not None})


@pytest.mark.parametrize("kind", IDS.kinds)
def test_ids_equal_llama_cpps(kind):
    tokenizer = words(kind)
    for text, ids in zip(IDS.texts, IDS.ids[kind], strict=True):
        doubled = ids[:2] == [tokenizer.bos] * 2  # llama.cpp warns of a second BOS, and puts it there
        assert tokenizer.encode(text) == ids[doubled:], f"{kind}: {text!r}"


def test_the_golden_ids_cover_every_kind_and_tell_them_apart():
    assert IDS.made_with == "0.3.36"
    assert {*PRE_TOKENIZERS} <= IDS.kinds.keys() == IDS.ids.keys()
    assert len(IDS.texts) >= 100
    for a, b in combinations(IDS.kinds, 2):
        same = any({a, b} <= names for names in EQUAL)
        assert (IDS.ids[a] == IDS.ids[b]) == same, f"{a} and {b}"


@pytest.mark.parametrize("kind", IDS.kinds)
def test_decoding_gives_back_the_text_but_for_what_was_put_in_front(kind):
    tokenizer = words(kind, add_bos_token=False, add_space_prefix=False)
    for text in IDS.texts:
        if kind == "phi3" and "<" in text:  # blanks after a special token are gone
            continue
        if "\u2581" in text and kind in ("llama", "gemma", "phi3", "scored"):  # stands for a space
            continue
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_sentencepiece_puts_a_space_in_front_unless_told_otherwise():
    assert words("llama").decode(words("llama").encode("the")) == "<s> the"
    assert words("gemma").decode(words("gemma").encode("the")) == "</s>the"  # its BOS is token 2 here


def test_part_of_a_character_shows_as_a_replacement_character():
    for kind in ("qwen2", "gemma"):
        tokenizer = words(kind, add_bos_token=False)
        first, *rest = tokenizer.encode("\u0904")
        assert rest
        assert tokenizer.piece(first) == "\ufffd"


def test_generation_ends_at_the_end_of_a_text_a_turn_and_a_message():
    named = words("qwen2", eos_token_id=None)
    assert [*map(named.piece, named.eos)] == ["<|eot_id|>", "<|im_end|>", "<|endoftext|>"]
    assert words("qwen2", eos_token_id=3, eot_token_id=4, eom_token_id=3).eos == (3, 4, *named.eos)
    assert words("llama", eos_token_id=None).eos[0] == 2
    plain = {"tokens": ["a", "b"], "token_type": [1, 1], "merges": [], "eos_token_id": None}
    assert words("qwen2", **plain).eos == ()


@pytest.mark.parametrize(
    ("kind", "changes", "bos"),
    [
        ("qwen2", {"add_bos_token": None}, None),
        ("gpt-2", {"add_bos_token": True, "bos_token_id": 7}, 7),
        ("llama-bpe", {"add_bos_token": None, "bos_token_id": 9}, 9),
        ("llama-bpe", {"add_bos_token": False}, None),
        ("llama", {"add_bos_token": None, "bos_token_id": None}, 1),
        ("llama", {"add_bos_token": False}, None),
    ],
)
def test_bos_is_added_where_llama_cpp_adds_it(kind, changes, bos):
    assert words(kind, **changes).bos == bos


def test_text_of_no_token_and_no_byte_is_refused():
    tokenizer = words("llama", tokens=["<unk>", "<s>", "</s>", "a"], token_type=[2, 3, 3, 1], scores=[0.0] * 4)
    with pytest.raises(TokenError, match="neither this text nor the byte <0xE2>"):
        tokenizer.encode("a")  # the space in front is U+2581
    assert words(
        "llama", tokens=["a"], token_type=[1], scores=None, add_space_prefix=False, add_bos_token=False
    ).encode("aa") == [0, 0]


def test_an_empty_token_has_llama_cpps_name():
    tokens = ["<unk>", "<s>", "</s>", ""]
    tokenizer = words("llama", tokens=tokens, token_type=[2, 3, 3, 1], scores=[0.0] * 4)
    assert tokenizer.piece(3) == "[EMPTY_3]"


@pytest.mark.parametrize(
    ("kind", "changes", "says"),
    [
        ("qwen2", {"model": "bert"}, "the file's tokenizer is 'bert'"),
        ("qwen2", {"pre": "default"}, "with pre-tokenizer 'default'; supported: 'llama', and 'gpt2' with"),
        ("qwen2", {"pre": None}, "with pre-tokenizer None"),
        ("qwen2", {"tokens": ["a", "a"]}, "holds 'a' twice"),
        ("qwen2", {"tokens": []}, "tokenizer.ggml.tokens is empty"),
        ("qwen2", {"add_eos_token": True}, "add_eos_token is true"),
        ("qwen2", {"add_bos_token": True, "bos_token_id": None}, "bos_token_id is None; it must be an id"),
        ("llama", {"scores": [1.0]}, "scores is .* a number for each token"),
        ("llama", {"tokens": ["a"], "token_type": [1], "scores": [float("nan")]}, "a number for each token"),
        ("llama", {"tokens": ["a"], "token_type": [1], "scores": ["x"]}, "a number for each token"),
        ("llama", {"tokens": ["<0xzz>"], "token_type": [6], "scores": [0.0]}, "is marked as a byte"),
        ("llama", {"add_space_prefix": 1}, "add_space_prefix is 1; it must be true or false"),
        ("llama", {"bos_token_id": 9_999_999}, "bos_token_id is 9999999"),
    ],
)
def test_a_vocabulary_that_cannot_be_right_is_refused(kind, changes, says):
    with pytest.raises(EngineError, match=says) as refusal:
        words(kind, **changes)
    assert len(str(refusal.value)) < 300
