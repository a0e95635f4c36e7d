"""Every row of `tests/families.py` against transformers: the same tensors by name on both sides.

rows            a `Bench` for each row: the engine's model, the reference in float32 and float64
families_agree  logits, points, cached runs, interventions, transplants and saved directories of every row
golden          the float64 numbers that the tests compare with, without torch
"""

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from operator import itemgetter
from pathlib import Path

import families
import numpy as np
import torch
import transformers
from declared import points_of
from naive import naive
from oracle.cases import built_in, inject, ours
from oracle.checks import agreement
from oracle.family_cases import KEPT, KEPT_CASES, STRIDE, cases, point_row, prompts, transplants
from oracle.family_sites import sites
from oracle.golden import Golden
from oracle.measure import CEILING, CONTROL, FACTOR, NOTHING, Measure, Result, allowed, distance, measure, row_errors
from oracle.reference import Array, Reference, Run, in_float64
from recording import cached
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from engine import Model, RecordHook, forward, load_model
from engine.families import family

ON_DISK = {"gpt_neox": {"lm_head.weight": "embed_out.weight"}}
"""Parameters that checkpoints call otherwise than the module does."""


BARE = {*families.SIZES, *families.GPT, "model_type", "attention_types"}
BARE |= {"n_embd", "n_layer", "n_head", "num_layers", "num_heads"}

# --- both sides ---------------------------------------------------------------------------------------------------


class Asked(families.Seeded):
    """Remembers which tensors were asked for."""

    def __init__(self, row: str) -> None:
        super().__init__(row)
        self.seen: set[str] = set()

    def get(self, name: str, shape: tuple[int, ...]) -> Array:
        self.seen.add(name)
        return super().get(name, shape)


@dataclass
class Bench:
    """One row. `runs` are pairs (float32, float64) of the reference by prompt, case or transplant; `controls` and
    `pooled` are set by `pool`.
    """

    row: str
    model: Model
    single: Reference
    double: Reference
    strays: set[str]
    ids: dict[str, list[int]]
    runs: dict[str, tuple[Run, Run]] = field(default_factory=dict)
    controls: dict[str, float] = field(default_factory=dict)
    pooled: dict[str, float] = field(default_factory=dict)

    @property
    def group(self) -> str:
        return f"family {self.row}"


def rows() -> Iterator[Bench]:
    for row in families.ROWS:
        asked = Asked(row)
        model = families.tiny(row, asked)
        for layer in range(model.config.n_layers):
            model.params.layer(layer)
        single, filled = reference(row, torch.float32)
        with in_float64():
            double, _ = reference(row, torch.float64)
        references = (Reference(twin, sites(twin), model.config.d_head) for twin in (single, double))
        yield Bench(row, model, *references, asked.seen ^ filled, prompts())


def reference(row: str, dtype: torch.dtype) -> tuple[torch.nn.Module, set[str]]:
    """The transformers model with the row's tensors, and their names on disk; a tied head has none of its own."""
    raw = families.ROWS[row]
    config = transformers.AutoConfig.for_model(**raw)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager").eval()
    on_disk, seeded = ON_DISK.get(raw["model_type"], {}), families.Seeded(row)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    shapes = {name: tuple(part.shape) for name, part in model.state_dict().items() if name not in tied}
    made = {name: torch.from_numpy(seeded.get(on_disk.get(name, name), shape)) for name, shape in shapes.items()}
    left = model.load_state_dict(made, strict=False)
    if {*left.missing_keys} != tied or left.unexpected_keys:
        raise AssertionError(f"{row}: {left}")
    model.tie_weights()
    return model, {on_disk.get(name, name) for name in shapes}


# --- comparisons --------------------------------------------------------------------------------------------------


def families_agree(benches: Iterable[Bench]) -> Iterator[Result]:
    """Every check of every row; the runs stay in the benches."""
    for bench in benches:
        yield _defaults(bench)
        yield Result(bench.group, "tensors that only one side reads", Measure(len(bench.strays), 0.0))
        yield from _unchanged(bench)
        yield from _cached(bench)
        yield from _changed(bench)
        yield from _injected(bench)
        yield from _saved(bench)


