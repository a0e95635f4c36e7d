"""One forward pass with something changed: forward_ablate, forward_steer, patch_activations."""

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from engine import Intervention, Model, capture_donor_state, compile_interventions, forward, replacements
from engine.cost import Cost, of_pass
from engine.distribution import kl_divergence, softmax_of
from engine.edits import Edit, Scope
from engine.errors import InputError
from engine.lens import distributions_cost
from engine.metrics import LEAST_GAP, Metric, MetricKind, recovered, saturating
from engine.ops import Array
from engine.patching import destinations, donor_places
from schemas.arguments import Heads, Layers, MatchName, ModelRef, PointRef, Prompt, Steer, Target, TokenRef
from schemas.arguments import Scope as ScopeArgument
from schemas.effects import Applied, Effect, LogitDifference, PatchEffect, TokenEffect
from schemas.interventions import FurtherInterventions
from server.call import Call, head_list, probabilities, token_id
from server.interventions import (
    Pairs,
    blank_ablation,
    blank_patch,
    described_cost,
    described_interventions,
    donor_rows_cost,
    named,
    planned_interventions,
    replacements_cost,
    scope,
    sources,
)
from server.lab import LoadedModel
from server.twins import tell_twins

SHOWN = 5

Asked = Annotated[TokenRef | None, Field(description="also report this one")]
Against = Annotated[TokenRef | None, Field(description="also report logit(token) - logit(against)")]


def forward_ablate(
    call: Call,
    prompt: Prompt,
    layers: Layers | None = None,
    point: PointRef = "resid_post",
    positions: ScopeArgument = "all",
    heads: Heads | None = None,
    mode: Literal["zero", "mean", "resample"] = "zero",
    mean_over: Annotated[
        list[Prompt] | None, Field(min_length=1, max_length=50, description="mean, resample: prompts")
    ] = None,
    match: MatchName | None = None,
    token: Asked = None,
    against: Against = None,
    interventions: FurtherInterventions = None,
    model: ModelRef = None,
) -> Effect:
    """Ablate a point of some layers and compare the next-token distribution with the baseline.

    zero sets rows to zero, mean to the average over other prompts, resample to rows drawn from them: best of as many
    tokens, the notice says how rows were matched. For what a part contributes use attn_out, mlp_out, or z with heads;
    zeroing resid_post erases all so far.
    """
    loaded = call.loaded(model)
    engine = loaded.model
    ids = call.ids(engine, prompt)
    own = layers is not None or heads is not None
    if not own and (mean_over or match or (point, positions, mode) != ("resid_post", "all", "zero")):
        raise InputError("say which layers, or which [layer, head] pairs in heads; interventions name their own")
    which = head_list(engine, layers, heads, point) if own else {}
    cost = _cost(call, engine, len(ids), interventions, point)
    if which and mode != "zero" and mean_over:
        cost = cost.beside(replacements_cost(call, engine, mean_over, list(which), point))
    at = (*named(which), point, scope(positions))
    made = _planned(call, engine, ids, at, mode, mean_over, match) if which else []
    _check(call, engine, len(ids), made, interventions, token, against)
    call.expect(engine, cost, len(ids))
    if which and mode != "zero":
        made = _replacements(call, engine, ids, at, mode, mean_over or (), match)
    effect = _compared(call, loaded, ids, made, interventions, token, against)
    if made and mode == "zero" and point == "resid_post" and positions == "all":
        effect.notice = joined(
            effect.notice,
            "the whole residual was zeroed: nothing is left for the layers after it, and a model without biases "
            "answers with the uniform distribution. To ask what a part contributes, use point attn_out, mlp_out or z",
        )
    return effect


At = tuple[tuple[int, ...], Pairs | None, str, Scope]
"""Layers, heads, a point and positions."""


def _planned(
    call: Call,
    model: Model,
    ids: list[int],
    at: At,
    mode: Literal["zero", "mean", "resample"],
    prompts: Sequence[Any] | None,
    match: MatchName | None,
) -> list[Intervention]:
    """The ablation; of a mean or resample without its rows, which take runs."""
    layers, heads, point, positions = at
    if mode == "zero":
        given = {"mean_over": prompts, "match": match}
        if idle := [name for name, value in given.items() if value is not None]:
            raise InputError(
                f"mode zero takes no {' and no '.join(idle)}: leave it out, or choose mode mean or resample"
            )
        return [Intervention("zero", layers, point, positions, heads)]
    if not prompts:
        raise InputError(f"mode {mode} needs mean_over, the prompts to take rows from")
    lengths = [len(call.ids(model, prompt)) for prompt in prompts]
    return [blank_ablation(model, mode, len(ids), at, lengths, match)]


