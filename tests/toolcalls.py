"""Arguments for fuzzing tools: hypothesis strategies made from what tools/list says.

calls       a tool's arguments: mostly sound, some of them spoiled, some from its input schema alone, some of nothing
sound       built from the names of arguments, whose meaning is the same in every tool
spoiled     sound arguments with a few places changed, at any depth
JUNK        values that nothing takes

A handle is drawn as a slot, `<act>`, which `filled` replaces by a real one: handles are random, the calls must not be.
"""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from hypothesis import strategies as st
from hypothesis_jsonschema import from_schema

Arguments = dict[str, Any]
Strategy = st.SearchStrategy[Any]

CAPTURED = [
    "embed", "resid_pre", "q", "k", "v", "attn_pattern", "z", "attn_proj", "attn_out", "resid_mid", "mlp_act",
    "mlp_proj", "mlp_out", "final_norm",
]  # fmt: skip
"""Every point of the synthetic model's but `resid_post`, which the slot `act` has."""

CAPTURES = ("act", *CAPTURED, "several")
SLOTS = (*CAPTURES, "grid", "kv", "vec", "run", "model")
STALE = ["act:gone-00", "kv:gone-00", "vec:gone-00", "run:gone-00", "model:gone-00", "act:", "act", ":", "<gone>"]
LENGTH, LAYERS, WIDTH, VOCABULARY = 8, 4, 64, 257
TEXTS = ["The cat.", "A  dog!\n", "abcabcab", "abdabdab", "12345678", "\x00\x7f\t<|>[]", "naïve c", "日本.."]
"""Each is `LENGTH` tokens of the synthetic model, one per byte."""


def filled(value: Any, handles: Mapping[str, str]) -> Any:
    """The value with every slot replaced by its handle."""
    if isinstance(value, list):
        return [filled(item, handles) for item in value]
    if isinstance(value, dict):
        return {key: filled(item, handles) for key, item in value.items()}
    return handles.get(value[1:-1], value) if isinstance(value, str) and value[:1] == "<" else value


# --- sound arguments, by name -----------------------------------------------------------------------------


def _lists(items: Strategy, most: int = 3, least: int = 1) -> Strategy:
    return st.lists(items, min_size=least, max_size=most)


def _slot(*names: str) -> Strategy:
    return st.sampled_from([f"<{name}>" for name in names])


def _with(**fields: Strategy) -> Strategy:
    """A dict; fields whose name ends in _ may be missing."""
    needed = {name: field for name, field in fields.items() if not name.endswith("_")}
    return st.fixed_dictionaries(needed, optional={k[:-1]: v for k, v in fields.items() if k.endswith("_")})


LAYER = st.integers(-LAYERS, LAYERS - 1)
POSITION = st.integers(-LENGTH, LENGTH - 1)
PROMPT = st.sampled_from(TEXTS) | _lists(st.integers(0, VOCABULARY - 1), LENGTH, LENGTH)
TOKEN = st.sampled_from("abc .T1") | st.integers(0, VOCABULARY - 1)
NUMBER = st.floats(-100, 100, width=32) | st.sampled_from([0, 1, -1, 1e-30, 1e14, 3e38])
LAYERS_OF = _lists(LAYER) | st.sampled_from(["all", "1:", "::2", "-2:"])
MATCH = st.sampled_from(["position", "pooled"])
PLACES = st.sampled_from(["last", "all"]) | _lists(POSITION)
PLAIN_VECTOR = st.one_of(
    _with(handle=_slot("act", "act", *CAPTURES), layer=LAYER, position=POSITION, point_=st.sampled_from(CAPTURED)),
    _with(handle=_slot("act"), layer=LAYER, position=POSITION),
    _with(handle=_slot("vec")),
    _with(token=TOKEN, space=st.sampled_from(["embed", "unembed"])),
    st.sampled_from([0.5, -2, 0, 1e14]).map(lambda x: {"values": [x, *[1.0] * (WIDTH - 1)]}),
    _with(random_seed=st.integers(0, 2**63)),
    _with(random_seed=st.integers(0, 9), norm_of=st.just("row") | _with(token=TOKEN, space=st.just("embed"))),
)
VECTOR = PLAIN_VECTOR | _with(minus=_lists(PLAIN_VECTOR, 2, 2))
WIDE = st.sampled_from(["embed", "resid_pre", "attn_proj", "attn_out", "resid_mid", "mlp_out", "resid_post"])
PAIR = st.tuples(LAYER, st.integers(0, 1)).map(list)
BY_HEAD = st.sampled_from(["q", "k", "v", "z"])


def _change(kind: str, **fields: Strategy) -> Strategy:
    return _with(kind=st.just(kind), layers=LAYERS_OF, **fields)


