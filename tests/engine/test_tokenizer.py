"""Text to ids and back, against llama.cpp's ids on awkward text."""

import json
from pathlib import Path

import pytest
import tiny_files
import tokenizers
from tokenizers.processors import TemplateProcessing

from engine import load_model
from engine.catalog import CATALOGUE
from engine.errors import PromptError, TokenError

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "llama_cpp_ids.json").read_text())
TEXTS = [case["text"] for case in GOLDEN["cases"]]


def test_the_golden_ids_were_made_from_the_default_model():
    assert GOLDEN["provenance"]["file_sha256"] == CATALOGUE["smollm2-135m-instruct"].sha256
    assert GOLDEN["provenance"]["made_with"] == "llama-cpp-python 0.3.36"
    assert len(TEXTS) == len(set(TEXTS)) >= 35


@pytest.mark.real
@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: repr(case["text"])[:30])
def test_ids_equal_llama_cpps(smollm2, case):
    assert smollm2.tokenizer.encode(case["text"]) == case["ids"]


@pytest.mark.parametrize("text", TEXTS)
def test_decoding_gives_back_the_text(model, text):
    assert model.tokenizer.decode(model.tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", TEXTS)
def test_synthetic_tokens_are_bytes(synthetic, text):
    assert synthetic.tokenizer.encode(text) == list(text.encode())


def test_special_tokens_in_a_prompt_are_read_as_such(synthetic):
    assert synthetic.tokenizer.encode("a<|end|>b") == [97, 256, 98]
    assert synthetic.tokenizer.decode([97, 256, 98]) == "a<|end|>b"
    assert synthetic.tokenizer.eos == (256,)


@pytest.mark.real
def test_smollm2_ends_at_its_own_token_and_adds_no_bos(smollm2):
    words = smollm2.tokenizer
    assert words.bos is None
    assert [words.piece(token) for token in words.eos] == ["<|im_end|>", "<|endoftext|>"]
    assert words.vocabulary == smollm2.config.d_vocab


def test_part_of_a_character_shows_as_a_replacement_character(synthetic):
    assert synthetic.tokenizer.piece("é".encode()[0]) == "\ufffd"
    assert synthetic.tokenizer.piece(97) == "a"


@pytest.mark.real
def test_a_single_token_is_found_and_several_are_shown(smollm2):
    words = smollm2.tokenizer
    assert words.single(" Paris") == 7042
    with pytest.raises(TokenError, match=r"is 3 tokens, not one: .* \(\d+\), .*usually starts with a space"):
        words.single("Ljub")
    with pytest.raises(TokenError, match="is 0 tokens, not one: nothing"):
        words.single("")


def test_text_of_several_tokens_is_never_cut(synthetic):
    assert synthetic.tokenizer.single("a") == 97
    with pytest.raises(TokenError, match=r"'ab' is 2 tokens, not one: 'a' \(97\), 'b' \(98\)"):
        synthetic.tokenizer.single("ab")


def test_text_that_is_not_unicode_is_refused(model):
    with pytest.raises(TokenError, match=r"not valid Unicode: .* at character 1"):
        model.encode("a\ud800")


def test_an_empty_prompt_is_refused(model):
    for prompt in ("", []):
        with pytest.raises(PromptError, match="at least one token"):
            model.capture_residuals(prompt, [0])


def test_a_directorys_own_rule_decides_about_bos(tmp_path):
    directory = tiny_files.hf_directory(tmp_path / "plain")
    plain = load_model(directory).tokenizer
    backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    backend.post_processor = TemplateProcessing(single="<|start|> $A", special_tokens=[("<|start|>", 0)])
    backend.save(str(directory / "tokenizer.json"))
    with_bos = load_model(directory).tokenizer
    ids = plain.encode("the an")
    assert [plain.piece(i) for i in ids] == ["the", " ", "an"]
    assert (plain.bos, with_bos.bos) == (None, 0)
    assert with_bos.encode("the an") == [0, *ids]
    assert with_bos.single("the") == plain.single("the")
    assert plain.eos == (1,)
