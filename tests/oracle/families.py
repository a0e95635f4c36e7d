"""Every row of `tests/families.py` against transformers: the same tensors by name on both sides.

rows            a `Bench` for each row: the engine's model, the reference in float32 and float64, three prompts
families_agree  logits, points, cached runs, interventions and saved directories of every row
golden          the float64 logits that the tests compare with, without torch
"""

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

import families
import numpy as np
import torch
import transformers
from naive import naive
from oracle.cases import Case, Change, Row, ours
from oracle.checks import agreement
from oracle.golden import Golden
from oracle.measure import Measure, Result, allowed, distance, measure, row_errors
from oracle.reference import Array, Reference, Run, Site, in_float64
from recording import cached
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from engine import Model, RecordHook, forward, load_model
from engine.families import family

LENGTHS = {"short": 24, "donor": 24, "long": 100}
"""Longer than the windows (4 tokens); 100 tokens are longer than the contexts at which longrope and dynamic change."""

KEPT = {"short": (1, 7, 15, 23), "long": (63, 64, 80, 99)}
"""Positions of the golden logits."""

# --- where the points are -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Names:
    """Module names of a family; `returns` is "first" where a layer returns a tuple."""

    layer: str = "model.layers.{}"
    attention: str = "self_attn"
    o: str = "o_proj"
    down: str = "mlp.down_proj"
    returns: str = "out"

    @property
    def sites(self) -> dict[str, Site]:
        attention = f"{self.layer}.{self.attention}"
        o, down = f"{attention}.{self.o}", f"{self.layer}.{self.down}"
        return {
            "resid_post": Site(self.layer, self.returns),
            "attn_pattern": Site(attention, "weights"),
            "z": Site(o, "in", heads=True),
            "attn_proj": Site(o, "out"),
            "mlp_act": Site(down, "in"),
            "mlp_proj": Site(down, "out"),
        }


NAMES = {
    "gpt2": Names("transformer.h.{}", "attn", "c_proj", "mlp.c_proj"),
    "gpt_neo": Names("transformer.h.{}", "attn.attention", "out_proj", "mlp.c_proj", "first"),
    "gpt_neox": Names("gpt_neox.layers.{}", "attention", "dense", "mlp.dense_4h_to_h"),
    "phi": Names(o="dense", down="mlp.fc2"),
    "starcoder2": Names(down="mlp.c_proj"),
}
"""Families whose modules are not called as Llama's are."""

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
    """One row. `runs` are pairs (float32, float64) of the reference by prompt or case."""

    row: str
    model: Model
    single: Reference
    double: Reference
    strays: set[str]
    ids: dict[str, list[int]]
    runs: dict[str, tuple[Run, Run]] = field(default_factory=dict)

    @property
    def group(self) -> str:
        return f"family {self.row}"


def rows() -> Iterator[Bench]:
    for row, raw in families.ROWS.items():
        asked, names = Asked(row), NAMES.get(raw["model_type"], Names())
        model = families.tiny(row, asked)
        for layer in range(model.config.n_layers):
            model.params.layer(layer)
        single, filled = reference(row, torch.float32)
        with in_float64():
            double, _ = reference(row, torch.float64)
        references = (Reference(twin, names.sites, model.config.d_head) for twin in (single, double))
        yield Bench(row, model, *references, asked.seen ^ filled, prompts())


