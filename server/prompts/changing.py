"""Protocols that change runs: steer_and_audit, transplant_kv_cache."""

from typing import Annotated

from pydantic import Field

from engine import Model
from server.prompts.steps import LAYER, Answer, Found, ModelName, Rival, Text, call, loading, protocol

ALPHA, RANDOM_ALPHA, LAYERS = Found("ALPHA"), Found("RANDOM_ALPHA"), Found("LAYERS")
UNRELATED = "Two plus two equals"


def steer_and_audit(known: Model | None, prompt: Text, toward: Answer, away: Rival, model: ModelName = None) -> str:
    """Steer towards a token, and audit what else the steering changes."""
    direction = {"minus": [{"token": token, "space": "unembed"} for token in (toward, away)]}
    steers = [{"layer": LAYER, "vector": direction, "alpha": ALPHA}]
    random = [{"layer": LAYER, "vector": {"random_seed": 1}, "alpha": RANDOM_ALPHA}]
    tokens = {"token": toward, "against": away, "model": model}
    return protocol(
        f"Can the model be steered from {away!r} to {toward!r} after {prompt!r}, and at what price?",
        [
            loading(known, model),
            f"{call('capture_residuals', prompt=prompt, layers='all', model=model)}: the norms say how large a push "
            "is. LAYER: start near three quarters of the depth.",
            f"{call('project_through_unembed', vector=direction, k=10, model=model)}: which tokens the direction "
            "raises, and its norm. ALPHA: such that alpha times that norm is a quarter of the residual's norm at "
            "LAYER.",
            f"{call('forward_steer', prompt=prompt, steers=steers, **tokens)}: the logit difference and KL. Double or "
            "halve ALPHA to find the least that works.",
            f"Control: {call('forward_steer', prompt=prompt, steers=random, **tokens)}, RANDOM_ALPHA being ALPHA "
            "times the norm of the direction: a push of the same size anywhere else should not do it. Take several "
            "seeds.",
            f"{call('generate_with_hooks', prompt=prompt, max_new_tokens=30, steers=steers, model=model)}: does the "
            "text stay fluent, and does it say more than the token?",
            f"Audit: {call('forward_steer', prompt=UNRELATED, steers=steers, **tokens)} and other prompts that have "
            "nothing to do with it: a small KL says that the steering is specific.",
        ],
        "the least ALPHA that works, its KL here, on unrelated prompts and for random directions of the same norm.",
        "that the model uses this direction by itself: steering shows that it can be pushed along it. The unembedding "
        "direction raises the token almost by construction in late layers.",
    )


def transplant_kv_cache(
    known: Model | None,
    recipient: Text,
    donor: Text,
    answer: Annotated[str, Field(description="the donor's answer: one token, with its leading space")],
    model: ModelName = None,
) -> str:
    """Transplant the donor's key-value cache: does it carry the answer, in which layers, in keys or in values?"""
    pair = {"recipient": recipient, "donor": donor, "model": model}

    def moved(**more: object) -> str:
        return call("prefill_inject", **(pair | more), max_new_tokens=12)

    return protocol(
        f"Does the cache of {donor!r} make the model say {answer!r} after {recipient!r}?",
        [
            loading(known, model),
            f"{call('tokenize', text=recipient, model=model)} and {call('tokenize', text=donor, model=model)}: they "
            "should end in the same token, for that token is decoded after the surgery and is not transplanted.",
            f"{call('kv_inject_test', target=answer, **pair)}: donor far above baseline, or there is nothing to carry. "
            "Read from_last and from_first: where does recovered jump? LAYERS are those. It has two controls: "
            "self_control must have KL 0, and unrelated_control should stay at the baseline.",
            f"{moved(layers=LAYERS)}: the layers you found, as a list; {moved()}: all of them.",
            f"{moved(what='v')} and {moved(what='k')}: is it in the values, or in where attention looks?",
            f"Control: {moved(donor=recipient)}: the recipient's own cache changes nothing, KL 0.",
        ],
        "the fewest layers that recover most of the donor's probability, and whether values alone do.",
        "that the answer is stored in those layers' caches: they carry what the last position reads there. With "
        "prompts of different lengths keys are turned to new positions, which is a change of its own: compare rope "
        "keep.",
    )
