"""Tokenizers of the `tokenizers` library: `Library`, and `byte_level`, the synthetic models'.

SentencePiece marks the words that follow a space. Its tokenizers put a space before the first word of a text, and take
one away in front of what they decode, so a piece without the mark and the same piece with it look alike at a text's
beginning. Inside a text neither happens, and there the two differ.
"""

import json
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from engine.tokenizer import Tokenizer, byte_alphabet

if TYPE_CHECKING:
    import tokenizers


class Library:
    """A `Backend`: a tokenizer of the `tokenizers` library."""

    def __init__(self, library: "tokenizers.Tokenizer") -> None:
        self._library = library

    def size(self) -> int:
        return int(self._library.get_vocab_size())

    def has(self, token_id: int) -> bool:
        return 0 <= token_id < 1 << 32 and self._library.id_to_token(token_id) is not None

    def encode(self, text: str, inside: bool = False) -> list[int]:
        made = (self._within if inside else self._library).encode(text, add_special_tokens=False)
        if not inside or self._within is self._library:
            return list(made.ids)
        first = next((i for i, token in enumerate(made.ids) if token in self._added), len(made.ids))
        rest = made.offsets[first:]
        return [*made.ids[:first], *(self.encode(text[rest[0][0] :]) if rest else [])]  # a special token begins anew

    def decode(self, ids: Sequence[int], inside: bool = False) -> str:
        library = self._within if inside else self._library
        return str(library.decode(list(ids), skip_special_tokens=False))

    @cached_property
    def _added(self) -> "dict[int, tokenizers.AddedToken]":
        return self._library.get_added_tokens_decoder()

    @cached_property
    def _within(self) -> "tokenizers.Tokenizer":
        """As the library inside a text; the library itself where that is no different."""
        import tokenizers
        from tokenizers import decoders, normalizers, pre_tokenizers

        whole = self._library
        parts = {
            "normalizer": _remade(whole.normalizer, normalizers.Sequence([])),
            "pre_tokenizer": _remade(whole.pre_tokenizer, pre_tokenizers.Sequence([])),
            "decoder": _remade(whole.decoder, decoders.Sequence([])),
        }
        if not any(parts.values()):
            return whole
        made = tokenizers.Tokenizer(whole.model)
        for name, part in parts.items():
            if (chosen := part or getattr(whole, name)) is not None:
                setattr(made, name, chosen)
        made.encode_special_tokens = whole.encode_special_tokens
        made.add_tokens([token for _, token in sorted(self._added.items())])
        return made


def _remade(part: Any, empty: Any) -> Any:
    """A component of a tokenizer without what it does at a text's beginning; None where it does nothing there."""
    if part is None:
        return None
    state = json.loads(part.__getstate__())
    within = _within(state)
    if within == state:
        return None
    nothing = json.loads(empty.__getstate__())
    empty.__setstate__(json.dumps(within or nothing).encode())
    return empty


def _within(state: dict[str, Any]) -> dict[str, Any] | None:
    """The description of a component, likewise; None for one that does nothing else."""
    kind, changes = state["type"], dict[str, Any]()
    if kind == "Sequence":
        (key,) = state.keys() - {"type"}
        first = 1 if key == "pretokenizers" else len(state[key])
        parts = [*map(_within, state[key][:first]), *(p if _every(p) else _within(p) for p in state[key][first:])]
        changes = {key: [part for part in parts if part is not None]}
    elif kind == "Prepend":
        return None
    elif kind == "Metaspace":
        changes = {"prepend_scheme": "never"}
    elif kind == "ByteLevel":
        changes = {"add_prefix_space": False}
    elif kind == "Strip":
        changes = {key: type(state[key])(0) for key in ("strip_left", "start") if key in state}
    return state | changes


def _every(state: dict[str, Any]) -> bool:
    """Whether a pre-tokenizer puts a space in front of every piece that the one before it made."""
    return bool(state.get("add_prefix_space") or state.get("prepend_scheme") == "always")


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
