"""Arguments that several tools share. Names of points and interventions repeat the engine's; a test compares them."""

import json
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, WithJsonSchema

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

_POINT = "as in capture_residuals"

PointRef = Annotated[PointName, Field(description=_POINT), WithJsonSchema({"type": "string", "description": _POINT})]
"""A point, where the names need not be published once more."""

ResidualName = Annotated[
    Literal["resid_post", "resid_mid", "resid_pre", "embed"],
    WithJsonSchema({"type": "string"}),
]
"""A point that the lens can read."""

ModelRef = str | None
"""A model: handle or the model's readable name; may be left out when exactly one is loaded."""

Prompt = Annotated[
    Annotated[str, Field(min_length=1, max_length=100_000)] | Annotated[Integers, Field(min_length=1)],
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "integer"}}]}),
]
"""Text, or a list of token ids."""

_MEANT = {"true": True, "false": False, "null": False, "none": False}


def _meant(value: Any) -> Any:
    """A truth value that a client sent as a text: no answer is begun with it."""
    return _MEANT.get(value.strip().lower(), value) if isinstance(value, str) else value


Chat = Annotated[
    bool | Annotated[str, Field(min_length=1, max_length=100_000)],
    BeforeValidator(_meant),
    WithJsonSchema({"type": ["boolean", "string"]}),
]
"""Whether texts go through the chat template, and how the answer begins."""

TokenRef = Annotated[
    str | int,
    Field(description="an id, or text of one token: ' Paris' has its space"),
]


def _listed(value: Any) -> Any:
    """A list of layers that a client sent as a text of JSON: no other text that names layers looks so."""
    try:
        read = json.loads(value) if isinstance(value, str) else None
    except (ValueError, RecursionError):
        return value
    return read if isinstance(read, list) and all(type(layer) is int for layer in read) else value


Layers = Annotated[
    Integers | str,
    BeforeValidator(_listed),
    Field(description='or "all", "start:stop:step"'),
]
Positions = Annotated[
    Literal["last", "all"] | Integers,
    Field(description="-1 is the prompt's last"),
]
Scope = Annotated[
    Literal["last", "all", "all_but_first", "prompt", "generated"] | Integers,
    Field(description="last: rows that emit a token"),
]
_HEADS = "numbers, or [layer, head] pairs without layers"

Heads = Annotated[
    list[int | Annotated[list[int], Field(min_length=2, max_length=2)]],
    Field(fail_fast=True, min_length=1, description=_HEADS),
    WithJsonSchema({"type": "array", "items": {}, "description": _HEADS}),
]
"""A set of heads: numbers in each of the layers beside them, or pairs that name a layer and a head each."""

MatchName = Annotated[
    Literal["position", "pooled"],
    Field(description="default position; pooled: all rows for all"),
]
MetricName = Annotated[
    Literal["probability", "logit", "logit_difference", "kl"],
    Field(description="logit_difference: of token - against; kl: to the unchanged run, no token"),
]
TopK = Annotated[int, Field(ge=1, le=50, description="tokens listed")]


class HandleVector(Strict):
    """One row of an act: capture."""

    handle: str
    layer: int | None = None
    position: int | None = None
    point: str | None = None


class TokenVector(Strict):
    """A token's row of W_E (`embed`) or W_U (`unembed`)."""

    token: str | int
    space: Literal["embed", "unembed"]


class ValuesVector(Strict):
    """Numbers given outright, d_model of them."""

    values: Annotated[list[Number], Field(fail_fast=True, min_length=1, max_length=20_000)]


class RandomVector(Strict):
    """A random direction: of unit norm, of another vector's, or of each row's that it is added to."""

    random_seed: Annotated[int, Field(ge=0)]
    norm_of: "Vector | Literal['row'] | None" = None


_FORMS = ("handle", "token", "values", "random_seed", "minus")
_VECTOR = (
    "{handle, layer?, position?, point?} | {token, space: embed|unembed} | {values: [numbers]} "
    "| {random_seed, norm_of?: vector|'row'} | {minus: [vector, vector]}"
)


def _form(value: Any) -> str | None:
    """Which form of a vector is meant: the first that has one of its keys."""
    keys = value if isinstance(value, dict) else vars(value) if isinstance(value, Strict) else ()
    return next((_tag(form) for form in _FORMS if form in keys), None)


def _tag(form: str) -> str:
    """No field's name: complaints tell both."""
    return f"by {form}"


_BY_FORM = Discriminator(_form, "vector", f"a vector is {_VECTOR}")

_Plain = (
    Annotated[HandleVector, Tag(_tag("handle"))]
    | Annotated[TokenVector, Tag(_tag("token"))]
    | Annotated[ValuesVector, Tag(_tag("values"))]
    | Annotated[RandomVector, Tag(_tag("random_seed"))]
)
PlainVector = Annotated[_Plain, _BY_FORM]


class DifferenceVector(Strict):
    """The first vector minus the second."""

    minus: Annotated[list[PlainVector], Field(min_length=2, max_length=2)]


Vector = Annotated[
    _Plain | Annotated[DifferenceVector, Tag(_tag("minus"))],
    _BY_FORM,
    Field(description=_VECTOR),
    WithJsonSchema({"type": "object", "description": _VECTOR}),
]
"""The published schema is its description: written out, the five forms would cost an agent 2 kB wherever they occur."""


_AS_NEIGHBORS = "as in embedding_neighbors"

VectorRef = Annotated[Vector, WithJsonSchema({"type": "object", "description": _AS_NEIGHBORS})]
"""The same, where the forms need not be published once more."""


class Steer(Strict):
    """alpha * vector is added to resid_post of layer."""

    layer: int
    vector: Vector
    alpha: Number


_STEERS = "as in forward_steer"

Steers = Annotated[
    list[Steer],
    Field(max_length=64),
    WithJsonSchema({"type": "array", "items": {"type": "object"}, "description": _STEERS}),
]
"""What forward_steer publishes in full."""


class Target(Strict):
    """A row to patch: one position of both prompts, or one of each; -1 is each's last."""

    layer: int
    position: int | None = None
    donor_position: int | None = None
    recipient_position: int | None = None
