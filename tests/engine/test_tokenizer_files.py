"""Tokens, chat templates and ends that only the files beside tokenizer.json tell, as transformers reads them.

`python -m oracle.directories --write` makes `tests/golden/directory_ids.json`.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_files
import tokenizer_dirs

from engine import generate, load_model
from engine.errors import DamagedFile, InputError, UnknownModel
from engine.tokenizer import Tokenizer, named_ends
from engine.tokenizer_files import from_directory

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "directory_ids.json").read_text("utf-8"))
CHATTING = [name for name, said in GOLDEN["files"].items() if "chats" in said]


def words(path: Path, files: dict[str, Any], kind: str = "byte level", **raw: Any) -> Tokenizer:
    return from_directory(tokenizer_dirs.directory(path / "words", kind, files), raw)


def single_bos(ids: list[int]) -> list[int]:
    """transformers puts BOS in front of a text that has one, too."""
    return ids[1:] if ids[:2] == [1, 1] else ids


@pytest.mark.parametrize("name", tokenizer_dirs.FILES)
def test_ids_equal_transformers(name, tmp_path):
    tokenizer = words(tmp_path, tokenizer_dirs.FILES[name])
    for text, ids in zip(tokenizer_dirs.TEXTS, GOLDEN["files"][name]["ids"], strict=True):
        assert tokenizer.encode(text) == ids, text


@pytest.mark.parametrize("kind", tokenizer_dirs.SENTENCEPIECE)
def test_ids_of_sentencepiece_equal_transformers(kind, tmp_path):
    tokenizer = words(tmp_path, {"tokenizer_config.json": tokenizer_dirs.FAST}, kind)
    for text, ids in zip(tokenizer_dirs.PIECE_TEXTS, GOLDEN["kinds"][kind]["ids"], strict=True):
        assert tokenizer.encode(text) == single_bos(ids), text


def of_class(path: Path, name: str) -> Tokenizer:
    kind, files = tokenizer_dirs.CLASSES[name]
    return words(path, files, kind, **files["config.json"])


@pytest.mark.parametrize("name", tokenizer_dirs.CLASSES)
def test_ids_and_texts_of_a_class_equal_transformers(name, tmp_path):
    tokenizer, said = of_class(tmp_path, name), GOLDEN["classes"][name]
    asked = zip(tokenizer_dirs.CLASS_TEXTS, said["ids"], said["texts"], strict=True)
    for text, ids, decoded in asked:
        assert tokenizer.decode(ids) == decoded, text
        assert tokenizer.encode(text) == (ids[1:] if ids[:2] == [tokenizer.bos] * 2 else ids), text


def test_chats_and_special_tokens_of_a_class_equal_transformers(tmp_path):
    chatting = [name for name, said in GOLDEN["classes"].items() if "chats" in said]
    assert len(chatting) >= 4
    for name in chatting:
        template, said = of_class(tmp_path / name, name).chat_template, GOLDEN["classes"][name]
        assert template.tokens == said["special"], name
        assert template.render(tokenizer_dirs.TURNS) == said["chats"]["plain"], name


@pytest.mark.parametrize("name", tokenizer_dirs.CLASSES)
def test_a_text_of_two_parts_has_the_ids_of_its_parts_in_every_class(name, tmp_path):
    tokenizer = of_class(tmp_path, name)
    for text in (" in</s>Paris", "\nthe", "</s> Paris", "<|im_start|>the"):
        whole = tokenizer.encode(f"Paris{text}")
        assert whole == [*tokenizer.encode("Paris"), *tokenizer.encode(text, inside=True)], text


def test_the_golden_ids_tell_the_classes_from_the_file():
    """Directories of one tokenizer.json that differ in their class alone have other ids."""
    said = {name: answers["ids"] for name, answers in GOLDEN["classes"].items()}
    assert GOLDEN["classes"].keys() == tokenizer_dirs.CLASSES.keys()
    for rebuilt, filed in (("Llama 2", "Mistral"), ("Llama 2", "Llama 2, no class"), ("StarCoder 2", "OLMo 2"),
                           ("Qwen 3", "Qwen 3, as filed"), ("Phi 2, a space", "Phi 2"), ("Pythia", "GPT-2"),
                           ("Pythia, BOS", "Llama 3"), ("split", "Llama 3"), ("Gemma 2", "Mistral")):  # fmt: skip
        assert said[rebuilt] != said[filed], (rebuilt, filed)
    assert said["Llama 2"][1] == [1, 278]  # " Paris"
    assert said["Llama 2, no class"][1] == [1, 259, 278]


@pytest.mark.parametrize(
    ("kind", "settings", "error", "says"),
    [
        ("prepended", {"tokenizer_class": "T5TokenizerFast"}, UnknownModel, "T5Tokenizer.*PreTrainedTokenizerFast"),
        ("written", {"tokenizer_class": "CohereTokenizer"}, UnknownModel, "CohereTokenizer"),
        ("unigram", {"tokenizer_class": "LlamaTokenizer"}, UnknownModel, "Unigram.*makes BPE"),
        ("prepended", {"tokenizer_class": 5}, DamagedFile, "tokenizer_class is 5"),
        ("written", {"split_special_tokens": "no"}, DamagedFile, "split_special_tokens is 'no'"),
    ],
)
def test_a_class_that_is_not_followed_is_refused_by_name(kind, settings, error, says, tmp_path):
    with pytest.raises(error, match=says):
        words(tmp_path, {"tokenizer_config.json": settings}, kind, model_type="llama")


def test_the_golden_ids_tell_the_files_apart():
    assert GOLDEN["files"].keys() == tokenizer_dirs.FILES.keys()
    plain = GOLDEN["files"]["nothing more"]["ids"]
    same = {name for name, said in GOLDEN["files"].items() if said["ids"] == plain}
    assert same == {"nothing more", "map beside ids", "named chats", "chats in files"}


@pytest.mark.parametrize("name", CHATTING)
@pytest.mark.parametrize("asked", tokenizer_dirs.ASKED)
def test_chats_equal_transformers(name, asked, tmp_path):
    expected = GOLDEN["files"][name]["chats"][asked]
    given = dict(tokenizer_dirs.ASKED[asked])
    named = given.pop("chat_template", None)
    template = words(tmp_path, tokenizer_dirs.FILES[name]).chat_template
    if expected is None:
        with pytest.raises(InputError, match="none called 'rag' among its chat templates"):
            template.render(tokenizer_dirs.TURNS, named, **given)
    else:
        assert template.render(tokenizer_dirs.TURNS, named, **given) == expected


def test_the_special_tokens_of_a_template_are_transformers(tmp_path):
    assert len(CHATTING) >= 3
    for name in CHATTING:
        template = words(tmp_path / name.replace(" ", "-"), tokenizer_dirs.FILES[name]).chat_template
        assert template.tokens == GOLDEN["files"][name]["special"], name


def test_a_directory_without_a_default_template_names_those_it_has(tmp_path):
    files = {"additional_chat_templates/rag.jinja": "{{ documents | length }}"}
    template = words(tmp_path, files).chat_template
    with pytest.raises(InputError, match="none by default among its chat templates; it has rag"):
        template.render(tokenizer_dirs.TURNS)
    assert template.render(tokenizer_dirs.TURNS, "rag", documents=[{}, {}]) == "2"
    assert words(tmp_path / "none", {}).chat_template is None


@pytest.mark.parametrize(
    ("files", "raw", "eos"),
    [
        ({}, {}, (1,)),  # <|end|>, by its name
        ({"generation_config.json": {"eos_token_id": 5}}, {"eos_token_id": 7}, (5,)),
        ({"generation_config.json": {"eos_token_id": [5, 6]}}, {"eos_token_id": [6]}, (5, 6)),
        ({"generation_config.json": {"eos_token_id": 0}}, {"eos_token_id": 7}, (0,)),
        ({"generation_config.json": {"do_sample": True}}, {"eos_token_id": 7}, (7,)),
        ({"generation_config.json": {"eos_token_id": None}}, {"text_config": {"eos_token_id": [7, 1]}}, (7, 1)),
        ({"tokenizer_config.json": {"eos_token": "<|start|>"}}, {}, (0, 1)),
        ({"tokenizer_config.json": {"eos_token": {"content": "<|stop|>"}}}, {"eos_token_id": 5}, (5,)),
        ({"added_tokens.json": {"<|im_end|>": 263}}, {"eos_token_id": 1}, (1,)),
        ({"added_tokens.json": {"<|return|>": 263, "<|call|>": 264}}, {}, (263, 264)),
    ],
)
def test_generation_ends_where_the_first_file_that_names_an_end_says(files, raw, eos, tmp_path):
    assert words(tmp_path, files, **raw).eos == eos


def test_an_inner_end_is_none_where_a_message_has_parts():
    assert named_ends({"<|end|>": 3}) == (3,)
    assert set(named_ends({"<|end|>": 3, "<|return|>": 4})) == {3, 4}
    assert named_ends({"<|end|>": 3, "<|return|>": 4, "<|call|>": 5}) == (4, 5)


def test_generation_stops_at_the_end_of_generation_config_and_says_which(tmp_path):
    path = tiny_files.hf_directory(tmp_path / "tiny", tiny_files.small(), eos_token_id=None)
    free = load_model(path)
    first = free.encode("the")
    made = generate(free, first, 6)
    assert made.end is None
    last = next(i for i, token in enumerate(made.ids) if i > 0 and token not in made.ids[:i])
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [made.ids[last]]}))
    stopped = generate(load_model(path), first, 6)
    assert (stopped.stopped, stopped.end, stopped.ids) == ("end_of_text", made.ids[last], made.ids[:last])


@pytest.mark.parametrize(
    ("files", "error", "says"),
    [
        ({"added_tokens.json": {"<a>": 300}}, DamagedFile, "'<a>' is 263 by tokenizer.json and its place, and 300"),
        ({"added_tokens.json": {"<a>": "x"}}, DamagedFile, "the id of an added token is 'x'"),
        ({"added_tokens.json": {"<a>": True}}, DamagedFile, "the id of an added token is True"),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"263": 5}}}, DamagedFile, "an added token is 5"),
        ({"tokenizer_config.json": {"added_tokens_decoder": [1]}}, DamagedFile, "added tokens must be an object"),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"263": {"content": "a", "of": 1}}}}, DamagedFile, "'a'"),
        ({"tokenizer_config.json": {"additional_special_tokens": "<a>"}}, DamagedFile, "special tokens a list"),
        ({"generation_config.json": {"eos_token_id": "end"}}, DamagedFile, "eos_token_id is 'end'"),
    ],
)
def test_files_that_contradict_each_other_or_are_damaged_are_refused(files, error, says, tmp_path):
    with pytest.raises(error, match=says):
        words(tmp_path, files)


def test_a_tokenizer_that_ends_every_prompt_is_refused(tmp_path):
    from tokenizers import Tokenizer as Made
    from tokenizers.processors import TemplateProcessing

    path = tokenizer_dirs.directory(tmp_path / "ended", "byte level")
    backend = Made.from_file(str(path / "tokenizer.json"))
    backend.post_processor = TemplateProcessing(single="$A <|end|>", special_tokens=[("<|end|>", 1)])
    backend.save(str(path / "tokenizer.json"))
    with pytest.raises(UnknownModel, match="only one BOS token in front is read"):
        from_directory(path, {})
