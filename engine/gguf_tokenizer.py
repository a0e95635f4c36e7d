"""Tokenizers of GGUF files, rebuilt from their metadata so that the ids are llama.cpp's: `from_gguf`.

Reference: llama.cpp, src/llama-vocab.cpp. Two kinds: byte-level BPE ("gpt2"), by the `tokenizers` library, with one of
`PRE_TOKENIZERS`; and SentencePiece ("llama", in Gemma's files too), by `spm.py`.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from engine.chat import ChatTemplate, template_from
from engine.errors import DamagedFile, UnknownModel, clipped
from engine.spm import SPACE, SentencePiece
from engine.tokenizer import ENDS, Tokenizer, byte_alphabet, eos_ids, named_ends

Metadata = dict[str, Any]
Words = Callable[[str, bool], list[int]]
"""Ids of text without special tokens; True for what stands inside a text."""

UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6
"""`tokenizer.ggml.token_type` values (ggml-org/ggml, docs/gguf.md)."""

NAMES = {
    "bos": "bos",
    "eos": "eos",
    "unknown": "unk",
    "seperator": "sep",
    "padding": "pad",
    "cls": "cls",
    "mask": "mask",
}
"""Special tokens as GGUF calls them (a key is misspelt there), and as templates do."""

MIDDLES = ("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<\uff5cfim\u2581begin\uff5c>", "<PRE>", "\u2581<PRE>",
    "<|code_prefix|>", "<|prefix|>", "<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<\uff5cfim\u2581hole\uff5c>",
    "<SUF>", "\u2581<SUF>", "<|code_suffix|>", "<|suffix|>", "<|fim_middle|>", "<fim-middle>", "<fim_middle>",
    "<\uff5cfim\u2581end\uff5c>", "<MID>", "\u2581<MID>", "<|code_middle|>", "<|middle|>", "<|fim_pad|>", "<fim-pad>",
    "<fim_pad>", "<PAD>", "[PAD]", "<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>",
    "<|file_sep|>")  # fmt: skip
HARMONY = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")
SPECIAL_BY_NAME = frozenset((*ENDS, *MIDDLES, *HARMONY))
"""Tokens that llama.cpp takes for special whatever their type says."""

BLANK = " \t\n\v\f\r"

# --- byte-level BPE -----------------------------------------------------------------------------------------------

_CONTRACTIONS = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split(digits: str) -> Any:
    from tokenizers import Regex, pre_tokenizers

    pattern = Regex(f"{_CONTRACTIONS}|{_WORDS}|{digits}|{_REST}")
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(pattern, "isolated"), bytes_only])


def _gpt2() -> Any:
    from tokenizers import pre_tokenizers

    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _smollm() -> Any:
    from tokenizers import pre_tokenizers

    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])


@dataclass(frozen=True)
class PreTokenizer:
    """How text is split before merging; whether a whole word that is a token is taken as it is; BOS unless denied."""

    make: Callable[[], Any]
    words_first: bool = False
    adds_bos: bool = False


_LLAMA3 = PreTokenizer(lambda: _split(r"\p{N}{1,3}"), words_first=True, adds_bos=True)
_QWEN2 = PreTokenizer(lambda: _split(r"\p{N}"))

PRE_TOKENIZERS = {
    "dbrx": PreTokenizer(lambda: _split(r"\p{N}{1,3}")),  # Phi-4's files
    "deepseek-r1-qwen": _QWEN2,
    "gpt-2": PreTokenizer(_gpt2),
    "llama-bpe": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama3": _LLAMA3,
    "qwen2": _QWEN2,
    "smollm": PreTokenizer(_smollm),
}
"""By `tokenizer.ggml.pre`."""


def _bpe(metadata: Metadata, ids: dict[str, int], pre: PreTokenizer) -> Words:
    import tokenizers
    from tokenizers import models

    merges = [tuple(merge.split(" ", 1)) for merge in _strings(metadata, "tokenizer.ggml.merges")]
    try:
        library = tokenizers.Tokenizer(models.BPE(ids, merges, ignore_merges=pre.words_first))  # type: ignore[arg-type]
    except Exception as error:  # the library raises bare Exception
        raise DamagedFile(f"the file's vocabulary and merges do not fit together: {str(error)[:200]}") from None
    library.pre_tokenizer = pre.make()
    return lambda text, inside: list(library.encode(text, add_special_tokens=False).ids)


# --- SentencePiece ------------------------------------------------------------------------------------------------


def _sentencepiece(metadata: Metadata, ids: dict[str, int]) -> Words:
    words = SentencePiece(ids, _scores(metadata, len(ids)))
    prefixed = _flag(metadata, "tokenizer.ggml.add_space_prefix", True)

    def encode(text: str, inside: bool) -> list[int]:
        return words.encode((" " + text if prefixed and not inside else text).replace(" ", SPACE))

    return encode


def _scores(metadata: Metadata, n_tokens: int) -> list[float]:
    scores = metadata.get("tokenizer.ggml.scores", [0.0] * n_tokens)
    if (
        not isinstance(scores, list)
        or len(scores) != n_tokens
        or not all(isinstance(score, float | int) and math.isfinite(score) for score in scores)
    ):
        raise DamagedFile(f"tokenizer.ggml.scores is {clipped(scores)}; it must hold a number for each token")
    return [float(score) for score in scores]


# --- both ---------------------------------------------------------------------------------------------------------


class Pieces:
    """A `tokenizer.Backend`: special tokens are cut out of the text, the longest first, then `words` sees the rest."""

    def __init__(
        self, vocabulary: "Vocabulary", words: Words, plain: Callable[[str], bytes], strips: frozenset[str]
    ) -> None:
        """`plain`: the bytes of an ordinary token; `strips`: special tokens that swallow the blanks after them."""
        self._tokens, self._types = vocabulary.tokens, vocabulary.types
        self._words, self._plain, self._strips = words, plain, strips
        kinds = (UNKNOWN, CONTROL, USER_DEFINED)
        named = enumerate(zip(self._tokens, self._types, strict=True))
        special = [i for i, (token, kind) in named if kind in kinds or token in SPECIAL_BY_NAME]
        self._special = dict.fromkeys(sorted(special, key=lambda i: -len(self._tokens[i].encode())))

    def size(self) -> int:
        return len(self._tokens)

    def has(self, token_id: int) -> bool:
        return 0 <= token_id < len(self._tokens)

    def encode(self, text: str, inside: bool = False) -> list[int]:
        ids: list[int] = []
        for i, part in enumerate(self._cut(text)):
            ids += [part] if isinstance(part, int) else self._words(part, inside and i == 0)
        return ids

    def _cut(self, text: str) -> list[str | int]:
        """Text and ids of special tokens, in order."""
        parts: list[str | int] = [text] if text else []
        for token in self._special:
            if self._tokens[token] in text:
                parts = [piece for part in parts for piece in self._cut_out(token, part)]
        return parts

    def _cut_out(self, token: int, part: str | int) -> list[str | int]:
        if isinstance(part, int):
            return [part]
        first, *rest = part.split(self._tokens[token])
        if self._tokens[token] in self._strips:
            rest = [text.lstrip(BLANK) for text in rest]
        return [piece for piece in (first, *(half for text in rest for half in (token, text))) if piece != ""]

    def decode(self, ids: Sequence[int], inside: bool = False) -> str:
        """A space that `encode` put in front of text stays."""
        return b"".join(map(self._bytes, ids)).decode("utf-8", "replace")

    def _bytes(self, token: int) -> bytes:
        text = self._tokens[token]
        if token in self._special:
            return text.encode()
        return bytes([int(text[3:5], 16)]) if self._types[token] == BYTE else self._plain(text)


def from_gguf(metadata: Metadata) -> Tokenizer:
    """The file's tokenizer; raises `UnknownModel` for kinds whose ids would have to be guessed."""
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind == "llama":
        vocabulary = Vocabulary.read(metadata)
        pieces = Pieces(vocabulary, _sentencepiece(metadata, vocabulary.ids), _from_spm, _strips(metadata, vocabulary))
        bos, template = _bos(metadata, len(vocabulary.tokens), True, 1), partial(_template, metadata, vocabulary)
        return Tokenizer(pieces, bos, _eos(metadata, 2, vocabulary), template)
    if kind != "gpt2" or not isinstance(pre, str) or pre not in PRE_TOKENIZERS:
        raise UnknownModel(
            f"the file's tokenizer is {clipped(kind)} with pre-tokenizer {clipped(pre)}; supported: 'llama', and "
            f"'gpt2' with {', '.join(map(repr, PRE_TOKENIZERS))}"
        )
    vocabulary, chosen = Vocabulary.read(metadata), PRE_TOKENIZERS[pre]
    words = _bpe(metadata, vocabulary.ids, chosen)
    pieces = Pieces(vocabulary, words, _from_byte_level, _strips(metadata, vocabulary))
    bos = _bos(metadata, len(vocabulary.tokens), chosen.adds_bos, None)
    return Tokenizer(pieces, bos, _eos(metadata, None, vocabulary), partial(_template, metadata, vocabulary))