def _defaults(bench: Bench) -> Result:
    """What config.json leaves out means what it means to transformers, in the row and in the barest config."""
    raw = families.ROWS[bench.row]
    reader, wrong = family(raw["model_type"]), 0
    bare = {key: value for key, value in raw.items() if key in BARE}
    bare |= {"hidden_size": 64} if "hidden_size" in raw else {}  # a quarter of a head must be an even number
    for given in (raw, bare):
        written = transformers.AutoConfig.for_model(**given).to_dict()
        ours, theirs = reader.config(given), reader.config(written)
        wrong += sum(getattr(ours, part.name) != getattr(theirs, part.name) for part in fields(ours))
    return Result(bench.group, "settings whose defaults differ", Measure(wrong, 0.0))


def _unchanged(bench: Bench) -> Iterator[Result]:
    """Logits and every point; the control is another prompt."""
    points, worst = tuple(bench.double.sites), dict.fromkeys(bench.double.sites, NOTHING)
    assert {*points} == {*points_of(bench.model)}
    for name, ids in bench.ids.items():
        bench.runs[name] = bench.single.run(ids, points), bench.double.run(ids, points)
    for name, ids in bench.ids.items():
        single, double = bench.runs[name]
        record = RecordHook.for_layers(bench.double.layers, points=points)
        logits = forward(bench.model, ids, hook=record, logits_at="all").logits
        other = bench.runs["donor" if name == "short" else "short"][1].logits[-1:]
        error = measure(logits[0], single.logits, double.logits)
        yield Result(bench.group, f"{name}: logits", error, distance(double.logits[-1:], other))
        for point in points:
            found = np.stack(list(record.get(point).values()))
            worst[point] |= measure(found, single.stacked(point), double.stacked(point))
    short, donor = (bench.runs[name][1] for name in ("short", "donor"))
    for point in points:
        yield Result(bench.group, point, worst[point], distance(short.stacked(point), donor.stacked(point)))
    yield _float64_is_real(bench)


def _float64_is_real(bench: Bench) -> Result:
    """A decoder written for the tests agrees with the float64 run as no float32 run does."""
    exact, (single, double) = naive(bench.model, bench.ids["long"]).logits, bench.runs["long"]
    error = float(row_errors(double.logits, exact).max()) if double.logits.dtype == np.float64 else np.inf
    worst = Measure(error, 1e-11, len(exact))
    return Result(bench.group, "the reference is float64", worst, distance(single.logits, exact))


def _cached(bench: Bench) -> Iterator[Result]:
    """Token by token and in chunks over a cache."""
    ids, (single, double) = bench.ids["short"], bench.runs["short"]
    for sizes in ([1] * len(ids), [7, 1, 10, 6]):
        logits, _ = cached(bench.model, ids, sizes)
        yield Result(bench.group, f"cached in {len(sizes)} steps", measure(logits, single.logits, double.logits))


def _changed(bench: Bench) -> Iterator[Result]:
    """Interventions against torch hooks, as data and by the built-in hooks; the control is the reference's distance
    from the unchanged run.
    """
    for case in cases(bench.model):
        bench.runs[case.name] = bench.single.changed(case, bench.ids), bench.double.changed(case, bench.ids)
    pool(bench, {case.name: case.prompt for case in cases(bench.model)})
    for case in cases(bench.model):
        yield _whole(bench, case.name, case.name, ours(bench.model, case, bench.ids))
        hooks = built_in(bench.model, case, bench.ids)
        if hooks is not None:
            name = " + ".join(type(hook).__name__ for hook in hooks)
            yield _whole(bench, case.name, f"{case.name}: {name}", ours(bench.model, case, bench.ids, hooks))


def _whole(bench: Bench, case: str, name: str, found: tuple[Array, Array]) -> Result:
    """Logits and resid_post together."""
    (single, double), pooled = bench.runs[case], bench.pooled[case]
    worst = measure(found[0], single.logits, double.logits, pooled)
    worst |= measure(found[1], single.resid_post, double.resid_post, pooled)
    return Result(bench.group, name, worst, bench.controls[case])


