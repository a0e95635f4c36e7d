"""Time mechscope against its peers: `make bench`.

Every contender runs in a process of its own with the same model, ids and threads; they take turns piece by piece,
so that a change of the machine's speed meets all of them. Prompts differ from repetition to repetition. After each the
contenders must have computed the same thing. The table is run several times; the worst ratio counts.

Writes table.md and raw.json in bench/results/, in a directory for the vectors that the processor has; of some rows in
one within it.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from model import NAME
from rich.console import Console
from rich.progress import track

from engine.catalog import fetch

HERE = Path(__file__).resolve().parent
OURS, FAST, BF16, PACKED = "mechscope", "with fast", "fast, weights bf16", "fast, weights packed"
MECHSCOPE = (OURS, FAST, BF16, PACKED)
CONTENDERS = {
    **dict.fromkeys(MECHSCOPE, "mechscope.py"),
    "transformers by hand": "by_hand.py",
    "TransformerLens": "transformer_lens_.py",
    "interp-engine": "interp_engine_.py",
    "nnsight": "nnsight_.py",
    "llama.cpp": "llama_cpp_.py",
}
FROM_GGUF = (PACKED, "llama.cpp")
"""Contenders that read the GGUF file, whose numbers the model's files have in float32."""
PACKAGES = ("torch", "transformers", "transformer-lens", "interp-engine", "nnsight")
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
VOCABULARY, START = 49_000, "start"
REST = 0.1
"""Seconds before each turn: threads of the contender before still spin, for some 30 ms in OpenBLAS."""


@dataclass(frozen=True)
class Row:
    """A piece of work. `against`: the peers that can do it; `at_most`: the ratio aimed at, with the fast extra, and
    with weights in bfloat16 or packed as well, which take part only where a ratio is aimed at.
    """

    name: str
    work: str
    tokens: int
    repeats: int
    against: tuple[str, ...]
    at_most: float | None
    fast_at_most: float | None = None
    bf16_at_most: float | None = None
    packed_at_most: float | None = None
    tolerance: float = 1e-3

    @property
    def limits(self) -> dict[str, float | None]:
        """{contender of ours that takes part: the ratio aimed at}."""
        limits = {OURS: self.at_most, FAST: self.fast_at_most, BF16: self.bf16_at_most, PACKED: self.packed_at_most}
        return {name: limit for name, limit in limits.items() if name in (OURS, FAST) or limit is not None}


