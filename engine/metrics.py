"""One number from a next-token distribution: `Metric`.

probability         of a token
logit               of a token
logit_difference    logit(token) - logit(against)
kl                  KL(this || baseline) in nats
"""

from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from engine.distribution import kl_rows, softmax_of
from engine.errors import InputError, clipped
from engine.network import Network
from engine.ops import Array

MetricKind = Literal["probability", "logit", "logit_difference", "kl"]
METRICS: tuple[str, ...] = get_args(MetricKind)


@dataclass(frozen=True)
class Metric:
    """Called with (n, d_vocab) logits and the (d_vocab,) baseline's; returns (n,)."""

    kind: MetricKind
    token: int | None = None
    against: int | None = None

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
