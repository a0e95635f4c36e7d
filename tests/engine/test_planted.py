"""Planted circuits: the scans name the heads that were wired, and no others."""

import numpy as np
import pytest
from tolerances import assert_same

from engine import Metric, RecordHook, ablation_scan, forward, load_model, patching_grid
from engine.distribution import softmax_of
from engine.errors import UnknownModel
from engine.lens import emergence_layer, leads, lens_logits
from engine.metrics import saturating
from engine.planted import CIRCUITS, N_HEADS, N_LAYERS, planted

MARGIN = 5
"""The faintest head of a circuit counts at least this many times what the loudest decoy does."""


@pytest.fixture(scope="module", params=[(name, seed) for name in CIRCUITS for seed in range(3)])
def case(request):
    name, seed = request.param
    model, circuit = planted(name, seed), CIRCUITS[name]
    answer = model.tokenizer.single(circuit.answer)
    return model, circuit, model.encode(circuit.prompt), model.encode(circuit.corrupt), answer


def named(scan, heads):
    """The heads with the largest effects; fails if a decoy comes near them."""
    found = scan.largest(len(heads) + 1)
    effects = [abs(value - scan.baseline) for _, value in found]
    assert effects[-2] > MARGIN * effects[-1], f"a decoy comes near: {found}"
    return {cell for cell, _ in found[:-1]}


def test_the_circuit_says_the_answer_and_not_after_the_corrupted_prompt(case):
    model, _, prompt, corrupt, answer = case
    assert softmax_of(forward(model, prompt).logits[0, -1])[answer] > 0.9
    assert softmax_of(forward(model, corrupt).logits[0, -1])[answer] < 0.2


def test_ablating_heads_names_the_circuit(case):
    model, circuit, prompt, _, answer = case
    scan = ablation_scan(model, prompt, Metric("logit", answer), "head")
    assert scan.values.size == N_LAYERS * N_HEADS
    assert named(scan, circuit.heads) == set(circuit.heads.values())


def test_patching_heads_names_the_circuit(case):
    model, circuit, prompt, corrupt, answer = case
    grid = patching_grid(model, prompt, corrupt, Metric("logit", answer), "z", "head")
    assert named(grid, circuit.heads) == set(circuit.heads.values())


def test_removing_a_suppressing_head_makes_the_answer_more_likely():
    model, circuit = planted("copy-suppression"), CIRCUITS["copy-suppression"]
    scan = ablation_scan(model, model.encode(circuit.prompt), Metric("logit", ord("i")), "head")
    assert scan.values[circuit.heads["suppression"]] > scan.baseline
    assert scan.values[circuit.heads["copying"]] < scan.baseline


@pytest.mark.parametrize("seed", range(3))
def test_a_suppressor_that_kl_does_not_see_is_seen_in_its_logit(seed):
    """Without it the answer, certain already, gains 14 of its logit: KL is some 5e-6."""
    model, circuit = planted("copy-suppression", seed), CIRCUITS["copy-suppression"]
    prompt, corrupt, head = model.encode(circuit.prompt), model.encode(circuit.corrupt), circuit.heads["suppression"]
    by_kl, by_logit = (ablation_scan(model, prompt, m, "head") for m in (Metric("kl"), Metric("logit", ord("i"))))
    assert by_kl.values[head] < 2e-5
    assert by_logit.values[head] - by_logit.baseline == pytest.approx(14, abs=0.3)
    assert by_kl.values[head] < 1e-5 * by_kl.values[circuit.heads["copying"]]
    assert saturating(by_kl.metric, by_kl.logits) > 0.9999
    assert [cell for cell, _ in by_logit.ends(5)[0]][:1] == [head]
    assert saturating(by_logit.metric, by_logit.logits) is None
    grid = patching_grid(model, prompt, corrupt, Metric("logit", ord("i")), "z", "head")
    raised, lowered = grid.ends(5)
    assert [cell for cell, _ in raised] == [circuit.heads["copying"]]
    assert [cell for cell, _ in lowered] == [head]


def test_the_token_of_a_circuit_emerges_where_the_head_writes_it():
    model, circuit = planted("induction"), CIRCUITS["induction"]
    rows = model.forward_with_capture(circuit.prompt, range(N_LAYERS))
    lens = {layer: lens_logits(model, row[-1]) for layer, row in rows.items()}
    assert emergence_layer(lens, ord(circuit.answer)) == circuit.heads["induction"][0]
    first = int(lens[0].argmax())
    assert not leads(lens[0], first), "the leader of a layer that writes nothing leads by chance"


def test_attention_scores_name_the_previous_token_head():
    model, circuit = planted("induction"), CIRCUITS["induction"]
    ids = model.encode(circuit.prompt)
    record = RecordHook.for_layers(range(N_LAYERS), capture_attention=True)
    forward(model, ids, hook=record)
    patterns = np.stack([record.attention_weights[layer] for layer in range(N_LAYERS)])
    to_previous = np.diagonal(patterns, -1, 2, 3).mean(-1)  # (layers, heads)
    found = np.unravel_index(to_previous.argmax(), to_previous.shape)
    assert found == circuit.heads["previous token"]
    assert to_previous[found] > 0.99
    assert np.sort(to_previous.ravel())[-2] < 0.5


def test_the_induction_head_attends_to_what_followed_the_token_before():
    model, circuit = planted("induction"), CIRCUITS["induction"]
    ids = model.encode(circuit.prompt)
    layer, head = circuit.heads["induction"]
    record = RecordHook.for_layers([layer], capture_attention=True)
    forward(model, ids, hook=record)
    assert record.attention_weights[layer][head, -1].argmax() == circuit.prompt.index("X")
    assert record.attention_weights[layer][head, -1].max() > 0.99


def test_a_planted_circuit_is_loaded_by_name_and_says_that_it_is_synthetic():
    model = load_model("synthetic:induction")
    assert (model.name, model.synthetic) == ("synthetic:induction", True)
    assert model.fingerprint == planted("induction").fingerprint != planted("induction", 1).fingerprint
    assert_same(model.params.embed, planted("induction").params.embed)
    with pytest.raises(UnknownModel, match="valid: synthetic:induction, synthetic:copy-suppression, synthetic:two-hop"):
        load_model("synthetic:nonsense")
