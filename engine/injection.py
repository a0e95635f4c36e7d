"""KV-cache surgery as experiments: `prefill_inject` and `kv_inject_test`.

Surgery after a full prefill cannot change the first new token: its key, value and query are computed already.
So both prompts are prefilled up to their last token, the caches are edited, and only then the recipient's last
token is decoded.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from engine.cache import KVCache, check_move
from engine.cost import Cost, cache_bytes, of_pass
from engine.decoder import Tick, forward
from engine.distribution import kl_divergence, softmax_of
from engine.errors import CacheError, PromptError
from engine.forks import Variant
from engine.generate import Generation, generate
from engine.heads import Heads, heads_by_layer, name_layers
from engine.metrics import Metric, recovered
from engine.network import Network
from engine.ops import Array
from engine.shares import Progress
from engine.sweep import Base, Read, base_run, sweep, sweep_cost


@dataclass(frozen=True)
class Injection:
    """Baseline and injected run: next-token logits (d_vocab,), KL(injected || baseline) in nats, continuations;
    `source` [start, end) of the donor went to `dest` of the recipient; `cache` is the edited cache (n-1 tokens).
    `unseen` is {layer: positions} of rows that were replaced where the next token's sliding window does not reach.
    `donor` are the donor's own next-token logits, where it was a prompt.
    """

    baseline: Array
    injected: Array
    kl: float
    baseline_text: Generation
    injected_text: Generation
    layers: list[int]
    source: tuple[int, int]
    dest: int
    rows_replaced: int
    cache: KVCache
    unseen: dict[int, list[int]]
    donor: Array | None = None

    def recovered(self, metric: Metric) -> float | None:
        """How much of the way from recipient to donor (`metrics.recovered`); None where the donor was a cache."""
        if self.donor is None:
            return None
        at = (self.baseline, self.injected, self.donor)
        baseline, injected, donor = (float(metric(logits[None], self.baseline)[0]) for logits in at)
        return recovered(metric.kind, injected, baseline, donor)


def prefilled(model: Network, tokens: Sequence[int], tick: Tick | None = None) -> KVCache:
    """The cache of all tokens but the last; raises `PromptError` for a prompt of one token."""
    _check_prompt(tokens)
    cache = KVCache.with_layers(model.config.n_layers)
    forward(model, tokens[:-1], cache=cache, logits_at="none", prompt_length=len(tokens), tick=tick)
    return cache


def _check_prompt(tokens: Sequence[int]) -> None:
    if len(tokens) < 2:
        raise PromptError("a one-token prompt has no cache to edit: give a prompt of at least two tokens")


def prefill_inject(
    model: Network,
    recipient: Sequence[int],
    donor: Sequence[int] | KVCache,
    layers: Iterable[int] | None = None,
    source: tuple[int, int] | None = None,
    dest: int | None = None,
    what: Literal["kv", "k", "v"] = "kv",
    rope: Literal["realign", "keep"] = "realign",
    heads: Heads | None = None,
    max_new_tokens: int = 20,
    tick: Tick | None = None,
) -> Injection:
    """Decode the recipient with part of the donor's cache in place of its own.

    By default all layers, and all donor positions that fit. `source` is [start, end) in the donor's n-1 cached
    positions, `dest` where it goes in the recipient's: the same positions if left out. `heads` are key-value heads, by
    number in each of the layers, or as pairs (layer, head) without `layers`.
    """
    _check_prompt(recipient)
    kept = len(recipient) - 1
    if isinstance(donor, KVCache):
        donor.bind(model.config)
        held = donor.length
    else:
        _check_prompt(donor)
        held = len(donor) - 1
    every = () if name_layers(heads) else range(model.config.n_layers)
    which = heads_by_layer(model, every if layers is None else layers, heads, key_value=True)
    dest = dest if dest is not None else 0 if source is None else source[0]
    if source is None and not 0 <= dest < kept:
        raise CacheError(f"dest {dest} does not lie in the {kept} positions that the cache holds from 0 on")
    rows = (0, min(held, kept - dest)) if source is None else source
    check_move(model.config, rows, dest, held, kept, what, rope)
    if tick is not None:
        tick = Progress(tick, prefill_inject_cost(model, recipient, donor, max_new_tokens).layers)
    mine = prefilled(model, recipient, tick)
    theirs = donor if isinstance(donor, KVCache) else prefilled(model, donor, tick)
    edited = mine.fork()
    replaced = sum(edited.transplant(theirs, [i], rows, dest, what, only, rope) for i, only in which.items())
    runs = [_decoded(model, cache, recipient[-1], max_new_tokens, tick) for cache in (mine, edited)]
    (baseline, baseline_text), (injected, injected_text) = runs
    kl = kl_divergence(injected, baseline)
    places = range(dest, dest + rows[1] - rows[0])
    unseen = _out_of_window(model, which, places, len(recipient) - 1)
    donors = None if isinstance(donor, KVCache) else next_logits(model, theirs, donor[-1], tick)
    return Injection(
        baseline, injected, kl, baseline_text, injected_text, [*which], rows, dest, replaced, edited, unseen, donors
    )


def prefill_inject_cost(
    model: Network, recipient: Sequence[int], donor: Sequence[int] | KVCache, max_new_tokens: int = 20
) -> Cost:
    """What `prefill_inject` will take."""
    cfg = model.config
    theirs = Cost() if isinstance(donor, KVCache) else of_pass(cfg, len(donor) - 1) + of_pass(cfg, 1)
    decoded = of_pass(cfg, 1) + of_pass(cfg, 1) * max_new_tokens
    caches = cache_bytes(cfg, 3 * len(recipient) + max_new_tokens)
    return (of_pass(cfg, len(recipient) - 1) + theirs + decoded * 2).holding(caches)


def _out_of_window(model: Network, layers: Iterable[int], positions: Iterable[int], query: int) -> dict[int, list[int]]:
    """{layer: the positions that a query row cannot see there}, for layers where there are any."""
    windows = {layer: model.config.windows[layer] for layer in layers}
    unseen = {
        layer: [p for p in positions if p <= query - window] for layer, window in windows.items() if window is not None
    }
    return {layer: hidden for layer, hidden in unseen.items() if hidden}


def _decoded(
    model: Network, cache: KVCache, token: int, max_new_tokens: int, tick: Tick | None
) -> tuple[Array, Generation]:
    logits = next_logits(model, cache, token, tick)
    return logits, generate(model, [token], max_new_tokens, cache=cache.fork(), tick=tick)


def next_logits(model: Network, cache: KVCache, token: int, tick: Tick | None = None) -> Array:
    """(d_vocab,) logits after `token` follows the cache, which stays as it is."""
    logits = forward(model, [token], cache=cache.fork(), tick=tick).logits
    assert logits is not None
    row: Array = logits[0, -1]
    return row


@dataclass(frozen=True)
class InjectionCell:
    """One transplant: the target's probability, how much of the way to the donor's that is (`metrics.recovered`), and
    KL(injected || baseline) in nats.
    """

    layers: list[int]
    probability: float
    recovered: float | None
    kl: float


@dataclass(frozen=True)
class InjectionScan:
    """Where the donor's cache carries the target: by layer, from the last layer downwards, from the first upwards;
    with two controls, the recipient's own cache and an unrelated donor's, at all layers. `unrelated` are that donor's
    tokens, `donor_logits` (d_vocab,) the donor's.
    """

    baseline: float
    donor: float
    source: tuple[int, int]
    dest: int
    per_layer: list[InjectionCell]
    from_last: list[InjectionCell]
    from_first: list[InjectionCell]
    self_control: InjectionCell
    unrelated_control: InjectionCell
    unrelated: list[int]
    donor_logits: Array


def kv_inject_test(
    model: Network,
    recipient: Sequence[int],
    donor: Sequence[int],
    target: int,
    layers: Iterable[int] | None = None,
    seed: int = 0,
    tick: Tick | None = None,
) -> InjectionScan:
    """Does the donor's cache carry the answer `target`, and in which layers?

    All donor positions that fit, from position 0. The unrelated donor is as long as the donor, of random tokens
    from `seed`.
    """
    token = model.check_token(target)
    chosen = sorted(heads_by_layer(model, range(model.config.n_layers) if layers is None else layers, None))
    _check_prompt(recipient)
    _check_prompt(donor)
    random = [int(i) for i in np.random.default_rng(seed).integers(0, model.config.d_vocab, len(donor))]
    if tick is not None:
        tick = Progress(tick, kv_inject_cost(model, recipient, donor, chosen).layers)
    base, logits, others = _runs(model, recipient, [donor, random], chosen[0], tick)
    rows = (0, min(len(recipient), len(donor)) - 1)
    moved, unrelated, own = (_transplanted(base.cache, cache, chosen, rows) for cache in (*others, base.cache))
    carried = float(softmax_of(logits)[token])
    spans = _spans(chosen)
    moves = [*({i: moved[i] for i in span} for span in spans), own, unrelated]
    run = sweep(model, recipient, [Variant(kv=kv) for kv in moves], _read(token), base=base, tick=tick)
    baseline = float(run.baseline[0])

    def cell(kv: Mapping[int, Any], values: Array) -> InjectionCell:
        probability, kl = map(float, values)
        return InjectionCell(list(kv), probability, recovered("probability", probability, baseline, carried), kl)

    cells = list(map(cell, moves, run.values))
    each, from_last, from_first = ([cells[spans.index(span)] for span in kind] for kind in _kinds(chosen))
    return InjectionScan(baseline, carried, rows, 0, each, from_last, from_first, cells[-2], cells[-1], random, logits)


def _runs(
    model: Network, recipient: Sequence[int], others: list[Sequence[int]], first: int, tick: Tick | None
) -> tuple[Base, Array, list[KVCache]]:
    """The recipient's base run, the logits after the first of the others, and the others' caches.

    Prompts of one length are one batch.
    """
    cache = KVCache.with_layers(model.config.n_layers)
    if len(others[0]) == len(recipient):
        base = base_run(model, recipient, first, beside=others, cache=cache, tick=tick)
        logits = base.beside_logits[0]
    else:
        base, run = base_run(model, recipient, first, tick=tick), forward(model, others, cache=cache, tick=tick)
        assert run.logits is not None
        logits = run.logits[0, -1]
    return base, logits, [cache.sequence(i) for i in range(len(others))]


def kv_inject_cost(
    model: Network, recipient: Sequence[int], donor: Sequence[int], layers: Iterable[int] | None = None
) -> Cost:
    """What `kv_inject_test` will take."""
    cfg, n = model.config, len(recipient)
    chosen = sorted(model.resolve_layers(range(cfg.n_layers) if layers is None else layers))
    blank = np.broadcast_to(np.float32(0), (cfg.n_kv_heads, n - 1, cfg.d_head))
    variants = [Variant(kv=dict.fromkeys(span, (blank, blank))) for span in [*_spans(chosen), chosen, chosen]]
    caches = cache_bytes(cfg, 4 * n + 2 * len(donor))
    if len(donor) == n:
        return sweep_cost(model, recipient, variants, prompts=3).holding(caches)
    others = Cost(cfg.n_layers, 2 * cfg.n_layers * len(donor), 0, 2 * of_pass(cfg, len(donor)).nbytes)
    return (others + sweep_cost(model, recipient, variants)).holding(caches)


def _kinds(layers: list[int]) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """Layer by layer, from the last downwards, from the first upwards."""
    n = len(layers)
    return [[i] for i in layers], [layers[i:] for i in reversed(range(n))], [layers[: i + 1] for i in range(n)]


def _spans(layers: list[int]) -> list[list[int]]:
    """The layers of every transplant of a scan, each once."""
    return [list(span) for span in dict.fromkeys(tuple(span) for kind in _kinds(layers) for span in kind)]


def _transplanted(
    recipient: KVCache, donor: KVCache, layers: Iterable[int], rows: tuple[int, int]
) -> dict[int, tuple[Array, Array]]:
    """{layer: (keys, values)} that the recipient's last row reads with the donor's rows in place of its own, from
    position 0 on.
    """
    edited = recipient.fork()
    edited.crop(recipient.length - 1)
    edited.transplant(donor, layers, rows, 0)
    filled = {layer: edited.layer(layer).filled() for layer in layers}
    return {layer: (k[0], v[0]) for layer, (k, v, _) in filled.items()}


def _read(token: int) -> Read:
    """The token's probability, and KL(injected || baseline)."""
    metrics = Metric("probability", token), Metric("kl")
    return lambda logits, baseline: np.stack([metric(logits, baseline) for metric in metrics], -1)
