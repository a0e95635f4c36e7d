"""The folders that docs/install.md lists are those that the code uses, on every system that the table has."""

import json
import os
import re
import subprocess
import sys

import pytest
from documents import ROOT

PAGE = (ROOT / "docs" / "install.md").read_text("utf-8")
HOME = "/home/of-nobody"
USED = """
import importlib, json, platformdirs
platformdirs.PlatformDirs = getattr(importlib.import_module(f"platformdirs.{system.lower()}"), system)
from engine import catalog, converted
from server import settings
from server.settings import Settings
cache = platformdirs.user_cache_path("mechscope")
print(json.dumps({
    "settings": [str(settings.user_config_path("mechscope"))],
    "cache": [str(cache), str(catalog.cache_dir().parent), str(converted.directory().parent)],
    "workspace": [str(Settings.model_fields["workspace"].default)],
}))
"""


@pytest.mark.parametrize(("system", "column"), [("Unix", 1), ("MacOS", 2)])
def test_the_folders_to_remove_are_those_in_use(system: str, column: int) -> None:
    rows = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if line.startswith("| ") and "`~/" in line]
    told = {re.split(r"\W", row[0])[0]: row[column].strip("` ") for row in rows}
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "MECHSCOPE_"))}
    made = subprocess.run(
        [sys.executable, "-c", f"system = {system!r}{USED}"],
        env=kept | {"HOME": HOME}, capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    for name, places in json.loads(made.stdout).items():
        assert {place.replace(HOME, "~") for place in places} == {told[name]}, name