def _replacements(
    call: Call,
    model: Model,
    ids: list[int],
    at: At,
    mode: Literal["mean", "resample"],
    prompts: Sequence[Any],
    match: MatchName | None,
) -> list[Intervention]:
    layers, heads, point, positions = at
    over = [call.ids(model, prompt) for prompt in prompts]
    how = match or "position"
    return replacements(
        model, len(ids), mode, over, layers, point, positions=positions, heads=heads, match=how, tick=call.tick
    )


def _check(
    call: Call,
    model: Model,
    length: int,
    planned: Sequence[Intervention],
    described: FurtherInterventions,
    token: str | int | None,
    against: str | int | None,
) -> None:
    """Refuse before anything runs what a run would refuse: tokens, and interventions that cannot act or are erased."""
    asked_metric(model, token, against)
    if not (made := [*planned, *planned_interventions(call, model, described, length)]):
        raise InputError("nothing would be changed: give the tool's own arguments, or interventions")
    compile_interventions(model, made, length)


def forward_steer(
    call: Call,
    prompt: Prompt,
    steers: Annotated[list[Steer] | None, Field(min_length=1, max_length=64)] = None,
    positions: ScopeArgument = "last",
    token: Asked = None,
    against: Against = None,
    interventions: FurtherInterventions = None,
    model: ModelRef = None,
) -> Effect:
    """Add alpha * vector to resid_post of layers and compare the next-token distribution with the baseline.

    alpha is raw: it multiplies the vector as it is, no normalisation. For text use generate_with_hooks.
    """
    loaded = call.loaded(model)
    ids = call.ids(loaded.model, prompt)
    if not steers and positions != "last":
        raise InputError("positions are those of steers, which are missing; interventions name their own")
    made = steering(call, loaded.model, steers or (), scope(positions))
    _check(call, loaded.model, len(ids), made, interventions, token, against)
    call.expect(loaded.model, _cost(call, loaded.model, len(ids), interventions), len(ids))
    return _compared(call, loaded, ids, made, interventions, token, against)


def steering(call: Call, model: Model, steers: Sequence[Steer], positions: Scope) -> list[Intervention]:
    """Steer arguments as interventions."""
    made = []
    for steer in steers:
        vector, unit = call.step(model, steer.vector)
        at = (steer.layer,)
        made.append(Intervention("steer", at, positions=positions, vector=vector, value=steer.alpha, unit=unit))
    return made


def patch_activations(
    call: Call,
    donor: Prompt,
    recipient: Prompt,
    targets: Annotated[list[Target], Field(min_length=1, max_length=1000)],
    point: PointRef = "resid_post",
    token: Asked = None,
    against: Against = None,
    interventions: FurtherInterventions = None,
    model: ModelRef = None,
) -> PatchEffect:
    """Write the donor's rows at (layer, position) into the recipient's run: does the answer move to the donor's?

    With token, the donor's answer, it says how much is recovered. For a grid of layers and positions use causal_trace.
    """
    loaded = call.loaded(model)
    engine = loaded.model
    ids, donor_ids = call.ids(engine, recipient), call.ids(engine, donor)
    moves = destinations(_pair(engine, target, len(donor_ids), len(ids)) for target in targets)
    pairs = [(layer, source, dest) for (layer, dest), source in moves.items()]
    layers = list({layer for layer, _, _ in pairs})
    held = donor_rows_cost(engine.config, len(donor_ids), point, layers, len({source for _, source, _ in pairs}))
    donors = of_pass(engine.config, len(donor_ids), max(layers) + 1) + of_pass(engine.config, len(donor_ids))
    passes = donors + _cost(call, engine, len(ids), interventions, point)
    donor_places(engine, len(donor_ids), [(layer, source) for layer, source, _ in pairs], point)
    planned = [blank_patch(engine, (i,), point, [to for layer, _, to in pairs if layer == i]) for i in layers]
    _check(call, engine, len(ids), planned, interventions, token, against)
    call.expect(engine, passes.beside(held), len(ids))
    state = capture_donor_state(engine, donor_ids, {(layer, source) for layer, source, _ in pairs}, point, call.tick)
    rows = {layer: {to: state.rows[i, source] for i, source, to in pairs if i == layer} for layer, _, _ in pairs}
    made = [Intervention("patch", (layer,), point, rows=by_position) for layer, by_position in rows.items()]
    donor_logits = forward(engine, donor_ids, tick=call.tick).logits
    assert donor_logits is not None
    effect = _compared(call, loaded, ids, made, interventions, token, against, donor_logits[0, -1])
    part, told = _recovered(effect, asked_metric(engine, token, against), donor_logits[0, -1])
    effect.notice = joined(effect.notice, _pairing(engine, targets, donor_ids, ids), told)
    return PatchEffect(
        **{name: getattr(effect, name) for name in type(effect).model_fields},
        donor=probabilities(engine, donor_logits[0, -1], SHOWN),
        recovered=part,
    )


