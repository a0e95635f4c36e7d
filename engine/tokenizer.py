"""Text to ids and back: from tokenizer.json, or one token per byte (`gguf_tokenizer.py` has those of GGUF files).

`Tokenizer` adds the model's own BOS rule to a `Backend`. Special tokens written in a prompt's text are read as special
tokens.
"""

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from engine import chat
from engine.chat import ChatTemplate, Message, Read
from engine.errors import DamagedFile, InputError, TokenError, UnknownModel, clipped
from engine.weights import read_json

if TYPE_CHECKING:
    import tokenizers


class Backend(Protocol):
    """Text and ids, without any rule about BOS."""

    def size(self) -> int: ...
    def has(self, token_id: int) -> bool: ...
    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...


class Library:
    """A `Backend`: a tokenizer of the `tokenizers` library."""

    def __init__(self, library: "tokenizers.Tokenizer") -> None:
        self._library = library

    def size(self) -> int:
        return int(self._library.get_vocab_size())

    def has(self, token_id: int) -> bool:
        return 0 <= token_id < 1 << 32 and self._library.id_to_token(token_id) is not None

    def encode(self, text: str) -> list[int]:
        return list(self._library.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._library.decode(list(ids), skip_special_tokens=False))


PIECES_SHOWN = 12
"""Of text that is several tokens, in an error."""


class Deferred:
    """A `Backend` that is read from its file when it is first used."""

    def __init__(self, read: "Callable[[], Tokenizer]", size: int) -> None:
        self._read, self._size = read, size

    @cached_property
    def words(self) -> "Tokenizer":
        """The tokenizer as its file has it."""
        return self._read()

    def size(self) -> int:
        return self._size

    def has(self, token_id: int) -> bool:
        return self.words.backend.has(token_id)

    def encode(self, text: str) -> list[int]:
        return self.words.backend.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self.words.backend.decode(ids)


class Tokenizer:
    """encode, decode, piece, single. `vocabulary` is the number of ids the tokenizer knows."""

    def __init__(self, backend: Backend, bos: int | None, eos: Sequence[int], template: Read = lambda: None) -> None:
        """`bos` is put in front of every prompt unless None; generation stops at any of `eos`."""
        self.backend = backend
        self.bos = bos
        self.eos = tuple(eos)
        self.vocabulary = backend.size()
        self._template = template

    @cached_property
    def chat_template(self) -> ChatTemplate | None:
        """The model's own chat template, if it has one."""
        return self._template()

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """The ids of a conversation in the model's own template, the assistant's turn opened.

        The template writes BOS itself, where the model wants one. Raises `InputError` for a model without a template.
        """
        if self.chat_template is None:
            raise InputError("this model has no chat template; give the prompt as the model should read it")
        return self._encoded(self.chat_template.render(messages))

    def encode(self, text: str) -> list[int]:
        """The ids of a prompt, BOS included where the model wants one."""
        ids = self._encoded(text)
        return ids if self.bos is None else [self.bos, *ids]

    def _encoded(self, text: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TokenError(f"the text is not valid Unicode: {error.reason} at character {error.start}") from None
        return self.backend.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included; a row of the embedding without a token reads as [no token 7]."""
        if all(map(self.backend.has, ids)):
            return self.backend.decode(ids)
        runs = groupby(ids, self.backend.has)
        return "".join(self.backend.decode([*run]) if known else "".join(map(_no_token, run)) for known, run in runs)

    def piece(self, token_id: int) -> str:
        """The text of one token; bytes that are only part of a character show as U+FFFD."""
        return self.decode([token_id])

    def single(self, text: str) -> int:
        """The id of text that is exactly one token; raises `TokenError` showing the pieces otherwise."""
        ids = self.backend.encode(text)
        if len(ids) != 1:
            pieces = ", ".join(f"{self.piece(i)!r} ({i})" for i in ids[:PIECES_SHOWN]) or "nothing"
            pieces += f" and {len(ids) - PIECES_SHOWN} more" if len(ids) > PIECES_SHOWN else ""
            hint = " (a word inside a sentence usually starts with a space)" if not text.startswith(" ") else ""
            raise TokenError(
                f"{clipped(text)} is {len(ids)} tokens, not one: {pieces}; give one of them by text or id{hint}"
            )
        return ids[0]


def _no_token(token_id: int) -> str:
    return f"[no token {token_id}]"


def from_directory(directory: Path, raw: dict[str, Any]) -> Tokenizer:
    """tokenizer.json (+ tokenizer_config.json for the BOS rule, config.json for the end of text)."""
    import tokenizers

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
    bos = with_special[0] if has_bos else None
    return Tokenizer(Library(backend), bos, _eos(raw), partial(chat.from_directory, directory))


def _eos(raw: dict[str, Any]) -> tuple[int, ...]:
    """In config.json, or in its part about the text model."""
    inner = raw.get("text_config")
    return eos_ids(raw.get("eos_token_id", inner.get("eos_token_id") if isinstance(inner, dict) else None))


def eos_ids(value: object) -> tuple[int, ...]:
    """An id, a list of ids or nothing."""
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise DamagedFile(f"config: eos_token_id is {clipped(value)}; it must be an id or a list of ids")
    return tuple(ids)


def byte_level() -> Tokenizer:
    """One token per byte (ids 0-255) and an end-of-text token (256): the synthetic models' tokenizer."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Made

    by_byte = {byte: char for char, byte in byte_alphabet().items()}
    backend = Made(models.BPE({by_byte[b]: b for b in range(256)} | {"<|end|>": 256}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|end|>", normalized=False, special=True)])
    return Tokenizer(Library(backend), None, (256,))


def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable alphabet: a byte that prints stands for itself, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}
