"""Compare GGUF loading with llama.cpp: `make oracle-gguf`.

The files of `gguf_rows.py` go to both sides; logits are compared at every position, ids on awkward text for every kind
of tokenizer. Leaves with status 1 when a comparison fails or a golden file is stale; `--write` writes them anew:

    gguf.safetensors   ROW/PROMPT (positions, d_vocab): llama.cpp's logits
    gguf.json          the version, prompts, positions and what each row is allowed
    gguf_ids.json      the vocabularies, and llama.cpp's ids of every text

`gguf_controls.py` says what is allowed and why. llama.cpp runs in float32 here (keys, values and the
product of scores too; flash attention off), except that its CPU kernel reads GELU from a table in half precision.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import gguf_controls
import gguf_ids
import gguf_rows
import llama_cpp
import numpy as np
from gguf import GGUFWriter
from oracle.golden import Golden, differences
from oracle.measure import NOTHING, Measure, Result, within
from oracle.report import report
from oracle.vocabularies import made
from rich.console import Console

from engine import forward, load_model
from engine.gguf_tokenizer import from_gguf

DIRECTORY = Path(__file__).parents[1] / "golden"
Array = np.ndarray


@llama_cpp.llama_log_callback
def quiet(*_: object) -> None:
    """Its warnings are about contexts and double BOS, which are meant here."""


def main() -> int:
    llama_cpp.llama_log_set(quiet, None)
    parser = argparse.ArgumentParser(description="compare GGUF loading with llama.cpp")
    parser.add_argument("--write", action="store_true", help="write the golden files")
    options = parser.parse_args()
    console, began = Console(width=None if sys.stdout.isatty() else 120), time.monotonic()
    console.print(f"llama-cpp-python {llama_cpp.__version__}")
    fresh = Golden({}, facts(), "gguf")
    results = report(console, files_agree(fresh))
    results += report(console, ids_agree(options.write))
    if options.write:
        fresh.write(DIRECTORY)
    results += report(console, stale(fresh))
    failed = [result for result in results if not result.passed]
    console.print(f"{len(results)} comparisons, {len(failed)} failed, {time.monotonic() - began:.0f} s")
    return 1 if failed else 0


# --- logits -------------------------------------------------------------------------------------------------------


def facts() -> dict[str, Any]:
    return {
        "llama_cpp_python": llama_cpp.__version__,
        "prompts": {row: gguf_controls.prompts(row) for row in gguf_rows.ROWS},
        "positions": {name: list(kept) for name, kept in gguf_controls.KEPT.items()},
        "allowed": {},
    }


def files_agree(fresh: Golden) -> Iterator[Result]:
    """Every row's file at every position; keeps the golden logits on the way."""
    for row in gguf_rows.ROWS:
        with tempfile.TemporaryDirectory() as scratch:
            path = gguf_rows.write(row, Path(scratch) / "tiny.gguf")
            yield from _file_agrees(row, path, fresh)


def _file_agrees(row: str, path: Path, fresh: Golden) -> Iterator[Result]:
    model, limit, worst = load_model(path), gguf_controls.allowed(row), NOTHING
    for prompt, ids in gguf_controls.prompts(row).items():
        theirs = their_logits(path, ids, gguf_controls.CONTEXTS[prompt])
        ours = forward(model, ids, logits_at=[*range(len(ids))]).logits[0]
        name, kept = f"{row}/{prompt}", theirs[list(gguf_controls.KEPT[prompt])]
        fresh.arrays[name], fresh.facts["allowed"][name] = kept, [limit] * len(kept)
        worst |= (measure := within(ours, theirs, limit))
        yield Result(f"GGUF {row}", f"logits, {prompt}", measure)
    for name, wrong in gguf_controls.changed(row, path.parent):
        far = gguf_controls.farthest(wrong, row, fresh)
        yield Result(f"GGUF {row}", f"control: {name}", worst, far, far=gguf_controls.FAR)


def their_logits(path: Path, ids: list[int], context: int) -> Array:
    """llama.cpp's logits at every position: (s, d_vocab)."""
    f32 = llama_cpp.GGML_TYPE_F32
    options = {"n_ctx": context, "n_batch": context, "n_ubatch": context, "n_threads": 1, "n_threads_batch": 1}
    model = llama_cpp.Llama(
        str(path), **options, logits_all=True, type_k=f32, type_v=f32, flash_attn=False, swa_full=True, verbose=False
    )
    model.eval(ids)
    logits = np.array(model.scores[: len(ids)])
    model.close()
    return logits


def stale(fresh: Golden) -> Iterator[Result]:
    """The committed logits are llama.cpp's of today, but for another processor's rounding."""
    noise = {name: max(limits) for name, limits in fresh.facts["allowed"].items()}
    found = list(differences(Golden.read(DIRECTORY, "gguf"), fresh, noise.__getitem__))
    for line in found:
        yield Result("golden files", f"gguf: {line}", Measure(1, 0.0))
    if not found:
        yield Result(
            "golden files", "gguf: arrays that differ from the committed ones", Measure(0, 0.0, len(fresh.arrays))
        )


# --- ids ----------------------------------------------------------------------------------------------------------


def ids_agree(write: bool) -> Iterator[Result]:
    """Every kind of tokenizer on every text, with BOS; the vocabularies are the committed ones unless written anew."""
    ids = made(llama_cpp.__version__) if write else gguf_ids.read()
    kept = ids.ids
    ids.ids = {kind: their_ids(ids.metadata(kind), ids.texts) for kind in ids.kinds}
    for kind, wanted in ids.ids.items():
        words = from_gguf(ids.metadata(kind))
        wrong = [text for text, theirs in zip(ids.texts, wanted, strict=True) if words.encode(text) != theirs]
        note = f"(such as {wrong[0]!r})" if wrong else ""
        yield Result("ids", f"{kind}: texts whose ids differ", Measure(len(wrong), 0.0, len(wanted)), note=note)
    if write:
        ids.write()
    elif ids.ids != kept or ids.made_with != llama_cpp.__version__:
        yield Result("ids", "the committed ids are not llama.cpp's of today", Measure(1, 0.0))


def their_ids(metadata: dict[str, Any], texts: Iterable[str]) -> list[list[int]]:
    with tempfile.TemporaryDirectory() as scratch:
        path = vocabulary_file(metadata, Path(scratch) / "vocabulary.gguf")
        model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
        ids = [list(model.tokenize(text.encode(), add_bos=True, special=True)) for text in texts]
        model.close()
    return ids


def vocabulary_file(metadata: dict[str, Any], path: Path) -> Path:
    writer = GGUFWriter(path, "llama")
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}
            add[type(value)](key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


if __name__ == "__main__":
    sys.exit(main())
