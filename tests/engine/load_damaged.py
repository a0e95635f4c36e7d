"""Loads damaged copies of one model under 2 GB of address space and 10 seconds per case; run by test_bad_files.py.

    python load_damaged.py JOB.json

JOB.json: {"model": a good .gguf file or directory, "scratch": an empty directory, "cases": [...]}. A case names the
file to damage and how: {"label", "file", and "keep": bytes to keep | "at" and "put": hex to write over | "text":
the whole new content}, and "may_load": "no" (must be refused), "whole" (refused, or loaded with the right weights)
or "any" (refused or loaded). After each case the good model must load. What is wrong is printed, one line each.
"""

import json
import resource
import signal
import sys
from pathlib import Path

TWO_GB, SECONDS, LONGEST_MESSAGE = 2 << 30, 10, 1_500
resource.setrlimit(resource.RLIMIT_AS, (TWO_GB, TWO_GB))

import numpy as np  # noqa: E402

import engine  # noqa: E402


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    good, scratch = Path(job["model"]), Path(job["scratch"])
    directory = good if good.is_dir() else good.parent
    whole = engine.load_model(good)
    for case in job["cases"]:
        print("case", case["label"], flush=True)  # names the case that ends this process
        model = _lay_out(scratch, directory, good, case)
        for path, may_load in ((model, case["may_load"]), (good, "must")):
            signal.alarm(SECONDS)  # its default action ends the process, even inside a library
            complaint = _complaint(path, may_load, whole)
            signal.alarm(0)
            if complaint:
                print(f"WRONG {case['label']}{' (good model after it)' * (path is good)}: {complaint}")
    print("done", len(job["cases"]))


def _lay_out(scratch: Path, directory: Path, good: Path, case: dict[str, object]) -> Path:
    """The good files by link, the damaged one written in its place."""
    damaged = str(case["file"])
    here = {path.name for path in scratch.iterdir() if not path.is_symlink()}
    if here != {damaged}:
        for old in scratch.iterdir():
            old.unlink()
        for path in directory.iterdir() if good.is_dir() else ():
            if path.name != damaged:
                (scratch / path.name).symlink_to(path)
    content = bytearray((directory / damaged).read_bytes())
    if "keep" in case:
        del content[int(str(case["keep"])) :]
    elif "text" in case:
        content = bytearray(str(case["text"]).encode())
    else:
        at, put = int(str(case["at"])), bytes.fromhex(str(case["put"]))
        content[at : at + len(put)] = put
    (scratch / damaged).write_bytes(content)
    return scratch if good.is_dir() else scratch / damaged


def _complaint(path: Path, may_load: str, whole: engine.Model) -> str | None:
    try:
        model = engine.load_model(path)
    except engine.EngineError as error:
        if may_load == "must":
            return f"was refused: {error}"
        return None if 10 < len(str(error)) < LONGEST_MESSAGE else f"a message of {len(str(error))} characters"
    except BaseException as error:
        return f"{type(error).__name__} instead of an EngineError: {str(error)[:300]}"
    if may_load == "no" or (may_load in ("whole", "must") and not _equal(model, whole)):
        return "was loaded"
    return None


def _equal(model: engine.Model, whole: engine.Model) -> bool:
    pairs = [(model.params.embed, whole.params.embed), (model.params.unembed, whole.params.unembed)]
    for i in range(whole.config.n_layers):
        ours, theirs = model.params.layer(i).arrays(), whole.params.layer(i).arrays()
        pairs += [(a, b) for (_, a), (_, b) in zip(ours, theirs, strict=True)]
    return model.config == whole.config and all(np.array_equal(a, b) for a, b in pairs)


if __name__ == "__main__":
    main()
