"""The documentation is what the code says and does."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from engine.points import POINTS

ROOT = Path(__file__).parents[2]


def test_the_generated_documentation_is_fresh() -> None:
    made = subprocess.run([sys.executable, ROOT / "docs" / "generate.py", "--check"], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr


def test_the_concepts_page_names_every_point() -> None:
    page = (ROOT / "docs" / "concepts.md").read_text()
    assert [name for name in POINTS if f"`{name}`" not in page] == []


def test_every_relative_link_leads_somewhere() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.real
@pytest.mark.parametrize("guide", sorted((ROOT / "docs" / "guides").glob("*.md")), ids=lambda path: path.stem)
def test_a_guides_python_prints_what_the_guide_says(guide: Path) -> None:
    made = subprocess.run([sys.executable, ROOT / "docs" / "run.py", "--check", guide], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr


@pytest.mark.real
def test_the_readmes_python_runs_and_says_what_it_should() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    lens, steered, moved = made.stdout.strip().split("\n", 2)
    assert "Paris" in lens
    assert steered.startswith(" London")
    assert "Rome" in moved
