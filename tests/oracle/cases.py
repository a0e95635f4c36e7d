"""What is compared, as data, and the engine's side of it. Needs no torch: the golden tests run it too.

prompts          {name: ids} of every prompt
Change, Case     interventions as data; `ours` runs one with the engine, `built_in` names the hooks that do the same
CASES            one or more of every kind of intervention
Transplant, TRANSPLANTS, inject    KV-cache surgery
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from engine import (
    CompositeHook,
    EditHook,
    Generation,
    Intervention,
    Model,
    PatchHook,
    RecordHook,
    ScaleHook,
    SteerHook,
    ZeroAblateHook,
    compile_interventions,
    forward,
    generate,
    prefill_inject,
)

Array = np.ndarray
Ids = Mapping[str, list[int]]

# --- prompts --------------------------------------------------------------------------------------------------

_CHAT = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n"
)
TEXTS: dict[str, str] = {
    "france": "The capital of France is",
    "italy": "The capital of Italy is",
    "one token": "The",
    "two tokens": "Once upon",
    "story": "Once upon a time, in a small village by the sea, there lived",
    "fact": "Water is made of two elements, hydrogen and",
    "induction": "Mr and Mrs Dursley, of number four, Privet Drive. Mr and Mrs Durs",
    "repetition": "one two three one two three one two three one two",
    "the same word": " the the the the the the the the the the the the the the the the",
    "arithmetic": "12 + 30 = 42\n7 + 5 = 12\n23 + 19 =",
    "digits": "3.14159265358979323846264338327950288419716939937510",
    "date": "On 2024-02-29T23:59:59Z the log said: 404 (0x194), retry in 15 s.",
    "python": 'def fibonacci(n: int) -> int:\n    """The n-th number."""\n    if n < 2:\n        return n\n    return',
    "json": '{"name": "Ada", "born": 1815, "fields": ["mathematics", "computing"], "living": false, "',
    "html": "<!DOCTYPE html>\n<html>\n\t<body class='main'>\n\t\t<p>Hello &amp; goodbye</p>\n",
    "shell": "$ find . -name '*.py' -print0 | xargs -0 wc -l | sort -rn | head -20\n",
    "french": "La révolution française a commencé en 1789, lorsque le peuple de Paris",
    "chinese": "北京是中华人民共和国的首都以及",
    "arabic": "القاهرة هي عاصمة جمهورية مصر العربية",
    "emoji": "I 💚 this 🏳️‍🌈 family 👩‍👩‍👧‍👦 and the flag 🇫🇷 of",
    "combining": "e\u0301 a\u0308 o\u0302 \u200d\u00a0\ufeff zero width and accents",
    "spaces": "   leading,   double   and trailing spaces\n\n\n\tand tabs\t  ",
    "shouting": "WARNING!!! DO NOT PRESS THE RED BUTTON!!! YOU HAVE BEEN",
    "mathematics": "Let $f(x) = \\int_0^x e^{-t^2} dt$. Then $f'(x) = \\frac{d}{dx}$",
    "chat": _CHAT,
    "donor": "Everyone who has been to school knows that the capital of Italy is",
}
RANDOM = "random ids"
LONG = "500 tokens"
GOLDEN = ("france", "story", "python", "chinese")
GREEDY = ("france", "story", "python", "fact", "chat", "induction")
STEPS = 60


def prompts(model: Model) -> dict[str, list[int]]:
    """Every text, 160 random ids (longer than a block of queries), and 500 tokens of everything."""
    ids = {name: list(model.encode(text)) for name, text in TEXTS.items()}
    ids[RANDOM] = np.random.default_rng(0).integers(0, model.config.d_vocab, 160).tolist()
    everything = list(model.encode("\n".join(TEXTS.values())))
    ids[LONG] = everything[:500]
    return ids


# --- interventions --------------------------------------------------------------------------------------------


class Numbers(Protocol):
    """Where vectors come from; the engine and the reference each bring their own."""

    def unembedding(self, token: int) -> Array: ...
    def rows(self, ids: list[int], point: str, layer: int) -> Array: ...


@dataclass(frozen=True)
class Difference:
    """W_U[plus] - W_U[minus]."""

    plus: int
    minus: int

    def of(self, numbers: Numbers, ids: Ids) -> Array:
        return numbers.unembedding(self.plus) - numbers.unembedding(self.minus)


@dataclass(frozen=True)
class Row:
    """One row of a point in the run of another prompt, or the mean of its rows (position None)."""

    prompt: str
    layer: int
    position: int | None
    point: str = "resid_post"

    def of(self, numbers: Numbers, ids: Ids) -> Array:
        rows = numbers.rows(ids[self.prompt], self.point, self.layer)
        return rows.mean(0) if self.position is None else rows[self.position]


@dataclass(frozen=True)
class Pool:
    """All rows of a point in the run of another prompt."""

    prompt: str
    layer: int
    point: str = "resid_post"

    def of(self, numbers: Numbers, ids: Ids) -> Array:
        return numbers.rows(ids[self.prompt], self.point, self.layer)


@dataclass(frozen=True)
class Change:
    """An `engine.Intervention` whose vector is still to be made; `pairs` are (row of the pool, position) of a patch."""

    kind: str
    layers: tuple[int, ...]
    point: str = "resid_post"
    positions: str | tuple[int, ...] = "all"
    heads: tuple[int, ...] | None = None
    value: float = 0.0
    vector: Difference | Row | Pool | None = None
    keys: tuple[int, ...] = ()
    neurons: tuple[int, ...] | None = None
    unit: str = "raw"
    seed: int = 0
    pairs: tuple[tuple[int, int], ...] = ()

    def rows(self, length: int) -> list[int]:
        """The rows it acts on in one pass over a prompt."""
        if self.pairs:
            return [to % length for _, to in self.pairs]
        if isinstance(self.positions, str):
            return list(range(length)) if self.positions == "all" else [length - 1]
        return [p % length for p in self.positions]


@dataclass(frozen=True)
class Case:
    """Some changes to the run of one prompt."""

    name: str
    prompt: str
    changes: tuple[Change, ...]
    golden: bool = False


def _case(name: str, kind: str, *layers: int, prompt: str = "france", golden: bool = False, **change: object) -> Case:
    return Case(name, prompt, (Change(kind, layers, **change),), golden)  # type: ignore[arg-type]


PARIS_LONDON = Difference(7042, 4528)
"""W_U[" Paris"] - W_U[" London"]: the ids in SmolLM2's vocabulary."""

