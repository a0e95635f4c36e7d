"""Write the parts of the documentation that come from the code: `make docs`, or `--check` to fail when they are stale.

docs/tools.md           every tool with its arguments and result fields, and their types
docs/python.md          every public name of the engine
README.md               the table of tools, between its two markers
docs/operate.md         the table of settings, between its two markers
deploy/manifest.json    version and tools of the desktop bundle
server.json             version and variables of the registry's entry
"""

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import anyio
from deployment import manifest, registry_entry, settings_table
from library import between, cell, first_sentence, python_page
from mcp import Client
from reference import tools_page

from server.app import build_server
from server.tools import TOOLS

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


async def _listed() -> tuple[list[Any], bool]:
    """The tools, and whether there are prompts."""
    async with Client(build_server()) as client:
        prompts = client.server_capabilities.prompts and (await client.list_prompts()).prompts
        return list((await client.list_tools()).tools), bool(prompts)


def table(tools: list[Any]) -> str:
    """The README's table: name, arguments, first sentence."""
    rows = [
        f"| `{tool.name}` | {', '.join(f'`{name}`' for name in tool.input_schema['properties'])} "
        f"| {cell(first_sentence(tool.description))} |"
        for tool in tools
    ]
    return "\n".join(["| tool | arguments | does |", "|---|---|---|", *rows])


def _wanted() -> dict[Path, str]:
    """Every file that comes from the code, wholly or in part, as it should be."""
    tools, prompts = anyio.run(_listed)
    readme, operate = ROOT / "README.md", HERE / "operate.md"
    bundle, entry = ROOT / "deploy" / "manifest.json", ROOT / "server.json"
    summaries = [(tool.name, first_sentence(tool.description)) for tool in tools]
    now = version("mechscope")
    return {
        HERE / "tools.md": tools_page(tools, TOOLS),
        HERE / "python.md": python_page(),
        readme: between(readme, "tools", table(tools)),
        operate: between(operate, "settings", settings_table()),
        bundle: manifest(bundle.read_text("utf-8"), now, summaries, prompts),
        entry: registry_entry(entry.read_text("utf-8"), now),
    }


def main() -> int:
    """Write the files, or with --check compare; returns the exit code."""
    wanted = _wanted()
    stale = [path.name for path, text in wanted.items() if not path.exists() or path.read_text("utf-8") != text]
    if "--check" in sys.argv:
        if stale:
            sys.stderr.write(f"stale: {', '.join(stale)}; run `make docs`\n")
        return 1 if stale else 0
    for path, text in wanted.items():
        path.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
