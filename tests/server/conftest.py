"""A lab with the synthetic model loaded, shared by the tests of one file."""

import pytest

from server.lab import Lab


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def lab() -> Lab:
    lab = Lab()
    lab.load("synthetic", "dense")
    return lab
