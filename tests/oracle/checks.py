"""The comparisons: each function yields `Result`s for the report.

Bench             the engine's model, the two references, the ids, and the runs that several checks share
float64_is_real   the reference computes in float64 everywhere, shown against numpy
weights_are_equal, prompts_agree, greedy_agrees, interventions_agree, hooked_generation_agrees, transplants_agree
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from oracle.cases import (
    CASES,
    CONTINUATION,
    GOLDEN,
    GREEDY,
    PARIS_LONDON,
    STEPS,
    TRANSPLANTS,
    Change,
    EngineNumbers,
    Transplant,
    greedy,
    inject,
    ours,
    prompts,
)
from oracle.measure import CEILING, CONTROL, FACTOR, NOTHING, Measure, Result, distance, measure, row_errors
from oracle.reference import SITES, Array, Reference, Run, doubled

from engine import Model, RecordHook, forward

CLOSE_CALL = 2e-3
"""Greedy tokens are compared until the reference's top two logits are closer."""

LONGEST_RECORDED = 200
"""Longer prompts are compared at resid_post and in the logits only."""


@dataclass
class Bench:
    """`runs` are pairs (float32, float64) of the reference by prompt or case; `tokens` its greedy tokens by prompt."""

    model: Model
    single: Reference
    double: Reference
    ids: dict[str, list[int]]
    runs: dict[str, tuple[Run, Run]] = field(default_factory=dict)
    tokens: dict[str, list[int]] = field(default_factory=dict)
    injected: dict[str, tuple[Array, Array]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Model, reference: torch.nn.Module) -> "Bench":
        return cls(model, Reference(reference), Reference(doubled(reference)), prompts(model))


# --- the reference itself -----------------------------------------------------------------------------------------


def float64_is_real(double: Reference, ids: list[int]) -> Iterator[Result]:
    """Rotary angles, a norm, a softmax and the logits against float64 numpy; the control is the unpatched model."""
    for name, found, unpatched, expected in _float64_samples(double, ids):
        bits = 0.0 if found.dtype == np.float64 else np.inf
        error = float(np.abs(found - expected).max() / np.abs(expected).max())
        control = float(np.abs(unpatched - expected).max() / np.abs(expected).max())
        yield Result("the reference is float64", name, Measure(error + bits, 1e-11, expected.size), control)


def _float64_samples(double: Reference, ids: list[int]) -> Iterator[tuple[str, Array, Array, Array]]:
    model, config = double.model, double.model.config
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 4, config.hidden_size)))
    pos = torch.tensor([[0, 7, 499, 8000]])
    theta = config.rope_parameters["rope_theta"]
    inv_freq = theta ** (-np.arange(0, double.d_head, 2) / double.d_head)
    angles = np.concatenate([pos.numpy()[0][:, None] * inv_freq] * 2, -1)
    yield "rotary frequencies", model.model.rotary_emb.inv_freq.numpy(), inv_freq.astype(np.float32), inv_freq
    yield "cosines up to position 8000", *_both(double, lambda: model.model.rotary_emb(x, pos)[0][0]), np.cos(angles)
    norm, rows = model.model.norm, x.numpy()[0]
    scale = np.sqrt((rows**2).mean(-1, keepdims=True) + config.rms_norm_eps)
    yield "RMS norm", *_both(double, lambda: norm(x)[0]), rows / scale * norm.weight.detach().numpy()
    patched = double.run(ids, ("attn_pattern", "final_norm"))
    pattern = patched.points["attn_pattern", 0]
    yield "softmax rows sum to 1", pattern.sum(-1), pattern.astype(np.float32).sum(-1), np.ones(pattern.shape[:2])
    with torch.no_grad():
        whole = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].numpy()
    last = patched.points["final_norm", double.layers[-1]]
    yield "logits", patched.logits, whole, last @ model.lm_head.weight.detach().numpy().T


def _both(double: Reference, function) -> tuple[Array, Array]:
    with double.running():
        patched = function().numpy()
    with torch.no_grad():
        return patched, function().numpy()


