"""Run the guides' Python and the README's demo: `make docs` writes what they print, `--check` fails where that changed.

A guide's blocks of python share one namespace and run in order, in an empty directory; a block of text right after one
is what it prints.
"""

import contextlib
import io
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from demo import demo_block
from library import between

GUIDES = Path(__file__).resolve().parent / "guides"
README = GUIDES.parents[1] / "README.md"
BLOCK = re.compile(r"```python\n(?P<code>.*?)```\n(?:\n```text\n(?P<output>.*?)```\n)?", re.DOTALL)


def run(page: str) -> str:
    """The page with the output of its blocks as it is now."""
    names: dict[str, Any] = {}

    def once(block: re.Match[str]) -> str:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block["code"], "guide", "exec"), names)  # noqa: S102  (our own guides)
        output = "\n".join(line.rstrip() for line in printed.getvalue().splitlines())
        shown = f"\n```text\n{output}\n```\n" if output else ""
        return f"```python\n{block['code']}```\n{shown}"

    home = Path.cwd()
    with tempfile.TemporaryDirectory() as empty:
        os.chdir(empty)
        try:
            return BLOCK.sub(once, page)
        finally:
            os.chdir(home)


def main() -> int:
    chosen = [Path(name) for name in sys.argv[1:] if name != "--check"] or [README, *sorted(GUIDES.glob("*.md"))]
    stale = []
    for path in chosen:
        before = path.read_text("utf-8")
        after = between(README, "demo", demo_block()) if path.name == README.name else run(before)
        if after != before:
            stale.append(path.name)
            if "--check" not in sys.argv:
                path.write_text(after, "utf-8")
    if "--check" in sys.argv and stale:
        print(f"stale: {', '.join(stale)}; run `make docs`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
