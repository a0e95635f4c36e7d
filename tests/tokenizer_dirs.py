"""Small tokenizer directories of every kind that is read, as Hugging Face libraries write them.

KINDS          name -> tokenizer: byte-level BPE, SentencePiece's BPE with bytes (in both forms of its space), Unigram
directory()    tokenizer.json of one of them, with other files beside it
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny_files
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

MARK = "\u2581"
FIRST = ["<unk>", "<s>", "</s>"]
MERGES = [("P", "a"), ("r", "i"), ("Pa", "ri"), ("Pari", "s"), (MARK, "Paris"), ("i", "n"), (MARK, "in")]
LETTERS = [MARK, *"Parisnbcde.<>|"]
GROWN = [a + b for a, b in MERGES]


def byte_level() -> Tokenizer:
    made = Tokenizer(models.BPE(tiny_files.VOCABULARY, tiny_files.MERGES))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, normalized=False) for token in tiny_files.SPECIAL])
    return made


def _pieces() -> Tokenizer:
    tokens = [*FIRST, *(f"<0x{byte:02X}>" for byte in range(256)), *LETTERS, *GROWN]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return Tokenizer(models.BPE(vocabulary, MERGES, unk_token="<unk>", fuse_unk=True, byte_fallback=True))


def _finished(made: Tokenizer) -> Tokenizer:
    made.add_special_tokens([AddedToken(token, normalized=False) for token in FIRST])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


def prepended() -> Tokenizer:
    """A space in front of every stretch of text, as Llama 2's files put it."""
    made = _pieces()
    made.normalizer = normalizers.Sequence([normalizers.Prepend(MARK), normalizers.Replace(" ", MARK)])
    made.decoder = decoders.Sequence(
        [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _finished(made)


def metaspace() -> Tokenizer:
    """A space in front of the text only, as newer files put it."""
    made = _pieces()
    made.pre_tokenizer = pre_tokenizers.Metaspace(MARK, prepend_scheme="first", split=False)
    made.decoder = decoders.Sequence(
        [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _finished(made)


def unigram() -> Tokenizer:
    pieces = [*((token, 0.0) for token in FIRST), *((token, -8.0) for token in LETTERS)]
    pieces += [(token, -2.0 - 0.1 * i) for i, token in enumerate(GROWN)]
    made = Tokenizer(models.Unigram(pieces, 0))
    made.normalizer = normalizers.Sequence([normalizers.Strip(True, True), normalizers.Replace(Regex(" {2,}"), " ")])
    made.pre_tokenizer = pre_tokenizers.Metaspace(MARK, prepend_scheme="always")
    made.decoder = decoders.Metaspace(MARK, prepend_scheme="always")
    return _finished(made)


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte level": byte_level,
    "prepended": prepended,
    "metaspace": metaspace,
    "unigram": unigram,
}
SENTENCEPIECE = ("prepended", "metaspace", "unigram")


def directory(path: Path, kind: str, files: dict[str, Any] | None = None) -> Path:
    """`files`: name -> what is written there as JSON, or as text."""
    path.mkdir(parents=True)
    KINDS[kind]().save(str(path / "tokenizer.json"))
    for name, content in (files or {}).items():
        at = path / name
        at.parent.mkdir(exist_ok=True)
        at.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return path


FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
IN_THE_MIDDLE = {"content": "<mid>", "lstrip": True, "rstrip": True, "normalized": False, "special": False}
WORD = {"content": "Pa", "single_word": True, "normalized": True, "special": False}
CHAT = (
    "{{ bos_token }}{% for m in messages %}{% generation %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}"
    "{% endgeneration %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    "{{ pad_token is defined }}{{ tools is none }}{{ documents | tojson(indent=2) }}{{ image_token }}"
)
NAMED = [{"name": "default", "template": CHAT}, {"name": "tool_use", "template": "tools: {{ tools | tojson }}"}]


def _config(**more: Any) -> dict[str, Any]:
    return {"tokenizer_config.json": FAST | more}


FILES: dict[str, dict[str, Any]] = {
    "nothing more": _config(),
    "by id": _config(added_tokens_decoder={"263": {"content": "<|user|>", "special": True}, "264": IN_THE_MIDDLE}),
    "out of order": _config(added_tokens_decoder={"264": {"content": "<b>"}, "263": {"content": "<a>"}}),
    "words": _config(added_tokens_decoder={"263": WORD | {"content": "Zo"}, "264": {"content": "<a>", "rstrip": True}}),
    "told again": _config(added_tokens_decoder={"1": {"content": "<|end|>", "lstrip": True, "rstrip": True}}),
    "in added_tokens.json": _config() | {"added_tokens.json": {"<|user|>": 263, "<tool>": 264}},
    "special in added_tokens.json": _config()
    | {"added_tokens.json": {"<|user|>": 263}, "special_tokens_map.json": {"additional_special_tokens": ["<|user|>"]}},
    "in special_tokens_map.json": _config()
    | {"special_tokens_map.json": {"pad_token": "<pad>", "eos_token": {"content": "<|end|>", "lstrip": False}}},
    "map beside ids": _config(added_tokens_decoder={}) | {"special_tokens_map.json": {"pad_token": "<pad>"}},
    "more special ones": _config(additional_special_tokens=["<|user|>", "<|tool|>"], pad_token="<pad>"),
    "extra by name": _config(extra_special_tokens={"image_token": "<image>"}, boi_token="<boi>"),
    "with types": _config(
        pad_token={"__type": "AddedToken", "content": "<pad>", "lstrip": True, "rstrip": False, "normalized": False},
        bos_token="<|start|>",
        eos_token="<|end|>",
    ),
    "chat": _config(chat_template=CHAT, bos_token="<|start|>", eos_token="<|end|>", image_token="<image>"),
    "named chats": _config(chat_template=NAMED, eos_token="<|end|>", pad_token="<|start|>"),
    "chats in files": _config(chat_template="old", eos_token="<|end|>")
    | {"chat_template.jinja": CHAT, "additional_chat_templates/rag.jinja": "{{ documents[0].title }}"},
}
"""Files beside tokenizer.json (which has 263 tokens), in every form in which added tokens and templates are found."""

TEXTS = [
    "the and",
    "a <mid> b<mid>c",
    "<|user|>the <tool> x<|tool|>",
    "<a> the<b> <a><b>",
    "Zo Zoo aZo, Zo",
    "x <|end|> y<|end|>",
    "a <pad> b <image><boi>",
    "<|start|>the",
]
TURNS = [{"role": "user", "content": "the"}, {"role": "assistant", "content": "an", "tool_calls": None}]
ASKED: dict[str, dict[str, Any]] = {
    "plain": {},
    "documents": {"documents": [{"title": "t", "text": "<é>"}]},
    "tools": {"tools": [{"name": "f"}]},
    "rag": {"chat_template": "rag", "documents": [{"title": "t", "text": "x"}]},
}
PIECE_TEXTS = ["Paris in", " Paris", "<s>Paris", "in</s>Paris", "Paris  in Paris", "\u00e9a", "Par<unk>is"]