HAND, LENS, ENGINE, SIGHT, LLAMA = [name for name in CONTENDERS if name not in MECHSCOPE]
ALL = (HAND, LENS, ENGINE, SIGHT)
ROWS = (
    Row("capture resid_post, 30 layers, 5 tokens", "capture", 5, 15, ALL, 1.0, 0.6),
    Row("capture resid_post, 30 layers, 32 tokens", "capture", 32, 15, ALL, 1.0, 0.6),
    Row("capture resid_post, 30 layers, 128 tokens", "capture", 128, 9, ALL, 1.0, 0.85),
    Row("capture resid_post, 30 layers, 512 tokens", "capture", 512, 5, ALL, 1.1, 0.85),
    Row("capture every point, 32 tokens, documented helper", "everything", 32, 7, (LENS,), 0.6),
    Row("capture every point, 32 tokens, by hand", "points", 32, 7, (HAND, ENGINE), 0.6),
    Row("capture every point, 128 tokens, documented helper", "everything", 128, 5, (LENS,), 0.6),
    Row("capture every point, 128 tokens, by hand", "points", 128, 5, (HAND, ENGINE), 0.6),
    Row("lens of 30 layers x 32 positions, top 10", "lens", 32, 7, ALL, 0.7),
    Row("patching grid 30 x 5, documented helper", "grid", 5, 3, (LENS,), 0.03),
    Row("patching grid 30 x 5, batched by hand", "grid", 5, 3, (HAND,), 0.6),
    Row("patching grid 30 x 16, documented helper", "grid", 16, 1, (LENS,), 0.05),
    Row("patching grid 30 x 16, batched by hand", "grid", 16, 2, (HAND,), 0.6),
    Row("head patching 30 x 9, 16 tokens, documented helper", "heads", 16, 3, (LENS,), 0.08),
    Row("head patching 30 x 9, 16 tokens, batched by hand", "heads", 16, 3, (HAND,), 0.6),
    Row("KV scan, 30 layers, 16 tokens, run by run by hand", "kv_scan", 16, 3, (HAND,), 0.2),
    Row("KV scan, 30 layers, 16 tokens, batched by hand", "kv_batch", 16, 9, (HAND,), 0.6),
    Row("greedy decode of 60 tokens, steered every step", "decode", 8, 3, ALL, 0.65, None, 0.3, 0.3, tolerance=0),
    Row("60 given tokens, one after the other, without hooks", "steps", 8, 9, (LLAMA,), None, None, None, 1.0, 0.1),
    Row("100 prompts x 20 tokens, last residuals of 30 layers", "batch", 20, 2, ALL, 0.5),
)
STARTED = Row("process start to the first lens, second start", "lens", 5, 3, ALL, 0.25)
_PUBLIC = "import {0} as p; print([n for n in dir(p) if any(w in n.lower() for w in {1})])"
DASHES = {
    HAND: (
        "its rows are those by hand: transformers has no helper that patches, nor one that records every point",
        _PUBLIC.format("transformers", ("act_patch", "run_with_cache", "steer")),
    ),
    LENS: (
        "its helpers patch activations, none moves a key-value cache; rows by hand are not its helpers",
        _PUBLIC.format("transformer_lens.patching", ("get_act_patch",)),
    ),
    ENGINE: (
        "no helper that patches or moves a key-value cache (`split_fused_qkv` reads weights); in the full cache every "
        "point has to be named, so it is in the row by hand",
        _PUBLIC.format("interp_engine", ("patch", "transplant", "kv", "inject")),
    ),
    SIGHT: (
        "no helper that patches, moves a key-value cache or records every point",
        _PUBLIC.format("nnsight", ("patch", "transplant", "kv", "inject", "cache")),
    ),
    LLAMA: (
        "decodes the GGUF file: what lies between layers is to be had through ggml's callback in C alone, and no "
        "helper captures or patches",
        _PUBLIC.format("llama_cpp", ("hook", "patch", "resid", "hidden")),
    ),
}
"""Why a contender has no time in a row: the reason, and what prints the helpers there are, in the peers' Python."""


@dataclass
class Contender:
    """A process that waits for work."""

    name: str
    process: subprocess.Popen[str]
    loaded: float = 0.0
    times: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def start(cls, name: str, python: str, model: Path, threads: int, **env: str) -> "Contender":
        read = fetch(NAME) if name in FROM_GGUF else model
        weights = {BF16: ["bf16"], PACKED: ["packed"]}.get(name, [])
        counts = dict.fromkeys(THREADS, str(threads)) | {"MECHSCOPE_FAST": "no" if name == OURS else "yes"}
        paths = os.pathsep.join([str(HERE.parent), str(HERE / "contenders")])
        process = subprocess.Popen(
            [python, str(HERE / "contenders" / CONTENDERS[name]), str(read), *weights],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env=os.environ | counts | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"} | env,
        )  # fmt: skip
        made = cls(name, process)
        made.loaded = made.read()["loaded"]
        return made

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("ANSWER "):
                answer: dict[str, Any] = json.loads(line.removeprefix("ANSWER "))
                return answer
        raise SystemExit(f"{self.name} ended (exit {self.process.wait()}); run it by hand to see why")

    def do(self, request: dict[str, Any]) -> tuple[float, list[float]]:
        assert self.process.stdin is not None
        time.sleep(REST)
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.read()
        return answer["seconds"], answer["results"]

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def request(row: Row, repetition: int, table: int) -> dict[str, Any]:
    """Ids that no other repetition has."""
    rng = np.random.default_rng([*row.work.encode(), row.tokens, repetition + 1, table])
    ids, corrupt = (rng.integers(0, VOCABULARY, row.tokens).tolist() for _ in range(2))
    asked: dict[str, Any] = {"work": row.work, "ids": ids, "corrupt": corrupt, "token": 260, "against": 281}
    if row.work == "batch":
        asked["prompts"] = rng.integers(0, VOCABULARY, (100, row.tokens)).tolist()
    if row.work == "steps":
        asked["next"] = rng.integers(0, VOCABULARY, 60).tolist()
    if row.work == "decode":
        asked["vector"] = (10 * rng.standard_normal(576) / 24).tolist()
    return asked