CASES: tuple[Case, ...] = (
    _case("zero resid_post, some rows", "zero", 12, positions=(1, 3), golden=True),
    _case("zero resid_post, every row", "zero", 10),
    _case("zero attn_out of two layers", "zero", 0, 6, point="attn_out"),
    _case("zero mlp_out", "zero", 1, point="mlp_out", prompt="story"),
    _case("zero mlp_act, last row", "zero", 29, point="mlp_act", positions="last"),
    _case("zero k of one key-value head", "zero", 4, point="k", heads=(1,), prompt="python"),
    _case("zero z of one head", "zero", 3, point="z", heads=(4,), golden=True),
    _case("zero z of three heads, last row", "zero", 9, 20, point="z", heads=(0, 5, 8), positions="last"),
    _case("mean mlp_out", "mean", 3, point="mlp_out", vector=Row("italy", 3, None, "mlp_out"), golden=True),
    _case("scale attn_out", "scale", 5, point="attn_out", value=2.5, prompt="story", golden=True),
    _case("scale q of two heads", "scale", 7, 8, point="q", heads=(2, 7), value=3.0, prompt="python"),
    _case("scale v of one key-value head", "scale", 11, point="v", heads=(2,), value=-1.0),
    _case("steer, last row", "steer", 15, positions="last", value=4.0, vector=PARIS_LONDON, golden=True),
    _case("steer embed, all rows", "steer", 0, point="embed", value=0.2, vector=PARIS_LONDON, prompt="story"),
    _case("set_component", "set_component", 20, positions="last", value=9.0, vector=PARIS_LONDON, golden=True),
    _case("project_out", "project_out", 4, 18, vector=Row("italy", 18, 3), golden=True),
    _case("patch one row", "patch", 8, positions=(3,), vector=Row("italy", 8, 3), golden=True),
    _case("patch one row from another position", "patch", 14, positions=(-1,), vector=Row("donor", 14, 11)),
    Case(
        "patch every row",
        "france",
        tuple(Change("patch", (6,), "resid_post", (p,), vector=Row("italy", 6, p)) for p in range(5)),
    ),
    _case("patch pairs of rows", "patch", 8, vector=Pool("italy", 8), pairs=((3, 3), (1, -1))),
    _case("resample attn_out", "resample", 4, point="attn_out", vector=Pool("donor", 4, "attn_out"), golden=True),
    _case(
        "resample attn_proj, another seed",
        "resample",
        9,
        point="attn_proj",
        seed=3,
        prompt="story",
        vector=Pool("donor", 9, "attn_proj"),
    ),
    _case("steer by a unit vector", "steer", 15, value=40.0, unit="unit", vector=PARIS_LONDON, prompt="story"),
    _case("steer by the row's norm", "steer", 15, positions="last", value=0.4, unit="row", vector=PARIS_LONDON),
    _case("zero some neurons", "zero", 1, 28, point="mlp_act", neurons=tuple(range(0, 1536, 2))),
    _case(
        "knockout, last row to one key",
        "knockout",
        *range(10, 30),
        point="attn_pattern",
        positions="last",
        keys=(3,),
        golden=True,
    ),
    _case(
        "knockout, some heads and rows",
        "knockout",
        2,
        13,
        point="attn_pattern",
        positions=(2, 5, 6, 11),
        heads=(0, 3, 4),
        keys=(0, 2),
        prompt="story",
    ),
    Case(
        "zero, then steer, one layer",
        "france",
        (
            Change("zero", (16,), positions=(0, 4)),
            Change("steer", (16,), positions="last", value=3.0, vector=PARIS_LONDON),
        ),
    ),
)


