"""The mutants of `make mutants` still fit the code they break."""

from mutants import MUTANTS, misplaced


def test_every_mutant_replaces_text_that_is_there_exactly_once():
    assert misplaced() == []


def test_mutants_have_names_of_their_own():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 20
