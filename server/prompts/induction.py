"""The protocol find_induction_heads, in tokens of the model that it is for."""

from collections.abc import Sequence
from itertools import cycle, islice
from typing import Annotated

from mcp import MCPError
from mcp.types import INVALID_PARAMS
from pydantic import Field

from engine import Model
from engine.errors import TokenError
from engine.tokenizer import Tokenizer
from server.prompts.steps import HEAD, LAYER, ModelName, call, loading, protocol

WORDS = "table river seven cloud orange winter stone music"
"""SmolLM2 continues their repetition."""
OTHERS = "bottle quiet thirteen garden silver window copper anchor"
LETTERS, OTHER_LETTERS = "qwertyui", "asdfghjk"
"""For models whose tokens are characters."""
LEAST = 3
"""Tokens of a sequence: two to be told apart, and one that follows."""


def find_induction_heads(
    known: Model | None,
    words: Annotated[
        str | None, Field(description="unrelated words, each one token after a space, or characters, each one token")
    ] = None,
    model: ModelName = None,
) -> str:
    """Find the heads that continue a repeated sequence: by patching, attention and ablation, each with its control."""
    tokenizer = None if known is None else known.tokenizer
    listed = _pieces(words or (WORDS if _has_words(tokenizer) else LETTERS))
    strangers = _pieces(OTHERS if listed and listed[0].startswith(" ") else OTHER_LETTERS)
    others = [piece for piece in strangers if piece not in listed]
    _check(tokenizer, listed, others)
    first = 0 if tokenizer is None or tokenizer.bos is None else 1
    return _protocol(_Prompts(listed, others, first), loading(known, model), known is None, model)


def _has_words(tokenizer: Tokenizer | None) -> bool:
    """Whether words are tokens; of a model that is not in memory it is supposed."""
    return tokenizer is None or all(_is_single(tokenizer, piece) for piece in _pieces(f"{WORDS} {OTHERS}"))


def _is_single(tokenizer: Tokenizer, piece: str) -> bool:
    try:
        tokenizer.single(piece)
    except TokenError:
        return False
    return True


def _pieces(words: str) -> list[str]:
    return [f" {word}" for word in words.split()] if len(words.split()) > 1 else list(words.strip())


def _check(tokenizer: Tokenizer | None, listed: Sequence[str], others: Sequence[str]) -> None:
    if not LEAST <= len(set(listed)) == len(listed) or len(others) < LEAST:
        raise MCPError(INVALID_PARAMS, f"words: give {LEAST} different words (or characters) or more")
    wrong = [piece for piece in (*listed, *others) if tokenizer is not None and not _is_single(tokenizer, piece)]
    if wrong:
        told = ", ".join(map(repr, wrong[:5]))
        raise MCPError(INVALID_PARAMS, f"words: {told} are not one token each in this model; choose others")


class _Prompts:
    """A sequence twice, without its last token at the end, and what controls need; positions of the first kind."""

    def __init__(self, listed: list[str], others: list[str], first: int) -> None:
        """`first` is the position of the first word."""
        copy, (self.rival, stranger, filler, *_) = listed[:-1], others
        self.answer = listed[-1]
        self.repeated = "".join([*listed, *copy])
        self.of_value = "".join([*copy, self.rival, *copy])
        self.of_key = "".join([*copy[:-1], stranger, self.answer, *copy])
        self.of_query = "".join([*listed, *copy[:-1], stranger])
        self.fresh = "".join([*islice(cycle(others), len(listed)), *copy])
        self.farther = "".join([*listed, filler, *copy])
        self.offset, self.value = len(copy), first + len(copy)
        self.key, self.last = self.value - 1, self.value - 1 + len(listed)


def _protocol(at: _Prompts, first_step: str, unknown: bool, model: str | None) -> str:
    def traced(corrupt: str, point: str = "z") -> str:
        tokens = {"token": at.answer, "against": at.rival, "metric": "logit_difference", "model": model}
        return call("causal_trace", clean=at.repeated, corrupt=corrupt, point=point, by="head", **tokens)

    def attention(prompt: str) -> str:
        return call("attention_pattern", prompt=prompt, layers=[LAYER], heads=[HEAD], positions="last", model=model)

    def ablated(prompt: str) -> str:
        head = {"layers": [LAYER], "point": "z", "heads": [HEAD]}
        return call("forward_ablate", prompt=prompt, **head, token=at.answer, model=model)

    return protocol(
        "Which heads are induction heads: after [A][B] ... [A], do they look at [B] and make the model say it?",
        [
            first_step,
            f"{call('tokenize', text=at.repeated, model=model)}: {at.last + 1} tokens. The last, [A], stands at "
            f"{at.last}; its earlier copy, the key, at {at.key}; what followed it, [B], the value, at {at.value}."
            + " If there are more, the model splits these words or begins with a token of its own: ask for this prompt "
            "again, now that it is loaded, and it will fit." * unknown,
            f"{call('track_token', prompt=at.repeated, token=at.answer, model=model)}: does the model continue the "
            f"copy? If {at.answer!r} does not end on top there is no induction to explain: stop and say so.",
            f"Corrupt the value: {traced(at.of_value)}. Heads that bring back {at.answer!r} move [B] to the end: LAYER "
            "and HEAD are candidates for induction heads.",
            f"Corrupt the key: {traced(at.of_key)}; and the query: {traced(at.of_query)}. Heads that count here and "
            "not before do the matching: those that tell a token what stood before it are the same in both runs while "
            "only the value is corrupted, so that corrupting the value hides them.",
            f"Keys, queries and values can be traced too: {traced(at.of_key, 'k')} shows whose keys match (by "
            f"key-value head), {traced(at.of_query, 'q')} whose queries ask, {traced(at.of_value, 'v')} whose values "
            "are moved.",
            f"{attention(at.repeated)} for each candidate: an induction head looks at {at.value} with a weight above "
            "0.3. One that looks elsewhere passes on what others found: drop it.",
            f"Controls: {attention(at.fresh)}: nothing is repeated, so an induction head leaves {at.value}. "
            f"{attention(at.farther)}: the copies are one token farther apart, so an induction head still looks at "
            f"{at.value}. A head of fixed offset passes every test until the distance changes: one that looks "
            f"{at.offset} tokens back looks at {at.value + 1} now.",
            f"{ablated(at.repeated)} for each candidate. Controls: another HEAD of that layer; and the candidate on "
            f"text without a repetition, {ablated(at.fresh)}.",
            "Repeat with other words: a head must pass with both.",
        ],
        f"the heads that look at {at.value} only when there is a repetition, at either distance, and whose ablation "
        "lowers the token's probability clearly more than the controls; beside them, the heads that only the key or "
        "the query shows.",
        "that attention alone makes an induction head; that a head which attends at one distance finds anything (its "
        "offset may be fixed); or that a head that survives its own ablation does nothing: several may share the work, "
        "so ablate the candidates together.",
    )