def _cost(call: Call, model: Model, length: int, interventions: FurtherInterventions, point: str | None = None) -> Cost:
    """Of the runs without and with interventions, and of what those need; the tool changes `point` itself."""
    runs = (of_pass(model.config, length) * 2).beside(distributions_cost(model, 2))
    return runs.beside(described_cost(call, model, interventions, length, point))


def _pair(model: Model, target: Target, donor_length: int, length: int) -> tuple[int, int, int]:
    """(layer, donor position, recipient position), resolved."""
    source = target.position if target.donor_position is None else target.donor_position
    dest = target.position if target.recipient_position is None else target.recipient_position
    both = target.donor_position is not None and target.recipient_position is not None
    if source is None or dest is None or (both and target.position is not None):
        raise InputError(
            "a target is {layer, position}, or {layer, donor_position, recipient_position} when they differ"
        )
    layer = model.resolve_layer(target.layer)
    return layer, model.resolve_position(source, donor_length), model.resolve_position(dest, length)


def _pairing(model: Model, targets: Sequence[Target], donor: list[int], recipient: list[int]) -> str | None:
    """What the first target pairs that says `position`, when the prompts are of different lengths."""
    said = (target for target in targets if target.position is not None and target.position >= 0)
    if len(donor) == len(recipient) or (first := next(said, None)) is None:
        return None
    _, source, dest = _pair(model, first, len(donor), len(recipient))
    here, there = (repr(model.tokenizer.piece(i)) for i in (donor[source], recipient[dest]))
    other = "" if source == dest else f"position {dest} is "
    return (
        f"the prompts have {len(donor)} and {len(recipient)} tokens: position {source} is {here} in the donor and "
        f"{other}{there} in the recipient; donor_position and recipient_position pair others"
    )


def asked_metric(model: Model, token: str | int | None, against: str | int | None) -> Metric | None:
    """What `recovered` is of: the token's probability, or the logit difference; raises `InputError` for half of it."""
    if against is not None and token is None:
        raise InputError("against needs token: logit(token) - logit(against) is reported")
    if token is None:
        return None
    if against is None:
        return Metric("probability", token_id(model, token))
    return Metric("logit_difference", token_id(model, token), token_id(model, against))


def _recovered(effect: Effect, metric: Metric | None, donor: Array) -> tuple[float | None, str | None]:
    """How much of the way to the donor, and what must be said of it."""
    if metric is None or effect.token is None:
        return None, None
    asked, difference = effect.token, effect.logit_difference
    value, baseline = (
        (asked.probability, asked.baseline_probability)
        if difference is None
        else (difference.effect, difference.baseline)
    )
    theirs = float(metric(donor[None], donor)[0])
    part = recovered(metric.kind, value, baseline, theirs)
    return part, recovered_notice(metric.kind, [part], baseline, theirs)