def weights_are_equal(bench: Bench) -> Iterator[Result]:
    """Both loaders gave the same numbers, to the last bit."""
    theirs = dict(bench.single.model.named_parameters())
    params = bench.model.params
    different = int((params.embed != theirs["model.embed_tokens.weight"].detach().numpy()).sum())
    rows = params.embed.size
    parts = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj"}
    parts |= {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
    parts |= {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    for layer in bench.single.layers:
        for name, array in params.layer(layer).arrays():
            other = theirs[f"model.layers.{layer}.{parts[name]}.weight"].detach().numpy().T
            different += int((array != other).sum())
            rows += array.size
    yield Result("weights", "numbers that differ", Measure(different, 0.0, rows))


# --- unchanged runs -------------------------------------------------------------------------------------------


def prompts_agree(bench: Bench) -> Iterator[Result]:
    """Logits at every position and resid_post of every layer, prompt by prompt; then every other point."""
    kept = {*GOLDEN, *(case.prompt for case in CASES), *(t.recipient for t in TRANSPLANTS)}
    points = dict.fromkeys(SITES, NOTHING)
    for name, ids in bench.ids.items():
        recorded = SITES if len(ids) <= LONGEST_RECORDED else ("resid_post",)
        pair = bench.single.run(ids, recorded), bench.double.run(ids, recorded)
        if name in kept:
            bench.runs[name] = pair
        yield from agreement("prompts", f"{name} ({len(ids)})", ours(bench.model, name, bench.ids), pair)
        if recorded is SITES:
            for point, worst in _points(bench.model, ids, pair).items():
                points[point] |= worst
    for point, worst in points.items():
        yield Result("points", point, worst)


def agreement(
    group: str,
    name: str,
    found: tuple[Array, Array],
    pair: tuple[Run, Run],
    control: float | None = None,
    pooled: float = 0.0,
) -> Iterator[Result]:
    single, double = pair
    yield Result(group, f"{name}: logits", measure(found[0], single.logits, double.logits, pooled), control)
    worst = measure(found[1], single.resid_post, double.resid_post, pooled)
    yield Result(group, f"{name}: resid_post", worst, control)


def _points(model: Model, ids: list[int], pair: tuple[Run, Run]) -> dict[str, Measure]:
    record = RecordHook.for_layers(range(model.config.n_layers), points=SITES)
    forward(model, ids, hook=record)
    single, double = pair
    found = {point: np.stack(list(record.get(point).values())) for point in SITES}
    return {point: measure(found[point], single.stacked(point), double.stacked(point)) for point in SITES}


# --- generation -------------------------------------------------------------------------------------------------


def greedy_agrees(bench: Bench) -> Iterator[Result]:
    """The reference's greedy tokens, in one float64 pass over the engine's: they are the reference's own for as long
    as they agree.
    """
    for name in GREEDY:
        ids = bench.ids[name]
        made = greedy(bench.model, ids, STEPS)
        decided = _until_close(bench.double.call([*ids, *made[:-1]])[len(ids) - 1 :].numpy())
        agreed = next((i for i, (a, b) in enumerate(zip(made, decided, strict=False)) if a != b), len(decided))
        bench.tokens[name] = decided[: agreed + 1]
        yield _same_tokens("greedy tokens", name, made[: agreed + 1][: len(decided)], bench.tokens[name])


def _same_tokens(group: str, name: str, mine: list[int], theirs: list[int]) -> Result:
    wrong = sum(a != b for a, b in zip(mine, theirs, strict=False)) + abs(len(mine) - len(theirs))
    return Result(group, name, Measure(wrong, 0.0, len(theirs)))


def hooked_generation_agrees(bench: Bench) -> Iterator[Result]:
    """`generate_with_hooks` steers every row that emits a token; the reference does in one uncached pass."""
    ids, steps, layer, alpha = bench.ids["story"], 30, 15, 4.0
    vector = PARIS_LONDON.of(EngineNumbers(bench.model), bench.ids)
    _, made = bench.model.generate_with_hooks(ids, steps, steers=[(layer, vector, alpha)])
    rows = list(range(len(ids) - 1, len(ids) + len(made) - 1))
    change = Change("steer", (layer,), positions=tuple(rows), value=alpha, vector=PARIS_LONDON)
    run = bench.double.run([*ids, *made[:-1]], (), bench.double.hooks(change, bench.ids, len(ids) + len(made) - 1))
    steered = run.logits[len(ids) - 1 :]
    decided = _until_close(steered)
    result = _same_tokens("greedy tokens", "story, steered at every step", made[: len(decided)], decided)
    plain = bench.tokens["story"][: len(made)]
    yield result if made != plain else Result(result.group, result.name, Measure(np.inf, 0.0), note="did nothing")


def _until_close(logits: Array) -> list[int]:
    """The best token of each row, up to the first close call."""
    second, first = np.partition(logits, -2, axis=-1)[:, -2:].T
    close = np.flatnonzero(first - second < CLOSE_CALL)
    return logits.argmax(-1)[: close[0] if len(close) else None].tolist()


# --- interventions ----------------------------------------------------------------------------------------------


def interventions_agree(bench: Bench) -> Iterator[Result]:
    """Every case against torch hooks; its control is the reference's own distance from the unchanged run."""
    for case in CASES:
        bench.runs[case.name] = bench.single.changed(case, bench.ids), bench.double.changed(case, bench.ids)
    torch32 = (row_errors(*(run.resid_post for run in bench.runs[case.name])).max() for case in CASES)
    anchor = min(CEILING, FACTOR * max(torch32))
    for case in CASES:
        pair = bench.runs[case.name]
        control = distance(pair[1].logits[-1], bench.runs[case.prompt][1].logits[-1])
        found = ours(bench.model, case, bench.ids)
        yield from agreement("interventions", case.name, found, pair, control, min(anchor, control / CONTROL))
    yield from _named_methods_agree(bench)


def _named_methods_agree(bench: Bench) -> Iterator[Result]:
    """forward_ablate, forward_steer and patch_activations: last-token residuals of three layers."""
    model, ids, layers = bench.model, bench.ids, [18, 25, 29]
    prompt, vector = ids["france"], PARIS_LONDON.of(EngineNumbers(model), ids)
    found = {
        "zero resid_post, every row": model.forward_ablate(prompt, [10], layers),
        "steer, last row": model.forward_steer(prompt, [(15, vector, 4.0)], layers),
        "patch one row": model.patch_activations(ids["italy"], prompt, [(8, 3)], layers),
    }
    for name, residuals in found.items():
        single, double = (run.resid_post for run in bench.runs[name])
        mine = double.copy()
        mine[layers, -1] = list(residuals.values())
        control = distance(double[layers, -1], bench.runs["france"][1].resid_post[layers, -1])
        worst = measure(mine, single, double)
        note = Measure(worst.error, worst.allowed, len(residuals))
        yield Result("interventions", f"{name}: by its method of Model", note, control)


# --- caches -----------------------------------------------------------------------------------------------------


def transplants_agree(bench: Bench) -> Iterator[Result]:
    """Next-token logits and continuation after cache surgery; the control is the run without it."""
    for case in TRANSPLANTS:
        logits, continued = inject(bench.model, case, bench.ids)
        pair, decided = _reference_surgery(bench, case)
        bench.injected[case.name] = pair
        bench.tokens[case.name] = decided
        baseline = bench.runs[case.recipient][1].logits[-1]
        worst = measure(logits[None], pair[0][None], pair[1][None])
        yield Result("KV transplants", f"{case.name}: logits", worst, distance(pair[1], baseline))
        yield _same_tokens("KV transplants", f"{case.name}: tokens", continued.ids[: len(decided)], decided)


def _reference_surgery(bench: Bench, case: Transplant) -> tuple[tuple[Array, Array], list[int]]:
    token = bench.ids[case.recipient][-1]
    single, _, _ = bench.single.decoded(bench.single.transplanted(case, bench.ids), token, 1)
    double, made, gaps = bench.double.decoded(bench.double.transplanted(case, bench.ids), token, CONTINUATION)
    close = [i for i, gap in enumerate(gaps) if gap < CLOSE_CALL]
    return (single, double), made[: close[0] if close else None]
