"""A directory's tokenizer, from the files that Hugging Face writes: `from_directory`."""

from functools import partial
from pathlib import Path
from typing import Any

from engine import chat
from engine.errors import DamagedFile, UnknownModel
from engine.library import Library
from engine.tokenizer import Tokenizer, eos_ids
from engine.weights import read_json


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
