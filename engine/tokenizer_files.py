"""A directory's tokenizer, from the files that Hugging Face writes: `from_directory`.

tokenizer.json             the tokenizer itself, or what its class makes its own of (`tokenizer_classes.py`)
tokenizer_config.json      its class, special tokens by name, added tokens by id, the chat template
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

from engine import tokenizer_classes
from engine.chat import ChatTemplate, template_from
from engine.errors import DamagedFile, EngineError, UnknownModel, clipped
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
    path = directory / "tokenizer.json"
    if not path.exists():
        raise UnknownModel(
            f"{directory} has no tokenizer.json; save the tokenizer there in its fast form (other kinds are not read)"
        )
    source, settings = read_json(path), _json(directory, "tokenizer_config.json")
    of = tokenizer_classes.of_directory(settings, raw, '"ByteLevel"' in path.read_text("utf-8"))
    said = Said.read(directory, of, source)
    try:
        backend = said.complete(of.rebuilt(_as_filed(path), source, settings), of)
        with_special = backend.encode("a", add_special_tokens=True).ids
        plain = backend.encode("a", add_special_tokens=False).ids
    except EngineError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise DamagedFile(f"tokenizer.json cannot be read: {str(error)[:200]}; fetch it again") from None
    ends = _eos(_json(directory, "generation_config.json")) or _eos(raw) or said.ends(backend)
    bos, template = _bos(with_special, plain), partial(_template, directory, said.texts())
    return Tokenizer(Library(backend), bos, tuple(dict.fromkeys(ends)), template)


def _as_filed(path: Path) -> "tokenizers.Tokenizer":
    import tokenizers

    made = tokenizers.Tokenizer.from_file(str(path))
    made.no_truncation()
    made.no_padding()
    return made


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
    """What the files say of added tokens: special ones by name, other special ones, tokens by id.

    `splits`: a special token that is written in a text is no token.
    """

    named: "dict[str, tokenizers.AddedToken]"
    more: "list[tokenizers.AddedToken]"
    placed: "dict[int, tokenizers.AddedToken]"
    splits: bool = False

    @classmethod
    def read(cls, directory: Path, of: tokenizer_classes.Class, source: Mapping[str, Any]) -> "Said":
        """`source` is tokenizer.json."""
        settings = _json(directory, "tokenizer_config.json")
        more = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
        placed = settings.get("added_tokens_decoder")
        if placed is None:
            told = _json(directory, "special_tokens_map.json")
            settings = {**settings, **told}
            more = more or told.get("extra_special_tokens") or told.get("additional_special_tokens") or []
        given = {**of.named, **{key: value for key, value in settings.items() if key.endswith("_token")}}
        named: dict[str, Any] = {key: value for key, value in given.items() if _is_token(value)}
        if isinstance(more, dict):
            named, more = named | more, []
        more = more or [text for key, text in of.named.items() if key not in NAMES and _default(settings, key)]
        if not isinstance(more, list) or not isinstance(placed, dict | None):
            raise DamagedFile("tokenizer_config.json: added tokens must be an object, additional special tokens a list")
        if not isinstance(splits := settings.get("split_special_tokens", False), bool):
            raise DamagedFile(f"split_special_tokens is {clipped(splits)}; it must be true or false")
        special = {name: _token(value) for name, value in named.items() if value}
        others = [*map(_token, more)]
        if placed is None:
            known = {token.content for token in (*special.values(), *others)}
            ids = _by_id(_json(directory, "added_tokens.json"), known) | _filed(source)
        else:
            ids = {_number(at): _token(token, special=False) for at, token in placed.items()}
        return cls(special, others, ids, splits)

    def texts(self) -> dict[str, str]:
        """Name -> text of the special tokens that have one."""
        return {name: token.content for name, token in self.named.items()}

    def ends(self, library: "tokenizers.Tokenizer") -> tuple[int, ...]:
        """EOS, and the ends of a turn or a message by their usual names."""
        added = {token.content: at for at, token in library.get_added_tokens_decoder().items()}
        eos = self.named.get("eos_token")
        return (*([added[eos.content]] if eos is not None and eos.content in added else ()), *named_ends(added))

    def complete(self, library: "tokenizers.Tokenizer", of: tokenizer_classes.Class) -> "tokenizers.Tokenizer":
        """The library's tokenizer with all added tokens."""
        library.encode_special_tokens = self.splits
        self.add_to(library)
        texts = self.texts()
        of.finish(library, texts.get("bos_token"), [*texts.values(), *(token.content for token in self.more)])
        return library

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


def _default(settings: Mapping[str, Any], key: str) -> bool:
    """Whether a class keeps a token of its own: neither null nor a token's fields stand in its place."""
    return isinstance(settings.get(key, ""), str)


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


def _filed(source: Mapping[str, Any]) -> "dict[int, tokenizers.AddedToken]":
    """As tokenizer.json has them."""
    tokens = source.get("added_tokens") or []
    if not isinstance(tokens, list) or not all(isinstance(token, dict) and "id" in token for token in tokens):
        raise DamagedFile("tokenizer.json: added_tokens must be a list of tokens with their ids")
    return {_number(token["id"]): _token({k: v for k, v in token.items() if k != "id"}) for token in tokens}


def _number(value: Any) -> int:
    text = str(value)
    if isinstance(value, bool) or not text.isascii() or not text.isdecimal() or len(text) > 9:
        raise DamagedFile(f"the id of an added token is {clipped(value)}; it must be a whole number")
    return int(text)


def _template(directory: Path, texts: Mapping[str, str]) -> ChatTemplate | None:
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
    return template_from(sources, dict(texts))
