"""Reading residuals in the vocabulary: the logit lens (nostalgebraist 2020) and projections.

lens_logits, logit_lens_topk, most_probable, track_token, track_race    final norm, unembedding, logit scale, softcap
lens_cost, distributions_cost    what the lens of some rows holds, and next-token distributions that are compared
leads, emergence_layer     whether a token is more than on top by chance, and from which layer on
project_through_unembed    raw W_U @ vec: no norm, no softcap (raw direct logit attribution)
embedding_neighbors        cosine against the unscaled W_E
embedding_row, embedding_row_scaled, unembedding_row    single rows of W_E and W_U

A residual is (d_model,) or (n, d_model); for the latter, lists of results.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from engine.cost import Cost
from engine.decoder import norm, unembed
from engine.distribution import softmax_of, top_k
from engine.errors import VectorError
from engine.matrices import rows_of, stretches
from engine.metrics import Metric, rounding
from engine.network import Network
from engine.ops import Array, inner, softmax

Ranked = list[tuple[int, float]]
"""(token id, score), best first."""

READ_AT_ONCE = 128
"""Rows unembedded in one product: enough to use what is read of W_U, and no more than some 25 MB for 50,000 tokens."""


def lens_logits(model: Network, residual: Array) -> Array:
    """The logits the model would give if this residual were its last: (..., d_model) -> (..., d_vocab)."""
    return unembed(model, norm(model.check_vector(residual), model.params.final_norm, model.config))


def logit_lens_topk(model: Network, residual: Array, k: int = 10) -> Ranked | list[Ranked]:
    """The k most probable tokens as (token id, probability)."""
    rows = model.check_vector(residual)
    return most_probable(model, rows, k) if rows.ndim == 2 else most_probable(model, rows[None], k)[0]


def track_token(model: Network, residual: Array, token_id: int) -> float | list[float]:
    """The probability of one token."""
    token = model.check_token(token_id)
    probabilities = softmax_of(lens_logits(model, residual))
    return float(probabilities[token]) if probabilities.ndim == 1 else [float(row[token]) for row in probabilities]


def track_race(
    model: Network, residuals: Mapping[int, Array], k: int = 5
) -> dict[int, Ranked] | dict[int, list[Ranked]]:
    """The lens of several layers: {layer: top k}. Faster than layer by layer: W_U is read for all rows at once."""
    rows = {layer: model.check_vector(residual) for layer, residual in residuals.items()}
    if not rows:
        return {}
    ranked = most_probable(model, np.concatenate([np.atleast_2d(x) for x in rows.values()]), k)
    out: dict[int, Any] = {}
    for layer, x in rows.items():
        out[layer], ranked = (ranked[: len(x)], ranked[len(x) :]) if x.ndim == 2 else (ranked[0], ranked[1:])
    return out


def most_probable(model: Network, rows: Array, k: int) -> list[Ranked]:
    """The k most probable tokens of each of (n, d_model) rows, so many rows at a time that their logits are a moderate
    array.
    """
    found: list[Ranked] = []
    for start in range(0, len(rows), READ_AT_ONCE):
        found += _each(softmax(lens_logits(model, rows[start : start + READ_AT_ONCE])), k)
    return found


def lens_cost(model: Network, rows: int) -> Cost:
    """What `most_probable` holds: the logits of some rows at a time, and what ranks one of them."""
    at_once = min(rows, READ_AT_ONCE)
    by = {"positions": rows} if rows == at_once else {}
    return Cost().holding(4 * model.config.d_vocab * at_once, **by).holding(2 * 4 * model.config.d_vocab)


def distributions_cost(model: Network, runs: int) -> Cost:
    """What so many runs' next-token logits hold, and KL between two of them in float64."""
    return Cost(nbytes=(4 * runs + 3 * 8 + 4) * model.config.d_vocab)


def leads(logits: Array, token: int) -> bool:
    """Whether a token is on top of (d_vocab,) logits by more than chance.

    On top of a distribution that is near uniform some token always is. So the leader needs at least d_vocab^-1/2 of
    the probability, which is half of the way from uniform to certain in nats, and a lead that rounding cannot make.
    """
    others = np.delete(logits, token)
    ahead = float(logits[token]) - float(others.max(initial=-np.inf))
    probability = float(softmax_of(logits)[token])
    return ahead > rounding(Metric("logit_difference"), logits) and probability >= len(logits) ** -0.5


def emergence_layer(logits: Mapping[int, Array], token: int) -> int | None:
    """The first of these layers from which the token `leads` to the last of them; None if it does not lead there."""
    since = None
    for layer, row in logits.items():
        since = (layer if since is None else since) if leads(row, token) else None
    return since


def project_through_unembed(model: Network, vec: Array, k: int = 10) -> Ranked | list[Ranked]:
    """The k largest entries of W_U @ vec as (token id, logit)."""
    return _ranked(inner(model.check_vector(vec), model.params.ends.unembed), k)


def embedding_neighbors(model: Network, query: Array, k: int = 10) -> Ranked | list[Ranked]:
    """The k tokens whose rows of W_E have the largest cosine with `query`."""
    vector = model.check_vector(query)
    length = np.linalg.norm(vector, axis=-1, keepdims=True)
    if not length.all():
        raise VectorError("a zero vector has no direction, so it has no neighbours")
    embed = model.params.ends.embed
    lengths = np.concatenate([np.sqrt(np.vecdot(rows, rows)) for rows in stretches(embed)])
    return _ranked(inner(vector / length, embed) / np.maximum(lengths, np.finfo(np.float32).tiny), k)


def embedding_row(model: Network, token_id: int) -> Array:
    """W_E[token]: (d_model,), a copy."""
    row: Array = rows_of(model.params.ends.embed, np.array([model.check_token(token_id)]))[0]
    return row


def embedding_row_scaled(model: Network, token_id: int) -> Array:
    """W_E[token] times the embedding scale: what enters the residual stream, (d_model,)."""
    return embedding_row(model, token_id) * np.float32(model.config.embed_scale)


def unembedding_row(model: Network, token_id: int) -> Array:
    """W_U's row of a token: (d_model,), a copy."""
    row: Array = rows_of(model.params.ends.unembed, np.array([model.check_token(token_id)]))[0]
    return row


def _ranked(scores: Array, k: int) -> Ranked | list[Ranked]:
    return top_k(scores, k) if scores.ndim == 1 else _each(scores, k)


def _each(scores: Array, k: int) -> list[Ranked]:
    return [top_k(row, k) for row in scores]