def prompts() -> dict[str, list[int]]:
    rng = np.random.default_rng(1)
    return {name: rng.integers(0, 256, length).tolist() for name, length in LENGTHS.items()}


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
    """Every check of every row; the runs stay in the benches. One thread: these matrices are small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for bench in benches:
        yield _defaults(bench)
        yield Result(bench.group, "tensors that only one side reads", Measure(len(bench.strays), 0.0))
        yield from _unchanged(bench)
        yield from _cached(bench)
        yield from _changed(bench)
        yield from _saved(bench)
    torch.set_num_threads(threads)


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
    points = tuple(bench.double.sites)
    for name, ids in bench.ids.items():
        bench.runs[name] = bench.single.run(ids, points), bench.double.run(ids, points)
    for name, ids in bench.ids.items():
        single, double = bench.runs[name]
        record = RecordHook.for_layers(bench.double.layers, points=points)
        logits = forward(bench.model, ids, hook=record, logits_at="all").logits
        other = bench.runs["donor" if name == "short" else "short"][1].logits[-1:]
        worst = measure(logits[0], single.logits, double.logits)
        yield Result(bench.group, f"{name}: logits", worst, distance(double.logits[-1:], other))
        for point in points:
            found = np.stack(list(record.get(point).values()))
            worst = measure(found, single.stacked(point), double.stacked(point))
            yield Result(bench.group, f"{name}: {point}", worst)
    if bench.model.config.family == "llama":
        exact = naive(bench.model, bench.ids["long"]).logits
        found = bench.runs["long"][1].logits
        error = float(row_errors(found, exact).max()) if found.dtype == np.float64 else np.inf
        control = distance(bench.runs["long"][0].logits, exact)
        worst = Measure(error, 1e-11, len(found))
        yield Result(bench.group, "the reference is float64", worst, control)


def _cached(bench: Bench) -> Iterator[Result]:
    """Token by token and in chunks over a cache."""
    ids, (single, double) = bench.ids["short"], bench.runs["short"]
    for sizes in ([1] * len(ids), [7, 1, 10, 6]):
        logits, _ = cached(bench.model, ids, sizes)
        yield Result(bench.group, f"cached in {len(sizes)} steps", measure(logits, single.logits, double.logits))


CASES = (
    Case("zero two rows", "short", (Change("zero", (1,), positions=(5, -2)),)),
    Case("steer", "short", (Change("steer", (2,), positions="last", value=0.5, vector=Row("donor", 2, 4)),)),
    Case("patch one row", "short", (Change("patch", (1,), positions=(-2,), vector=Row("donor", 1, -2)),)),
    Case("zero a head", "short", (Change("zero", (2,), "z", heads=(1,)),)),
)


def _changed(bench: Bench) -> Iterator[Result]:
    """Interventions against torch hooks; the control is the reference's distance from the unchanged run."""
    baseline = bench.runs["short"][1].logits[-1]
    for case in CASES:
        pair = bench.single.changed(case, bench.ids), bench.double.changed(case, bench.ids)
        control = distance(pair[1].logits[-1], baseline)
        yield from agreement(bench.group, case.name, ours(bench.model, case, bench.ids), pair, control)


def _saved(bench: Bench) -> Iterator[Result]:
    """Names of tensors, keys of config.json and shards as transformers writes them."""
    with tempfile.TemporaryDirectory() as directory:
        bench.single.model.save_pretrained(directory, max_shard_size="40KB")
        tokenizer().save(str(Path(directory) / "tokenizer.json"))
        shards = len(list(Path(directory).glob("*.safetensors")))
        model = load_model(directory)
    pair = bench.runs["long"]
    yield from agreement(bench.group, f"saved, {shards} shards", ours(model, "long", bench.ids), pair)
    text, words = "The capital of France is", list(b"The capital of France is")
    wrong = sum(a != b for a, b in zip(model.encode(text), words, strict=True))
    yield Result(bench.group, "saved, ids that differ", Measure(wrong, 0.0, len(words)))


def tokenizer() -> Tokenizer:
    """One token per byte, as `engine.tokenizer.byte_level` numbers them."""
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
        "prompts": {name: prompts()[name] for name in KEPT},
        "positions": {name: list(kept) for name, kept in KEPT.items()},
        "allowed": {},
    }
    made = Golden({}, facts, "families")
    for bench in benches:
        for prompt, kept in KEPT.items():
            single, double = (run.logits for run in bench.runs[prompt])
            name, where = f"{bench.row}/{prompt}/logits", list(kept)
            made.arrays[name] = double[where].astype("f4")
            made.facts["allowed"][name] = [float(f"{limit:.1e}") for limit in allowed(single, double)[where]]
    return made
