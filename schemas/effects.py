"""Results of changing a run: baseline, effect, and what was applied how often."""

from typing import Annotated, Literal

from pydantic import Field, WithJsonSchema

from schemas.base import Number, Result, Strict, Token, TokenProbability


class Applied(Strict):
    """One intervention at one layer, and how many rows it changed."""

    kind: str
    point: str
    layer: int
    positions: Annotated[str | list[int], WithJsonSchema({})]
    heads: list[int] | None = None
    fired: int


class LogitDifference(Strict):
    """logit(token) - logit(against), without and with the intervention."""

    token: str
    against: str
    baseline: Number
    effect: Number


class TokenEffect(TokenProbability):
    """The token asked about, without and with."""

    baseline_probability: Number
    logit: Number
    baseline_logit: Number


class Effect(Result):
    """Next-token distributions with and without an intervention."""

    baseline: list[TokenProbability]
    effect: list[TokenProbability]
    kl: Number = Field(description="KL(effect || baseline) in nats")
    token: TokenEffect | None = None
    logit_difference: LogitDifference | None = None
    applied: list[Applied]


class PatchEffect(Effect):
    """The recipient with the donor's rows; `recovered` is the part of the way from recipient to donor."""

    donor: list[TokenProbability]
    recovered: Number | None = Field(
        description="(effect - baseline) / (donor - baseline) of the logit difference, without against of the token's "
        "probability: above 1 past the donor, below 0 away from it; null without a token or when donor and baseline "
        "are closer than 0.1 of a logit or 0.05 of probability",
    )


class Continuation(Strict):
    """New tokens."""

    text: str
    ids: list[int]
    stopped: Literal["length", "end_of_text", "context"]
    end: Token | None = None


class HookedGeneration(Result):
    """Text without and with the interventions."""

    baseline: Continuation
    hooked: Continuation
    first_difference: int | None = Field(description="index of the first new token that differs; null if none does")
    applied: list[Applied]


class InjectionResult(Result):
    """The recipient decoded with part of the donor's key-value cache in place of its own."""

    baseline: list[TokenProbability]
    injected: list[TokenProbability]
    kl: Number = Field(description="KL(injected || baseline) in nats, next token")
    baseline_continuation: Continuation
    injected_continuation: Continuation
    layers: list[int]
    source: list[int] = Field(description="[start, end) in the donor")
    dest: list[int] = Field(description="[start, end) in the recipient")
    what: str
    rope: str
    rows_replaced: int
    rows_unseen: int = Field(description="of those, rows that the next token's sliding window does not reach")
    replaced_text: str = Field(description="the recipient's tokens whose cache rows were replaced")
    donor_text: str | None = Field(None, description="the donor's tokens whose rows took their place")
    handle: str | None = Field(None, description="kv: handle of the edited cache, when keep was true")
    token: TokenEffect | None = None
    recovered: Number | None = Field(
        None,
        description="of the token's probability, as in kv_inject_test; left out where null, or for a cache as donor",
    )


class InjectionCell(Strict):
    """One transplant."""

    layers: str
    probability: Number
    recovered: Number | None = Field(
        description="(probability - baseline) / (donor - baseline): above 1 past the donor, below 0 away from it; null "
        "when donor and baseline are closer than 0.05"
    )
    kl: Number


class InjectionTest(Result):
    """Where the donor's cache carries the target."""

    target: str
    baseline: Number
    donor: Number
    positions: list[int] = Field(description="[start, end) transplanted, the same in both prompts")
    per_layer: list[InjectionCell]
    from_last: list[InjectionCell] = Field(description="the layers named and all above them")
    from_first: list[InjectionCell] = Field(description="the layers named and all below them")
    self_control: InjectionCell = Field(description="the recipient's own cache: must change nothing")
    unrelated_control: InjectionCell = Field(description="random tokens of the donor's length")
    unrelated_donor: str = Field(
        description="the text of those random tokens, the same in every call; its first 200 characters"
    )
