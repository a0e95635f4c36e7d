"""Loads SmolLM2 and uses it, and prints what that took; run by test_memory.py.

    python measure_memory.py dense|mapped|scoped|packed DIRECTORY

"mapped" is dense weights from the conversion that "dense" leaves in DIRECTORY.

Prints JSON in bytes: `peak`, the kernel's VmHWM: the largest resident set the process ever had, which is anonymous
and file-backed pages together (RssAnon + RssFile + RssShmem), mapped files included; `before`, the same before the
model is loaded (interpreter and imports); `anonymous` and `file` at the end; `held`, the weights as they are kept;
`weights`, all of them as float32.
"""

import gc
import json
import sys
from pathlib import Path

import gguf.quants  # noqa: F401
import tokenizers  # noqa: F401

from engine import Model, RecordHook, converted, forward, load_model


def kilobytes(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(f"{field}:")).split()[1])


def weights(model: Model) -> int:
    layers = (model.params.layer(layer).arrays() for layer in range(model.config.n_layers))
    ends = model.params.embed.nbytes + model.params.final_norm.weight.nbytes
    assert model.params.ends.unembed is model.params.ends.embed
    return ends + sum(array.nbytes for layer in layers for _, array in layer)


def main() -> None:
    converted.directory = lambda: Path(sys.argv[2])
    gc.collect()
    before = kilobytes("VmHWM")
    model = load_model("smollm2-135m-instruct", weights={"mapped": "dense"}.get(sys.argv[1], sys.argv[1]))
    assert model.conversion == {"dense": "made", "mapped": "used"}.get(sys.argv[1], "none"), model.conversion
    ids = list(range(1000, 1032))
    forward(model, ids)
    record = RecordHook.for_layers(range(model.config.n_layers))
    forward(model, ids, hook=record)
    peak, anonymous, file = (kilobytes(field) for field in ("VmHWM", "RssAnon", "RssFile"))
    assert len(record.post_layer) == model.config.n_layers
    figures = {"before": before, "peak": peak, "anonymous": anonymous, "file": file}
    figures = {name: 1024 * value for name, value in figures.items()}
    print(json.dumps(figures | {"held": model.params.nbytes, "weights": weights(model)}))


if __name__ == "__main__":
    main()
