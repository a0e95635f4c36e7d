"""What every schema shares: strict models, finite numbers, and the parts that appear in many results."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer

LEAST_SHOWN = 1e-12
"""Smaller numbers show as 0: they are rounding, or a probability that no run tells from none."""


def _shown(value: float, digits: int = 6) -> float:
    return float(f"{value:.{digits}g}") if abs(value) >= LEAST_SHOWN else 0.0


Number = Annotated[float, Field(allow_inf_nan=False), PlainSerializer(_shown, return_type=float)]
"""A finite float, shown to six significant digits."""

Rough = Annotated[float, Field(allow_inf_nan=False), PlainSerializer(lambda value: _shown(value, 4), return_type=float)]
"""A finite float of many in one answer, shown to four significant digits."""

Exact = Annotated[
    float, Field(allow_inf_nan=False), PlainSerializer(lambda value: float(f"{value:.9g}"), return_type=float)
]
"""A finite float32, shown with the nine digits that identify it."""

Integers = Annotated[list[int], Field(fail_fast=True)]
"""A list argument, refused at its first wrong item: to tell all of a million takes minutes."""


class Strict(BaseModel):
    """Refuses unknown fields and values of the wrong type, nested ones included."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Result(Strict):
    """Base of every tool's result."""

    model: str = Field(description="handle of the model that was used")
    notice: str | None = Field(None, description="what a reader of these numbers must know")


class Token(Strict):
    """A vocabulary entry."""

    id: int
    text: str


class ScoredToken(Token):
    """A vocabulary entry with its probability, logit or cosine, as the field holding it says."""

    score: Number


class TokenProbability(Token):
    """A vocabulary entry and its probability."""

    probability: Number
