"""The schemas: closed and strict at every depth, finite, and naming what the engine names."""

import importlib
import inspect
import pkgutil
from typing import get_args

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError

import schemas
from engine.points import POINTS
from schemas.arguments import PointName, Steer, Vector
from schemas.base import Number


def models() -> list[type[BaseModel]]:
    found = []
    for module in pkgutil.iter_modules(schemas.__path__):
        members = vars(importlib.import_module(f"schemas.{module.name}")).values()
        found += [m for m in members if inspect.isclass(m) and issubclass(m, BaseModel) and m is not BaseModel]
    return sorted(set(found), key=lambda m: m.__name__)


def test_the_point_names_are_the_engines() -> None:
    assert get_args(PointName) == tuple(POINTS)


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
        {"minus": [{"random_seed": 1}]},
        {"minus": [{"random_seed": 1}, {"random_seed": 2, "x": 1}]},
    ],
)
def test_a_vector_is_exactly_one_of_its_forms(vector: dict) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(Vector).validate_python(vector)
