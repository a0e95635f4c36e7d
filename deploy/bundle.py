"""Build dist/mechscope.mcpb, the desktop bundle: `make bundle`.

The bundle is the source distribution's files with a manifest; its host installs the dependencies with uv. The official
command line validates the manifest and packs it: `python deploy/bundle.py PATH_OF_MCPB`.
"""

import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUNDLE = ROOT / "dist" / "mechscope.mcpb"


def stage(folder: Path) -> None:
    """What goes into the bundle."""
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    for name in tomllib.loads(project)["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(ROOT / name, folder)
    shutil.copy2(ROOT / "deploy" / "manifest.json", folder)
    (folder / "pyproject.toml").write_text(_without_groups(project), "utf-8")


def _without_groups(project: str) -> str:
    """Without what developers need: uv would resolve torch's relatives on the user's computer before it starts."""
    return re.sub(r"^\[dependency-groups\]\n.*?(?=^\[)", "", project, flags=re.MULTILINE | re.DOTALL)


def main() -> int:
    """Build and validate; returns the exit code."""
    mcpb = sys.argv[1]
    BUNDLE.parent.mkdir(exist_ok=True)
    BUNDLE.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="bundle-") as folder:
        stage(Path(folder))
        subprocess.run([mcpb, "validate", f"{folder}/manifest.json"], check=True)  # noqa: S603
        subprocess.run([mcpb, "pack", folder, BUNDLE], check=True)  # noqa: S603
    return 0


if __name__ == "__main__":
    sys.exit(main())
