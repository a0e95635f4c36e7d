"""`Mutant`: one replacement in one file of the engine."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """In engine/`file`, `old` (found exactly once) becomes `new`.

    `at` is the test that notices it, tried first. A mutant of the architectures names the `features` that it takes
    away instead: the golden numbers of every row that has one must notice.
    """

    name: str
    file: str
    old: str
    new: str
    at: str = ""
    features: tuple[str, ...] = ()
