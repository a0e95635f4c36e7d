"""`mechscope doctor`: is this installation sound? Prints one line per check; exit code 1 if any fails.

With --repair it puts the workspace in order instead.
"""

import functools
import importlib.metadata
import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape

from engine import converted, fast, forward, load_model
from engine.catalog import CATALOGUE, SYNTHETIC, cache_dir, cached_path, is_cached
from engine.progress import following
from server.repair import repair as repair_workspace
from server.repair import state
from server.store import StoreError

PACKAGES = ("engine", "schemas", "server")
LEAST_PYTHON = (3, 11)

Verdict = tuple[bool, str]


def repair(place: Path) -> int:
    """Put the workspace in order, a line for everything that was done; returns the exit code."""
    console = Console(highlight=False, soft_wrap=True, markup=False)
    try:
        repair_workspace(place, console.print)
    except StoreError as error:
        console.print(str(error))
        return 1
    return 0


def run(place: Path, thorough: bool = False) -> int:
    """Run every check, with the workspace at `place`; `thorough` reads converted weights and the workspace's tensors
    to the end. The exit code.
    """
    console = Console(highlight=False, soft_wrap=True)
    checks: dict[str, Callable[[], Verdict]] = {
        "python": python,
        "threads": threads,
        "kernels": kernels,
        "models": models,
        "cache": cache,
        "converted": lambda: conversions(thorough),
        "workspace": functools.partial(workspace, place, thorough),
        "packages": packages,
        "self-test": self_test,
    }
    sound = True
    for name, check in checks.items():
        passed, said = check()
        sound = sound and passed
        console.print(f"{'[green]ok  ' if passed else '[red]FAIL'}[/] {name:<10} {escape(said)}")
    return 0 if sound else 1


def python() -> Verdict:
    """Python and numpy versions."""
    found = f"Python {sys.version.split()[0]}, numpy {np.__version__}"
    return sys.version_info >= LEAST_PYTHON, found


def threads() -> Verdict:
    """How many threads BLAS and kernels may use."""
    names = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "NUMBA_NUM_THREADS")
    asked = {name: os.environ[name] for name in names if name in os.environ}
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    limits = ", ".join(f"{name}={value}" for name, value in asked.items()) or "no limit set"
    return True, f"{blas['name']} {blas.get('version', '')} on {os.cpu_count()} processors, {limits}"


def kernels() -> Verdict:
    """Whether the compiled kernels of the fast extra are installed, and compile."""
    with following("kernels", None, None) as told:
        fast.prepare(told.say)
    return True, fast.state()


def models() -> Verdict:
    """Which catalogue models are in the cache, compared with their sha256."""
    damaged, lines = False, []
    for entry in CATALOGUE.values():
        path = cached_path(entry)
        if not path.exists():
            lines.append(f"{entry.name}: not fetched (mechscope fetch {entry.name})")
        elif not is_cached(entry.name):
            damaged = True
            lines.append(f"{entry.name}: {path} is damaged; delete it and fetch again")
        else:
            lines.append(f"{entry.name}: {path}, its sha256 is right")
    return not damaged, "; ".join(lines)


def cache() -> Verdict:
    """Whether the cache directory, for models, can be written."""
    return _writable(cache_dir())


def conversions(thorough: bool) -> Verdict:
    """Weights converted for faster starts: how much room they take, and whether they are whole."""
    files, place = converted.held(), converted.directory()
    taken = sum(file.stat().st_size for file in files)
    old = [file for file in files if converted.outdated(file)]
    looked = "their numbers compared with their digests" if thorough else "their headers compared (--thorough: numbers)"
    said = f"{len(files)} models, {taken / 1e6:.0f} MB in {place}, {looked}; delete it to free them"
    wrong = {f.name: why for f in files if f not in old and (why := converted.damage(f, thorough))}
    told = [f"{len(old)} made by another version, not compared: the next load makes them again"] if old else []
    return not wrong, "; ".join([said, *told, *(f"{name}: {why}, delete it" for name, why in wrong.items())])


def workspace(place: Path, thorough: bool) -> Verdict:
    """Whether the workspace, for what sessions keep, can be written and is in order; its tensors too if `thorough`."""
    writable, said = _writable(place)
    if not writable:
        return writable, said
    sound, holds = state(place, thorough)
    return sound, f"{said}: {holds}"


def _writable(place: Path) -> Verdict:
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=place):
            return True, f"{place} is writable"
    except OSError as error:
        return False, f"{place} cannot be written: {error.strerror}"


def packages() -> Verdict:
    """Whether engine, schemas and server are mechscope's own: the names are common."""
    home = Path(__file__).resolve().parent.parent
    strangers = []
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        place = None if spec is None or spec.origin is None else Path(spec.origin).resolve().parent.parent
        owners = {d for d in importlib.metadata.packages_distributions().get(name, []) if d != "mechscope"}
        if place != home or owners:
            strangers.append(f"{name} ({', '.join(sorted(owners)) or place})")
    if strangers:
        return (
            False,
            f"other packages of the same name: {', '.join(strangers)}; install mechscope on its own (uvx, pipx)",
        )
    return True, f"{', '.join(PACKAGES)} are mechscope's own, in {home}"


def self_test() -> Verdict:
    """A second's worth of arithmetic: the same tokens with and without a cache, on synthetic weights."""
    from engine import KVCache

    started = time.perf_counter()
    model = load_model(SYNTHETIC)
    ids = model.tokenizer.encode("mechscope")
    whole = forward(model, ids).logits
    cache = KVCache.with_layers(model.config.n_layers)
    forward(model, ids[:-1], cache=cache, logits_at="none")
    step = forward(model, ids[-1:], cache=cache).logits
    if whole is None or step is None:
        return False, "a forward pass gave no logits"
    error = float(np.abs(whole - step).max() / np.abs(whole).max())
    return error < 1e-5, f"cached and uncached runs differ by {error:.1e}, {time.perf_counter() - started:.2f} s"
