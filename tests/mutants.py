"""Break the engine in named ways and expect the tests to notice: `make mutants`.

Mutant      one replacement in one file
MUTANTS     the list
misplaced   mutants whose text is not in its file exactly once
main        control run, then every mutant in a copy of the project, two at a time; exit 1 if one survives

Each copy imports its own engine (checked in every run). The tests on the synthetic model run first, the ones
on SmolLM2 only for mutants that survived them.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from family_mutants import FAMILY_MUTANTS, MULTIMODAL_MUTANTS
from gguf_mutants import GGUF_MUTANTS, TOKENIZER_MUTANTS
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import track
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("engine", "schemas", "server", "tests", "pyproject.toml")
SLOW = ("test_bad_files.py", "test_catalog.py", "test_fuzz.py", "test_memory.py")
"""Tests that run many or heavy subprocesses; no mutant here is theirs to catch."""
PHASES = ("not real", "real")
WORKERS = 2
SECONDS = 900
WRONG_ENGINE = 97
RUNNER = f"""
import sys
from pathlib import Path
copy = Path(sys.argv.pop(1))
import engine
if not Path(engine.__file__).resolve().is_relative_to(copy):
    sys.exit({WRONG_ENGINE})
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""


@dataclass(frozen=True)
class Mutant:
    """In engine/`file`, `old` (found exactly once) becomes `new`. `at` is a test file to try first."""

    name: str
    file: str
    old: str
    new: str
    at: str = ""