INTERVENTION = st.one_of(
    _change("zero", point_=WIDE, positions_=PLACES),
    _change("zero", point=BY_HEAD, heads=_lists(st.integers(0, 1), 2)),
    _with(kind=st.just("zero"), point=BY_HEAD, heads=_lists(PAIR, 2)),
    _change("zero", point=st.just("mlp_act"), neurons=_lists(st.integers(-160, 159))),
    _change("mean", over=_lists(PROMPT), point_=WIDE, match_=MATCH),
    _change("resample", over=_lists(PROMPT), point_=WIDE, seed_=st.integers(0, 2**64), match_=MATCH),
    _change("scale", value=NUMBER, point_=WIDE, positions_=PLACES),
    _change("steer", vector=VECTOR, value=NUMBER, unit_=st.sampled_from(["raw", "unit", "row"])),
    _change("set_component", vector=VECTOR, value=NUMBER),
    _change("project_out", vector=VECTOR),
    _change("patch", donor=PROMPT, pairs_=_lists(st.tuples(POSITION, POSITION).map(list))),
    _change("patch", donor=PROMPT, positions=PLACES),
    _change("knockout", keys=_lists(POSITION), heads_=_lists(st.integers(0, 3), 2)),
)

NAMES: dict[str, Strategy] = {
    **dict.fromkeys(("prompt", "recipient", "donor", "clean", "corrupt"), PROMPT),
    **dict.fromkeys(("a", "b"), PROMPT | PROMPT | _slot(*CAPTURES)),
    **dict.fromkeys(("token", "against", "target"), TOKEN),
    **dict.fromkeys(("layers", "ablate_layers"), LAYERS_OF),
    "text": st.sampled_from(TEXTS) | st.text(st.characters(codec="utf-8"), min_size=1, max_size=20),
    "tokens": st.lists(TOKEN, min_size=2, max_size=4, unique_by=lambda t: ord(t) if isinstance(t, str) else t),
    "positions": PLACES,
    "position": POSITION,
    "points": st.sampled_from([["embed"], ["final_norm"]]) | _lists(st.sampled_from(["resid_post", *CAPTURED]), 2),
    "heads": st.one_of(*[_lists(st.integers(0, 1), 2)] * 4, _lists(PAIR, 2)),  # layers beside pairs are mostly refused
    "chat": st.booleans() | st.sampled_from(TEXTS),
    "k": st.integers(1, 12),
    "vector": VECTOR,
    "steers": _lists(_with(layer=LAYER, vector=VECTOR, alpha=NUMBER)),
    "interventions": _lists(INTERVENTION),
    "targets": _lists(_with(layer=LAYER, position=POSITION)),
    "max_new_tokens": st.integers(1, 4),
    "mean_over": _lists(PROMPT),
    "match": MATCH,
    "handle": _slot(*CAPTURES, "grid", "kv", "vec"),
    "cache": _slot("kv"),
    "model": st.sampled_from(["<model>", "synthetic", None]),
    "source": st.tuples(st.integers(0, 3), st.integers(4, LENGTH - 1)).map(list),
    "dest": st.integers(0, 3),
    "start": st.integers(0, 500),
    "run": _slot("run"),
    "wait_seconds": st.floats(0, 0.05),
}
"""What an argument of this name means in every tool."""

OWN: dict[tuple[str, str], Strategy] = {
    ("load_model", "model"): st.sampled_from(["synthetic", "synthetic:induction"]),
    ("logit_lens", "tensor"): _slot("act", "act", "act", *CAPTURES),
    ("read_tensor", "tensor"): st.sampled_from(["resid_post.0", "resid_post.3", "embed.0", "q.1", "grid", "vector"]),
    ("causal_trace", "positions"): _lists(POSITION),
    ("release", "handle"): _slot(*SLOTS),
    ("start_job", "tool"): st.sampled_from(["logit_lens", "capture_residuals", "attention_pattern"]),
    ("start_job", "arguments"): _with(prompt=PROMPT, layers_=LAYERS_OF),
}
"""Where a name means something else in one tool."""

APART: dict[str, tuple[tuple[str, ...], ...]] = {
    "load_model": (("model", "weights"), ("model", "dense_layers")),
    "logit_lens": (("prompt",), ("tensor", "layers")),
    "embedding_neighbors": (("token", "k"), ("vector", "k")),
    "project_through_unembed": (("token", "k"), ("vector", "k")),
    "forward_ablate": (
        ("layers", "positions", "interventions", "token", "against"),
        ("layers", "mode", "mean_over", "match", "token"),
        ("interventions",),
    ),
    "forward_steer": (("steers", "interventions", "token", "against"), ("interventions", "token")),
    "causal_trace": (("token", "layers", "positions", "k", "point"), ("token", "against", "metric"), ("token", "by")),
    "compare": (("layers", "position"),),
    "attention_pattern": (("layers", "positions", "k", "heads", "chat"),) * 3 + (("heads", "positions", "k"),),
}
"""Arguments that go together, where not all of them do; the first of each is always given."""


