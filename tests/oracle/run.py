"""Compare the engine with transformers on the same weights, live: `make oracle`.

Prints every comparison and leaves with status 1 when one fails or the golden files are stale; `--write` writes the
golden files anew.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import torch
import transformers
from oracle import checks, config_keys, directories, families, float8, layouts, multimodal, tiny
from oracle.cases import CASES, GOLDEN, TRANSPLANTS
from oracle.golden import STRIDE, Golden, differences
from oracle.measure import Measure, Result, allowed
from oracle.reference import Array, load
from oracle.report import report
from rich.console import Console

from engine import catalog, fast, load_model

MODEL = "smollm2-135m-instruct"
DIRECTORY = Path(__file__).parents[1] / "golden"


def main() -> int:
    parser = argparse.ArgumentParser(description="compare the engine with transformers on the same weights")
    parser.add_argument("--write", action="store_true", help="write the golden files")
    options = parser.parse_args()
    console, began = Console(width=None if sys.stdout.isatty() else 120), time.monotonic()
    bench = checks.Bench.of(load_model(MODEL), load(catalog.fetch(MODEL)))
    console.print(f"torch {torch.__version__}, transformers {transformers.__version__}, {MODEL}")
    console.print(f"compiled kernels: {fast.state()}")
    results = report(console, everything(bench))
    benches = list(families.rows())
    results += report(console, families.families_agree(benches))
    for fresh in (made(bench), families.golden(benches)):
        results += report(console, golden_files(fresh, options.write))
    failed = [result for result in results if not result.passed]
    console.print(f"{len(results)} comparisons, {len(failed)} failed, {time.monotonic() - began:.0f} s")
    return 1 if failed else 0


def everything(bench: checks.Bench) -> Iterable[Result]:
    """Every check, in order."""
    yield from checks.float64_is_real(bench.double, bench.ids["story"])
    yield from checks.weights_are_equal(bench)
    yield from checks.prompts_agree(bench)
    yield from checks.greedy_agrees(bench)
    yield from checks.hooked_generation_agrees(bench)
    yield from checks.interventions_agree(bench)
    yield from checks.transplants_agree(bench)
    torch.set_num_threads(1)  # of so many tiny models each is faster so, and the more on a busy machine
    yield from tiny.directories_agree()
    yield from multimodal.multimodal_agrees()
    yield from directories.directories_agree()
    yield from layouts.layouts_agree()
    yield from config_keys.config_keys_agree()
    yield from float8.float8_agrees()


# --- golden files -------------------------------------------------------------------------------------------------


def golden_files(fresh: Golden, write: bool) -> Iterable[Result]:
    """Write them, or regenerate them elsewhere and compare."""
    if write:
        fresh.write(DIRECTORY)
    with tempfile.TemporaryDirectory() as scratch:
        fresh.write(Path(scratch))
        found = list(differences(Golden.read(DIRECTORY, fresh.stem), Golden.read(Path(scratch), fresh.stem)))
    for line in found:
        yield Result("golden files", f"{fresh.stem}: {line}", Measure(1, 0.0))
    if not found:
        name = f"{fresh.stem}: arrays that differ from the committed ones"
        yield Result("golden files", name, Measure(0, 0.0, len(fresh.arrays)))


def made(bench: checks.Bench) -> Golden:
    """The golden files' contents, from the reference's runs alone."""
    golden = Golden({}, _facts(bench))
    for name in GOLDEN:
        single, double = bench.runs[name]
        top = torch.from_numpy(double.logits[-1]).topk(5).indices.numpy()
        golden.arrays[f"prompt/{name}/top"] = top
        golden.arrays[f"prompt/{name}/resid_post"] = double.resid_post[:, -1].astype("f4")
        golden.facts["allowed"][f"prompt/{name}/resid_post"] = _limits(single.resid_post, double.resid_post)
        _keep_logits(golden, f"prompt/{name}/logits", single.logits, double.logits)
    for case in CASES:
        if case.golden:
            single, double = bench.runs[case.name]
            name = f"case/{case.name}/resid_post"
            golden.arrays[name] = double.resid_post[-1, -1].astype("f4")
            golden.facts["allowed"][name] = _limits(single.resid_post, double.resid_post)[-1:]
            _keep_logits(golden, f"case/{case.name}/logits", single.logits, double.logits)
    for transplant in TRANSPLANTS:
        if transplant.golden:
            rows = (row[None] for row in bench.injected[transplant.name])
            _keep_logits(golden, f"transplant/{transplant.name}/logits", *rows)
    return golden


def _facts(bench: checks.Bench) -> dict[str, object]:
    used = {*GOLDEN, "italy", "donor"}
    return {
        "torch": torch.__version__.split("+")[0],
        "transformers": transformers.__version__,
        "model": MODEL,
        "weights_sha256": bench.model.fingerprint,
        "stride": STRIDE,
        "prompts": {name: bench.ids[name] for name in sorted(used)},
        "tokens": {name: bench.tokens[name] for name in sorted(_golden_tokens(bench))},
        "allowed": {},
    }


def _golden_tokens(bench: checks.Bench) -> set[str]:
    return {*GOLDEN, *(t.name for t in TRANSPLANTS if t.golden)} & set(bench.tokens)


def _keep_logits(golden: Golden, name: str, single: Array, double: Array) -> None:
    golden.arrays[name] = double[-1, ::STRIDE].astype("f4")
    golden.facts["allowed"][name] = _limits(single[None], double[None])


def _limits(single: Array, double: Array) -> list[float]:
    """(layers, s, ...): what the last row of every layer is allowed, to two digits."""
    last = allowed(single, double).reshape(double.shape[:2])[:, -1]
    return [float(f"{limit:.1e}") for limit in last]


if __name__ == "__main__":
    sys.exit(main())
