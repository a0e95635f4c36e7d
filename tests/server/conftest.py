"""A lab with the synthetic model loaded, shared by the tests of one file."""

from collections.abc import Iterator

import pytest
from slow_model import Entered

from server.lab import Lab


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def lab() -> Lab:
    lab = Lab()
    lab.load("synthetic", "dense")
    return lab


@pytest.fixture
def slow(lab: Lab) -> Iterator[Entered]:
    """The lab's model, its layers counted, to be held."""
    entered = Entered(lab.models[0].model)
    lab.models[0].model = entered.model
    yield entered
    entered.let_go()
