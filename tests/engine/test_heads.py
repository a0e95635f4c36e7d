"""Heads and layers as callers name them."""

import numpy as np
import pytest

from engine import Intervention, compile_interventions, kv_inject_test, prefill_inject
from engine.errors import InputError, VectorError
from engine.heads import heads_by_layer


@pytest.mark.parametrize("heads", [np.array([[0, 1], [2, 3], [0, 0]]), [np.array([0, 1]), (2, 3), [0, 0]]])
def test_pairs_come_as_arrays_too(synthetic, heads):
    assert heads_by_layer(synthetic, (), heads) == {0: (1, 0), 2: (3,)}
    hook = compile_interventions(synthetic, [Intervention("zero", (), "z", heads=heads)], 3)
    assert [(edit.layer, edit.heads) for edit in hook.edits] == [(0, (1, 0)), (2, (3,))]


def test_numbers_come_as_an_array_too(synthetic):
    assert heads_by_layer(synthetic, [1], np.array([2, -1])) == {1: (2, 3)}
    with pytest.raises(InputError, match=r"not \[0, 1, 2\]"):
        heads_by_layer(synthetic, (), np.array([[0, 1, 2]]))
    with pytest.raises(InputError, match=r"a layer is a whole number, not 0\.0"):
        heads_by_layer(synthetic, (), np.array([[0, 1.5]]))


def test_a_surgery_in_no_layer_is_refused(synthetic):
    for act in (
        lambda: prefill_inject(synthetic, [1, 2, 3], [4, 5, 6], layers=[]),
        lambda: prefill_inject(synthetic, [1, 2, 3], [4, 5, 6], layers=[], heads=(0,)),
        lambda: kv_inject_test(synthetic, [1, 2, 3], [4, 5, 6], 1, layers=[]),
    ):
        with pytest.raises(InputError, match="names no layer"):
            act()


def test_rows_of_the_wrong_width_are_told_with_their_layer_and_heads(synthetic):
    rows = {0: np.zeros((2, synthetic.config.d_head), np.float32)}
    pairs = ((0, 0), (0, 1), (2, 3))
    with pytest.raises(VectorError, match=r"^patch at z, layers \[2\], heads \[3\], .*\(1, 16\), not \(2, 16\)"):
        compile_interventions(synthetic, [Intervention("patch", (), "z", heads=pairs, rows=rows)], 3)
