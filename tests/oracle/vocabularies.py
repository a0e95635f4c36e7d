"""Small vocabularies of every tokenizer kind that GGUF files hold, and awkward text for them.

made(version)   the vocabularies, and their kinds by pre-tokenizer and settings
TEXTS           what to tokenize: the corpus of SmolLM2's golden ids, oddities, and strings drawn at random

They are trained once, on text in this repository, and kept with llama.cpp's ids in `golden/gguf_ids.json`. Nothing is
split before training, so that merges cross what a pre-tokenizer must cut.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from gguf_ids import Ids, Metadata
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

ROOT = Path(__file__).parents[2]
PRES = ("dbrx", "deepseek-r1-qwen", "gpt-2", "llama-bpe", "llama-v3", "llama3", "qwen2", "smollm")
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPECIAL = {
    "<|im_start|>": CONTROL,
    "<|im_end|>": CONTROL,
    "<|endoftext|>": CONTROL,
    "<|eot_id|>": NORMAL,  # special by its name
    "<unk>": UNKNOWN,
    "<tool>": USER_DEFINED,
    "<tool><b": USER_DEFINED,
    "b><tool": USER_DEFINED,  # the longest first, not the leftmost
    "<gone>": UNUSED,
}
ALONE = ("Paris", "Zürich", "2026")
"""Words that no merge makes: tokens only for pre-tokenizers that look up whole words first."""

_CORPUS = [case["text"] for case in json.loads((ROOT / "tests/golden/llama_cpp_ids.json").read_text("utf-8"))["cases"]]
_ODD = [
    "a<tool><b><tool>b",
    "<tool> x",
    " <tool>",
    "<|im_start|> user<|im_end|>\n\n x",
    "<|eot_id|>",
    "<unk><gone>",
    "<0x41>",
]
_ODD += [
    "▁a b▁",
    "  ",
    "\n",
    "\r\n\r\n  x",
    "1234567",
    "Paris Zürich 2026Paris",
    "can'T WE'LL 'sX",
    "WE'LLAMA IT'STOP he'Da I'Mex",
    "(a);\n\n x!\n\ny",
    "end.\n\nNext. \n|\n",
    "\u017f's '\u017f",
    "x\t\ty \n z  ",
]
_ODD += [
    "½²٣१二",
    "a\u0301\u0302",
    "日本語日本",
    "\u200b\u2028\u0085\u00a0x",
    "((((]]]]\n\n",
    "<s>x</s>",
    "<end_of_turn>\n",
    "\n\n\n\n",
]
_ALPHABET = "aeth  \n\t'sSrRlL0123½.,;!(<|>)▁éßñ日本語😀مर\u00a0\u200d\r"


def _random(count: int) -> Iterator[str]:
    rng = np.random.default_rng(3)
    for _ in range(count):
        yield "".join(rng.choice(list(_ALPHABET), rng.integers(1, 24)))


TEXTS = list(dict.fromkeys([*_CORPUS, *_ODD, *_random(60)]))


def made(version: str) -> Ids:
    """Everything but the ids."""
    pieces = _sentencepiece()
    vocabularies = {"bytes": _byte_level(), "pieces": pieces, "gemma": _gemma(pieces)}
    kinds: dict[str, tuple[str, Metadata]] = {pre: ("bytes", {"pre": pre}) for pre in PRES}
    kinds["llama-bpe without BOS"] = ("bytes", {"pre": "llama-bpe", "add_bos_token": False})
    kinds |= {"llama": ("pieces", {}), "gemma": ("gemma", {}), "phi3": ("pieces", {"add_bos_token": False})}
    kinds["scored"] = ("pieces", {"scores": _scores(pieces["token_type"]), "bos_token_id": 5})
    named = {kind: (of, _ggml(more)) for kind, (of, more) in kinds.items()}
    named["phi3"][1]["general.name"] = "Phi-3 mini"
    return Ids(version, {name: _ggml(words) for name, words in vocabularies.items()}, named, TEXTS, {})


def _ggml(metadata: Metadata) -> Metadata:
    return {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}


def _training_text() -> list[str]:
    """Without special tokens: llama.cpp refuses a vocabulary that holds a token twice."""
    texts = [
        *_CORPUS * 3,
        *["WE'LLAMA, IT'STOP, he'Da I'Mex", "(a);\n\n x!\n\n"] * 40,
        (ROOT / "docs/concepts.md").read_text("utf-8"),
    ]
    return [re.sub(r"<\|\w+\|>", "", text) for text in texts]


def _byte_level() -> Metadata:
    """Byte-level BPE over whole texts."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=800, initial_alphabet=alphabet, max_token_length=12, show_progress=False)
    backend.train_from_iterator(_training_text(), trainer)
    merges = [" ".join(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
    vocabulary = backend.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    alone = [_printed(backend, word) for word in ALONE if _printed(backend, word) not in vocabulary]
    return {
        "model": "gpt2",
        "tokens": [*tokens, *SPECIAL, *alone],
        "token_type": [*[NORMAL] * len(tokens), *SPECIAL.values(), *[NORMAL] * len(alone)],
        "merges": merges,
        "bos_token_id": len(tokens),
        "eos_token_id": len(tokens) + 1,
    }


def _printed(backend: Tokenizer, word: str) -> str:
    return backend.pre_tokenizer.pre_tokenize_str(word)[0][0]


def _sentencepiece() -> Metadata:
    """Pieces with falling scores, after Llama's first ids; some of equal score, some whose parts are no pieces."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    trainer = trainers.BpeTrainer(vocab_size=700, max_token_length=12, show_progress=False)
    backend.train_from_iterator([text for text in _training_text() if text], trainer)
    learned = json.loads(backend.to_str())["model"]
    grown = ["".join(pair) for pair in learned["merges"]]
    first = {"<unk>": UNKNOWN, "<s>": CONTROL, "</s>": CONTROL, **{f"<0x{byte:02X}>": BYTE for byte in range(256)}}
    letters = [letter for letter in learned["vocab"] if len(letter) == 1 and letter not in "日本語\n"]
    whole = [piece for piece in [*grown, "日本", "本語", "ab", "bc", "abc", *letters] if not {"\n", "\0"} & {*piece}]
    tokens = first | dict.fromkeys(whole, NORMAL) | {name: kind for name, kind in SPECIAL.items() if name != "<unk>"}
    scores = [0.0] * len(first) + [-float(i // 2) for i in range(len(tokens) - len(first))]
    return {"model": "llama", "pre": "default", "tokens": [*tokens], "token_type": [*tokens.values()], "scores": scores}


def _gemma(pieces: Metadata) -> Metadata:
    """No space in front; runs of newlines and spaces are tokens that the user defined."""
    extra = {"\n\n": USER_DEFINED, "\n": USER_DEFINED, "▁▁": NORMAL, "  ": USER_DEFINED, "<start_of_turn>": CONTROL}
    extra["<end_of_turn>"] = CONTROL
    new = {token: kind for token, kind in extra.items() if token not in pieces["tokens"]}
    return pieces | {
        "tokens": [*pieces["tokens"], *new],
        "token_type": [*pieces["token_type"], *new.values()],
        "scores": [*pieces["scores"], *[-1000.0] * len(new)],
        "bos_token_id": 2,
        "eos_token_id": 1,
        "add_bos_token": True,
        "add_space_prefix": False,
    }


def _scores(types: list[int]) -> list[float]:
    """As a unigram model's: the log of a probability."""
    rng = np.random.default_rng(5)
    return [float(np.float32(-rng.exponential(8))) if kind == NORMAL else 0.0 for kind in types]
