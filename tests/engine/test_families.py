"""Every family against the golden logits of transformers in float64, and what a family refuses.

`make oracle` makes `tests/golden/families.*` and says how; what each row is allowed was fixed there.
"""

from pathlib import Path

import families
import numpy as np
import pytest
from oracle.golden import Golden
from oracle.measure import CEILING, CONTROL, distance, row_errors

from engine import Model, forward
from engine.errors import DamagedFile, UnknownModel
from engine.families import family, known
from engine.families._rope import rope_from
from engine.ops import ACTIVATIONS


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden.read(Path(__file__).parents[1] / "golden", "families")


@pytest.fixture(scope="module", params=families.ROWS)
def tiny(request: pytest.FixtureRequest) -> Model:
    return families.tiny(request.param)


@pytest.mark.parametrize("prompt", ["short", "long"])
def test_logits_equal_the_golden_ones(tiny, golden, prompt):
    name = f"{tiny.name}/{prompt}/logits"
    positions = golden.facts["positions"][prompt]
    found = forward(tiny, golden.facts["prompts"][prompt], logits_at=positions).logits[0]
    errors = row_errors(found, golden.arrays[name])
    for position, error, limit in zip(positions, errors, golden.allowed(name), strict=True):
        assert error <= limit, f"{name}, position {position}: relative error {error:.1e} is above {limit:.1e}"


def test_every_row_has_golden_logits_that_differ_from_position_to_position(golden):
    names = {f"{row}/{prompt}/logits" for row in families.ROWS for prompt in golden.facts["positions"]}
    assert names == golden.arrays.keys() == golden.facts["allowed"].keys()
    for name, logits in golden.arrays.items():
        limit = max(golden.allowed(name))
        assert 0 < limit <= CEILING
        assert distance(logits[1:], logits[:-1]) >= CONTROL * limit


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
    named = dict.fromkeys(("hidden_act", "hidden_activation", "activation_function"), "quick_gelu")
    with pytest.raises(DamagedFile, match=f"quick_gelu.*the supported values are {', '.join(ACTIVATIONS)}"):
        family(raw["model_type"]).config(raw | named)


ROTARY = [row for row in families.ROWS if any(families.tiny(row).config.ropes)]


@pytest.mark.parametrize("row", ROTARY)
def test_an_unknown_rope_type_is_refused_naming_the_known_ones(row):
    raw = families.ROWS[row]
    settings = {"rope_type": "proportional"}
    by_kind = {"full_attention": settings, "sliding_attention": settings}
    for given in (settings, by_kind) if raw["model_type"] in ("gemma3_text", "olmo3") else (settings,):
        bad = raw | {"rope_parameters": given, "rope_scaling": settings}
        with pytest.raises(DamagedFile, match=r"proportional.*default, linear, dynamic, llama3, yarn, longrope"):
            family(raw["model_type"]).config(bad)


@pytest.mark.parametrize("kind", ["linear", "dynamic", "llama3", "longrope"])
def test_a_rope_type_without_its_settings_is_refused(kind):
    with pytest.raises(DamagedFile, match="config: "):
        rope_from({"rope_type": kind, "rope_theta": 10_000.0}, 16, 128)


def test_a_tied_head_is_the_embedding_and_an_untied_one_is_not(tiny):
    tied = tiny.config.tied
    assert (tiny.params.unembed is tiny.params.embed) == tied
    assert np.array_equal(tiny.params.unembed, tiny.params.embed) == tied
