"""The schemas: closed and strict at every depth, finite, and naming what the engine names."""

import importlib
import inspect
import pkgutil
from typing import get_args

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError

import schemas
from engine import edits
from engine.interventions import KINDS, UNITS
from engine.metrics import METRICS
from engine.points import POINTS
from engine.replacements import MATCHES
from schemas.arguments import MatchName, MetricName, PointName, Scope, Steer, Vector
from schemas.base import Number
from schemas.interventions import NEEDS, TAKES, Intervention, Kind


def models() -> list[type[BaseModel]]:
    found = []
    for module in pkgutil.iter_modules(schemas.__path__):
        members = vars(importlib.import_module(f"schemas.{module.name}")).values()
        found += [m for m in members if inspect.isclass(m) and issubclass(m, BaseModel) and m is not BaseModel]
    return sorted(set(found), key=lambda m: m.__name__)


def test_the_point_names_are_the_engines() -> None:
    assert get_args(PointName) == tuple(POINTS)


def test_the_kinds_units_and_metrics_are_the_engines() -> None:
    assert get_args(Kind) == KINDS == tuple(NEEDS)
    units, _ = get_args(Intervention.model_fields["unit"].annotation)
    assert get_args(units) == UNITS
    assert get_args(get_args(MetricName)[0]) == METRICS
    assert get_args(get_args(MatchName)[0]) == MATCHES


def test_the_scopes_are_the_engines() -> None:
    (names, _), (engines, _) = get_args(get_args(Scope)[0]), get_args(edits.Scope)
    assert get_args(names) == get_args(engines)


GIVEN = {
    "over": ["a"],
    "value": 1.0,
    "vector": {"random_seed": 1},
    "unit": "raw",
    "seed": 1,
    "match": "pooled",
    "donor": "a",
    "pairs": [[0, 0]],
    "keys": [0],
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_intervention_has_the_fields_its_kind_needs_and_no_idle_ones(kind: str) -> None:
    needed = {name: GIVEN[name] for name in NEEDS[kind]}
    Intervention.model_validate({"kind": kind, "layers": [0], **needed})
    for name in needed:
        fewer = {key: value for key, value in needed.items() if key != name}
        with pytest.raises(ValidationError, match=f"{kind} needs {name}"):
            Intervention.model_validate({"kind": kind, "layers": [0], **fewer})
    for name in GIVEN.keys() - needed.keys() - set(TAKES.get(kind, ())):
        with pytest.raises(ValidationError, match=f"{kind} takes no {name}"):
            Intervention.model_validate({"kind": kind, "layers": [0], **needed, name: GIVEN[name]})


@pytest.mark.parametrize("model", models(), ids=lambda m: m.__name__)
def test_every_schema_is_closed_and_strict(model: type[BaseModel]) -> None:
    assert model.model_config["extra"] == "forbid"
    assert model.model_config["strict"] is True


@pytest.mark.parametrize("value", ["1", True, 1.0, None])
def test_an_integer_field_takes_integers_only(value: object) -> None:
    with pytest.raises(ValidationError):
        Steer.model_validate({"layer": value, "vector": {"random_seed": 1}, "alpha": 1.0})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_are_finite(value: float) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(Number).validate_python(value)


@pytest.mark.parametrize(
    "vector",
    [
        {"handle": "act:x", "extra": 1},
        {"token": " a"},
        {"token": " a", "space": "middle"},
        {"values": []},
        {"random_seed": -1},
        {"random_seed": 1, "norm_of": "column"},
        {"random_seed": 1, "norm_of": {"token": "a"}},
        {"minus": [{"random_seed": 1}]},
        {"minus": [{"random_seed": 1}, {"random_seed": 2, "x": 1}]},
    ],
)
def test_a_vector_is_exactly_one_of_its_forms(vector: dict) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(Vector).validate_python(vector)
