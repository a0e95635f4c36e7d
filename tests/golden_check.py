"""How far rows of `tests/families.py` are from the golden files, as multiples of what is allowed.

    python golden_check.py DIRECTORY ROW...

prints {row: factor} as JSON, for the engine in DIRECTORY: the largest error / allowed over every golden array of an
unchanged run, except points that are not there or have another width. A row that cannot be computed has the name of the
error in place of its factor. `make mutants` runs this once for every mutant of the architectures.
"""

import json
import sys
from pathlib import Path

import families
import numpy as np
from oracle.family_cases import unchanged
from oracle.golden import Golden
from oracle.measure import row_errors

import engine
from engine import EngineError

WRONG_ENGINE = 97


def factor(row: str, golden: Golden) -> float | str:
    try:
        found = {f"{row}/{name}": array for name, array in unchanged(families.tiny(row))}
        fit = [name for name in found if name in golden.arrays and found[name].shape == golden.arrays[name].shape]
        return max(float((row_errors(found[name], golden.arrays[name]) / golden.allowed(name)).max()) for name in fit)
    except (EngineError, ValueError, IndexError) as error:  # shapes that no longer fit; anything else is a bad mutant
        return type(error).__name__


if __name__ == "__main__":
    directory, *rows = sys.argv[1:]
    if not Path(engine.__file__).resolve().is_relative_to(directory):
        sys.exit(WRONG_ENGINE)
    with np.errstate(all="ignore"):
        golden = Golden.read(Path(__file__).parent / "golden", "families")
        sys.stdout.write(json.dumps({row: factor(row, golden) for row in rows}))