def distance(ours: list[float], theirs: list[float]) -> float:
    """How far apart two results are, relative to their size."""
    a, b = np.asarray(ours), np.asarray(theirs)
    return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-9)) if a.shape == b.shape else np.inf


def check_same(row: Row, name: str, ours: list[float], theirs: list[float]) -> None:
    """End the benchmark unless they agree. Of tokens each must: the decoded row allows no distance."""
    gap = distance(ours, theirs)
    if not gap <= row.tolerance:  # nor NaN
        raise SystemExit(f"{row.name}: {name} computed something else (relative distance {gap:.1e})")


def measure(row: Row, contenders: dict[str, Contender], table: int) -> dict[str, list[float]]:
    """{contender: seconds of each repetition}; a different one starts each round. A first round is not counted.

    Rounded weights compute something else, which the tests compare with the same weights in float32.
    """
    names = (*row.limits, *row.against)
    times: dict[str, list[float]] = {name: [] for name in names}
    for repetition in range(-1, row.repeats):
        asked = request(row, repetition, table)
        first = repetition % len(names)
        done = {name: contenders[name].do(asked) for name in (*names[first:], *names[:first])}
        for name in set(names) - {OURS, BF16}:
            check_same(row, name, done[OURS][1], done[name][1])
        if repetition >= 0:
            for name in names:
                times[name].append(done[name][0])
    return times


def first_answer(python: dict[str, str], model: Path, threads: int, table: int) -> dict[str, list[float]]:
    """Seconds from the start of a process to the lens of the last row: second start, files cached by the system."""
    times: dict[str, list[float]] = {name: [] for name in (*STARTED.limits, *STARTED.against)}
    for repetition in range(-1, STARTED.repeats):
        found: list[float] = []
        for name in times:
            began = time.perf_counter()
            contender = Contender.start(name, python[name], model, threads)
            _, results = contender.do(request(STARTED, repetition, table))
            if repetition >= 0:
                times[name].append(time.perf_counter() - began - REST)
            contender.stop()
            found = found or results
            check_same(STARTED, name, found, results)
    return times


def first_start(model: Path, threads: int) -> float:
    """The same for mechscope's very first start, which converts the weights: seconds."""
    with tempfile.TemporaryDirectory() as cache:
        began = time.perf_counter()
        contender = Contender.start(OURS, sys.executable, model, threads, XDG_CACHE_HOME=cache)
        contender.do(request(STARTED, 0, 0))
        took = time.perf_counter() - began - REST
        contender.stop()
    return took


def main() -> int:
    parser = argparse.ArgumentParser(description="time mechscope against its peers")
    parser.add_argument("--peers", default=sys.executable, help="the Python that has the peers")
    parser.add_argument("--llama", default="", help="the Python that has llama.cpp; without it its row is left out")
    parser.add_argument("--model", type=Path, required=True, help="directory of the model (bench/model.py)")
    parser.add_argument("--tables", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--only", default="", help="rows whose work is one of these, comma-separated; start is one, too"
    )
    options = parser.parse_args()
    console = Console()
    rows = [row for row in ROWS if not options.only or row.work in options.only.split(",")]
    rows = [row for row in rows if options.llama or LLAMA not in row.against]
    python = {name: sys.executable if name in MECHSCOPE else options.peers for name in CONTENDERS}
    python[LLAMA] = options.llama
    needed = {name for row in rows for name in (*row.limits, *row.against)}
    with_start = not options.only or START in options.only.split(",")
    told = [*rows, STARTED] if with_start else rows
    tables: list[dict[str, dict[str, list[float]]]] = []
    for table in range(options.tables):
        contenders = {
            name: Contender.start(name, python[name], options.model, options.threads)
            for name in CONTENDERS
            if name in needed
        }
        tables.append({row.name: measure(row, contenders, table) for row in track(rows, f"table {table + 1}")})
        for contender in contenders.values():
            contender.stop()
        if with_start:
            tables[-1][STARTED.name] = first_answer(python, options.model, options.threads, table)
        report = written(told, tables, options)
        console.print(report, markup=False)
        keep(report, tables, options)  # an hour's work: what is done stays if the rest is not
    if with_start:
        first = first_start(options.model, options.threads)
        report += f"\n\nThe first start, which converts the weights: {1000 * first:.0f} ms."
        keep(report, tables, options)
    return 0


