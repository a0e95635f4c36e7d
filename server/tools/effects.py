"""One forward pass with something changed: forward_ablate, forward_steer, patch_activations."""

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from engine import Intervention, Model, RecordHook, capture_donor_state, compile_interventions, forward
from engine.distribution import kl_divergence, softmax_of
from engine.edits import Edit, Scope
from engine.errors import InputError
from engine.hooks import EditHook
from engine.ops import Array
from engine.patching import patch_hook
from schemas.arguments import Layers, ModelRef, PointName, Prompt, Steer, Target, TokenRef
from schemas.arguments import Scope as ScopeArgument
from schemas.effects import Applied, Effect, LogitDifference, PatchEffect, TokenEffect
from server.call import Call, layer_list, probabilities, token_id, token_ids
from server.lab import LoadedModel

LEAST_GAP = 0.05
SHOWN = 5

Heads = Annotated[list[int] | None, Field(description="limit to these heads (points q, k, v, attn_pattern, z)")]
Asked = Annotated[TokenRef | None, Field(description="report this token's probability and logit too")]
Against = Annotated[TokenRef | None, Field(description="with token: report logit(token) - logit(against)")]


def forward_ablate(
    call: Call,
    prompt: Prompt,
    layers: Layers,
    point: PointName = "resid_post",
    positions: ScopeArgument = "all",
    heads: Heads = None,
    mode: Literal["zero", "mean"] = "zero",
    mean_over: Annotated[
        list[Prompt] | None, Field(min_length=1, max_length=50, description="for mean: prompts to average over")
    ] = None,
    token: Asked = None,
    against: Against = None,
    model: ModelRef = None,
) -> Effect:
    """Ablate a point of some layers and compare the next-token distribution with the baseline.

    zero sets rows to zero, mean to their average over other prompts. To ask what a component contributes use
    attn_out, mlp_out, or z with heads; zeroing resid_post erases everything computed so far.
    """
    loaded = call.loaded(model)
    engine = loaded.model
    ids, chosen = token_ids(engine, prompt), layer_list(engine, layers)
    at = partial(Intervention, point=point, positions=_scope(positions), heads=None if heads is None else tuple(heads))
    if mode == "zero":
        interventions = [at("zero", tuple(chosen))]
    else:
        means = _means(call, engine, chosen, point, mean_over, heads)
        interventions = [at("mean", (layer,), vector=mean) for layer, mean in means.items()]
    hook = compile_interventions(engine, interventions, len(ids))
    effect = _compared(call, loaded, ids, hook, mode, token, against)
    if mode == "zero" and point == "resid_post" and positions == "all":
        effect.notice = _joined(
            effect.notice,
            "the whole residual was zeroed: nothing is left for the layers after it, and a model without biases "
            "answers with the uniform distribution. To ask what a part contributes, use point attn_out, mlp_out or z",
        )
    return effect


def _means(
    call: Call, model: Model, layers: list[int], point: str, prompts: Sequence[Any] | None, heads: list[int] | None
) -> dict[int, Array]:
    """{layer: the mean of the point's rows over all positions of the prompts} (heads kept apart)."""
    if not prompts:
        raise InputError("mode mean needs mean_over, the prompts to average over")
    if point == "attn_pattern":
        raise InputError("attention patterns of different prompts cannot be averaged; use z, or mode zero")
    total: dict[int, Array] = {}
    count = 0
    call.expect(len(prompts) + 2, model)
    for prompt in prompts:
        record = RecordHook.for_layers(layers, points=[point])
        ids = token_ids(model, prompt)
        forward(model, ids, hook=record, logits_at="none", tick=call.tick)
        count += len(ids)
        for layer, rows in record.get(point).items():
            by_row = rows.swapaxes(0, 1) if point in ("q", "k", "v") else rows
            total[layer] = total.get(layer, np.float32(0)) + by_row.sum(0)
    chosen = slice(None) if heads is None else heads
    return {layer: (rows / np.float32(count))[chosen] for layer, rows in total.items()}


def forward_steer(
    call: Call,
    prompt: Prompt,
    steers: Annotated[list[Steer], Field(min_length=1, max_length=64)],
    positions: ScopeArgument = "last",
    token: Asked = None,
    against: Against = None,
    model: ModelRef = None,
) -> Effect:
    """Add alpha * vector to resid_post of layers and compare the next-token distribution with the baseline.

    alpha is raw: it multiplies the vector as it is, no normalisation. For text use generate_with_hooks.
    """
    loaded = call.loaded(model)
    ids = token_ids(loaded.model, prompt)
    interventions = steering(call, loaded.model, steers, _scope(positions))
    hook = compile_interventions(loaded.model, interventions, len(ids))
    return _compared(call, loaded, ids, hook, "steer", token, against)


def steering(call: Call, model: Model, steers: Sequence[Steer], positions: Scope) -> list[Intervention]:
    """Steer arguments as interventions."""
    return [
        Intervention(
            "steer",
            (steer.layer,),
            positions=positions,
            vector=call.vector(model, steer.vector),
            value=steer.alpha,
        )
        for steer in steers
    ]


