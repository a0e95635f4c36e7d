"""An intervention at position p, layer l reaches nothing before p and nothing below l."""

import numpy as np
import pytest
from declared import has, refuses
from recording import everything, uneven
from tolerances import assert_close, assert_moved, assert_same

from engine import POINTS
from engine.edits import Edit
from engine.hooks import EditHook

P = 2


@pytest.fixture(scope="module")
def clean(model, ids):
    return everything(model, ids)


def by_position(name: str, x: np.ndarray) -> np.ndarray:
    return np.moveaxis(x, POINTS[name].seq_axis - 1, 0)


@pytest.mark.parametrize("where", [name for name in POINTS if name not in ("embed", "final_norm")])
def test_what_comes_before_in_place_or_depth_is_untouched(model, ids, clean, where):
    layer, order = model.config.n_layers // 2, list(POINTS)
    hook = EditHook([Edit(where, layer, lambda rows, pos, key_pos: uneven(rows), [P])])
    if not has(model, where):
        with refuses(where):
            everything(model, ids, hook)
        return
    found = everything(model, ids, hook)
    for (name, at), array in found.items():
        deeper = name == "final_norm" or (name != "embed" and (at, order.index(name)) >= (layer, order.index(where)))
        new, old = by_position(name, array), by_position(name, clean[name, at])
        if not deeper:
            assert_same(new, old)
        assert_close(new[:P].reshape(P, -1), old[:P].reshape(P, -1))
    last = model.config.n_layers - 1
    assert_moved(found["resid_post", layer], clean["resid_post", layer])
    assert_moved(found["resid_post", last][P:], clean["resid_post", last][P:])


def test_a_later_token_leaves_earlier_rows_unchanged(model, ids, donor, clean):
    changed = [*ids[:P], donor[0], *ids[P + 1 :]]
    assert changed != ids
    found = everything(model, changed)
    last = model.config.n_layers - 1
    assert_close(found["resid_post", last][:P], clean["resid_post", last][:P])
    assert_moved(found["resid_post", last][P:], clean["resid_post", last][P:])
