"""What every row of `tests/families.py` is compared on, as data, and the engine's side of it. Needs no torch.

LENGTHS, prompts   prompts of random ids
CASES, cases       each kind of intervention, each point, each built-in hook, on the short prompt
TRANSPLANTS, transplants    KV-cache surgery on the short prompt
Kept, kept         the rows that the golden file holds: `ours` are the engine's
"""

from collections.abc import Iterator

import numpy as np
from declared import has, moves
from oracle.cases import Case, Change, Pool, Row, Transplant, inject, ours

from engine import POINTS, Model, RecordHook, forward

Array = np.ndarray

LENGTHS = {"short": 24, "donor": 24, "long": 100, "middle": 60}
"""Longer than the windows (4 tokens); longrope and dynamic change their frequencies after 64 tokens."""

KEPT = {"short": (1, 7, 15, 23), "long": (63, 64, 80, 99)}
"""Positions of the golden logits."""

KEPT_POINTS, KEPT_CASES, STRIDE = 99, (7, 22, 23), 8
"""Points: the row at this position of the long prompt. Cases: every 8th logit at these positions."""


def prompts() -> dict[str, list[int]]:
    rng = np.random.default_rng(1)
    return {name: rng.integers(0, 256, length).tolist() for name, length in LENGTHS.items()}


# --- interventions --------------------------------------------------------------------------------------------


def _case(name: str, kind: str, *layers: int, **change: object) -> Case:
    return Case(name, "short", (Change(kind, layers, **change),))  # type: ignore[arg-type]


_ZERO = Change("zero", (1,), positions=(5, -2))
_STEER = Change("steer", (1,), positions="all", value=0.5, vector=Row("donor", 1, 4))

CASES: tuple[Case, ...] = (
    Case("zero two rows", "short", (_ZERO,)),
    Case("steer", "short", (Change("steer", (2,), positions="last", value=0.5, vector=Row("donor", 2, 4)),)),
    Case("patch one row", "short", (Change("patch", (1,), positions=(-2,), vector=Row("donor", 1, -2)),)),
    _case("scale attn_out of two layers", "scale", 0, 3, point="attn_out", value=2.5),
    Case("zero, then steer", "short", (_ZERO, _STEER)),
    Case("steer, then zero", "short", (_STEER, _ZERO)),
    _case("zero z of one head", "zero", 2, point="z", heads=(1,)),
    _case("mean mlp_out", "mean", 3, point="mlp_out", vector=Row("donor", 3, None, "mlp_out")),
    _case("scale q of two heads", "scale", 1, 2, point="q", heads=(0, 3), value=3.0),
    _case("zero k of one key-value head", "zero", 2, point="k", heads=(0,)),
    _case("scale v of one key-value head", "scale", 1, point="v", heads=(1,), value=-1.0),
    _case("steer embed", "steer", 0, point="embed", value=0.7, vector=Row("donor", 0, 3, "embed")),
    _case("set_component of resid_mid", "set_component", 2, point="resid_mid", value=6.0, vector=Row("donor", 2, 7)),
    _case("project_out of resid_pre", "project_out", 1, 3, point="resid_pre", vector=Row("donor", 2, 9)),
    _case("patch attn_proj, last row", "patch", 3, point="attn_proj", positions="last",
          vector=Row("donor", 3, 5, "attn_proj")),
    _case("steer mlp_act", "steer", 1, point="mlp_act", value=1.5, vector=Row("donor", 1, 8, "mlp_act")),
    _case("scale mlp_proj, two rows", "scale", 2, point="mlp_proj", positions=(-1, 21), value=-2.0),
    _case("project_out of final_norm", "project_out", 3, point="final_norm", vector=Row("donor", 3, 2, "final_norm")),
    Case("patch pairs of rows", "short", (Change("patch", (2,), vector=Pool("donor", 2), pairs=((4, 22), (9, -1))),)),
    _case("resample attn_out", "resample", 2, point="attn_out", seed=1, vector=Pool("donor", 2, "attn_out")),
    _case("steer by a unit vector", "steer", 1, value=4.0, unit="unit", vector=Row("donor", 1, 6)),
    _case("steer by the row's norm", "steer", 2, positions="last", value=0.8, unit="row", vector=Row("donor", 2, 3)),
    _case("zero every other neuron", "zero", 2, point="mlp_act", neurons=tuple(range(0, 80, 2))),
    _case("knockout of two keys", "knockout", 1, 2, 3, point="attn_pattern", positions=(22, 23), keys=(21, 22)),
    _case("knockout in two heads", "knockout", 1, 2, 3, point="attn_pattern", heads=(0, 2), positions="last",
          keys=(20, 22, 23)),
)  # fmt: skip
"""Layers, heads and positions that every row has; windows of 4 tokens still see the keys."""


def cases(model: Model) -> list[Case]:
    """Those at points that the model's blocks have."""
    return [case for case in CASES if all(has(model, change.point) for change in case.changes)]


# --- KV-cache surgery -----------------------------------------------------------------------------------------

_LAYERS = (0, 1, 2, 3)

TRANSPLANTS: tuple[Transplant, ...] = (
    Transplant("kv, same positions", "short", "donor", _LAYERS, (12, 23), 12),
    Transplant("k of one head, two layers", "short", "donor", (1, 3), (17, 23), 17, what="k", heads=(1,)),
    Transplant("v, one layer", "short", "donor", (2,), (17, 23), 17, what="v"),
    Transplant("kv, realigned to later positions", "short", "donor", _LAYERS, (5, 12), 16),
    Transplant("kv, realigned to earlier positions", "short", "middle", (0, 1, 2), (48, 55), 16),
    Transplant("kv, kept rotation at later positions", "short", "donor", _LAYERS, (5, 12), 16, rope="keep"),
)
"""The rows end inside the last token's window."""


def transplants(model: Model) -> list[Transplant]:
    """Those that the model can do: learned positions do not move."""
    return [case for case in TRANSPLANTS if case.source[0] == case.dest or moves(model)]


# --- what the golden file keeps -------------------------------------------------------------------------------


def point_row(name: str, at_layers: Array) -> Array:
    """(layers, [heads,] width): the kept row of a point that was recorded at all its layers, without a batch axis."""
    return np.take(at_layers, KEPT_POINTS, POINTS[name].seq_axis)


def unchanged(model: Model) -> Iterator[tuple[str, Array]]:
    """The engine's (name, array) of every golden array of a row that needs no intervention."""
    ids = prompts()
    for prompt, positions in KEPT.items():
        names = [name for name in POINTS if has(model, name)] if prompt == "long" else []
        record = RecordHook.for_layers(range(model.config.n_layers), points=names)
        logits = forward(model, ids[prompt], hook=record, logits_at=positions).logits
        assert logits is not None
        yield f"{prompt}/logits", logits[0]
        for name in names:
            yield f"points/{name}", point_row(name, np.stack(list(record.get(name).values())))


def changed(model: Model, case: Case) -> Array:
    """(positions, logits / STRIDE) of a case."""
    return ours(model, case, prompts())[0][list(KEPT_CASES), ::STRIDE]


def injected(model: Model, case: Transplant) -> Array:
    """(1, logits / STRIDE) after the surgery."""
    return inject(model, case, prompts(), 1)[0][None, ::STRIDE]
