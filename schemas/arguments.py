"""Arguments that several tools share. Names of points and interventions repeat the engine's; a test compares them."""

from typing import Annotated, Literal

from pydantic import Field, WithJsonSchema

from schemas.base import Integers, Number, Strict

PointName = Literal[
    "embed",
    "resid_pre",
    "q",
    "k",
    "v",
    "attn_pattern",
    "z",
    "attn_proj",
    "attn_out",
    "resid_mid",
    "mlp_act",
    "mlp_proj",
    "mlp_out",
    "resid_post",
    "final_norm",
]

ModelRef = Annotated[
    str | None, Field(description="a model: handle or its readable name; may be left out when one model is loaded")
]
Prompt = Annotated[
    Annotated[str, Field(min_length=1, max_length=100_000)] | Annotated[Integers, Field(min_length=1)],
    Field(description="text, or a list of token ids"),
]
TokenRef = Annotated[
    str | int,
    Field(description="text that is exactly one token (mind the leading space, as in ' Paris'), or a token id"),
]
Layers = Annotated[
    Integers | str,
    Field(description='layer numbers (negative from the end), "all", or "start:stop:step"'),
]
Positions = Annotated[
    Literal["last", "all"] | Integers,
    Field(description='"last", "all", or positions (negative from the end of the prompt)'),
]
Scope = Annotated[
    Literal["last", "all", "prompt", "generated"] | Integers,
    Field(description='"last" (rows that emit a token), "all", "prompt", "generated", or absolute positions'),
]
MetricName = Annotated[
    Literal["probability", "logit", "logit_difference", "kl"],
    Field(description="of token; logit_difference: logit(token) - logit(against); kl: to the unchanged run, no token"),
]
TopK = Annotated[int, Field(ge=1, le=50, description="how many tokens to list")]


class HandleVector(Strict):
    """A stored vector: a vec: handle, or one row of an act: capture."""

    handle: str
    layer: int | None = None
    position: int | None = None


class TokenVector(Strict):
    """A token's row of W_E (`embed`) or W_U (`unembed`)."""

    token: str | int
    space: Literal["embed", "unembed"]


class ValuesVector(Strict):
    """Numbers given outright, d_model of them."""

    values: Annotated[list[Number], Field(fail_fast=True, min_length=1, max_length=20_000)]


class RandomVector(Strict):
    """A random direction of unit norm."""

    random_seed: Annotated[int, Field(ge=0)]


PlainVector = HandleVector | TokenVector | ValuesVector | RandomVector


class DifferenceVector(Strict):
    """The first vector minus the second."""

    minus: Annotated[list[PlainVector], Field(min_length=2, max_length=2)]


_VECTOR = (
    '{"handle", "layer"?, "position"?}, {"token", "space": "embed"|"unembed"}, {"values": [numbers]}, {"random_seed"}, '
    'or {"minus": [vector, vector]}'
)

Vector = Annotated[
    PlainVector | DifferenceVector,
    Field(description=_VECTOR),
    WithJsonSchema({"type": "object", "description": _VECTOR, "minProperties": 1}),
]
"""The published schema is its description: written out, the five forms would cost an agent 2 kB wherever they occur."""


class Steer(Strict):
    """Add alpha * vector to `resid_post` of a layer."""

    layer: int
    vector: Vector
    alpha: Number


class Target(Strict):
    """A row to patch: the same position in donor and recipient, or one in each; negative from each prompt's end."""

    layer: int
    position: int | None = None
    donor_position: int | None = None
    recipient_position: int | None = None
