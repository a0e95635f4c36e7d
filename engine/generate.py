"""Prefill and decode with hooks on at every step: `generate`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from engine.cache import KVCache
from engine.decoder import Tick, forward
from engine.edits import check_order
from engine.errors import InputError
from engine.hooks import LayerHook
from engine.network import Network, Tokens
from engine.ops import Array
from engine.shares import Progress


@dataclass(frozen=True)
class Generation:
    """ids and text of the new tokens (the end-of-text token that ended the run is `end`, and not among them).

    `stopped`: at max_new_tokens, at an end-of-text token, or since no further position can be computed; `why` says what
    stands in the way then.
    """

    ids: list[int]
    text: str
    stopped: Literal["length", "end_of_text", "context"]
    why: str | None = None
    end: int | None = None


def generate(
    model: Network,
    tokens: Tokens,
    max_new_tokens: int,
    *,
    hook: LayerHook | None = None,
    cache: KVCache | None = None,
    window: int | None = None,
    on_token: Callable[[int, str], None] | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    tick: Tick | None = None,
) -> Generation:
    """Continue one prompt.

    `cache` may hold earlier positions; `tokens` follow them. `window` keeps only the last positions of the cache,
    which stay at their absolute positions. temperature 0 is greedy; otherwise nucleus sampling (Holtzman et al.
    2020) from a generator seeded with `seed`. `on_token(id, text)` is called for each new token. `tick` counts to the
    layers that `max_new_tokens` take; an end-of-text token ends it before.

    Where rotary frequencies change with the length (longrope once, dynamic at every token beyond its context) the whole
    sequence is computed anew, hooks included, as transformers does for Phi-3: the numbers are those without a cache. A
    cache whose tokens are not known here, or that a window has cut, ends the text at that place.
    """
    _check(max_new_tokens, temperature, top_p)
    ids = model.token_batch(tokens)
    if len(ids) != 1:
        raise InputError(f"generation continues one prompt at a time, not {len(ids)}")
    cache = KVCache.with_layers(model.config.n_layers) if cache is None else cache
    whole = cache.length == 0 and window is None
    prompt_length = cache.next_position + ids.shape[1]
    rng = np.random.default_rng(seed)
    edits = [] if hook is None else [*hook.named_edits()]
    check_order(edits, np.arange(cache.next_position, prompt_length + max_new_tokens - 1), prompt_length)
    counted = [(edit, edit.fired) for edit in edits]
    new: list[int] = []
    feed = ids.tolist()
    progress = None if tick is None else Progress(tick, model.config.n_layers * max_new_tokens)
    stopped: Literal["length", "end_of_text", "context"] = "length"
    why = None
    end: int | None = None
    while len(new) < max_new_tokens:
        if new and (why := _no_further(model, cache, whole)) is not None:
            stopped = "context"
            break
        if new and not cache.serves(cache.next_position + 1):
            cache.crop(0)
            for edit, fired in counted:
                edit.fired = fired
            feed = [[*ids[0].tolist(), *new]]
        result = forward(model, feed, hook=hook, cache=cache, prompt_length=prompt_length, tick=progress)
        assert result.logits is not None
        if window is not None:
            cache.keep_last(window)
        token = pick(result.logits[0, -1], temperature, top_p, rng)
        if token in model.tokenizer.eos:
            stopped, end = "end_of_text", token
            break
        new.append(token)
        feed = [[token]]
        if on_token is not None:
            on_token(token, model.tokenizer.piece(token))
    return Generation(new, model.tokenizer.decode(new, inside=True), stopped, why, end)


def _no_further(model: Network, cache: KVCache, whole: bool) -> str | None:
    """Why the next token cannot be computed; None where it can. `whole`: every token of the cache is known."""
    if (length := cache.next_position) >= model.config.n_ctx:
        return f"the context of {model.config.n_ctx} tokens is full"
    if whole or cache.serves(length + 1):
        return None
    return (
        f"rotary frequencies change after {length} tokens, and this cache's keys cannot be computed anew: generate "
        "from the whole prompt, without a cache or window"
    )


def pick(logits: Array, temperature: float, top_p: float, rng: np.random.Generator) -> int:
    """The next token from (d_vocab,) logits."""
    if temperature == 0:
        return int(logits.argmax())
    shifted = logits.astype(np.float64) - logits.max()
    with np.errstate(over="ignore"):  # so cold that only the largest is left
        weights = np.exp(shifted / temperature)
    probabilities = weights / weights.sum()
    order = np.argsort(-probabilities, kind="stable")
    before = np.cumsum(probabilities[order]) - probabilities[order]
    kept = order[before < top_p]  # the smallest set that reaches top_p: never empty
    return int(rng.choice(kept, p=probabilities[kept] / probabilities[kept].sum()))


def _check(max_new_tokens: int, temperature: float, top_p: float) -> None:
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    if not temperature >= 0 or not np.isfinite(temperature):
        raise InputError(f"temperature is {temperature}; it must be 0 (greedy) or a number above it")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p is {top_p}; it must be above 0 and at most 1")
