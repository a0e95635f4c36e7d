"""The mutants of `make mutants` still fit the code they break."""

from dataclasses import replace

from family_mutants import FAMILY_MUTANTS, uncovered
from mutants import MUTANTS, ROOT, misplaced
from plain_mutants import PLAIN_MUTANTS
from server_mutants import SERVER_MUTANTS

from engine.families import known


def test_every_mutant_replaces_text_that_is_there_exactly_once_and_leaves_python():
    assert misplaced() == []


def test_a_mutant_that_is_no_python_is_told(monkeypatch):
    broken = replace(MUTANTS[0], name="half a line", new=f"{MUTANTS[0].old} (")
    monkeypatch.setattr("mutants.MUTANTS", [broken])
    assert misplaced() == ["half a line"]


def test_mutants_have_names_of_their_own():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 20


def test_every_feature_of_every_row_has_a_mutant_and_every_mutant_a_feature():
    assert list(uncovered()) == []


def test_a_feature_without_a_mutant_and_a_mutant_without_a_feature_are_told(monkeypatch):
    without = [mutant for mutant in FAMILY_MUTANTS if "learned positions" not in mutant.features]
    monkeypatch.setattr("family_mutants.FAMILY_MUTANTS", without)
    rows = ["gpt2", "gpt_neo"]
    assert list(uncovered()) == [f"{row} has a feature without a mutant: learned positions" for row in rows]
    monkeypatch.setattr("family_mutants.FAMILY_MUTANTS", [*FAMILY_MUTANTS, replace(without[0], features=("wings",))])
    assert list(uncovered()) == [f"the mutant {without[0].name!r} takes away what no row has: wings"]


def test_every_family_has_a_mutant_of_its_own():
    assert {f"families/{name}.py" for name in known()} <= {mutant.file for mutant in MUTANTS}


def test_every_other_mutant_names_a_test_that_exists():
    for mutant in (*PLAIN_MUTANTS, *SERVER_MUTANTS):
        file, _, test = mutant.test.partition("::")
        assert f"def {test}(" in (ROOT / file).read_text("utf-8"), mutant.name