def patch_activations(
    call: Call,
    donor: Prompt,
    recipient: Prompt,
    targets: Annotated[list[Target], Field(min_length=1, max_length=1000)],
    point: PointName = "resid_post",
    token: Asked = None,
    against: Against = None,
    model: ModelRef = None,
) -> PatchEffect:
    """Write the donor's rows at (layer, position) into the recipient's run: does the answer move to the donor's?

    A position -1 is the last of each prompt. Give token, the donor's answer, to see how much is recovered.
    """
    loaded = call.loaded(model)
    engine = loaded.model
    ids, donor_ids = token_ids(engine, recipient), token_ids(engine, donor)
    pairs = [_pair(engine, target, len(donor_ids), len(ids)) for target in targets]
    call.expect(4, engine)
    state = capture_donor_state(engine, donor_ids, {(layer, source) for layer, source, _ in pairs}, point, call.tick)
    hook = EditHook(
        edit
        for layer, source, dest in dict.fromkeys(pairs)
        for edit in patch_hook(engine, ids, state.only(layer, source), {source: dest}).edits
    )
    donor_logits = forward(engine, donor_ids, tick=call.tick).logits
    assert donor_logits is not None
    effect = _compared(call, loaded, ids, hook, "patch", token, against)
    return PatchEffect(
        **effect.model_dump(exclude={"applied", "token", "logit_difference", "baseline", "effect"}),
        baseline=effect.baseline,
        effect=effect.effect,
        token=effect.token,
        logit_difference=effect.logit_difference,
        applied=effect.applied,
        donor=probabilities(engine, donor_logits[0, -1], SHOWN),
        recovered=_recovered(effect.token, donor_logits[0, -1]),
    )


def _pair(model: Model, target: Target, donor_length: int, length: int) -> tuple[int, int, int]:
    """(layer, donor position, recipient position), resolved."""
    source = target.position if target.donor_position is None else target.donor_position
    dest = target.position if target.recipient_position is None else target.recipient_position
    if source is None or dest is None:
        raise InputError(
            "a target is {layer, position}, or {layer, donor_position, recipient_position} when they differ"
        )
    layer = model.resolve_layer(target.layer)
    return layer, model.resolve_position(source, donor_length), model.resolve_position(dest, length)


def _recovered(asked: TokenEffect | None, donor_logits: Array) -> float | None:
    if asked is None:
        return None
    gap = float(softmax_of(donor_logits)[asked.id]) - asked.baseline_probability
    return (asked.probability - asked.baseline_probability) / gap if abs(gap) >= LEAST_GAP else None


def _scope(positions: Any) -> Scope:
    return positions if isinstance(positions, str) else tuple(positions)  # type: ignore[return-value]


def _compared(
    call: Call,
    loaded: LoadedModel,
    ids: list[int],
    hook: EditHook,
    kind: str,
    token: str | int | None,
    against: str | int | None,
) -> Effect:
    """The prompt's next-token distribution without and with the hook."""
    engine = loaded.model
    if against is not None and token is None:
        raise InputError("against needs token: logit(token) - logit(against) is reported")
    asked = None if token is None else token_id(engine, token)
    other = None if against is None else token_id(engine, against)
    if call.expected is None:
        call.expect(2, engine)
    base, changed = (forward(engine, ids, hook=h, tick=call.tick).logits for h in (None, hook))
    assert base is not None
    assert changed is not None
    baseline, effect = base[0, -1], changed[0, -1]
    return Effect(
        model=loaded.handle,
        notice=loaded.notice,
        baseline=probabilities(engine, baseline, SHOWN),
        effect=probabilities(engine, effect, SHOWN),
        kl=kl_divergence(effect, baseline),
        token=None if asked is None else _token_effect(engine, asked, baseline, effect),
        logit_difference=None
        if asked is None or other is None
        else LogitDifference(
            token=engine.tokenizer.piece(asked),
            against=engine.tokenizer.piece(other),
            baseline=float(baseline[asked] - baseline[other]),
            effect=float(effect[asked] - effect[other]),
        ),
        applied=applied(hook.edits, kind, len(ids)),
    )


def _token_effect(model: Model, index: int, baseline: Array, effect: Array) -> TokenEffect:
    return TokenEffect(
        id=index,
        text=model.tokenizer.piece(index),
        probability=float(softmax_of(effect)[index]),
        baseline_probability=float(softmax_of(baseline)[index]),
        logit=float(effect[index]),
        baseline_logit=float(baseline[index]),
    )


def applied(edits: Sequence[Edit], kind: str | Sequence[str], prompt_length: int) -> list[Applied]:
    """What each edit did; raises `InputError` for one that never fired. `kind` is one name, or one per edit."""
    kinds = [kind] * len(edits) if isinstance(kind, str) else kind
    rows = []
    for edit, name in zip(edits, kinds, strict=True):
        shown = edit.scope if isinstance(edit.scope, str) else list(edit.scope)
        if edit.fired == 0:
            raise InputError(
                f"the intervention {name} at {edit.point}, layer {edit.layer}, positions {shown} never fired: "
                f"the run computed no such row (the prompt has positions 0 to {prompt_length - 1})"
            )
        heads = None if edit.heads is None else list(edit.heads)
        rows.append(
            Applied(kind=name, point=edit.point, layer=edit.layer, positions=shown, heads=heads, fired=edit.fired)
        )
    return rows


def _joined(*notices: str | None) -> str | None:
    return ". ".join(notice for notice in notices if notice) or None