def keep(report: str, tables: list[Any], options: argparse.Namespace) -> None:
    """Write the results; those of some rows beside those of all."""
    results = HERE / "results" / vectors() / options.only.replace(",", "-")
    results.mkdir(parents=True, exist_ok=True)
    (results / "table.md").write_text(report + "\n", "utf-8")
    raw = {"rows": tables, "machine": machine(options)}
    (results / "raw.json").write_text(json.dumps(raw, indent=1) + "\n", "utf-8")


def vectors() -> str:
    """The level of x86-64 that numpy finds (v3 has AVX2, v4 AVX-512), or the kind of processor."""
    found = np.show_config(mode="dicts")["SIMD Extensions"].get("found", [])
    levels = sorted(name.lower() for name in found if name.startswith("X86_V"))
    return levels[-1] if levels else platform.machine()


def machine(options: argparse.Namespace) -> dict[str, Any]:
    asked = f"import importlib.metadata as m; print({{p: m.version(p) for p in {PACKAGES}}})"
    peers = subprocess.run([options.peers, "-c", asked], capture_output=True, text=True, check=True).stdout
    return {
        "processor": processor(),
        "vectors": vectors(),
        "cores": os.cpu_count(),
        "threads": options.threads,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "mechscope": version("mechscope"),
        "peers": peers.strip(),
        "llama-cpp-python": _printed(options.llama, "import llama_cpp; print(llama_cpp.__version__)"),
    }


def processor() -> str:
    """Its name, where the system tells."""
    known = Path("/proc/cpuinfo")  # Linux
    lines = known.read_text().splitlines() if known.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def written(rows: list[Row], tables: list[Any], options: argparse.Namespace) -> str:
    """The table: medians of all runs, and the worst table's ratio to the best peer of the row."""
    lines = [f"| work | {' | '.join([*CONTENDERS, *(f'ratio: {who}' for who in MECHSCOPE)])} |"]
    lines.append("|---" * (1 + len(CONTENDERS) + len(MECHSCOPE)) + "|")
    for row in rows:
        medians = [{name: statistics.median(t) for name, t in table[row.name].items()} for table in tables]
        over_tables = {name: statistics.median(m[name] for m in medians) for name in medians[0]}
        ratios = {who: max(m[who] / min(m[name] for name in row.against) for m in medians) for who in row.limits}
        lines.append(_line(row.name, over_tables, ratios, row.limits))
    told = machine(options)
    lines += ["", f"Milliseconds, medians; ratios to the best peer, in the worst of {len(tables)} tables, and in "
              "brackets the most they should be; what is more is bold. "
              f"{told['processor']} ({told['vectors']}), {told['cores']} cores, {told['threads']} threads. "
              f"Python {told['python']}, numpy {told['numpy']}; peers {told['peers']}, "
              f"llama-cpp-python {told['llama-cpp-python']}."]  # fmt: skip
    lines += ["", "A dash, and what shows it (helpers found by the command, in the peers' Python):", ""]
    lines += [
        f"- {name}: {why}: `{shows}` prints {_printed(options.llama if name == LLAMA else options.peers, shows)}"
        for name, (why, shows) in DASHES.items()
    ]
    return "\n".join(lines)


def _printed(python: str, command: str) -> str:
    if not python:
        return "none"
    ran = subprocess.run([python, "-c", command], capture_output=True, text=True)
    return (ran.stdout.splitlines() or ["nothing"])[-1]


def _line(name: str, seconds: dict[str, float], ratios: dict[str, float], limits: Mapping[str, float | None]) -> str:
    cells = [f"{1000 * seconds[who]:.0f}" if who in seconds else "-" for who in CONTENDERS]
    for who in MECHSCOPE:
        limit = limits.get(who)
        shown = f"{ratios[who]:.3g}" if who in ratios else ""
        missed = who in ratios and limit is not None and ratios[who] > limit
        cells.append(f"{f'**{shown}**' if missed else shown}{'' if limit is None else f' ({limit})'}")
    return f"| {name} | {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
