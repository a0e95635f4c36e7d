"""A prompt that continues what a cache holds has no BOS in front, so that two parts are what the whole is."""

import dataclasses

import pytest

from engine import KVCache, forward, generate
from engine.chat import ChatTemplate
from engine.errors import InputError
from engine.tokenizer import Tokenizer

BOS = 256
TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}{% endfor %}[a]"


@pytest.fixture
def begun(synthetic):
    """The synthetic model, its end-of-text token as BOS, with a chat template that writes it."""
    words = synthetic.tokenizer
    template = ChatTemplate(TEMPLATE, {"bos_token": "<|end|>"})
    return dataclasses.replace(synthetic, tokenizer=Tokenizer(words.backend, BOS, (), lambda: template))


def held(model, text: str) -> KVCache:
    cache = KVCache.with_layers(model.config.n_layers)
    forward(model, model.encode(text), cache=cache)
    return cache


def test_generation_from_a_cache_is_generation_from_the_whole_text(begun):
    whole = generate(begun, begun.encode("hello there"), 8)
    assert begun.generate_with_hooks(" there", 8, cache=held(begun, "hello")) == (whole.text, whole.ids)
    with_bos = generate(begun, begun.encode(" there"), 8, cache=held(begun, "hello"))
    assert with_bos.ids != whole.ids, "the control: a BOS in the middle is another text"


def test_an_empty_cache_holds_nothing_to_continue(begun):
    cache = KVCache.with_layers(begun.config.n_layers)
    plain = generate(begun, begun.encode("hello"), 4)
    assert begun.generate_with_hooks("hello", 4, cache=cache) == (plain.text, plain.ids)
    assert cache.next_position == len("hello") + 1 + 3


def test_a_turn_that_continues_has_no_bos_either(begun):
    assert begun.encode_chat("hi") == [BOS, *b"[u]hi[a]"]
    assert begun.encode_chat("hi", inside=True) == [*b"[u]hi[a]"]


def test_an_answer_may_be_begun(begun):
    assert begun.encode_chat("hi", "It is") == [BOS, *b"[u]hi[a]It is"]
    with pytest.raises(InputError, match="no chat template"):
        dataclasses.replace(begun, tokenizer=Tokenizer(begun.tokenizer.backend, BOS, ())).encode_chat("hi", "It is")
