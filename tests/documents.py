"""The documentation as data.

PAGES     every page that people read, but for those that `make docs` writes whole
spans     what stands between single backticks
blocks    (language, text) of what is fenced
commands  the commands of a page's sh blocks, a line continued with \\ being one
anchors   what links may point to
"""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[1]
WRITTEN = ("tools.md", "python.md")
"""Whole pages that come from the code."""
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *(path for path in sorted((ROOT / "docs").rglob("*.md")) if path.name not in WRITTEN),
]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def spans(page: Path) -> list[str]:
    """Each as one line; a span may go on in the next line, but not in the next paragraph."""
    text = FENCED.sub("", page.read_text("utf-8"))
    return [" ".join(span.split()) for span in re.findall(r"(?<!`)`(?!`)((?:[^`\n]|\n(?!\n))+)`(?!`)", text)]


def blocks(page: Path, language: str | None = None) -> list[str]:
    found = FENCED.findall(page.read_text("utf-8"))
    return [text for kind, text in found if language in (None, kind)]


def commands(page: Path) -> list[str]:
    """Without their comments."""
    lines = [line for text in blocks(page, "sh") for line in _joined(text)]
    return [line for line in lines if shlex.split(line, comments=True)]


def _joined(text: str) -> list[str]:
    """Lines of which each is a whole command: continued ones, and those inside quotes, go on."""
    made: list[str] = []
    pending = ""
    for line in text.splitlines():
        pending = f"{pending}\n{line}" if pending else line
        if line.endswith("\\") or pending.replace("\\'", "").count("'") % 2:
            continue
        made.append(pending)
        pending = ""
    return made


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", page.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
