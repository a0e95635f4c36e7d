"""Next-token distributions: `softmax_of`, `kl_divergence`, `kl_rows`, `top_k`, `rank_of`."""

import numpy as np
import numpy.typing as npt

from engine.ops import Array, softmax

STRETCH = 64


def softmax_of(logits: Array) -> Array:
    """Probabilities over the last axis; the logits are left as they are."""
    return softmax(logits.copy())


def kl_divergence(p_logits: Array, q_logits: Array) -> float:
    """KL(p || q) in nats for two (d_vocab,) rows of logits; rounding below zero reads as zero."""
    return float(kl_rows(p_logits[None], q_logits)[0])


def kl_rows(p_logits: Array, q_logits: Array) -> Array:
    """KL of each (n, d_vocab) row from one (d_vocab,) row of logits: (n,), computed in float64."""
    p, q = (x.astype(np.float64) for x in (p_logits, q_logits))
    apart = p - q
    p_total, q_total = _exponentials(p), _exponentials(q)  # p and q are shares of these now
    divergence: Array = np.vecdot(p, apart) / p.sum(-1) - (p_total - q_total)
    return np.maximum(divergence, 0).astype(np.float32)


def _exponentials(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Turn rows of logits, in place, into their exponentials, of which the largest is 1; returns the log of each row's
    sum of exponentials as they were.
    """
    peak = logits.max(-1)
    logits -= peak[..., None]
    np.exp(logits, out=logits)
    out: npt.NDArray[np.float64] = peak + np.log(logits.sum(-1))
    return out


def top_k(scores: Array, k: int) -> list[tuple[int, float]]:
    """The k largest entries of a (n,) array as (index, value), largest first; ties by index."""
    k = min(k, len(scores))
    if k < 1:
        return []
    candidates = np.flatnonzero(scores >= _floor(scores, k))
    order = candidates[np.argsort(-scores[candidates], kind="stable")][:k]
    return [(int(i), float(scores[i])) for i in order]


def _floor(scores: Array, k: int) -> float:
    """A value that at least k entries reach: the k-th largest of the maxima of some parts, or of the entries.

    Finding the maxima of a vocabulary is some 50 times faster than partitioning it. A part is every so-manieth entry:
    then the maximum is taken of whole rows at a time.
    """
    whole = len(scores) - len(scores) % STRETCH
    maxima = scores[:whole].reshape(STRETCH, -1).max(0)
    if len(maxima) < k:
        maxima = scores
    return float(np.partition(maxima, -k)[-k])


def rank_of(scores: Array, index: int) -> int:
    """How many entries are larger: 0 is the top."""
    return int((scores > scores[index]).sum())