class EngineNumbers:
    """Vectors from the engine."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def unembedding(self, token: int) -> Array:
        return self.model.unembedding_for(token)

    def rows(self, ids: list[int], point: str, layer: int) -> Array:
        record = RecordHook.for_layers([layer], points=[point])
        forward(self.model, ids, hook=record, logits_at="none")
        return record.get(point)[layer]


def edit_hook(model: Model, case: Case, ids: Ids) -> EditHook:
    """The engine's hook for a case."""
    numbers = EngineNumbers(model)
    made = [_intervention(c, None if c.vector is None else c.vector.of(numbers, ids)) for c in case.changes]
    return compile_interventions(model, made, len(ids[case.prompt]))


def _intervention(c: Change, vector: Array | None) -> Intervention:
    return Intervention(
        kind=c.kind,  # type: ignore[arg-type]
        layers=c.layers,
        point=c.point,
        positions=c.positions,  # type: ignore[arg-type]
        heads=c.heads,
        neurons=c.neurons,
        value=c.value,
        unit=c.unit,  # type: ignore[arg-type]
        vector=None if c.pairs else vector,
        rows=None if vector is None or not c.pairs else {to: vector[source] for source, to in c.pairs},
        keys=c.keys,
        seed=c.seed,
    )


def built_in(model: Model, case: Case, ids: Ids) -> list[EditHook] | None:
    """The built-in hooks that do what a case does, in its order; None where one of its changes has none."""
    made = [_built_in(c, None if c.vector is None else c.vector.of(EngineNumbers(model), ids)) for c in case.changes]
    hooks = [hook for hook in made if hook is not None]
    return hooks if len(hooks) == len(made) else None


