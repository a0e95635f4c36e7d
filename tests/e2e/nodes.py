"""Programs of this folder's package.json, run by the Node that it pins. `make e2e` installs them."""

import os
import subprocess
from pathlib import Path

BIN = Path(__file__).parent / "node_modules" / ".bin"


def run(program: str, *arguments: str, within: float = 120) -> subprocess.CompletedProcess[str]:
    """Run a program of `node_modules` to its end; its status is the caller's to judge."""
    absent = [name for name in ("node", program) if not (BIN / name).exists()]
    if absent:
        raise RuntimeError(f"{' and '.join(absent)} not installed in {BIN}: run `make e2e`, which needs npm")
    env = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "NO_COLOR": "1"}
    return subprocess.run(
        [BIN / program, *arguments], env=env, capture_output=True, text=True, timeout=within, stdin=subprocess.DEVNULL
    )
