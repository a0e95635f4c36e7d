"""`engine.catalog.fetch` in a process of its own; run by test_catalog.py.

    python fetch_in_child.py ENTRY.json [BYTES]

ENTRY.json holds the fields of a catalogue entry; no file may grow beyond BYTES. Prints the path, or the error.
"""

import json
import resource
import sys
from pathlib import Path

from engine import catalog
from engine.errors import EngineError


def main() -> None:
    if len(sys.argv) > 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
    entry = catalog.Entry(**json.loads(Path(sys.argv[1]).read_text()))
    catalog.CATALOGUE[entry.name] = entry
    try:
        print(catalog.fetch(entry.name))
    except EngineError as error:
        print(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
