"""A directory's tokenizer, from the files that Hugging Face writes: `from_directory`.

tokenizer.json             the tokenizer itself
tokenizer_config.json      special tokens by name, added tokens by id, the chat template
special_tokens_map.json    special tokens and added_tokens.json ids, where tokenizer_config.json has none by id
generation_config.json     where generation ends
chat_template.jinja        the chat template; additional_chat_templates/NAME.jinja others

Reference: transformers, tokenization_utils_base.py and tokenization_utils_tokenizers.py. Tokens that only these files
name are added to tokenizer.json's in the order in which transformers adds them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.chat import ChatTemplate, template_from
from engine.errors import DamagedFile, UnknownModel, clipped
from engine.library import Library
from engine.tokenizer import Tokenizer, eos_ids, named_ends
from engine.weights import read_json

if TYPE_CHECKING:
    import tokenizers

NAMES = tuple(f"{part}_token" for part in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
"""Special tokens that every tokenizer may have, in the order in which they are added."""

MOST_TEMPLATES = 50


def from_directory(directory: Path, raw: dict[str, Any]) -> Tokenizer:
    """`raw` is config.json, which also says where text ends."""
    import tokenizers

    path = directory / "tokenizer.json"
    if not path.exists():
        raise UnknownModel(
            f"{directory} has no tokenizer.json; save the tokenizer there in its fast form (other kinds are not read)"
        )
    read_json(path)
    said = Said.read(directory)
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
        backend.no_truncation()
        backend.no_padding()
        said.add_to(backend)
        with_special = backend.encode("a", add_special_tokens=True).ids
        plain = backend.encode("a", add_special_tokens=False).ids
    except DamagedFile:
        raise
    except Exception as error:  # the library raises bare Exception
        raise DamagedFile(f"tokenizer.json cannot be read: {str(error)[:200]}; fetch it again") from None
    ends = (*_eos(raw), *_eos(_json(directory, "generation_config.json")), *said.ends(backend))
    return Tokenizer(
        Library(backend), _bos(with_special, plain), tuple(dict.fromkeys(ends)), partial(_template, directory)
    )


def _bos(with_special: list[int], plain: list[int]) -> int | None:
    """What stands in front of a prompt. An EOS after every prompt is refused."""
    if with_special == plain:
        return None
    if with_special[1:] != plain:
        raise UnknownModel(
            f"the tokenizer makes {clipped(with_special)} of the tokens {clipped(plain)}: only one BOS token in front "
            "is read, since a prompt that ends the text cannot be continued"
        )
    return with_special[0]


def _eos(raw: dict[str, Any]) -> tuple[int, ...]:
    """In a configuration, or in its part about the text model."""
    inner = raw.get("text_config")
    return eos_ids(raw.get("eos_token_id", inner.get("eos_token_id") if isinstance(inner, dict) else None))


def _json(directory: Path, name: str) -> dict[str, Any]:
    path = directory / name
    return read_json(path) if path.exists() else {}


@dataclass(frozen=True)
class Said:
    """What the files beside tokenizer.json say of tokens: special ones by name, other special ones, tokens by id."""

    named: "dict[str, tokenizers.AddedToken]"
    more: "list[tokenizers.AddedToken]"
    placed: "dict[int, tokenizers.AddedToken]"

    @classmethod
    def read(cls, directory: Path) -> "Said":
        settings = _json(directory, "tokenizer_config.json")
        more = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
        placed = settings.get("added_tokens_decoder")
        if placed is None:
            told = _json(directory, "special_tokens_map.json")
            settings = {**settings, **told}
            more = more or told.get("extra_special_tokens") or told.get("additional_special_tokens") or []
        named = {key: value for key, value in settings.items() if key.endswith("_token") and _is_token(value)}
        if isinstance(more, dict):
            named, more = named | more, []
        if not isinstance(more, list) or not isinstance(placed, dict | None):
            raise DamagedFile("tokenizer_config.json: added tokens must be an object, additional special tokens a list")
        special = {name: _token(value) for name, value in named.items() if value}
        others = [*map(_token, more)]
        if placed is None:
            known = {token.content for token in (*special.values(), *others)}
            return cls(special, others, _by_id(_json(directory, "added_tokens.json"), known))
        return cls(special, others, {_number(at): _token(token, special=False) for at, token in placed.items()})

    def texts(self) -> dict[str, str]:
        """Name -> text of the special tokens that have one."""
        return {name: token.content for name, token in self.named.items()}

    def ends(self, library: "tokenizers.Tokenizer") -> tuple[int, ...]:
        """EOS, and the ends of a turn or a message by their usual names."""
        added = {token.content: at for at, token in library.get_added_tokens_decoder().items()}
        eos = self.named.get("eos_token")
        return (*([added[eos.content]] if eos is not None and eos.content in added else ()), *named_ends(added))

    def add_to(self, library: "tokenizers.Tokenizer") -> None:
        """Add what tokenizer.json lacks; raises `DamagedFile` where its place is not the one that a file gives it."""
        special = {token.content for token in self.named.values()}
        for _, token in (ordered := sorted(self.placed.items())):
            token.special = token.special or token.content in special
        library.add_tokens([token for _, token in ordered])
        for at, token in ordered:
            if (found := library.token_to_id(token.content)) != at:
                raise DamagedFile(
                    f"the added token {clipped(token.content)} is {found} by tokenizer.json and its place, and {at} "
                    "by the files beside it; save the tokenizer again"
                )
        known = {token.content for token in library.get_added_tokens_decoder().values()}
        order = sorted(self.named, key=lambda name: NAMES.index(name) if name in NAMES else len(NAMES))
        wanted = [*(self.named[name] for name in order), *self.more]
        library.add_tokens([token for token in wanted if token.content not in known])


def _is_token(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and isinstance(value.get("content"), str))


def _token(value: Any, special: bool = True) -> "tokenizers.AddedToken":
    """A token from its text, which makes it special, or from its fields, `special` where they do not say."""
    from tokenizers import AddedToken

    if isinstance(value, str):
        return AddedToken(value, special=True, normalized=False)
    fields = {key: item for key, item in value.items() if key != "__type"} if isinstance(value, dict) else {}
    if not _is_token(fields):
        raise DamagedFile(f"an added token is {clipped(value)}; it must have its text as content")
    try:
        return AddedToken(**({"special": special} | fields))
    except TypeError as error:
        raise DamagedFile(
            f"the added token {clipped(fields['content'])} cannot be read: {clipped(str(error))}"
        ) from None


def _by_id(ids: Mapping[str, Any], special: set[str]) -> "dict[int, tokenizers.AddedToken]":
    """As added_tokens.json has them: text -> id."""
    from tokenizers import AddedToken

    made = {}
    for text, at in ids.items():
        made[_number(at)] = AddedToken(text, special=text in special, normalized=text not in special)
    return made


def _number(value: Any) -> int:
    text = str(value)
    if isinstance(value, bool) or not text.isascii() or not text.isdecimal() or len(text) > 9:
        raise DamagedFile(f"the id of an added token is {clipped(value)}; it must be a whole number")
    return int(text)


def _template(directory: Path) -> ChatTemplate | None:
    """Of files of their own where there are any, or of tokenizer_config.json."""
    beside = {"default": directory / "chat_template.jinja"}
    beside |= {
        path.stem: path for path in sorted((directory / "additional_chat_templates").glob("*.jinja"))[:MOST_TEMPLATES]
    }
    sources: dict[str, object] = {
        name: path.read_text("utf-8", "replace") for name, path in beside.items() if path.exists()
    }
    source = _json(directory, "tokenizer_config.json").get("chat_template")
    if not sources and isinstance(source, list):
        sources = {str(item.get("name")): item.get("template") for item in source if isinstance(item, dict)}
    elif not sources:
        sources = source if isinstance(source, dict) else {"default": source}
    return template_from(sources, Said.read(directory).texts())