def recovered_notice(kind: MetricKind, parts: Iterable[float | None], baseline: float, donor: float) -> str | None:
    """What a reader of `recovered` must know where it is null, above 1 or below 0; a twentieth is no matter."""
    if abs(donor - baseline) < LEAST_GAP[kind]:
        return (
            f"recovered is null: the {kind} is {baseline:.6g} before and {donor:.6g} in the donor, closer than "
            f"{LEAST_GAP[kind]}"
        )
    told = [part for part in parts if part is not None]
    over = ["above 1 is past the donor"] * any(part > 1.05 for part in told)
    under = ["below 0 is away from the donor"] * any(part < -0.05 for part in told)
    return f"recovered, of the {kind}: {', '.join([*over, *under])}" if over or under else None


def _compared(
    call: Call,
    loaded: LoadedModel,
    ids: list[int],
    own: Sequence[Intervention],
    described: FurtherInterventions,
    token: str | int | None,
    against: str | int | None,
    *others: Array,
) -> Effect:
    """The prompt's next-token distribution without and with the interventions: the tool's own, then those described.

    `others` are logits (d_vocab,) of other runs, where the tokens asked about may be likelier.
    """
    engine = loaded.model
    asked = asked_metric(engine, token, against)
    made = [*own, *described_interventions(call, engine, described, len(ids))]
    hook = compile_interventions(engine, made, len(ids))
    base, changed = (forward(engine, ids, hook=h, tick=call.tick).logits for h in (None, hook))
    assert base is not None
    assert changed is not None
    baseline, effect = base[0, -1], changed[0, -1]
    tell_twins(call, engine, [] if asked is None else [asked.token, asked.against], baseline, *others)
    return Effect(
        model=loaded.handle,
        notice=joined(loaded.notice, sources(made), None if asked is not None else _certain(baseline, effect)),
        baseline=probabilities(engine, baseline, SHOWN),
        effect=probabilities(engine, effect, SHOWN),
        kl=kl_divergence(effect, baseline),
        token=token_effect(engine, asked, baseline, effect),
        logit_difference=logit_difference(engine, asked, baseline, effect),
        applied=applied(hook.edits, len(ids)),
    )


def _certain(baseline: Array, effect: Array) -> str | None:
    """What KL hides where one token has nearly all of the probability without and with the intervention."""
    kl = Metric("kl")
    shares = [saturating(kl, logits) for logits in (baseline, effect)]
    if None in shares or baseline.argmax() != effect.argmax():
        return None
    return f"KL is saturated: the leading token has {shares[0]:.6g} and {shares[1]:.6g}. Give token to see its logit"


def token_effect(model: Model, asked: Metric | None, baseline: Array, effect: Array) -> TokenEffect | None:
    """The token that was asked about, in two runs' (d_vocab,) logits."""
    if asked is None or (index := asked.token) is None:
        return None
    return TokenEffect(
        id=index,
        text=model.tokenizer.piece(index),
        probability=float(softmax_of(effect)[index]),
        baseline_probability=float(softmax_of(baseline)[index]),
        logit=float(effect[index]),
        baseline_logit=float(baseline[index]),
    )


def logit_difference(model: Model, asked: Metric | None, baseline: Array, effect: Array) -> LogitDifference | None:
    """The difference that was asked about, in two runs' (d_vocab,) logits."""
    if asked is None or asked.token is None or asked.against is None:
        return None
    piece = model.tokenizer.piece
    before, after = (float(logits[asked.token] - logits[asked.against]) for logits in (baseline, effect))
    return LogitDifference(token=piece(asked.token), against=piece(asked.against), baseline=before, effect=after)


def applied(edits: Sequence[Edit], prompt_length: int) -> list[Applied]:
    """What each edit did; raises `InputError` for one that never fired."""
    rows = []
    for edit in edits:
        shown = edit.scope if isinstance(edit.scope, str) else list(edit.scope)
        if edit.fired == 0:
            raise InputError(
                f"the intervention {edit.kind} at {edit.point}, layer {edit.layer}, positions {shown} never fired: "
                f"the run computed no such row (the prompt has positions 0 to {prompt_length - 1})"
            )
        heads = None if edit.heads is None else list(edit.heads)
        rows.append(
            Applied(kind=edit.kind, point=edit.point, layer=edit.layer, positions=shown, heads=heads, fired=edit.fired)
        )
    return rows


def joined(*notices: str | None) -> str | None:
    """Notices one after the other."""
    return ". ".join(notice for notice in notices if notice) or None
