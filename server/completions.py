"""Completions of prompt arguments and of handles in resource addresses: model names, tokens, the caller's handles."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import anyio.to_thread
from mcp.server import MCPServer
from mcp.types import (
    Completion,
    CompletionArgument,
    CompletionContext,
    PromptReference,
    ResourceTemplateReference,
)

from engine import Model
from engine.catalog import CATALOGUE, SYNTHETIC
from engine.errors import TokenError
from engine.planted import CIRCUITS
from server.auth import principal
from server.lab import Lab, LoadedModel
from server.prompts import TOKENS as OF_TOKENS
from server.resources import RUNS, TENSORS

MOST = 100
"""Values in one answer; the protocol allows no more."""


class Completions:
    """What an argument may become, given how it begins."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._pieces: WeakKeyDictionary[LoadedModel, list[str]] = WeakKeyDictionary()

    def find(
        self, ref: PromptReference | ResourceTemplateReference, argument: CompletionArgument, chosen: dict[str, str]
    ) -> Completion:
        """The values that begin as the argument does; `chosen` are the arguments that are known."""
        found = [value for value in self._values(ref, argument.name, chosen) if value.startswith(argument.value)]
        return Completion(values=found[:MOST], total=len(found), has_more=len(found) > MOST)

    def _values(
        self, ref: PromptReference | ResourceTemplateReference, name: str, chosen: dict[str, str]
    ) -> Sequence[str]:
        if isinstance(ref, ResourceTemplateReference):
            return self._handles(ref.uri)
        if name == "model":
            return list(dict.fromkeys(self._models()))
        return self._tokens(chosen.get("model")) if name in OF_TOKENS else []

    def _handles(self, template: str) -> list[str]:
        store, owner = self._lab.store, principal()
        if template == TENSORS:
            return [record.handle for record in store.records(owner)]
        return [run.handle for run in store.runs(owner)] if template == RUNS else []

    def _models(self) -> Iterator[str]:
        """Loaded ones first, by name and by handle, then what could be loaded."""
        for item in self._lab.models:
            yield from (item.model.name, item.handle)
        yield from (*CATALOGUE, SYNTHETIC, *(f"{SYNTHETIC}:{name}" for name in CIRCUITS))
        yield from self._lab.sources.names()

    def _tokens(self, model: str | None) -> list[str]:
        if (item := self._lab.present(model or None)) is None:
            return []
        if item not in self._pieces:
            self._pieces[item] = usable_pieces(item.model)
        return self._pieces[item]


def usable_pieces(model: Model) -> list[str]:
    """What can be typed of the vocabulary, in the order of ids: printable texts that are that one token again."""
    ids = range(min(model.config.d_vocab, model.tokenizer.vocabulary))
    return [piece for index in ids if _stands_for(model, piece := model.tokenizer.piece(index), index)]


def _stands_for(model: Model, piece: str, index: int) -> bool:
    try:
        return piece.isprintable() and model.tokenizer.single(piece) == index
    except TokenError:
        return False


def add_completions(server: MCPServer[Any], lab: Lab) -> None:
    """Answer completion requests from one lab."""
    completions = Completions(lab)

    @server.completion()  # type: ignore[no-untyped-call, untyped-decorator]
    async def complete(
        ref: PromptReference | ResourceTemplateReference,
        argument: CompletionArgument,
        context: CompletionContext | None,
    ) -> Completion:
        chosen = (context and context.arguments) or {}
        return await anyio.to_thread.run_sync(functools.partial(completions.find, ref, argument, chosen))