MADE = st.just("<made>")
ASKED_OF_ANY = {"read_tensor": _with(handle=MADE, start_=st.integers(0, 9)), "release": _with(handle=MADE)}
FOLLOWED: dict[str, tuple[Arguments, dict[str, Strategy]]] = {
    "capture_residuals": (
        {},
        {
            "logit_lens": _with(tensor=MADE, layers_=LAYERS_OF, positions_=PLACES),
            "compare": _with(a=MADE, b=MADE | PROMPT),
            "project_through_unembed": _with(vector=_with(handle=MADE, layer_=LAYER, position_=POSITION)),
            **ASKED_OF_ANY,
        },
    ),
    "causal_trace": ({"metric": "kl", "token": None, "against": None}, ASKED_OF_ANY),
    "prefill_inject": (
        {"keep": True},
        {"generate_with_hooks": _with(prompt=PROMPT, cache=MADE, max_new_tokens=st.just(2)), **ASKED_OF_ANY},
    ),
    "start_job": (
        {"dry_run": False},
        {"get_job": _with(run=MADE), "cancel_job": _with(run=MADE), **ASKED_OF_ANY},
    ),
}
"""tool that makes a handle -> arguments with which it does, and what the next calls are asked about `<made>`"""


@st.composite
def sound(draw: st.DrawFn, tool: str, schema: Arguments) -> Arguments:
    """Arguments that should often be taken: what is required, and some of the rest."""
    properties, required = schema["properties"], schema.get("required", [])
    together = draw(st.sampled_from(APART[tool])) if tool in APART else tuple(properties)
    given = [*required, *(together[:1] if tool in APART else ())]
    given += [name for name in together if name not in given and draw(st.integers(0, 3)) == 0]
    return {name: draw(_argument(tool, name, schema)) for name in dict.fromkeys(given)}


def _argument(tool: str, name: str, schema: Arguments) -> Strategy:
    known = OWN.get((tool, name), NAMES.get(name))
    return from_schema(schema["properties"][name] | {"$defs": schema.get("$defs", {})}) if known is None else known


# --- what nothing takes -----------------------------------------------------------------------------------


def _nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


JUNK: Strategy = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 2**31, -(2**31) - 1, 2**63, 2**64, -(2**63) - 1, 10**30, 10**400]),
    st.sampled_from([0.5, -0.0, 1e308, -1e308, 5e-324, float("nan"), float("inf"), float("-inf")]),
    st.sampled_from(["", " ", "NaN", "Infinity", "1", "true", "null", "\x00", "\ud800", "a\udfffb", "x" * 5000, "{}"]),
    st.sampled_from(STALE) | _slot(*SLOTS),
    st.sampled_from(["::0", ":::", "1:2:3:4", "all:", "9" * 30 + ":", "../..", "synthetic:", "~", "/dev/zero", "a/b"]),
    st.sampled_from([[], {}, [[]], [{}], [None], [float("nan")], {"x": 1}, {"": {}}]).map(copy.deepcopy),
    st.sampled_from([[0] * 2000, ["a"] * 60, {str(i): i for i in range(300)}]).map(copy.copy),
    st.sampled_from([50, 100]).map(_nested),  # the client itself sends no more than 255 levels
)
KEYS = st.sampled_from(
    ["extra", "", "model ", "Prompt", "__proto__", "\u202e\x1b[31m", "x" * 300, "0", "call", "ctx", "self"]
)


@st.composite
def spoiled(draw: st.DrawFn, tool: str, schema: Arguments) -> Arguments:
    """Sound arguments with one to three places changed."""
    arguments = copy.deepcopy(draw(sound(tool, schema)))
    for _ in range(draw(st.integers(1, 3))):
        inside = draw(st.sampled_from(list(_containers(arguments))))
        _spoil(draw, inside)
    return arguments


def _containers(value: Any) -> Iterator[Any]:
    """Every dict and list in a value, itself included."""
    if isinstance(value, dict | list):
        yield value
        for item in value.values() if isinstance(value, dict) else value[:20]:
            yield from _containers(item)


def _spoil(draw: st.DrawFn, inside: Any) -> None:
    if isinstance(inside, dict) and draw(st.booleans()):
        inside[draw(KEYS)] = draw(JUNK)
    elif not inside:
        return
    else:
        key = draw(st.sampled_from(list(inside) if isinstance(inside, dict) else range(len(inside))))
        if draw(st.integers(0, 4)) == 0:
            del inside[key]
        else:
            inside[key] = draw(JUNK)


@st.composite
def calls(draw: st.DrawFn, tool: str, schema: Arguments) -> Arguments:
    draw(st.integers(0, 2**32))  # hypothesis never repeats an example: of tools with few arguments none would be left
    kind = draw(st.sampled_from(["sound"] * 10 + ["spoiled"] * 6 + ["schema"] * 3 + ["wild"]))
    if kind == "schema":
        return draw(from_schema(schema))
    if kind == "wild":
        return draw(st.dictionaries(KEYS | st.sampled_from(sorted(schema["properties"]) or ["x"]), JUNK, max_size=4))
    return draw((sound if kind == "sound" else spoiled)(tool, schema))
