"""Key-value cache surgery: prefill_inject, kv_inject_test."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from engine import KVCache, Metric, Model
from engine import kv_inject_test as scanned
from engine import prefill_inject as injected
from engine.cost import Cost, cache_bytes
from engine.injection import Injection, InjectionCell, kv_inject_cost, prefill_inject_cost
from engine.lens import distributions_cost
from schemas import effects
from schemas.arguments import Heads, Layers, ModelRef, Prompt, TokenRef
from schemas.effects import InjectionResult, InjectionTest
from server.call import Call, head_list, label, layer_list, probabilities, token_id
from server.interventions import named
from server.lab import LoadedModel
from server.tools.effects import Asked, asked_metric, joined, recovered_notice, token_effect
from server.tools.writing import continuation, cut_short, held_cache
from server.twins import tell_twins

MOST_TEXT = 200
"""Characters of a control's text in an answer."""

Span = Annotated[list[int], Field(min_length=2, max_length=2)]


def prefill_inject(
    call: Call,
    recipient: Prompt,
    donor: Annotated[Prompt, Field(description="a prompt, or the kv: handle of a kept cache")],
    layers: Layers = "all",
    source: Annotated[Span | None, Field(description="[start, end) of the donor; left out: all that fit")] = None,
    dest: Annotated[int | None, Field(ge=0, description="in the recipient; default as source")] = None,
    what: Literal["kv", "k", "v"] = "kv",
    rope: Annotated[
        Literal["realign", "keep"], Field(description="realign turns keys to their new positions")
    ] = "realign",
    heads: Annotated[Heads | None, Field(description="key-value heads")] = None,
    max_new_tokens: Annotated[int, Field(ge=1, le=500)] = 20,
    keep: Annotated[bool, Field(description="keep the cache as a kv: handle")] = False,
    token: Asked = None,
    model: ModelRef = None,
) -> InjectionResult:
    """Transplant part of the donor's key-value cache into the recipient and continue from it.

    Both are prefilled up to their last token, the cache is edited, then that token is decoded. kv_inject_test finds
    which layers carry an answer.
    """
    loaded = call.loaded(model)
    engine = loaded.model
    ids = call.ids(engine, recipient)
    donor_ids, donor_cache = _donor(call, engine, donor)
    asked = asked_metric(engine, token, None)
    which, only = named(head_list(engine, layers, heads, "k"))
    cost = prefill_inject_cost(engine, ids, donor_cache or donor_ids, max_new_tokens)
    cost = cost.beside(distributions_cost(engine, 3))
    call.expect(engine, cost, len(ids), keeps=cache_bytes(engine.config, len(ids) - 1) if keep else 0)
    result = injected(
        engine, ids, donor_cache or donor_ids, which,
        None if source is None else (source[0], source[1]), dest, what, rope, only, max_new_tokens, call.tick,
    )  # fmt: skip
    handle = _kept(call, loaded, ids, donor_ids, result) if keep else None
    if asked is not None:
        runs = (result.baseline, result.injected if result.donor is None else result.donor)
        tell_twins(call, engine, [asked.token], *runs)
    return _shown(loaded, ids, donor_ids, result, what, rope, handle, asked)


def _donor(call: Call, model: Model, donor: str | Sequence[int]) -> tuple[list[int], KVCache | None]:
    if not isinstance(donor, str) or not donor.startswith("kv:"):
        return call.ids(model, donor), None
    cache = held_cache(call, model, donor)
    return call.record(donor, "kv").provenance["prompt_ids"][: cache.length], cache


def _kept(call: Call, loaded: LoadedModel, ids: list[int], donor_ids: list[int], result: Injection) -> str:
    engine = loaded.model
    return call.lab.store.put(
        "kv",
        label(engine, ids, "edited"),
        call.owner,
        result.cache.to_tensors(),
        {
            "about": f"cache of {len(ids) - 1} positions with {result.rows_replaced} rows of a donor",
            "model": loaded.handle,
            "fingerprint": engine.fingerprint,
            "prompt_ids": ids,
            "donor_ids": donor_ids,
            "layers": result.layers,
            "source": list(result.source),
            "dest": result.dest,
        },
    )