def _template(metadata: Metadata, vocabulary: "Vocabulary") -> ChatTemplate | None:
    ids = {f"{short}_token": metadata.get(f"tokenizer.ggml.{name}_token_id") for name, short in NAMES.items()}
    known = range(len(vocabulary.tokens))
    tokens = {name: vocabulary.tokens[i] for name, i in ids.items() if isinstance(i, int) and i in known}
    key = "tokenizer.chat_template"
    others = {name.removeprefix(f"{key}."): source for name, source in metadata.items() if name.startswith(f"{key}.")}
    return template_from({"default": metadata.get(key), **others}, tokens)


_ALPHABET = byte_alphabet()


def _from_byte_level(token: str) -> bytes:
    return bytes(_ALPHABET[char] for char in token) if all(char in _ALPHABET for char in token) else token.encode()


def _from_spm(token: str) -> bytes:
    return token.replace(SPACE, " ").encode()


@dataclass(frozen=True)
class Vocabulary:
    """Tokens and their types, by id, and the way back."""

    tokens: list[str]
    types: list[int]
    ids: dict[str, int]

    @classmethod
    def read(cls, metadata: Metadata) -> "Vocabulary":
        """Raises `DamagedFile` for anything but different texts with a number each."""
        named = _strings(metadata, "tokenizer.ggml.tokens")
        if not named:
            raise DamagedFile("tokenizer.ggml.tokens is empty")
        tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(named)]  # as llama.cpp calls them
        ids = {token: i for i, token in enumerate(tokens)}
        if len(ids) < len(tokens):
            twice = next(token for i, token in enumerate(tokens) if ids[token] != i)
            raise DamagedFile(f"tokenizer.ggml.tokens holds {clipped(twice)} twice; llama.cpp refuses the file too")
        types = metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
        if not isinstance(types, list) or len(types) != len(tokens):
            raise DamagedFile(f"tokenizer.ggml.token_type is {clipped(types)}; it must hold a number for each token")
        for token, kind in zip(tokens, types, strict=True):
            if kind == BYTE and not _BYTE_TOKEN.fullmatch(token):
                raise DamagedFile(f"the token {clipped(token)} is marked as a byte; bytes are <0x00> to <0xFF>")
        return cls(tokens, types, ids)


_BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")


def _strips(metadata: Metadata, vocabulary: Vocabulary) -> frozenset[str]:
    """llama.cpp knows Phi-3's files by their name; their special tokens swallow blanks, but for three."""
    name = str(metadata.get("general.name", "")).lower()
    if "phi-3" not in name and "phi3" not in name:
        return frozenset()
    return frozenset(vocabulary.tokens) - {"<unk>", "<s>", "<|endoftext|>"}


def _bos(metadata: Metadata, n_tokens: int, usual: bool, default: int | None) -> int | None:
    """The BOS id, when the file wants one in front of every prompt. An EOS after every prompt is refused."""
    if _flag(metadata, "tokenizer.ggml.add_eos_token", False):
        raise UnknownModel("tokenizer.ggml.add_eos_token is true: a prompt that ends the text cannot be continued")
    if not _flag(metadata, "tokenizer.ggml.add_bos_token", usual):
        return None
    bos = metadata.get("tokenizer.ggml.bos_token_id", default)
    if isinstance(bos, bool) or not isinstance(bos, int) or not 0 <= bos < n_tokens:
        raise DamagedFile(f"tokenizer.ggml.bos_token_id is {clipped(bos)}; it must be an id from 0 to {n_tokens - 1}")
    return bos


def _eos(metadata: Metadata, default: int | None, vocabulary: Vocabulary) -> tuple[int, ...]:
    """Generation ends at the ends of a text, of a turn and of a message, by the file's word or by their names."""
    found = eos_ids(metadata.get("tokenizer.ggml.eos_token_id", default))
    for name in ("eot", "eom"):
        found += eos_ids(metadata.get(f"tokenizer.ggml.{name}_token_id"))
    return tuple(dict.fromkeys([*found, *named_ends(vocabulary.ids)]))


def _flag(metadata: Metadata, key: str, default: bool) -> bool:
    value = metadata.get(key, default)
    if not isinstance(value, bool):
        raise DamagedFile(f"{key} is {clipped(value)}; it must be true or false")
    return value


def _strings(metadata: Metadata, key: str) -> list[str]:
    value = metadata.get(key)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise DamagedFile(f"{key} is missing or not a list of texts")
    return value