MUTANTS = (
    # --- numerics
    Mutant("rotary off by one position", "config.py", "pos[:, None].astype(", "(pos[:, None] + 1).astype("),
    Mutant("queries are not rotated", "decoder.py", "q, k = rotate(q, *run.tables[rope]), ", "q, k = q, "),
    Mutant("rotary pairs interleaved", "ops.py", "x[..., :half], x[..., half : 2 * half]", "x[..., ::2], x[..., 1::2]"),
    Mutant("epsilon x 10", "ops.py", "scale += np.float32(eps)", "scale += np.float32(eps * 10)"),
    Mutant("attention scale missing", "ops.py", "scores *= np.float32(scale)", "scores *= np.float32(1)"),
    Mutant(
        "softmax rows sum to 1.001", "ops.py", "x /= np.maximum(total,", "x /= np.float32(1.001) * np.maximum(total,"
    ),
    Mutant("causal mask open by one", "ops.py", "= distance < 0", "= distance < -1"),
    Mutant("window wider by one", "ops.py", "hidden |= distance >= window", "hidden |= distance > window"),
    Mutant(
        "grouped query heads in the wrong order",
        "ops.py",
        "grouped = q.reshape(b, k.shape[1], -1, d_head)",
        "grouped = q.reshape(b, -1, k.shape[1], s, d_head).swapaxes(1, 2).reshape(b, k.shape[1], -1, d_head)",
    ),
    Mutant("values of the wrong group", "ops.py", "-1, s_kv) @ v\n", "-1, s_kv) @ v[:, ::-1]\n"),
    Mutant(
        "gate and up swapped",
        "decoder.py",
        "act = activation(linear(x, p.gate.weight, p.gate.bias))\n        act *= up",
        "act = linear(x, p.gate.weight, p.gate.bias)\n        act *= activation(up)",
    ),
    Mutant("MLP reads the layer's input", "decoder.py", "m = norm(mlp(norm(mid,", "m = norm(mlp(norm(x,"),
    Mutant(
        "biases are dropped",
        "ops.py",
        "        out += bias\n    return out\n\n\ndef rms",
        "        pass\n    return out\n\n\ndef rms",
    ),
    # --- positions and caches
    Mutant(
        "positions relative to the chunk",
        "decoder.py",
        "np.arange(past, past + rows, dtype",
        "np.arange(0, rows, dtype",
    ),
    Mutant(
        "keys cached before rotary",
        "decoder.py",
        "rotate(k, *run.tables[rope])",
        "rotate(k, *run.tables[rope]) if run.cache is None else k",
    ),
    Mutant("logits of the wrong row", "decoder.py", "np.searchsorted(pos, wanted)", "np.searchsorted(pos, wanted) - 1"),
    Mutant("a fork shares its arrays", "cache.py", "cls(k.copy(), v.copy(), pos.copy(),", "cls(k, v, pos,"),
    Mutant("crop keeps one position too many", "cache.py", "min(layer.length, n)", "min(layer.length, n + 1)"),
    Mutant("a window loses its places", "cache.py", "v[:, :, -n:], pos[-n:])", "v[:, :, -n:], np.arange(n))"),
    Mutant("transplant without realignment", "cache.py", 'if rope == "realign":', 'if rope == "never":'),
    Mutant(
        "realignment turns the wrong way",
        "cache.py",
        "angle = new_pos[:, None] * np.asarray(new) - old_pos[:, None] * np.asarray(old)",
        "angle = old_pos[:, None] * np.asarray(old) - new_pos[:, None] * np.asarray(new)",
    ),
    Mutant("transplant writes all heads", "cache.py", "slice(None) if heads is None else", "slice(None) if True else"),
    Mutant("transplant of keys writes values", "cache.py", 'if "v" in what:', "if True:"),
    # --- hooks
    Mutant(
        "hook return value ignored",
        "hooks.py",
        "        return replaced\n\n\ndef resolve_positions",
        "        return x\n\n\ndef resolve_positions",
    ),
    Mutant(
        "writing in place allowed everywhere",
        "hooks.py",
        "shown.flags.writeable = False",
        "shown.flags.writeable = True",
    ),
    Mutant("any dtype may replace", "hooks.py", " or replaced.dtype != np.float32:", ":"),
    Mutant("recording aliases", "hooks.py", "taken = np.array(x) if", "taken = x if"),
    Mutant("recording forgets the prompt", "hooks.py", "        if past == 0:\n", "        if True:\n"),
    Mutant("steering applied twice", "hooks.py", "rows + step\n", "rows + step + step\n"),
    Mutant(
        "ablation of the wrong rows",
        "hooks.py",
        "            edited[:, rows] = self",
        "            edited[:, rows - 1] = self",
    ),
    Mutant("scope last misses generated rows", "hooks.py", "pos >= prompt_length - 1", "pos == prompt_length - 1"),
    Mutant(
        "positions of a scope relative to the chunk",
        "hooks.py",
        "np.isin(pos, resolve",
        "np.isin(pos - pos[0], resolve",
    ),
    Mutant("negative positions of a scope off by one", "hooks.py", "position + length if", "position + length - 1 if"),
    Mutant(
        "steering before ablation",
        "hooks.py",
        "        for hook in self.hooks:\n            if hook.wants",
        "        for hook in self.hooks[::-1]:\n            if hook.wants",
    ),
    Mutant(
        "knock-out without renormalising",
        "hooks.py",
        "np.divide(left, total, out=np.zeros_like(left), where=total > 0)",
        "left",
    ),
    Mutant(
        "set_component adds the wrong way",
        "interventions.py",
        "(component) - rows @ unit)",
        "(component) + rows @ unit)",
    ),
    # --- reading, patching, generating
    Mutant(
        "no final norm in the lens",
        "lens.py",
        "norm(model.check_vector(residual), model.params.final_norm, model.config)",
        "model.check_vector(residual)",
    ),
    Mutant("neighbours by product, not cosine", "lens.py", " / np.maximum(lengths, np.finfo(np.float32).tiny)", ""),
    Mutant("top k in the wrong order", "distribution.py", "argsort(-scores[candidates]", "argsort(scores[candidates]"),
    Mutant(
        "KL the other way round",
        "distribution.py",
        "(np.exp(log_p) * (log_p - log_q))",
        "(np.exp(log_q) * (log_q - log_p))",
    ),
    Mutant(
        "patch reads the wrong row",
        "patching.py",
        "np.take(kept[layer], pos, axis)",
        "np.take(kept[layer], pos - 1, axis)",
    ),
    Mutant(
        "patch writes the donor's position",
        "model.py",
        "PatchHook({(layer, to): rows",
        "PatchHook({(layer, source): rows",
    ),
    Mutant(
        "another head is mapped", "patching.py", '"all", (index,))', '"all", ((index + 1) % model.config.n_heads,))'
    ),
    Mutant(
        "negative position off by one",
        "network.py",
        "int(position) % length",
        "(int(position) - (position < 0)) % length",
    ),
    Mutant(
        "a prompt's end forgets the cache",
        "generate.py",
        "prompt_length = cache.next_position + ids",
        "prompt_length = ids",
    ),
    Mutant("temperature ignored", "generate.py", "logits / np.float32(temperature)", "logits"),
    Mutant("end of text ignored", "generate.py", "if token in model.tokenizer.eos:", "if False:"),
    Mutant(
        "surgery after the whole prompt",
        "injection.py",
        "forward(model, tokens[:-1], cache",
        "forward(model, tokens, cache",
    ),
    Mutant(
        "recovery against the donor", "injection.py", "(probability - baseline) / gap", "(probability - carried) / gap"
    ),
    Mutant(
        "no tick", "decoder.py", '            tick(layer - start, stop - start, f"layer {layer}")', "            pass"
    ),
    # --- files
    Mutant("an untied head is read as tied", "families/_parts.py", "w_e if cfg.tied else", "w_e if True else"),
    Mutant(
        "bf16 read as f16",
        "weights.py",
        "(raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)",
        "raw.view(np.float16).astype(np.float32)",
    ),
    Mutant(
        "a pinned layer is never let go",
        "params.py",
        "                self._pinned.pop(index, None)",
        "                pass",
        at="test_scoped.py",
    ),
    Mutant(
        "one dense layer too many",
        "params.py",
        "len(self._dense) >= self.keep",
        "len(self._dense) > self.keep",
        at="test_scoped.py",
    ),
    Mutant(
        "the layer used last goes first",
        "params.py",
        "self._dense.popitem(last=False)",
        "self._dense.popitem()",
        at="test_scoped.py",
    ),
    Mutant(
        "stretches of a tensor overlap",
        "gguf_file.py",
        "raw[start : start + step].reshape",
        "raw[:step].reshape",
        at="test_quantised.py",
    ),
    Mutant(
        "weights that are not finite pass",
        "weights.py",
        "np.isfinite(array.min()) and np.isfinite(array.max())",
        "True",
        at="test_spoiled_files.py",
    ),
    Mutant(
        "code in a tokenizer's config is overlooked",
        "load.py",
        '(path / "tokenizer_config.json").exists()',
        "False",
        at="test_spoiled_files.py",
    ),
    Mutant(
        "digits are not split off",
        "gguf_tokenizer.py",
        "[digits, pre_tokenizers.ByteLevel(",
        "[pre_tokenizers.ByteLevel(",
        "test_tokenizer.py",
    ),
    # --- architectures
    *(Mutant(*mutant, at="test_families.py") for mutant in FAMILY_MUTANTS),
    *(Mutant(*mutant, at="test_multimodal.py") for mutant in MULTIMODAL_MUTANTS),
    *(Mutant(f"GGUF: {name}", *rest, at="test_gguf_families.py") for name, *rest in GGUF_MUTANTS),
    *(Mutant(f"GGUF ids: {name}", *rest, at="test_gguf_tokenizers.py") for name, *rest in TOKENIZER_MUTANTS),
)