def _shown(
    loaded: LoadedModel,
    ids: list[int],
    donor_ids: list[int],
    result: Injection,
    what: str,
    rope: str,
    handle: str | None,
    asked: Metric | None,
) -> InjectionResult:
    engine = loaded.model
    start, end = result.source
    dest = [result.dest, result.dest + end - start]
    return InjectionResult(
        model=loaded.handle,
        notice=joined(loaded.notice, cut_short(result.baseline_text, result.injected_text), _odd(result, asked)),
        baseline=probabilities(engine, result.baseline, 5),
        injected=probabilities(engine, result.injected, 5),
        kl=result.kl,
        baseline_continuation=continuation(engine, result.baseline_text),
        injected_continuation=continuation(engine, result.injected_text),
        layers=result.layers,
        source=[start, end],
        dest=dest,
        what=what,
        rope=rope,
        rows_replaced=result.rows_replaced,
        rows_unseen=sum(map(len, result.unseen.values())),
        replaced_text=engine.tokenizer.decode(ids[dest[0] : dest[1]]),
        donor_text=engine.tokenizer.decode(donor_ids[start:end]),
        handle=handle,
        token=token_effect(engine, asked, result.baseline, result.injected),
        recovered=None if asked is None else result.recovered(asked),
    )


def _odd(result: Injection, asked: Metric | None) -> str | None:
    """What a reader of `recovered` must know."""
    if asked is None:
        return None
    if result.donor is None:
        return "recovered is null: the donor is a cache, which says nothing by itself"
    before, theirs = (float(asked(logits[None], result.baseline)[0]) for logits in (result.baseline, result.donor))
    return recovered_notice(asked.kind, [result.recovered(asked)], before, theirs)


def kv_inject_test(
    call: Call,
    recipient: Prompt,
    donor: Prompt,
    target: Annotated[TokenRef, Field(description="the donor's answer")],
    layers: Layers = "all",
    model: ModelRef = None,
) -> InjectionTest:
    """Test whether the donor's key-value cache carries its answer, and in which layers, with two controls.

    Layer by layer, from the last down and from the first up: the target's probability and how much of the donor's is
    recovered (null when the two differ by less than 0.05).
    """
    loaded = call.loaded(model)
    engine = loaded.model
    ids, donor_ids = call.ids(engine, recipient), call.ids(engine, donor)
    chosen, wanted = layer_list(engine, layers), token_id(engine, target)
    cost = kv_inject_cost(engine, ids, donor_ids, chosen).beside(_read_cost(engine, len(chosen)))
    call.expect(engine, cost, len(ids))
    scan = scanned(engine, ids, donor_ids, wanted, chosen, tick=call.tick)
    parts = [cell.recovered for cells in (scan.per_layer, scan.from_last, scan.from_first) for cell in cells]
    tell_twins(call, engine, [wanted], scan.donor_logits)
    return InjectionTest(
        model=loaded.handle,
        notice=joined(loaded.notice, recovered_notice("probability", parts, scan.baseline, scan.donor)),
        target=engine.tokenizer.piece(wanted),
        baseline=scan.baseline,
        donor=scan.donor,
        positions=list(scan.source),
        per_layer=[_cell(cell) for cell in scan.per_layer],
        from_last=[_cell(cell) for cell in scan.from_last],
        from_first=[_cell(cell) for cell in scan.from_first],
        self_control=_cell(scan.self_control),
        unrelated_control=_cell(scan.unrelated_control),
        unrelated_donor=engine.tokenizer.decode(scan.unrelated)[:MOST_TEXT],
    )


def _read_cost(model: Model, layers: int) -> Cost:
    """Of every transplant of a scan, each span of layers and two controls, logits and KL in float64."""
    transplants = 2 + max(3 * layers - 3, 1)
    return distributions_cost(model, 3).holding((4 + 2 * 8) * transplants * model.config.d_vocab)


def _cell(cell: InjectionCell) -> effects.InjectionCell:
    return effects.InjectionCell(
        layers=_span(cell.layers), probability=cell.probability, recovered=cell.recovered, kl=cell.kl
    )


def _span(layers: list[int]) -> str:
    """[3, 4, 5] -> "3-5"; [1, 4] -> "1,4"."""
    if len(layers) > 1 and layers == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}-{layers[-1]}"
    return ",".join(map(str, layers))
