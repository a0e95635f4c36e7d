"""Small tokenizer directories of every kind that is read, as Hugging Face libraries write them.

KINDS          name -> tokenizer: byte-level BPE, SentencePiece's BPE with bytes (in both forms of its space), Unigram
directory()    tokenizer.json of one of them, with other files beside it
CLASSES        name -> kind and files of directories that name a class, as real models' do
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


def gemma() -> Tokenizer:
    made = _pieces()
    made.normalizer = normalizers.Replace(" ", MARK)
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    made.decoder = decoders.Sequence([decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse()])
    return _finished(made)


END, PADDING, TURN = "<|endoftext|>", "<|padding|>", "<|im_start|>"
WORDS = [("1", "2"), ("12", "3"), ("t", "h"), ("th", "e"), ("\u0120", "the"), ("'", "S"), ("!", "!"), ("\u0120", "1")]
WORDS += [("\u00c3", "\u00a9"), ("e", "\u00cc"), ("e\u00cc", "\u0123"), ("\u010a", "\u010a"), ("T", "H")]


def written() -> Tokenizer:
    """Byte-level BPE whose merges tell the pipelines apart: digits, capitals, marks, line ends."""
    tokens = [END, PADDING, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in WORDS)]
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, WORDS))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    made.add_special_tokens([AddedToken(token, normalized=False) for token in (END, PADDING, TURN)])
    return made


def digits() -> Tokenizer:
    """As StarCoder2's and SmolLM2's: every digit by itself."""
    made = written()
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), made.pre_tokenizer])
    return made


def lower() -> Tokenizer:
    made = written()
    made.normalizer = normalizers.Lowercase()
    return made


def beginning() -> Tokenizer:
    """BOS in front, as Llama 3's."""
    made = written()
    made.post_processor = processors.TemplateProcessing(single=[END, "$A"], special_tokens=[(END, 0)])
    return made


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte level": byte_level,
    "gemma": gemma,
    "written": written,
    "digits": digits,
    "lower": lower,
    "beginning": beginning,
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


_ENDS = {"bos_token": END, "eos_token": END, "unk_token": END}
_MARKS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n {{ m.content }}{{ eos_token }}{% endfor %}{{ bos_token }}"
_INST = "{% for m in messages %}{{ bos_token }} [INST] {{ m.content }} {{ eos_token }}in{% endfor %}{{ pad_token }}"
_LEANING = {"content": TURN, "lstrip": True, "rstrip": True, "special": True}
_PLACED = {str(i): {"content": token, "special": True} for i, token in enumerate(FIRST)}


def _of(kind: str, model_type: str, name: str | None, **more: Any) -> tuple[str, dict[str, Any]]:
    given = more if name is None else {"tokenizer_class": name} | more
    return kind, {"config.json": {"model_type": model_type}} | ({"tokenizer_config.json": given} if given else {})


CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama 2": _of("prepended", "llama", "LlamaTokenizer", **_MARKS, legacy=False, chat_template=_INST),
    "Llama 2, fast": _of("prepended", "llama", "LlamaTokenizerFast", added_tokens_decoder=_PLACED),
    "Llama 2, old": _of("prepended", "llama", "LlamaTokenizer", **_MARKS, legacy=True),
    "Llama 2, of marks": _of("metaspace", "llama", "LlamaTokenizer", **_MARKS, legacy=None),
    "Llama 2, nothing in front": _of("prepended", "llama", "LlamaTokenizer", add_prefix_space=False),
    "Llama 2, without BOS": _of("prepended", "llama", "LlamaTokenizer", add_bos_token=False, add_eos_token=True),
    "Llama 2, no class": _of("prepended", "llama", None),
    "Llama 2, class in config": (
        "prepended",
        {"config.json": {"model_type": "llama", "tokenizer_class": "LlamaTokenizer"}},
    ),
    "Llama 2, fewer added": _of("prepended", "llama", "LlamaTokenizer", added_tokens_decoder={}, unk_token=None),
    "Llama 2, more added": _of(
        "prepended", "llama", "LlamaTokenizer", pad_token="<pad>", additional_special_tokens=["<|user|>"]
    ),
    "Code Llama": _of("prepended", "llama", "CodeLlamaTokenizer", **_MARKS),
    "Code Llama, no infilling": _of(
        "prepended", "llama", "CodeLlamaTokenizerFast", fill_token=None, suffix_token="<b>"
    ),
    "Llama 3": _of(
        "beginning", "llama", "PreTrainedTokenizerFast", bos_token=END, eos_token=TURN, chat_template=_TURNS
    ),
    "Llama 3, as Llama 2": _of("beginning", "llama", "LlamaTokenizer", bos_token=END),
    "SmolLM2": _of("digits", "llama", "GPT2Tokenizer", **_ENDS, chat_template=_TURNS, extra_special_tokens=[TURN]),
    "SmolLM3": _of("digits", "smollm3", "PreTrainedTokenizerFast", eos_token=TURN),
    "Mistral": _of("prepended", "mistral", "LlamaTokenizer", **_MARKS, legacy=False),
    "Phi 3": _of("prepended", "phi3", "LlamaTokenizer", **_MARKS, legacy=False),
    "Phi 2": _of("written", "phi", "CodeGenTokenizer", **_ENDS),
    "Phi 2, a space": _of("written", "phi", "CodeGenTokenizer", add_prefix_space=True),
    "Qwen 2": _of(
        "written", "qwen2", "Qwen2Tokenizer", eos_token=TURN, pad_token=END, unk_token=None, chat_template=_TURNS
    ),
    "Qwen 2, fast": _of("digits", "qwen2", "PreTrainedTokenizerFast"),
    "Qwen 2, leaning": _of(
        "written",
        "qwen2",
        "Qwen2Tokenizer",
        added_tokens_decoder={"0": {"content": END, "special": True}, "1": {"content": PADDING}, "271": _LEANING},
        eos_token=TURN,
    ),
    "Qwen 3": _of("lower", "qwen3", "Qwen2TokenizerFast", eos_token=TURN, bos_token=None),
    "Qwen 3, as filed": _of("lower", "qwen3", "PreTrainedTokenizerFast"),
    "Qwen 3, a space": _of("written", "qwen3", "Qwen2Tokenizer", add_prefix_space=True),
    "Gemma": _of("gemma", "gemma", "GemmaTokenizer", **_MARKS),
    "Gemma 2": _of("prepended", "gemma2", "GemmaTokenizerFast", **_MARKS, pad_token=None, mask_token=None),
    "Gemma 3": _of("gemma", "gemma3_text", "GemmaTokenizer", unk_token="<unk>"),
    "GPT-2": _of("written", "gpt2", "GPT2Tokenizer"),
    "GPT-2, no class": _of("digits", "gpt2", None),
    "GPT-2, a space": _of("written", "gpt2", "GPT2Tokenizer", add_prefix_space=True, add_bos_token=True),
    "GPT-2, lower": _of("lower", "gpt2", "GPT2TokenizerFast"),
    "GPT-2, BOS": _of("beginning", "gpt2", "GPT2Tokenizer", **_ENDS),
    "GPT-Neo": _of("written", "gpt_neo", "GPT2Tokenizer", model_max_length=2048),
    "Pythia": _of("written", "gpt_neox", "GPTNeoXTokenizer", **_ENDS, add_prefix_space=False),
    "Pythia, BOS": _of("beginning", "gpt_neox", "GPTNeoXTokenizerFast", add_bos_token=True),
    "StarCoder 2": _of("digits", "starcoder2", "GPT2Tokenizer", **_ENDS),
    "OLMo 2": _of("digits", "olmo2", "GPT2Tokenizer", **_ENDS),
    "Granite": _of("digits", "granite", "GPT2Tokenizer", **_ENDS),
    "StableLM": _of("digits", "stablelm", "GPTNeoXTokenizer", **_ENDS),
    "unknown class": _of("digits", "qwen3", "StrangeTokenizer"),
    "split": _of("beginning", "llama", "PreTrainedTokenizerFast", split_special_tokens=True, bos_token=END),
    "split, rebuilt": _of("prepended", "llama", "LlamaTokenizer", split_special_tokens=True),
}
"""As the models of that name have it; what is odd about the others stands behind the comma."""

CLASS_TEXTS = [
    "Paris in", " Paris", "  Paris", "</s>Paris", "in</s> Paris", "<s>in\n</s>", "Par<unk>is", "in <pad><|user|>Paris",
    "THE the'S 12 123 1!!", "e\u0301 \u00e9\n\n the", "<|im_start|>the 12<|endoftext|> the", "the <|im_start|> 1",
    "<|padding|>the <b> \u2581<SUF>in",
]  # fmt: skip
