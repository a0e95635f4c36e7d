"""A token and its twin, the same text with or without the space in front: `tell_twins`."""

import math
from collections.abc import Iterable

from engine import Model
from engine.errors import TokenError
from engine.ops import Array
from server.call import Call

FAR = 10.0
"""Times as likely as the token that was named: then the twin was meant."""


def tell_twins(call: Call, model: Model, tokens: Iterable[int | None], *logits: Array) -> None:
    """A notice for each token whose twin is far likelier in one of the (d_vocab,) logits."""
    for token in dict.fromkeys(tokens):
        twin = None if token is None else twin_of(model, token)
        if token is None or twin is None:
            continue
        times = math.exp(min(max(float(row[twin] - row[token]) for row in logits), 80.0))
        if times >= FAR:
            named, other = (f"{model.tokenizer.piece(i)!r} ({i})" for i in (token, twin))
            call.note(f"{named} was asked about, but {other} is {times:.3g} times as likely there: which is meant?")


def twin_of(model: Model, token: int) -> int | None:
    """The token of the same text with a space in front, or without it; None where there is none.

    Bytes and other tokens that their own text does not name have none.
    """
    words = model.tokenizer
    text = words.piece(token)
    other = text[1:] if text.startswith(" ") else f" {text}"
    try:
        twin = words.single(other)
        is_named = words.single(text) == token and words.piece(twin) == other
    except TokenError:
        return None
    return twin if is_named and twin < model.config.d_vocab else None
