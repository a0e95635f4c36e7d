"""What installers and operators read, from the code: used by docs/generate.py.

settings_table   every setting as a flag, a variable and a TOML key
manifest         deploy/manifest.json, of the desktop bundle: the version, the tools, whether there are prompts
registry_entry   server.json, of the MCP registry: the version, the variables that stdio heeds
"""

import json
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from server.__main__ import app
from server.settings import CONFIG, OF_HTTP, PREFIX, Settings

FORMATS = {bool: "boolean", int: "number", float: "number", Path: "filepath"}
"""How the registry calls the kinds of values; a list of folders is written as one text."""


def settings_table() -> str:
    """A row for each option of `mechscope serve`, as `--help` tells it."""
    rows = [_row(option) for option in _options().values()]
    return "\n".join(["| TOML key | flag | variable | default | |", "|---|---|---|---|---|", *rows])


def _options() -> dict[str, Any]:
    serve = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    return {option.name: option for option in serve.params}


def _row(option: Any) -> str:
    name = str(option.name)
    known = name in Settings.model_fields
    key, variable = (f"`{name}`", f"{PREFIX}{name.upper()}") if known else ("", CONFIG)
    flags = ", ".join(f"`{flag}`" for flag in (*option.opts, *option.secondary_opts))
    return f"| {key} | {flags} | `{variable}` | {_default(option)} | {option.help} |"


def _default(option: Any) -> str:
    """As `--help` shows it, but for folders: those differ between systems and users."""
    field = Settings.model_fields.get(option.name)
    if field is not None and isinstance(field.default, Path):
        return "[by system](install.md#what-is-where)"
    return f"`{option.show_default}`" if isinstance(option.show_default, str) else ""


def manifest(text: str, version: str, tools: list[tuple[str, str]], prompts: bool) -> str:
    """The bundle's manifest, brought up to date."""
    made = json.loads(text) | {"version": version, "prompts_generated": prompts}
    made["tools"] = [{"name": name, "description": description} for name, description in tools]
    return _json(made)


def registry_entry(text: str, version: str) -> str:
    """The registry's entry, brought up to date."""
    made = json.loads(text) | {"version": version}
    fields = {name: field for name, field in Settings.model_fields.items() if name not in {*OF_HTTP, "http"}}
    variables = [_variable(name, field) for name, field in fields.items()]
    made["packages"] = [
        package | {"version": version, "environmentVariables": variables} for package in made["packages"]
    ]
    return _json(made)


def _variable(name: str, field: FieldInfo) -> dict[str, Any]:
    made: dict[str, Any] = {"name": f"{PREFIX}{name.upper()}", "description": field.description}
    kinds = (field.annotation, *get_args(field.annotation))
    made["format"] = next((name for kind, name in FORMATS.items() if kind in kinds), "string")
    if get_origin(field.annotation) is Literal:
        made["choices"] = list(get_args(field.annotation))
    if isinstance(field.default, bool | int | float | str):
        made["default"] = json.dumps(field.default).strip('"')
    return made


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
