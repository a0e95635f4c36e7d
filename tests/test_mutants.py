"""The mutants of `make mutants` still fit the code they break."""

from mutants import MUTANTS, misplaced

from engine.families import known


def test_every_mutant_replaces_text_that_is_there_exactly_once():
    assert misplaced() == []


def test_mutants_have_names_of_their_own():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 20


def test_every_family_has_a_mutant_of_its_own():
    assert {f"families/{name}.py" for name in known()} <= {mutant.file for mutant in MUTANTS}
