"""Put, release and run in a workspace for ever, telling each handle once it was returned; `test_kills.py` kills it.

`python write_until_killed.py FOLDER` forks a child for each seed it reads, which spares the imports. The child writes
lines: a word, a handle, and for `put` the sha256 of its file.
"""

import os
import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from server.disk_store import open_store

LARGE = 1 << 40


def tell(*words: object) -> None:
    """One line in one write: a kill leaves all of it or nothing, whether or not Python buffers what it prints."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def main(root: Path, seed: int) -> None:
    drawn = random.Random(seed)
    tell("begun", os.getpid())
    store = open_store(root, 1 << 16, LARGE)
    own: list[str] = []
    while True:
        tensors = {"a": np.full(drawn.choice([10, 5_000, 200_000]), drawn.random(), np.float32)}
        handle = store.put("act", "x", "ann", tensors, {"about": "x"})
        tell("put", handle, store.get(handle, "ann").provenance["sha256"])
        own.append(handle)
        if drawn.random() < 0.4:
            gone = own.pop(drawn.randrange(len(own)))
            tell("releasing", gone)
            store.release(gone, "ann")
            tell("released", gone)
        if drawn.random() < 0.2:
            run = store.start_run("ann", "causal_trace", {}, {})
            tell("started", run.handle)
            if drawn.random() < 0.5:
                store.save_run(replace(run, state="done", result={}))
                tell("done", run.handle)


if __name__ == "__main__":
    for seed in iter(sys.stdin.readline, ""):
        if child := os.fork():
            os.waitpid(child, 0)
            tell("killed", child)
        else:
            main(Path(sys.argv[1]), int(seed))
