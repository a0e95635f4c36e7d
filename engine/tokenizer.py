"""Text to ids and back: from tokenizer.json, or rebuilt from GGUF metadata with the `tokenizers` library.

`Tokenizer` wraps the library's with the model's own BOS rule. Special tokens written in a prompt's text are read
as special tokens.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from engine.errors import DamagedFile, TokenError, UnknownModel, clipped
from engine.weights import read_json

_CONTROL, _USER_DEFINED = 3, 4
"""`tokenizer.ggml.token_type` values (ggml-org/ggml, docs/gguf.md)."""


class Tokenizer:
    """encode, decode, piece, single. `vocabulary` is the number of ids the tokenizer knows."""

    def __init__(self, backend: tokenizers.Tokenizer, bos: int | None, eos: Sequence[int]) -> None:
        """`bos` is put in front of every prompt unless None; generation stops at any of `eos`."""
        self._backend = backend
        self.bos = bos
        self.eos = tuple(eos)
        self.vocabulary = backend.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """The ids of a prompt, BOS included where the model wants one."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TokenError(f"the text is not valid Unicode: {error.reason} at character {error.start}") from None
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids if self.bos is None else [self.bos, *ids]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=False)
        return text

    def piece(self, token_id: int) -> str:
        """The text of one token; bytes that are only part of a character show as U+FFFD."""
        return self.decode([token_id])

    def single(self, text: str) -> int:
        """The id of text that is exactly one token; raises `TokenError` showing the pieces otherwise."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        if len(ids) != 1:
            pieces = ", ".join(f"{self.piece(i)!r} ({i})" for i in ids) or "nothing"
            hint = " (a word inside a sentence usually starts with a space)" if not text.startswith(" ") else ""
            raise TokenError(f"{text!r} is {len(ids)} tokens, not one: {pieces}; give one of them by text or id{hint}")
        return ids[0]


def from_directory(directory: Path, raw: dict[str, Any]) -> Tokenizer:
    """tokenizer.json (+ tokenizer_config.json for the BOS rule, config.json for the end of text)."""
    path = directory / "tokenizer.json"
    if not path.exists():
        raise UnknownModel(
            f"{directory} has no tokenizer.json; save the tokenizer there in its fast form (other kinds are not read)"
        )
    read_json(path)
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
        backend.no_truncation()
        backend.no_padding()
        with_special = backend.encode("a", add_special_tokens=True).ids
        plain = backend.encode("a", add_special_tokens=False).ids
    except Exception as error:  # the library raises bare Exception
        raise DamagedFile(f"tokenizer.json cannot be read: {str(error)[:200]}; fetch it again") from None
    has_bos = len(with_special) > len(plain) and with_special[: len(plain)] != plain
    return Tokenizer(backend, with_special[0] if has_bos else None, _eos_ids(raw.get("eos_token_id")))


def _eos_ids(value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise DamagedFile(f"config: eos_token_id is {clipped(value)}; it must be an id or a list of ids")
    return tuple(ids)


def from_gguf(metadata: dict[str, Any]) -> Tokenizer:
    """A byte-level BPE rebuilt from `tokenizer.ggml.*`; raises `UnknownModel` for other kinds."""
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2" or not isinstance(pre, str) or pre not in _PRE_TOKENIZERS:
        raise UnknownModel(
            f"the file's tokenizer is {clipped(kind)} with pre-tokenizer {clipped(pre)}; supported: 'gpt2' with "
            + ", ".join(map(repr, _PRE_TOKENIZERS))
        )
    tokens = _strings(metadata, "tokenizer.ggml.tokens")
    if not tokens:
        raise DamagedFile("tokenizer.ggml.tokens is empty")
    merges = [tuple(merge.split(" ", 1)) for merge in _strings(metadata, "tokenizer.ggml.merges")]
    try:
        backend = tokenizers.Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))  # type: ignore[arg-type]
    except Exception as error:  # the library raises bare Exception
        raise DamagedFile(f"the file's vocabulary and merges do not fit together: {str(error)[:200]}") from None
    backend.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    backend.decoder = decoders.ByteLevel()
    types = _types(metadata, len(tokens))
    backend.add_tokens(_added(tokens, types, _USER_DEFINED))
    backend.add_special_tokens(_added(tokens, types, _CONTROL))
    return Tokenizer(backend, _bos(metadata, len(tokens)), _eos_ids(metadata.get("tokenizer.ggml.eos_token_id")))


def _bos(metadata: dict[str, Any], n_tokens: int) -> int | None:
    """The BOS id, when the file wants one in front of every prompt."""
    wanted, bos = metadata.get("tokenizer.ggml.add_bos_token", False), metadata.get("tokenizer.ggml.bos_token_id")
    if not isinstance(wanted, bool):
        raise DamagedFile(f"tokenizer.ggml.add_bos_token is {clipped(wanted)}; it must be true or false")
    if not wanted:
        return None
    if isinstance(bos, bool) or not isinstance(bos, int) or not 0 <= bos < n_tokens:
        raise DamagedFile(f"tokenizer.ggml.bos_token_id is {clipped(bos)}; it must be an id from 0 to {n_tokens - 1}")
    return bos


def _types(metadata: dict[str, Any], n_tokens: int) -> list[int]:
    """`tokenizer.ggml.token_type`, one per token; empty when the file has none."""
    types = metadata.get("tokenizer.ggml.token_type")
    if types is None:
        return []
    if not isinstance(types, list) or len(types) != n_tokens:
        raise DamagedFile(f"tokenizer.ggml.token_type is {clipped(types)}; it must hold a number for each token")
    return types


def _added(tokens: list[str], types: list[int], kind: int) -> list[AddedToken]:
    chosen = [token for token, found in zip(tokens, types, strict=False) if found == kind]
    return [AddedToken(token, normalized=False, special=kind == _CONTROL) for token in chosen]


def _strings(metadata: dict[str, Any], key: str) -> list[str]:
    value = metadata.get(key)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise DamagedFile(f"{key} is missing or not a list of texts")
    return value


def _smollm() -> Any:
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])


_PRE_TOKENIZERS = {"smollm": _smollm}
"""`tokenizer.ggml.pre` -> how text is split before merging."""


def byte_level() -> Tokenizer:
    """One token per byte (ids 0-255) and an end-of-text token (256): the synthetic models' tokenizer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    by_byte = {_byte_of(char): char for char in alphabet}
    backend = tokenizers.Tokenizer(models.BPE({by_byte[b]: b for b in range(256)} | {"<|end|>": 256}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|end|>", normalized=False, special=True)])
    return Tokenizer(backend, None, (256,))


def _byte_of(char: str) -> int:
    """GPT-2's printable alphabet: a byte that prints stands for itself, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return ord(char) if ord(char) in printable else others[ord(char) - 0x100]
