"""The protocol where_is_it_computed."""

from engine import Model
from server.prompts.steps import HEAD, LAYER, POSITION, Answer, ModelName, Rival, Text, call, loading, protocol, start


def where_is_it_computed(
    known: Model | None, clean: Text, corrupt: Text, answer: Answer, rival: Rival, model: ModelName = None
) -> str:
    """Trace an answer through layers, positions and heads by patching a clean run into a corrupt one."""
    pair = {"clean": clean, "corrupt": corrupt, "token": answer, "model": model}
    heads = {**pair, "against": rival, "metric": "logit_difference", "by": "head"}
    ablated = {"prompt": clean, "layers": [LAYER], "point": "z", "heads": [HEAD]}
    cell = [{"layer": LAYER, "position": POSITION}]

    def patched(donor: str) -> str:
        return call(
            "patch_activations", donor=donor, recipient=corrupt, targets=cell, token=answer, against=rival, model=model
        )

    return protocol(
        f"Where does the model compute {answer!r} after {clean!r}, and not {rival!r} as after {corrupt!r}?",
        [
            loading(known, model),
            f"{call('tokenize', text=clean, model=model)} and {call('tokenize', text=corrupt, model=model)}: the "
            "prompts need the same number of tokens and should differ in one thing.",
            f"{call('causal_trace', **pair)}: clean must be far above corrupt, or there is nothing to locate. The top "
            "cells say where the information is: LAYER and POSITION. On long prompts start it as a job: "
            f"{start('causal_trace', **pair)}, then {call('get_job', run='RUN')}.",
            f"{patched(clean)}: one cell, with the whole distribution. Control: {patched(corrupt)} is the identity, "
            "KL 0; then the same layer at a position that differs in nothing.",
            f"{call('causal_trace', **heads, point='z')}: which HEAD of which LAYER moves it. The same with point "
            "mlp_out and by position for the MLPs.",
            f"Queries, keys and values can be traced too: {call('causal_trace', **heads, point='q')}, "
            f"{call('causal_trace', **heads, point='k')} and {call('causal_trace', **heads, point='v')} say whether a "
            "head is changed by what it asks, by where it looks or by what it takes from there (k and v by key-value "
            "head).",
            "Where the answer is copied from the prompt, corrupt three things in turn, each in a prompt of its own: "
            "the value (what is copied), the key (what is looked for, where it stands before the value) and the query "
            "(the last word that asks for it). Heads that match are the same in both runs while only the value "
            "differs, so that corrupting the value hides them; corrupting key and query shows them.",
            f"{call('forward_ablate', **ablated, token=answer, against=rival, model=model)}: is the head needed too? "
            "Control: another head of that layer.",
        ],
        "the cells that are sufficient (patching them restores the answer) and those that are also necessary (ablating "
        "them loses it), with both numbers.",
        "that a residual cell that restores the answer computed it: it may only carry it. That one pair of prompts "
        "shows the rule, or every head of it: repeat with another pair, and with another thing corrupted.",
    )
