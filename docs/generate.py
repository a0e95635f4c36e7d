"""Write the parts of the documentation that come from the code: `make docs`, or `--check` to fail when they are stale.

docs/tools.md           every tool with its arguments and result fields
docs/python.md          every public name of the engine
README.md               the table of tools, between its two markers
docs/operate.md         the table of settings, between its two markers
deploy/manifest.json    version and tools of the desktop bundle
server.json             version and variables of the registry's entry
"""

import inspect
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import anyio
from deployment import manifest, registry_entry, settings_table
from library import cell, first_sentence, python_page
from mcp import Client

from server.app import build_server
from server.tools import TOOLS as FUNCTIONS

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
COMMON = """\
`model` is a `model:` handle or a model's readable name; it may be left out when exactly one is loaded. A prompt is text
or a list of token ids; with `chat` true, a text is the user's turn in the model's own chat template, and the notice of
the result shows exactly what the model read. `layers` are numbers from 0, negative ones from the end. An argument whose
default is not shown may be left out. A result field that is null by default is left out when it has nothing to say."""


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


def page(tools: list[Any]) -> str:
    """docs/tools.md."""
    parts = ["# Tools", "Written by `make docs` from the code; the order is the one agents see.", COMMON]
    results = {f.__name__: inspect.signature(f, eval_str=True).return_annotation for f in FUNCTIONS}
    for tool in tools:
        parts += [f"## {tool.name}", tool.description.strip(), _fields("argument", tool.input_schema)]
        parts += [_fields("result", results[tool.name].model_json_schema(mode="serialization"))]
    return "\n\n".join(parts) + "\n"


def _fields(heading: str, schema: dict[str, Any]) -> str:
    properties = schema.get("properties", {})
    if not properties:
        return f"No {heading}s."
    required = set(schema.get("required", ()))
    rows = [f"| {heading} | type | |", "|---|---|---|"]
    for name, field in properties.items():
        notes = [field.get("description", "")]
        if heading == "argument":
            notes += (
                ["required"] if name in required else [f"default `{field['default']}`"] if "default" in field else []
            )
        rows.append(f"| `{name}` | {_type(field)} | {cell('; '.join(filter(None, notes)))} |".replace("  ", " "))
    return "\n".join(rows)


def _type(field: dict[str, Any]) -> str:
    if "$ref" in field:
        return str(field["$ref"].rsplit("/", 1)[-1])
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_type(part) for part in field["anyOf"]))
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if field.get("type") == "array":
        return f"list of {_type(field.get('items', {}))}"
    return str(field.get("const", field.get("type", "any")))


def _between(path: Path, what: str, made: str) -> str:
    """The text of a page with `made` between its two markers."""
    begin, end = f"<!-- {what}: written by `make docs` -->", f"<!-- end of {what} -->"
    before, rest = path.read_text("utf-8").split(begin)
    return f"{before}{begin}\n{made}\n{end}{rest.split(end)[1]}"


def _wanted() -> dict[Path, str]:
    """Every file that comes from the code, wholly or in part, as it should be."""
    tools, prompts = anyio.run(_listed)
    readme, operate = ROOT / "README.md", HERE / "operate.md"
    bundle, entry = ROOT / "deploy" / "manifest.json", ROOT / "server.json"
    summaries = [(tool.name, first_sentence(tool.description)) for tool in tools]
    now = version("mechscope")
    return {
        HERE / "tools.md": page(tools),
        HERE / "python.md": python_page(),
        readme: _between(readme, "tools", table(tools)),
        operate: _between(operate, "settings", settings_table()),
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
