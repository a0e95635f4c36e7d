"""Bad layers, positions, tokens, vectors and prompts: refused with the valid range; negative ones resolved."""

import numpy as np
import pytest
from tolerances import assert_moved, assert_same

from engine import EngineError, SteerHook, forward, generate, trace_forward
from engine.errors import InputError, LayerError, PositionError, PromptError, TokenError, VectorError


def ones(model) -> np.ndarray:
    return np.ones(model.config.d_model, np.float32)


def slope(model) -> np.ndarray:
    """A direction that no layer norm takes away, as it does with ones."""
    return np.linspace(-1, 2, model.config.d_model, dtype=np.float32)


AT_LAYER = {
    "capture_residuals": lambda m, ids, layer: m.capture_residuals(ids, [layer]),
    "forward_with_capture": lambda m, ids, layer: m.forward_with_capture(ids, [0, layer]),
    "forward_ablate": lambda m, ids, layer: m.forward_ablate(ids, [layer], [0]),
    "forward_ablate capturing": lambda m, ids, layer: m.forward_ablate(ids, [0], [layer]),
    "forward_steer": lambda m, ids, layer: m.forward_steer(ids, [(layer, ones(m), 1.0)], [0]),
    "patch_activations": lambda m, ids, layer: m.patch_activations(ids, ids, [(layer, 0)], [0]),
    "generate_with_hooks": lambda m, ids, layer: m.generate_with_hooks(ids, 1, ablate_layers=[layer]),
    "generate_with_hooks steering": lambda m, ids, layer: m.generate_with_hooks(ids, 1, steers=[(layer, ones(m), 1.0)]),
    "trace_forward": lambda m, ids, layer: trace_forward(m, ids, capture_layers=[layer]),
}


@pytest.mark.parametrize("name", AT_LAYER)
def test_a_layer_outside_the_model_is_refused_everywhere(model, ids, name):
    n = model.config.n_layers
    for layer in (n, -n - 1, 10**30):
        with pytest.raises(LayerError, match=f"layer {layer} does not exist; valid: 0 to {n - 1}, or -{n} to -1"):
            AT_LAYER[name](model, ids, layer)
    for layer in (True, 1.0, "1", None):
        with pytest.raises(LayerError, match="a layer is a whole number"):
            AT_LAYER[name](model, ids, layer)


def test_negative_layers_count_from_the_end_and_are_reported_resolved(model, ids):
    n = model.config.n_layers
    found = model.capture_residuals(ids, [-1, -n, 0, np.int64(1)])
    assert set(found) == {0, 1, n - 1}
    assert_same(found[n - 1], model.capture_residuals(ids, [n - 1])[n - 1])
    assert_moved(found[n - 1], found[0])


def test_negative_positions_count_from_the_end_of_each_prompt(model, ids):
    n = len(ids)
    for position in range(-n, n):
        assert model.resolve_position(position, n) == position % n

    def steered(position):
        return forward(model, ids, hook=SteerHook().add(1, slope(model), 5.0, [position])).logits[0]

    assert_same(steered(-1), steered(n - 1))
    assert_same(steered(-n), steered(0))
    assert_moved(steered(1), steered(-1))


def test_a_position_outside_the_prompt_is_refused(model):
    for position in (5, -6, 10**30):
        with pytest.raises(PositionError, match="does not exist in a prompt of 5 tokens; valid: 0 to 4, or -5 to -1"):
            model.resolve_position(position, 5)
    for position in (True, 1.0, "1", None):
        with pytest.raises(PositionError, match="whole number"):
            model.resolve_position(position, 5)


def test_a_row_before_the_prompt_is_refused_in_hooks(model, ids):
    hook = SteerHook().add(1, ones(model), 1.0, [-len(ids) - 1])
    with pytest.raises(PositionError, match=f"prompt of {len(ids)} tokens; valid: -{len(ids)}"):
        forward(model, ids, hook=hook)


@pytest.mark.parametrize(
    "run", [forward, lambda m, ids: generate(m, ids, 1), lambda m, ids: m.capture_residuals(ids, [0])]
)
def test_a_prompt_that_is_no_prompt_is_refused(synthetic, run):
    for bad, error, message in (
        ([], PromptError, "at least one token"),
        ([[]], PromptError, "at least one token"),
        ([257], TokenError, "token id 257 does not exist; valid: 0 to 256"),
        ([0, -1], TokenError, "token id -1 does not exist; valid: 0 to 256"),
        ([10**30], PromptError, "whole-number token ids"),
        ([1.5, 2.0], PromptError, "whole-number token ids"),
        (["a"], PromptError, "same number|whole-number"),
        ([1, [2]], PromptError, "whole-number token ids"),
        ([[[1]]], PromptError, "whole-number token ids"),
        ([1] * 513, PromptError, "513 tokens are more than the context of 512"),
    ):
        with pytest.raises(error, match=message):
            run(synthetic, bad)


@pytest.mark.parametrize(
    "kind", [list, tuple, np.array, lambda ids: np.array(ids, np.int32), lambda ids: [np.int64(i) for i in ids]]
)
def test_ids_may_come_as_any_sequence_of_whole_numbers(model, ids, kind):
    assert_same(forward(model, kind(ids)).logits, forward(model, ids).logits)


def test_text_and_its_ids_are_the_same_prompt(model, ids):
    text = model.tokenizer.decode(ids)
    assert_same(model.capture_residuals(text, [1])[1], model.capture_residuals(ids, [1])[1])


def test_steering_refuses_what_is_no_direction(synthetic):
    good = ones(synthetic)
    for vec, alpha, message in (
        (good[:-1], 1.0, r"it must be \(64,\)"),
        (good[:1], 1.0, r"it must be \(64,\)"),
        (good[None], 1.0, "one vector, not several rows"),
        (good * np.nan, 1.0, "NaN or infinity"),
        (good, float("nan"), "alpha is nan"),
        (good, float("inf"), "alpha is inf"),
    ):
        with pytest.raises(VectorError, match=message):
            synthetic.forward_steer([1, 2], [(0, vec, alpha)], [0])
        with pytest.raises(VectorError, match=message):
            synthetic.generate_with_hooks([1, 2], 1, steers=[(0, vec, alpha)])


def test_heads_are_checked(model):
    n, kv = model.config.n_heads, model.config.n_kv_heads
    assert (model.resolve_head(-1), model.resolve_head(-1, key_value=True)) == (n - 1, kv - 1)
    for head, key_value, valid in (
        (n, False, n),
        (-n - 1, False, n),
        (kv, True, kv),
        (True, False, n),
        (0.0, False, n),
    ):
        with pytest.raises(InputError, match=f"valid: 0 to {valid - 1}"):
            model.resolve_head(head, key_value)


def test_duplicated_layers_are_harmless(model, ids):
    once, twice = (model.forward_ablate(ids, layers, layers) for layers in ([1], [1, 1]))
    assert list(once) == list(twice) == [1]
    assert_same(once[1], twice[1])


def test_an_unknown_choice_of_logits_is_refused(synthetic):
    with pytest.raises(PositionError, match="last, all, none or a list"):
        forward(synthetic, [1, 2], logits_at="first")


def test_every_refusal_is_an_engine_error(synthetic):
    with pytest.raises(EngineError):
        synthetic.resolve_layer(99)
    assert issubclass(InputError, EngineError)
    for error in (LayerError, PositionError, PromptError, TokenError, VectorError):
        assert issubclass(error, InputError)
