"""`blas.product` is numpy's product, whatever the arrays' layout; `single_threaded` is for all who want it."""

from collections.abc import Callable, Iterator
from contextlib import suppress

import numpy as np
import pytest

from engine import blas

NOISE = np.random.default_rng(0)


def noise(*shape: int) -> np.ndarray:
    return NOISE.standard_normal(shape, np.float32)


def product(x: np.ndarray, weight: np.ndarray, block: int) -> np.ndarray:
    return blas.product(x, weight, block, room(x, weight))


def room(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return np.full((len(x), weight.shape[1]), np.nan, np.float32)


LAYOUTS = {
    "contiguous": (noise(40, 96), noise(96, 700)),
    "some features of a wider matrix": (noise(40, 200)[:, 50:146], noise(200, 700)[50:146]),
    "some columns of a wider matrix": (noise(40, 96), noise(96, 900)[:, 100:800]),
    "columns beside each other in memory": (noise(96, 40).T, noise(700, 96).T),
    "every other number": (noise(40, 192)[:, ::2], noise(96, 1400)[:, ::2]),
    "one row": (noise(1, 96), noise(96, 20000)),
    "rows backwards": (noise(40, 96)[::-1], noise(96, 700)[::-1]),
    "every other row": (noise(80, 96)[::2], noise(192, 700)[::2]),
    "one matrix for all": (np.broadcast_to(noise(1, 96), (40, 96)), noise(96, 700)),
}


@pytest.mark.parametrize("block", [96, 40, 1000])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_product_is_the_sum_over_all_blocks(layout: str, block: int) -> None:
    x, weight = LAYOUTS[layout]
    expected = x.astype(np.float64) @ weight.astype(np.float64)
    assert np.abs(product(x, weight, block) - expected).max() < 1e-4
    assert np.abs(expected).max() > 1


@pytest.mark.parametrize("features", [90, 110])
def test_matrices_that_do_not_fit_are_refused(features: int) -> None:
    with pytest.raises(ValueError, match="mismatch"):
        product(noise(40, 96), noise(features, 700), 40)


def test_the_library_of_numpys_wheels_is_found_and_adds_up_as_numpy_would() -> None:
    built = np.show_config(mode="dicts")["Build Dependencies"]["blas"]["name"]
    if built != "scipy-openblas":
        pytest.skip(f"this numpy is built with {built}")
    assert blas.library() is not None
    x, weight = LAYOUTS["contiguous"]
    assert (product(x, weight, 40) == blas._by_numpy(x, weight, 40, room(x, weight))).all()


def test_without_the_library_numpy_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blas, "library", lambda: None)
    x, weight = LAYOUTS["contiguous"]
    assert (product(x, weight, 96) == x @ weight).all()


def test_a_function_that_computes_something_else_is_not_used() -> None:
    assert not blas._agrees(lambda *_: None)


@pytest.fixture
def two_threads() -> Iterator[Callable[[], int]]:
    """What tells how many threads products have: two, as a machine with one processor may have, too."""
    found = blas.library()
    if found is None or found.get_threads is None or found.set_threads is None:
        pytest.skip("the number of threads cannot be changed")
    before = found.get_threads()
    found.set_threads(2)
    yield found.get_threads
    found.set_threads(before)


def test_products_have_one_thread_until_the_last_who_wants_that_is_done(two_threads: Callable[[], int]) -> None:
    first, second = blas.single_threaded(), blas.single_threaded()
    seen = [two_threads()]
    for step in (first.__enter__, second.__enter__, lambda: first.__exit__(None, None, None)):
        step()
        seen.append(two_threads())
        assert blas.most_threads() == 2
    second.__exit__(None, None, None)
    assert [*seen, two_threads()] == [2, 1, 1, 1, 2]


def test_products_have_their_threads_again_after_an_error(two_threads: Callable[[], int]) -> None:
    with suppress(KeyError), blas.single_threaded():
        raise KeyError
    assert two_threads() == 2


def test_without_the_library_products_count_as_single_threaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blas, "library", lambda: None)
    with blas.single_threaded():
        assert blas.most_threads() == 1
