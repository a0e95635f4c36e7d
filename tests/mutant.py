"""`Mutant`: one replacement in one file of a package."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """In `package`/`file`, `old` (found exactly once) becomes `new`.

    `at` is the test that notices it, tried first. A mutant of the architectures names the `features` that it takes
    away instead: the golden numbers of every row that has one must notice.
    """

    name: str
    file: str
    old: str
    new: str
    at: str = ""
    features: tuple[str, ...] = ()
    package: str = "engine"

    @property
    def path(self) -> str:
        """From the root of the project."""
        return f"{self.package}/{self.file}"

    @property
    def test(self) -> str:
        """The test that is tried first, from the root of the project."""
        return f"tests/{self.package}/{self.at}"