def _built_in(c: Change, vector: Array | None) -> EditHook | None:
    scope: Any = c.positions
    if c.kind == "scale" and c.heads is None:
        return ScaleHook.for_layers(c.layers, c.value, c.point, scope)
    if c.point != "resid_post" or c.unit != "raw" or c.pairs:
        return None
    if c.kind == "zero":
        return ZeroAblateHook.for_layers(c.layers, scope)
    if c.kind == "steer" and vector is not None:
        return SteerHook().add(c.layers[0], vector, c.value, scope)
    if c.kind == "patch" and vector is not None:
        return PatchHook({(c.layers[0], position): vector for position in scope})
    return None


def ours(model: Model, case: Case | str, ids: Ids, hooks: Sequence[EditHook] | None = None) -> tuple[Array, Array]:
    """(s, d_vocab) logits and (layers, s, d_model) `resid_post` of a case, or of a prompt as it is. `hooks` do the
    case's work in place of its interventions.
    """
    record = RecordHook.for_layers(range(model.config.n_layers), points=["resid_post"])
    if isinstance(case, str):
        result = forward(model, ids[case], hook=record, logits_at="all")
    else:
        chosen = [edit_hook(model, case, ids)] if hooks is None else hooks
        result = forward(model, ids[case.prompt], hook=CompositeHook([*chosen, record]), logits_at="all")
        idle = [edit for hook in chosen for edit in hook.edits if not edit.fired]
        if idle:
            raise AssertionError(f"{case.name}: {idle} never fired")
    assert result.logits is not None
    return result.logits[0], np.stack(list(record.post_layer.values()))


# --- KV-cache surgery -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Transplant:
    """Rows [source) of the donor's cache go to `dest` of the recipient's, then the last token is decoded."""

    name: str
    recipient: str
    donor: str
    layers: tuple[int, ...]
    source: tuple[int, int]
    dest: int
    what: Literal["kv", "k", "v"] = "kv"
    rope: Literal["realign", "keep"] = "realign"
    heads: tuple[int, ...] | None = None
    golden: bool = False


ALL_LAYERS = tuple(range(30))
CONTINUATION = 6

TRANSPLANTS: tuple[Transplant, ...] = (
    Transplant("kv, same positions", "france", "italy", ALL_LAYERS, (0, 4), 0, golden=True),
    Transplant("kv, realigned to earlier positions", "france", "donor", ALL_LAYERS, (9, 12), 1, golden=True),
    Transplant("kv, kept rotation at earlier positions", "france", "donor", ALL_LAYERS, (9, 12), 1, rope="keep"),
    Transplant("kv, realigned to later positions", "donor", "france", ALL_LAYERS, (1, 4), 9),
    Transplant("v only, some layers", "france", "italy", tuple(range(5, 20)), (2, 4), 2, what="v"),
    Transplant("k only, two key-value heads", "donor", "story", tuple(range(2, 28)), (0, 9), 3, what="k", heads=(0, 2)),
)


def inject(model: Model, case: Transplant, ids: Ids, steps: int = CONTINUATION) -> tuple[Array, Generation]:
    """(d_vocab,) next-token logits after the surgery, and the continuation."""
    done = prefill_inject(
        model,
        ids[case.recipient],
        ids[case.donor],
        case.layers,
        case.source,
        case.dest,
        case.what,
        case.rope,
        case.heads,
        max_new_tokens=steps,
    )
    return done.injected, done.injected_text


def greedy(model: Model, ids: list[int], steps: int) -> list[int]:
    """The engine's greedy tokens; an end of text is one of them."""
    made = generate(model, ids, steps)
    return made.ids + list(model.tokenizer.eos[:1]) * (made.stopped == "end_of_text")