def _injected(bench: Bench) -> Iterator[Result]:
    """Next-token logits after surgery on the caches; the control is the run without it."""
    for case in transplants(bench.model):
        token, sides = bench.ids[case.recipient][-1], (bench.single, bench.double)
        rows = (side.decoded(side.transplanted(case, bench.ids), token, 1)[0] for side in sides)
        bench.runs[case.name] = tuple(Run(row[None], {}) for row in rows)
    pool(bench, {case.name: case.recipient for case in transplants(bench.model)})
    for case in transplants(bench.model):
        (single, double), found = bench.runs[case.name], inject(bench.model, case, bench.ids, 1)[0][None]
        worst = measure(found, single.logits, double.logits, bench.pooled[case.name])
        yield Result(bench.group, case.name, worst, bench.controls[case.name])


def pool(bench: Bench, baselines: Mapping[str, str]) -> None:
    """Notes the control of each run, its distance from its baseline, and the limit that its kind shares: torch's worst
    float32 row over all of them, as far as the control leaves room (see `measure`).
    """
    anchor = min(CEILING, FACTOR * max(distance(*(run.logits for run in bench.runs[name])) for name in baselines))
    for name, baseline in baselines.items():
        bench.controls[name] = distance(bench.runs[name][1].logits[-1], bench.runs[baseline][1].logits[-1])
        bench.pooled[name] = min(anchor, bench.controls[name] / CONTROL)


def _saved(bench: Bench) -> Iterator[Result]:
    """Names of tensors, keys of config.json and shards as transformers writes them."""
    with tempfile.TemporaryDirectory() as directory:
        bench.single.model.save_pretrained(directory, max_shard_size="40KB")
        save_tokenizer(Path(directory))
        shards = len(list(Path(directory).glob("*.safetensors")))
        model = load_model(directory)
    pair = bench.runs["long"]
    yield from agreement(bench.group, f"saved, {shards} shards", ours(model, "long", bench.ids), pair)
    text, words = "The capital of France is", list(b"The capital of France is")
    wrong = sum(a != b for a, b in zip(model.encode(text), words, strict=True))
    yield Result(bench.group, "saved, ids that differ", Measure(wrong, 0.0, len(words)))


def save_tokenizer(directory: Path) -> None:
    """The tokenizer of these models, in a directory that says that it is to be taken as it stands."""
    tokenizer().save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def tokenizer() -> Tokenizer:
    """One token per byte, as `engine.library.byte_level` numbers them."""
    alphabet = {c: i for i, c in _alphabet().items()}
    backend = Tokenizer(models.BPE(alphabet | {"<|end|>": 256}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|end|>", normalized=False, special=True)])
    return backend


def _alphabet() -> Mapping[int, str]:
    """GPT-2's character for every byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(0x100 + i) for i, b in enumerate(others)}


# --- golden -------------------------------------------------------------------------------------------------------


def golden(benches: Iterable[Bench]) -> Golden:
    """From the reference's runs alone."""
    facts = {
        "torch": torch.__version__.split("+")[0],
        "transformers": transformers.__version__,
        "prompts": prompts(),
        "positions": {name: list(kept) for name, kept in KEPT.items()},
        "allowed": {},
    }
    made = Golden({}, facts, "families")
    for bench in benches:
        for name, single, double, row in _kept(bench):
            limits = np.maximum(allowed(single, double), bench.pooled.get(name.partition("/")[2], 0.0))
            by_row = row(np.broadcast_to(limits.reshape(*double.shape[:-1], 1), double.shape))[..., 0]
            made.arrays[f"{bench.row}/{name}"] = row(double).astype("f4")
            made.facts["allowed"][f"{bench.row}/{name}"] = [float(f"{limit:.1e}") for limit in by_row.ravel()]
    return made


def _kept(bench: Bench) -> Iterator[tuple[str, Array, Array, Callable[[Array], Array]]]:
    """(name, float32, float64, which rows of either are kept)."""
    for prompt, positions in KEPT.items():
        single, double = bench.runs[prompt]
        yield f"{prompt}/logits", single.logits, double.logits, itemgetter(list(positions))
    single, double = bench.runs["long"]
    for point in bench.double.sites:
        yield f"points/{point}", single.stacked(point), double.stacked(point), partial(point_row, point)
    for case in cases(bench.model):
        single, double = bench.runs[case.name]
        yield f"case/{case.name}", single.logits, double.logits, lambda logits: logits[list(KEPT_CASES), ::STRIDE]
    for surgery in transplants(bench.model):
        single, double = bench.runs[surgery.name]
        yield f"transplant/{surgery.name}", single.logits, double.logits, lambda logits: logits[:, ::STRIDE]
