"""One number from a next-token distribution: `Metric`; and when differences of it mean something.

probability         of a token
logit               of a token
logit_difference    logit(token) - logit(against)
kl                  KL(this || baseline) in nats

recovered     the part of the way from one run to another
LEAST_GAP     how far those must be apart
rounding      what rounding alone can change
saturating    where a metric hardly moves, whatever the logits do
"""

from dataclasses import dataclass, replace
from typing import Literal, TypeVar, get_args

import numpy as np

from engine.distribution import kl_rows, softmax_of
from engine.errors import InputError, clipped
from engine.network import Network
from engine.ops import Array

MetricKind = Literal["probability", "logit", "logit_difference", "kl"]
METRICS: tuple[str, ...] = get_args(MetricKind)

LEAST_GAP: dict[MetricKind, float] = {"probability": 0.05, "logit": 0.1, "logit_difference": 0.1, "kl": 0.01}
"""`recovered` is of no use between runs that are closer than this, in units of the metric: a tenth of a logit is one
part in ten of the odds, and rounding in thirty layers some hundredths of it; 0.01 nats go with 0.05 of probability.
"""

ROUNDING = 1e-4
"""What float32 may do to a logit in thirty layers, relative to the largest logit."""

FLAT = 0.01
"""The slope p (1 - p) of a probability below which a whole logit moves it by less than that much."""

Value = TypeVar("Value", float, Array)


@dataclass(frozen=True)
class Metric:
    """Called with (n, d_vocab) logits and the (d_vocab,) baseline's; returns (n,)."""

    kind: MetricKind
    token: int | None = None
    against: int | None = None

    def __post_init__(self) -> None:
        """Raise `InputError` for a difference between a token and itself, which is 0 in every run."""
        if self.kind == "logit_difference" and self.token is not None and self.token == self.against:
            raise InputError(
                f"token and against are one token, {self.token}: its logit differs from itself by 0 in every run. Give "
                "another against, or leave it out"
            )

    def check(self, model: Network) -> None:
        """Raise `InputError` unless the metric has the tokens it needs, and the model has them."""
        if self.kind not in METRICS:
            raise InputError(f"there is no metric {clipped(self.kind)}; valid: {', '.join(METRICS)}")
        needs = {"token": self.kind != "kl", "against": self.kind == "logit_difference"}
        for name, needed in needs.items():
            if needed != ((token := getattr(self, name)) is not None):
                raise InputError(f"the metric {self.kind} {'needs' if needed else 'takes no'} {name}")
            if token is not None:
                model.check_token(token)

    def narrowed(self) -> tuple["Metric", list[int] | None]:
        """The same of the logits of a few tokens, and these tokens; itself and None if it needs the logits of all."""
        if self.kind == "logit" and self.token is not None:
            return replace(self, token=0), [self.token]
        if self.kind == "logit_difference" and self.token is not None and self.against is not None:
            return replace(self, token=0, against=1), [self.token, self.against]
        return self, None

    def __call__(self, logits: Array, baseline: Array) -> Array:
        out: Array
        if self.kind == "kl":
            return kl_rows(logits, baseline)
        if self.kind == "probability":
            out = softmax_of(logits)[:, self.token]
        elif self.kind == "logit":
            out = logits[:, self.token]
        else:
            out = logits[:, self.token] - logits[:, self.against]
        return np.ascontiguousarray(out)


def recovered(kind: MetricKind, value: Value, baseline: float, donor: float) -> Value | None:
    """The part of the way from baseline to donor, (value - baseline) / (donor - baseline).

    Above 1 it went past the donor, below 0 away from it. None where the two are closer than `LEAST_GAP`.
    """
    gap = donor - baseline
    return (value - baseline) / gap if abs(gap) >= LEAST_GAP[kind] else None


def rounding(metric: Metric, logits: Array) -> float:
    """How much rounding alone may change the metric of a run with these (d_vocab,) logits, in its own units.

    Every logit may be off by e, so differences by 2e. A probability follows with slope p (1 - p), KL to second order.
    """
    e = ROUNDING * float(np.abs(logits).max())
    if metric.kind == "probability":
        p = float(softmax_of(logits)[metric.token])
        return 2 * e * p * (1 - p)
    return {"logit": e, "logit_difference": 2 * e, "kl": 2 * e**2}[metric.kind]


def saturating(metric: Metric, logits: Array) -> float | None:
    """The probability that saturates the metric in a run with these (d_vocab,) logits; None where nothing does.

    A probability near 0 or 1 hardly follows its logit; nor does KL any logit where one token has nearly all.
    """
    if metric.kind not in ("probability", "kl"):
        return None
    p = softmax_of(logits)
    found = float(p.max() if metric.token is None else p[metric.token])
    alone = metric.kind == "probability" or found > 0.5
    return found if alone and found * (1 - found) < FLAT else None