def misplaced() -> list[str]:
    """Names of mutants whose text does not occur exactly once in its file, or changes nothing."""
    return [
        mutant.name
        for mutant in MUTANTS
        if (ROOT / "engine" / mutant.file).read_text("utf-8").count(mutant.old) != 1 or mutant.old == mutant.new
    ]


@contextmanager
def project_copy() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="mutant-") as directory:
        copy = Path(directory).resolve()
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
            else:
                shutil.copy(source, copy / name)
        yield copy


def failed_test(copy: Path, marker: str, files: list[str]) -> str | None:
    """The first test that fails in a copy of the project; None when all pass."""
    environment = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "OPENBLAS_NUM_THREADS": "1"}
    skipped = [f"--ignore=tests/engine/{name}" for name in SLOW]
    options = ["-x", "-q", "-p", "no:cacheprovider", "--tb=no", "--no-header", f"--basetemp={copy / 'tmp'}"]
    command = [sys.executable, "-c", RUNNER, str(copy), *options, *skipped, *files]
    command += ["-m", marker] if marker else []
    try:
        ran = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return f"nothing within {SECONDS} s"
    if ran.returncode == 0:
        return None
    found = re.search(r"^(?:FAILED|ERROR) (?:tests/engine/)?(.+?)(?: - .*)?$", ran.stdout, re.MULTILINE)
    if found is None or ran.returncode != 1:
        raise SystemExit(f"the tests could not run (exit {ran.returncode}):\n{ran.stdout[-2000:]}{ran.stderr[-2000:]}")
    return found[1]


def caught_by(mutant: Mutant) -> str | None:
    """The test that notices the mutant; None when it survives."""
    with project_copy() as copy:
        path = copy / "engine" / mutant.file
        path.write_text(path.read_text("utf-8").replace(mutant.old, mutant.new), "utf-8")
        if mutant.at and (found := failed_test(copy, "", [f"tests/engine/{mutant.at}"])):
            return found
        return next((found for phase in PHASES if (found := failed_test(copy, phase, ["tests/engine"]))), None)


def control(phase: str) -> str | None:
    with project_copy() as copy:
        return failed_test(copy, phase, ["tests/engine"])


def main() -> int:
    console, start = Console(), time.perf_counter()
    if wrong := misplaced():
        console.print(f"these mutants no longer fit the code: {', '.join(wrong)}")
        return 1
    with ThreadPoolExecutor(WORKERS) as pool:
        if broken := [test for test in pool.map(control, PHASES) if test]:
            console.print(f"without any mutant these tests fail: {', '.join(broken)}")
            return 1
        console.print(f"control: all tests pass without a mutant ({time.perf_counter() - start:.0f} s)")
        found = track(pool.map(caught_by, MUTANTS), "mutants", len(MUTANTS), console=console, transient=True)
        results = dict(zip(MUTANTS, found, strict=True))
    table = Table("mutant", box=SIMPLE)
    table.add_column("caught by", overflow="fold")
    for mutant, test in results.items():
        table.add_row(mutant.name, test or "[bold red]nothing: it survives[/]")
    console.print(table)
    survivors = sum(test is None for test in results.values())
    seconds = time.perf_counter() - start
    console.print(f"{len(MUTANTS) - survivors} of {len(MUTANTS)} mutants caught in {seconds:.0f} s")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
