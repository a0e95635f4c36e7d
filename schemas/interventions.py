"""One intervention as an agent describes it; the same in every tool that intervenes."""

from typing import Annotated, Literal, Self

from pydantic import Field, WithJsonSchema, model_validator

from schemas.arguments import Heads, Layers, MatchName, PointName, Prompt, Scope, Vector
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
    """A change of rows at a point, in every pass."""

    kind: Kind
    layers: Layers | None = None
    point: Annotated[
        PointName | None,
        Field(description="default resid_post, or attn_pattern for knockout"),
        WithJsonSchema({"type": "string", "description": "as elsewhere; default resid_post, knockout: attn_pattern"}),
    ] = None
    positions: Annotated[Scope | None, Field(description='default "last" for steer, "all" for the others')] = None
    heads: Annotated[Heads | None, Field(description="as in forward_ablate")] = None
    neurons: Annotated[Integers | None, Field(description="at mlp_act")] = None
    value: Annotated[Number | None, Field(description="scale: factor; steer: alpha; set_component: component")] = None
    vector: Annotated[Vector | None, Field(description="steer, set_component, project_out")] = None
    unit: Annotated[
        Literal["raw", "unit", "row"] | None,
        Field(description="steer: alpha times the vector (default), its unit vector, or that in row norms"),
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
        told = [f"needs {', '.join(missing)}"] if missing else []
        told += [f"takes no {', '.join(f'{name} ({_takers(name)})' for name in idle)}"] if idle else []
        if self.kind == "patch" and self.positions is not None:
            told += self._no_identity()
        if told:
            raise ValueError(f"{self.kind} {' and '.join(told)}")
        return self

    def _no_identity(self) -> list[str]:
        """Why `positions` of a patch are not the same rows in both prompts."""
        if self.pairs is not None:
            return ["takes pairs or positions, not both: positions [3] are the pairs [[3, 3]]"]
        if self.positions in ("generated", "all_but_first"):
            return [f'takes no positions "{self.positions}": give positions [3] for pairs [[3, 3]], or "last" or "all"']
        return []


def _takers(name: str) -> str:
    """The kinds that take a field, and what they do."""
    kinds = [kind for kind, needs in NEEDS.items() if name in (*needs, *TAKES.get(kind, ()))]
    return f"{', '.join(kinds)} {'does' if len(kinds) == 1 else 'do'}"


Interventions = Annotated[
    list[Intervention] | None,
    Field(max_length=64, description="after the others, in the order listed"),
]

_ELSEWHERE = "applied last; as in generate_with_hooks"

FurtherInterventions = Annotated[
    list[Intervention] | None,
    Field(max_length=64, description=_ELSEWHERE),
    WithJsonSchema({"type": "array", "items": {"type": "object"}, "description": _ELSEWHERE}),
]
"""The same, but only generate_with_hooks publishes them in full: each further tool would cost an agent 2 kB."""
