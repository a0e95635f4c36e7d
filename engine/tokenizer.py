"""Text to ids and back: `Tokenizer`, which adds the model's own BOS rule to a `Backend`.

`library.py` and `gguf_tokenizer.py` have the backends, `tokenizer_files.py` reads a directory's. Special tokens written
in a prompt's text are read as special tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import groupby
from typing import Any, Protocol

from engine.chat import ChatTemplate, Message, Read
from engine.errors import DamagedFile, InputError, TokenError, clipped


class Backend(Protocol):
    """Text and ids, without any rule about BOS; `inside` a text SentencePiece puts no space in front."""

    def size(self) -> int: ...
    def has(self, token_id: int) -> bool: ...
    def encode(self, text: str, inside: bool = False) -> list[int]: ...
    def decode(self, ids: Sequence[int], inside: bool = False) -> str: ...


ENDS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<EOT>", "_<EOT>",
    "[EOT]", "<end_of_utterance>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "<|return|>", "<|call|>", "<|flush|>",
    "<|calls|>", "</s>", "<|eom_id|>", "[EOS]", "<eos>", "<turn|>", "<|tool_response>", "[e~[")  # fmt: skip
"""Names of tokens that end a text, a turn or a message, as llama.cpp knows them."""

HARMONY_ENDS = ({"<|return|>", "<|call|>"}, {"<|calls|>", "<|flush|>"})
"""Beside either pair <|end|> closes a part of an answer."""

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

    def encode(self, text: str, inside: bool = False) -> list[int]:
        return self.words.backend.encode(text, inside)

    def decode(self, ids: Sequence[int], inside: bool = False) -> str:
        return self.words.backend.decode(ids, inside)


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

    def encode_chat(
        self, messages: Sequence[Message], opening: str = "", inside: bool = False, **given: Any
    ) -> list[int]:
        """The ids of a conversation in the model's own template, the assistant's turn opened, its answer at `opening`.

        The template writes BOS itself, where the model wants one; what stands `inside` a text has none. `given` goes to
        `ChatTemplate.render`: tools, documents, template, and what the template alone knows. Raises `InputError` for a
        model without a template.
        """
        if self.chat_template is None:
            raise InputError("this model has no chat template; give the prompt as the model should read it")
        written = self.chat_template.render(messages, **given) + opening
        return self._encoded(
            written.removeprefix(self.chat_template.tokens.get("bos_token", "")) if inside else written
        )

    def encode(self, text: str, inside: bool = False) -> list[int]:
        """The ids of a prompt, BOS in front where the model wants one and the text does not begin with it.

        A text that stands `inside` another gets neither BOS nor the space that SentencePiece puts in front.
        """
        ids = self._encoded(text, inside)
        return ids if inside or self.bos is None or ids[:1] == [self.bos] else [self.bos, *ids]

    def has_bos(self, text: str) -> bool:
        """Whether a text begins with the BOS token that `encode` would put there."""
        return self.bos is not None and self.piece(self.bos) in text and self.backend.encode(text)[:1] == [self.bos]

    def _encoded(self, text: str, inside: bool = False) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TokenError(f"the text is not valid Unicode: {error.reason} at character {error.start}") from None
        return self.backend.encode(text, inside)

    def decode(self, ids: Sequence[int], inside: bool = False) -> str:
        """The text of ids, special tokens included; a row of the embedding without a token reads as [no token 7].

        `inside` another text, a first word keeps the space in front of it.
        """
        if all(map(self.backend.has, ids)):
            return self.backend.decode(ids, inside)
        runs = groupby(ids, self.backend.has)
        return "".join(
            self.backend.decode([*run], inside) if known else "".join(map(_no_token, run)) for known, run in runs
        )

    def piece(self, token_id: int) -> str:
        """The text of one token inside a text; bytes that are only part of a character show as U+FFFD."""
        return self.decode([token_id], inside=True)

    def single(self, text: str) -> int:
        """The id of text that is exactly one token inside a text: " Paris" and "Paris" are two.

        Raises `TokenError` showing the pieces otherwise.
        """
        ids = self._encoded(text, inside=True)
        if len(ids) != 1:
            pieces = ", ".join(f"{self.piece(i)!r} ({i})" for i in ids[:PIECES_SHOWN]) or "nothing"
            pieces += f" and {len(ids) - PIECES_SHOWN} more" if len(ids) > PIECES_SHOWN else ""
            hint = " (a word inside a sentence usually starts with a space)" if not text.startswith(" ") else ""
            hint = " (an id is a number without quotes)" if text.isdecimal() else hint
            raise TokenError(
                f"{clipped(text)} is {len(ids)} tokens, not one: {pieces}; give one of them by text or id{hint}"
            )
        return ids[0]


def _no_token(token_id: int) -> str:
    return f"[no token {token_id}]"


def eos_ids(value: object) -> tuple[int, ...]:
    """An id, a list of ids or nothing."""
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise DamagedFile(f"config: eos_token_id is {clipped(value)}; it must be an id or a list of ids")
    return tuple(ids)


def named_ends(ids: Mapping[str, int]) -> tuple[int, ...]:
    """The tokens of a vocabulary that end generation by their names."""
    inner = {"<|end|>"} if any(pair <= ids.keys() for pair in HARMONY_ENDS) else set()
    return tuple(ids[name] for name in ENDS if name in ids and name not in inner)


def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable alphabet: a byte that prints stands for itself, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}
