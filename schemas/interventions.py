"""One intervention as an agent describes it; the same in every tool that intervenes."""

from typing import Annotated, Literal, Self

from pydantic import Field, WithJsonSchema, model_validator

from schemas.arguments import Layers, MatchName, PointName, Prompt, Scope, Vector
from schemas.base import Integers, Number, Strict

Kind = Literal["zero", "mean", "resample", "scale", "steer", "set_component", "project_out", "patch", "knockout"]

NEEDS: dict[str, tuple[str, ...]] = {
    "zero": (),
    "mean": ("over",),
    "resample": ("over",),
    "scale": ("value",),
    "steer": ("vector", "value"),
    "set_component": ("vector", "value"),
    "project_out": ("vector",),
    "patch": ("donor",),
    "knockout": ("keys",),
}
"""kind -> the fields it cannot do without."""

TAKES: dict[str, tuple[str, ...]] = {
    "mean": ("match",),
    "resample": ("match", "seed"),
    "steer": ("unit",),
    "patch": ("pairs",),
}
"""kind -> the fields it may have besides, beyond the ones that all kinds have."""

SPECIAL = ("over", "match", "value", "vector", "unit", "seed", "donor", "pairs", "keys")


class Intervention(Strict):
    """A change of some rows at one point of some layers, in every pass of the run."""

    kind: Kind
    layers: Layers
    point: Annotated[
        PointName | None,
        Field(description="default resid_post, or attn_pattern for knockout"),
        WithJsonSchema({"type": "string", "description": "as elsewhere; default resid_post, knockout: attn_pattern"}),
    ] = None
    positions: Annotated[Scope | None, Field(description='default "last" for steer, "all" for the others')] = None
    heads: Annotated[Integers | None, Field(description="at q, attn_pattern, z; key-value heads at k, v")] = None
    neurons: Annotated[Integers | None, Field(description="at mlp_act")] = None
    value: Annotated[Number | None, Field(description="scale: factor; steer: alpha; set_component: component")] = None
    vector: Annotated[Vector | None, Field(description="steer, set_component, project_out")] = None
    unit: Annotated[
        Literal["raw", "unit", "row"] | None,
        Field(
            description="steer: alpha is of the vector (raw, default), its unit vector, or that times the row's norm"
        ),
    ] = None
    over: Annotated[list[Prompt] | None, Field(min_length=1, max_length=50, description="mean, resample: prompts")] = (
        None
    )
    match: MatchName | None = None
    seed: Annotated[int | None, Field(ge=0, description="resample")] = None
    donor: Annotated[Prompt | None, Field(description="patch: prompt")] = None
    pairs: Annotated[
        list[Annotated[list[int], Field(min_length=2, max_length=2)]] | None,
        Field(min_length=1, max_length=1000, description="patch: [donor position, position]; default: same positions"),
    ] = None
    keys: Annotated[Integers | None, Field(min_length=1, description="knockout: positions not attended to")] = None

    @model_validator(mode="after")
    def fields_of_the_kind(self) -> Self:
        """Refuse a field the kind needs and lacks, or has no use for."""
        missing = [name for name in NEEDS[self.kind] if getattr(self, name) is None]
        allowed = (*NEEDS[self.kind], *TAKES.get(self.kind, ()))
        idle = [name for name in SPECIAL if getattr(self, name) is not None and name not in allowed]
        if self.kind == "patch" and self.positions is not None:
            idle.append("positions (give pairs)")
        if missing or idle:
            told = [f"needs {', '.join(missing)}"] if missing else []
            told += [f"takes no {', '.join(idle)}"] if idle else []
            raise ValueError(f"{self.kind} {' and '.join(told)}")
        return self


Interventions = Annotated[
    list[Intervention] | None, Field(max_length=64, description="applied after the others, in order")
]

_ELSEWHERE = "applied after the others; as in generate_with_hooks"

FurtherInterventions = Annotated[
    list[Intervention] | None,
    Field(max_length=64, description=_ELSEWHERE),
    WithJsonSchema({"type": "array", "items": {"type": "object"}, "description": _ELSEWHERE}),
]
"""The same, but only generate_with_hooks publishes them in full: each further tool would cost an agent 2 kB."""
