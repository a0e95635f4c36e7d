"""Every family against what transformers computes in float64, and what a family refuses.

`make oracle` makes `tests/golden/families.*` and says how; what each row is allowed was fixed there.
"""

from collections.abc import Callable
from pathlib import Path

import families
import numpy as np
import pytest
from declared import points_of
from oracle.cases import built_in, ours
from oracle.family_cases import (
    CASES,
    KEPT_CASES,
    STRIDE,
    cases,
    changed,
    injected,
    prompts,
    transplants,
    unchanged,
)
from oracle.golden import Golden
from oracle.measure import CEILING, CONTROL, distance, row_errors
from tolerances import assert_same

from engine import POINTS, Model, PatchHook, ScaleHook, SteerHook, ZeroAblateHook, forward
from engine.activations import ACTIVATIONS
from engine.errors import DamagedFile, UnknownModel
from engine.families import family, known
from engine.families._rope import rope_from
from engine.interventions import KINDS


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden.read(Path(__file__).parents[1] / "golden", "families")


@pytest.fixture(scope="module", params=families.ROWS)
def tiny(request: pytest.FixtureRequest) -> Model:
    return families.tiny(request.param)


def assert_golden(found: np.ndarray, golden: Golden, name: str) -> None:
    errors = row_errors(found, golden.arrays[name])
    for row, (error, limit) in enumerate(zip(errors, golden.allowed(name), strict=True)):
        assert error <= limit, f"{name}, row {row}: relative error {error:.1e} is above {limit:.1e}"


@pytest.fixture(scope="module")
def far(golden) -> Callable[[str, np.ndarray], None]:
    """Asserts that a golden array is further from a baseline than what is allowed, by the factor of all controls."""

    def check(name: str, baseline: np.ndarray) -> None:
        assert distance(golden.arrays[name], baseline) >= CONTROL * max(golden.allowed(name)), name

    return check


@pytest.fixture(scope="module")
def baseline(tiny) -> dict[str, np.ndarray]:
    """Logits at every position of every prompt, in the stride of the golden cases."""
    return {name: forward(tiny, ids, logits_at="all").logits[0, :, ::STRIDE] for name, ids in prompts().items()}


def test_logits_and_every_point_equal_the_golden_ones(tiny, golden, far):
    found = dict(unchanged(tiny))
    assert {*found} == {"short/logits", "long/logits", *(f"points/{name}" for name in points_of(tiny))}
    for name, array in found.items():
        assert_golden(array, golden, f"{tiny.name}/{name}")
        far(f"{tiny.name}/{name}", np.roll(array, 1, axis=0 if name.endswith("logits") else -1))


def test_interventions_give_the_golden_logits(tiny, golden, far, baseline):
    for case in cases(tiny):
        assert_golden(changed(tiny, case), golden, f"{tiny.name}/case/{case.name}")
        far(f"{tiny.name}/case/{case.name}", baseline[case.prompt][list(KEPT_CASES)])


def test_built_in_hooks_do_what_interventions_do(tiny):
    for case in cases(tiny):
        hooks = built_in(tiny, case, prompts())
        if hooks is not None:
            for mine, theirs in zip(ours(tiny, case, prompts(), hooks), ours(tiny, case, prompts()), strict=True):
                assert_same(mine, theirs)


def test_transplants_give_the_golden_logits(tiny, golden, far, baseline):
    for case in transplants(tiny):
        assert_golden(injected(tiny, case), golden, f"{tiny.name}/transplant/{case.name}")
        far(f"{tiny.name}/transplant/{case.name}", baseline[case.recipient][-1:])


def test_a_row_has_golden_numbers_for_everything_that_it_has(tiny, golden):
    names = {"short/logits", "long/logits", *(f"points/{name}" for name in points_of(tiny))}
    names |= {f"case/{case.name}" for case in cases(tiny)} | {f"transplant/{case.name}" for case in transplants(tiny)}
    found = {name.partition("/")[2] for name in golden.arrays if name.startswith(f"{tiny.name}/")}
    assert found == names


def test_every_golden_number_has_a_limit_below_the_ceiling(golden):
    assert golden.arrays.keys() == golden.facts["allowed"].keys()
    assert {name.partition("/")[0] for name in golden.arrays} == {*families.ROWS}
    assert all(0 < limit <= CEILING for limits in golden.facts["allowed"].values() for limit in limits)


def test_the_golden_cases_cover_every_kind_every_point_and_every_built_in_hook():
    synthetic = families.tiny("llama")
    assert {change.kind for case in CASES for change in case.changes} == {*KINDS}
    assert {change.point for case in CASES for change in case.changes} == {*POINTS}
    hooks = {type(hook) for case in CASES for hook in built_in(synthetic, case, prompts()) or ()}
    assert hooks == {ZeroAblateHook, SteerHook, PatchHook, ScaleHook}


def test_every_family_has_a_row():
    wraps_gemma3_text = {"gemma3"}  # test_multimodal.py
    assert {raw["model_type"] for raw in families.ROWS.values()} == {*known()} - wraps_gemma3_text


@pytest.mark.parametrize("name", ["bert", "", "_parts", "../llama", None, 3])
def test_an_unknown_model_type_is_refused_naming_the_known_ones(name):
    with pytest.raises(UnknownModel, match=f"the supported ones are {', '.join(known())}"):
        family(name)


@pytest.mark.parametrize("row", families.ROWS)
def test_an_unknown_activation_is_refused_naming_the_known_ones(row):
    raw = families.ROWS[row]
    named = dict.fromkeys(("hidden_act", "hidden_activation", "activation_function"), "glu")
    with pytest.raises(DamagedFile, match=f"glu.*the supported values are {', '.join(ACTIVATIONS)}"):
        family(raw["model_type"]).config(raw | named)


ROTARY = [row for row in families.ROWS if any(families.tiny(row).config.ropes)]


@pytest.mark.parametrize("row", ROTARY)
def test_an_unknown_rope_type_is_refused_naming_the_known_ones(row):
    raw = families.ROWS[row]
    settings = {"rope_type": "ntk"}
    by_kind = {"full_attention": settings, "sliding_attention": settings}
    for given in (settings, by_kind) if raw["model_type"] in ("gemma3_text", "olmo3") else (settings,):
        bad = raw | {"rope_parameters": given, "rope_scaling": settings}
        with pytest.raises(DamagedFile, match=r"ntk.*default, (linear, dynamic, llama3, yarn, )?longrope"):
            family(raw["model_type"]).config(bad)


@pytest.mark.parametrize("kind", ["linear", "dynamic", "llama3", "longrope"])
def test_a_rope_type_without_its_settings_is_refused(kind):
    with pytest.raises(DamagedFile, match="config: "):
        rope_from({"rope_type": kind, "rope_theta": 10_000.0}, 16, 128)


def test_a_tied_head_is_the_embedding_and_an_untied_one_is_not(tiny):
    tied = tiny.config.tied
    assert (tiny.params.unembed is tiny.params.embed) == tied
    assert np.array_equal(tiny.params.unembed, tiny.params.embed) == tied
