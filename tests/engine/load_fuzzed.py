"""Loads every case of fuzzing.py in a process of its own: 2 GB of address space, 10 seconds; run by test_fuzz.py.

    python load_fuzzed.py DIRECTORY [LABEL]    all cases, or one; DIRECTORY is empty
    python load_fuzzed.py --controls           what goes wrong in each of these must be noticed

A fork of this process, which has imported the engine, loads one case and, if it loads, runs the model: encode, forward,
generate, decode. One line of JSON per case: `label`, `kind`, `outcome` ("refused": an `EngineError` with a message of
sensible length; "loaded": everything ran, with finite numbers unless the file holds extreme ones; "wrong"), `said`,
`seconds` and `bytes`, the largest resident set.
"""

import json
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import fuzzing
import numpy as np

import engine

TWO_GB, SECONDS, LONGEST_MESSAGE = 2 << 30, 10, 1_500
PROMPT = "the and then 12345 é\t<|end|> [(x)]\n"
EXTREME = 1e6
"""Weights and settings beyond it, or nearer to zero than one over it, may make numbers overflow: the file says so."""

Judgement = tuple[str, str]
"""(outcome, what was said)."""


def main() -> None:
    if sys.argv[1] == "--controls":
        for label, action in CONTROLS.items():
            print(json.dumps({"label": label} | in_a_fork(partial(judged, action), seconds=2)))
        return
    home, wanted = Path(sys.argv[1]), sys.argv[2:]
    made = fuzzing.originals(home)
    for name, path in made.items():  # imports what a load needs, and shows that the originals are good
        found = judged(partial(used, path, "dense"))
        assert found == ("loaded", ""), (name, found)
    scratch = home / "case"
    for case in fuzzing.corpus(made):
        if wanted and case.label not in wanted:
            continue
        scratch.mkdir()
        action = partial(judged, partial(used, case.lay_out(scratch), case.weights))
        print(json.dumps({"label": case.label, "kind": case.kind} | in_a_fork(action)), flush=True)
        shutil.rmtree(scratch)


def in_a_fork(action: Callable[[], Judgement], seconds: int = SECONDS) -> dict[str, object]:
    reader, writer = os.pipe()
    started = time.perf_counter()
    child = os.fork()
    if child == 0:
        try:
            resource.setrlimit(resource.RLIMIT_AS, (TWO_GB, TWO_GB))
            signal.alarm(seconds)  # its default action ends the process, even inside a library
            os.write(writer, json.dumps(action()).encode())
            os._exit(0)
        finally:
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        answer = pipe.read()
    _, status, usage = os.wait4(child, 0)
    code = os.waitstatus_to_exitcode(status)
    outcome, said = json.loads(answer) if code == 0 and answer else ("wrong", f"the process ended with {code}")
    took = round(time.perf_counter() - started, 3)
    return {"outcome": outcome, "said": said, "seconds": took, "bytes": usage.ru_maxrss * 1024}


def judged(run: Callable[[], str]) -> Judgement:
    """`run` says what is not as it should be; empty if all is well."""
    try:
        wrong = run()
    except engine.EngineError as error:
        said = str(error)
        clear = 10 < len(said) < LONGEST_MESSAGE and "not enough memory" not in said
        return ("refused" if clear else "wrong"), said[:LONGEST_MESSAGE]
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return "wrong", f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}: {str(error)[:300]}"
    return ("wrong", wrong) if wrong else ("loaded", "")


def used(path: Path, weights: str) -> str:
    model = engine.load_model(path, weights=weights)
    ids = model.encode(PROMPT)
    logits = engine.forward(model, ids).logits
    if logits is None or logits.shape != (1, 1, model.config.d_vocab) or logits.dtype != np.float32:
        return "logits of another form"
    if not np.isfinite(logits).all():
        return "" if extreme(model) else "logits that are not finite, though nothing in the file is extreme"
    made = engine.generate(model, ids, 2)
    return "" if isinstance(model.tokenizer.decode([*ids, *made.ids]), str) else "ids that are no text"


def extreme(model: engine.Model) -> bool:
    cfg, params = model.config, model.params
    arrays = [params.embed, params.unembed, *(a for i in range(cfg.n_layers) for _, a in params.layer(i).arrays())]
    settings = [cfg.embed_scale, cfg.residual_scale, cfg.logit_scale, *cfg.attn_scales]
    settings += [value for value in (cfg.attn_softcap, cfg.final_softcap) if value is not None]
    settings += [rope.scale for rope in cfg.ropes if rope is not None]
    most = max(float(np.abs(array).max()) for array in arrays)
    return most > EXTREME or not all(1 / EXTREME <= value <= EXTREME for value in settings)


def raised(error: BaseException) -> str:
    raise error


CONTROLS: dict[str, Callable[[], str]] = {
    "a crash": lambda: str(os.kill(os.getpid(), signal.SIGSEGV)),
    "a hang": lambda: str(time.sleep(60)),
    "three gigabytes": lambda: str(len(bytearray(3 << 30))),
    "three gigabytes, reported": lambda: raised(engine.EngineError("there is not enough memory for tiny")),
    "a raw error": lambda: raised(KeyError("hidden_size")),
    "an exit": lambda: raised(SystemExit(0)),
    "an error without words": lambda: raised(engine.EngineError("no")),
    "a wrong result": lambda: "logits of another form",
}


if __name__ == "__main__":
    main()
