"""The engine against the golden files: what torch and transformers computed in float64 from the same weights.

`make oracle` makes the files and says how; what each row is allowed was fixed there.
"""

from pathlib import Path

import numpy as np
import pytest
from oracle.cases import CASES, GOLDEN, TEXTS, TRANSPLANTS, Case, Transplant, greedy, inject, ours
from oracle.golden import Golden
from oracle.measure import CEILING, CONTROL, distance, row_errors

from engine import Model, catalog
from engine.interventions import KINDS

pytestmark = pytest.mark.real

Runs = dict[str, tuple[np.ndarray, np.ndarray]]


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden.read(Path(__file__).parents[1] / "golden")


@pytest.fixture(scope="module")
def runs(smollm2: Model, golden: Golden) -> Runs:
    """(logits, resid_post) of every golden prompt, unchanged."""
    return {name: ours(smollm2, name, golden.facts["prompts"]) for name in GOLDEN}


def assert_golden(found: np.ndarray, golden: Golden, name: str) -> None:
    reference = golden.arrays[name]
    errors = np.atleast_1d(row_errors(found, reference))
    for row, (error, limit) in enumerate(zip(errors, golden.allowed(name), strict=True)):
        assert error <= limit, f"{name}, row {row}: relative error {error:.1e} is above {limit:.1e}"


def assert_far(golden: Golden, name: str, baseline: np.ndarray) -> None:
    limit = max(golden.allowed(name))
    assert distance(golden.arrays[name], baseline) >= CONTROL * limit, f"{name} is too close to the unchanged run"


def kept(logits: np.ndarray, golden: Golden) -> np.ndarray:
    return logits[:: golden.facts["stride"]]


def test_the_golden_files_were_made_from_these_weights(smollm2, golden):
    assert golden.facts["weights_sha256"] == smollm2.fingerprint == catalog.CATALOGUE[smollm2.name].sha256


def test_no_golden_row_is_allowed_more_than_the_ceiling(golden):
    limits = golden.facts["allowed"]
    assert {name for name in golden.arrays if not name.endswith("/top")} == limits.keys()
    assert all(0 < limit <= CEILING for rows in limits.values() for limit in rows)


@pytest.mark.parametrize("prompt", GOLDEN)
def test_prompts_have_the_ids_the_golden_files_were_made_from(smollm2, golden, prompt):
    assert smollm2.encode(TEXTS[prompt]) == golden.facts["prompts"][prompt]


@pytest.mark.parametrize("prompt", GOLDEN)
def test_residuals_of_every_layer_equal_the_golden_ones(golden, runs, prompt):
    assert_golden(runs[prompt][1][:, -1], golden, f"prompt/{prompt}/resid_post")


@pytest.mark.parametrize("prompt", GOLDEN)
def test_logits_equal_the_golden_ones(golden, runs, prompt):
    logits = runs[prompt][0][-1]
    assert_golden(kept(logits, golden), golden, f"prompt/{prompt}/logits")
    assert np.argsort(-logits)[:5].tolist() == golden.arrays[f"prompt/{prompt}/top"].tolist()


@pytest.mark.parametrize("prompt", GOLDEN)
def test_a_residual_of_another_prompt_is_no_golden_one(golden, runs, prompt):
    other = GOLDEN[GOLDEN.index(prompt) - 1]
    assert_far(golden, f"prompt/{prompt}/logits", kept(runs[other][0][-1], golden))
    with pytest.raises(AssertionError, match="relative error"):
        assert_golden(runs[other][1][:, -1], golden, f"prompt/{prompt}/resid_post")


@pytest.mark.parametrize("prompt", [name for name in GOLDEN if name != "chinese"])
def test_greedy_tokens_equal_the_golden_ones(smollm2, golden, prompt):
    expected = golden.facts["tokens"][prompt]
    assert len(expected) >= 30
    assert greedy(smollm2, golden.facts["prompts"][prompt], len(expected)) == expected


@pytest.mark.parametrize("case", [c for c in CASES if c.golden], ids=lambda case: case.name)
def test_an_intervention_gives_the_golden_result(smollm2, golden, runs, case: Case):
    logits, resid_post = ours(smollm2, case, golden.facts["prompts"])
    assert_golden(resid_post[-1, -1], golden, f"case/{case.name}/resid_post")
    assert_golden(kept(logits[-1], golden), golden, f"case/{case.name}/logits")
    assert_far(golden, f"case/{case.name}/logits", kept(runs[case.prompt][0][-1], golden))


@pytest.mark.parametrize("case", [t for t in TRANSPLANTS if t.golden], ids=lambda case: case.name)
def test_a_transplant_gives_the_golden_result(smollm2, golden, runs, case: Transplant):
    logits, continued = inject(smollm2, case, golden.facts["prompts"])
    assert_golden(kept(logits, golden), golden, f"transplant/{case.name}/logits")
    assert_far(golden, f"transplant/{case.name}/logits", kept(runs[case.recipient][0][-1], golden))
    expected = golden.facts["tokens"][case.name]
    assert continued.ids[: len(expected)] == expected


def test_every_kind_of_intervention_has_a_golden_result(golden):
    covered = {change.kind for case in CASES if case.golden for change in case.changes}
    assert covered == set(KINDS)
    assert all(f"case/{case.name}/logits" in golden.arrays for case in CASES if case.golden)
