"""Protocols that locate: where_is_it_computed, find_induction_heads."""

from typing import Annotated

from pydantic import Field

from server.prompts.steps import Answer, ModelName, Rival, Text, call, loading, protocol, start

WORDS = "violet anchor seven meadow copper winter"
OTHERS = "bottle quiet thirteen garden silver window"


def where_is_it_computed(clean: Text, corrupt: Text, answer: Answer, rival: Rival, model: ModelName = None) -> str:
    """Trace an answer through layers, positions and heads by patching a clean run into a corrupt one."""
    pair = {"clean": clean, "corrupt": corrupt, "token": answer, "model": model}
    heads = {**pair, "against": rival, "metric": "logit_difference", "point": "z", "by": "head"}
    cell = [{"layer": "LAYER", "position": "POSITION"}]

    def patched(donor: str) -> str:
        return call(
            "patch_activations", donor=donor, recipient=corrupt, targets=cell, token=answer, against=rival, model=model
        )

    return protocol(
        f"Where does the model compute {answer!r} after {clean!r}, and not {rival!r} as after {corrupt!r}?",
        [
            loading(model),
            f"{call('tokenize', text=clean, model=model)} and {call('tokenize', text=corrupt, model=model)}: the "
            "prompts need the same number of tokens and should differ in one thing.",
            f"{call('causal_trace', **pair)}: clean must be far above corrupt, or there is nothing to locate. The top "
            "cells say where the information is: LAYER and POSITION. On long prompts start it as a job: "
            f"{start('causal_trace', **pair)}, then {call('get_job', run='RUN')}.",
            f"{call('causal_trace', **heads)}: which HEAD of which layer moves it. The same with point mlp_out and by "
            "position for the MLPs.",
            f"{patched(clean)}: one cell, with the whole distribution. Control: {patched(corrupt)} is the identity, "
            "KL 0; then the same layer at a position that differs in nothing.",
            call(
                "forward_ablate",
                prompt=clean,
                layers=["LAYER"],
                point="z",
                heads=["HEAD"],
                token=answer,
                against=rival,
                model=model,
            )
            + ": is the head needed too? Control: another head of that layer.",
        ],
        "the cells that are sufficient (patching them restores the answer) and those that are also necessary (ablating "
        "them loses it), with both numbers.",
        "that a residual cell that restores the answer computed it: it may only carry it. That one pair of prompts "
        "shows the rule: repeat with another pair.",
    )


def find_induction_heads(
    words: Annotated[str, Field(description="unrelated words, each one token with a space before it")] = WORDS,
    model: ModelName = None,
) -> str:
    """Find the heads that continue a repeated sequence: by attention, then by ablation, each with a control."""
    listed = words.split()
    repeated = "".join(f" {word}" for word in [*listed, *listed[:-1]])
    fresh = "".join(f" {word}" for word in [*OTHERS.split()[: len(listed)], *listed[:-1]])
    last = f" {listed[-1]}"

    def attention(prompt: str) -> str:
        return call("attention_pattern", prompt=prompt, layers="all", positions="last", k=1, model=model)

    def ablated(prompt: str) -> str:
        return call(
            "forward_ablate", prompt=prompt, layers=["LAYER"], point="z", heads=["HEAD"], token=last, model=model
        )

    return protocol(
        "Which heads are induction heads: after [A][B] ... [A], do they look at [B] and make the model say it?",
        [
            loading(model),
            f"{call('tokenize', text=repeated, model=model)}: each word must be one token, n of them in a copy. The "
            "last token stands at 2n-2; its earlier copy is at n-2, so an induction head looks at n-1 (all one further "
            "where the model puts a token of its own in front).",
            f"{call('track_token', prompt=repeated, token=last, model=model)}: does the model continue the copy? If "
            f"{last!r} does not end on top there is no induction to explain.",
            f"{attention(repeated)}: candidates are heads whose largest weight, above 0.3, is at n-1. With an error "
            "that "
            'there are too many entries, ask for fewer layers, such as "0:10".',
            f"Control: {attention(fresh)}: nothing is repeated, so a head that looks at n-1 here too goes by position.",
            f"{ablated(repeated)} for each candidate. Controls: another HEAD of that layer; and the candidate on text "
            f"without a repetition, {ablated(fresh)}.",
            "Repeat with other words: a head must pass with both.",
        ],
        "the heads that attend to n-1 only when there is a repetition and whose ablation lowers the token's "
        "probability clearly more than the controls.",
        "that attention alone makes an induction head, or that a head that survives its own ablation does nothing: "
        "several may share the work, so ablate the candidates together.",
    )
