"""Text under interventions: generate_with_hooks."""

from functools import partial
from typing import Annotated

from pydantic import Field

from engine import Generation, Intervention, KVCache, Model, compile_interventions, generate
from engine.cost import of_generation
from schemas.arguments import Layers, ModelRef, Prompt, Steers
from schemas.effects import Continuation, HookedGeneration
from schemas.interventions import Interventions
from server.call import Call, layer_list, token_shown
from server.interventions import described_cost, described_interventions, planned_interventions, sources
from server.metrics import count_tokens
from server.tools.effects import applied, joined, steering


def generate_with_hooks(
    call: Call,
    prompt: Prompt,
    max_new_tokens: Annotated[int, Field(ge=1, le=500)] = 20,
    ablate_layers: Annotated[Layers | None, Field(description="resid_post zeroed, all rows")] = None,
    steers: Steers | None = None,
    interventions: Interventions = None,
    temperature: Annotated[float, Field(ge=0, le=10)] = 0.0,
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0,
    seed: Annotated[int, Field(ge=0)] = 0,
    cache: Annotated[str | None, Field(description="kv: handle; the prompt follows what it holds")] = None,
    model: ModelRef = None,
) -> HookedGeneration:
    """Generate text without and with ablation, steering and other interventions, the hooks active at every step.

    At each layer ablation comes first, then steering, then interventions. Greedy unless temperature is above 0; both
    runs use the seed.
    """
    loaded = call.loaded(model)
    engine = loaded.model
    start = None if cache is None else held_cache(call, engine, cache)
    ids = call.ids(engine, prompt, inside=start is not None)
    length = len(ids) + (0 if start is None else start.next_position)
    ablated = () if ablate_layers is None else tuple(layer_list(engine, ablate_layers))
    texts = of_generation(engine.config, len(ids), max_new_tokens) * 2
    texts = texts.holding(4 * 4 * engine.config.d_vocab)  # logits, and what ranks or draws from them
    own = [Intervention("zero", ablated)] if ablated else []
    own += steering(call, engine, steers or (), "last")
    planned = planned_interventions(call, engine, interventions, length)
    compile_interventions(engine, [*own, *planned], length, max_new_tokens)
    call.expect(engine, texts.beside(described_cost(call, engine, interventions, length)), len(ids))
    made = [*own, *described_interventions(call, engine, interventions, length)]
    hook = compile_interventions(engine, made, length, max_new_tokens)
    run = partial(generate, engine, ids, max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    baseline, hooked = (
        run(hook=h, cache=None if start is None else start.fork(), tick=call.tick) for h in (None, hook)
    )
    return HookedGeneration(
        model=loaded.handle,
        notice=joined(loaded.notice, sources(made, generating=True), cut_short(baseline, hooked)),
        baseline=continuation(engine, baseline),
        hooked=continuation(engine, hooked),
        first_difference=_first_difference(baseline.ids, hooked.ids),
        applied=applied(hook.edits, length),
    )


def cut_short(*made: Generation) -> str | None:
    """Why no further token can be computed, where a text ends for that."""
    return joined(*dict.fromkeys(text.why for text in made))


def continuation(model: Model, made: Generation) -> Continuation:
    """A generation as results show it."""
    count_tokens("written", len(made.ids))
    end = None if made.end is None else token_shown(model, made.end)
    return Continuation(text=made.text, ids=made.ids, stopped=made.stopped, end=end)


def held_cache(call: Call, model: Model, handle: str) -> KVCache:
    """The cache behind a kv: handle; raises `InputError` for another model's."""
    return KVCache.from_tensors(call.tensors(call.record(handle, "kv", model)), model.config)


def _first_difference(a: list[int], b: list[int]) -> int | None:
    if a == b:
        return None
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
