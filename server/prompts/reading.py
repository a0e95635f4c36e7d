"""Protocols that read runs: factual_recall, compare_prompts."""

from engine import Model
from server.prompts.steps import LAYER, POSITION, Answer, Found, ModelName, Rival, Text, call, loading, protocol

EARLIER = Found("EARLIER")


def factual_recall(known: Model | None, prompt: Text, answer: Answer, rival: Rival, model: ModelName = None) -> str:
    """Follow how a fact appears through the layers, and test which layer's MLP or attention it needs."""
    asked = {"prompt": prompt, "token": answer, "against": rival, "model": model}

    def ablated(point: str, layer: Found = LAYER) -> str:
        return call("forward_ablate", layers=[layer], point=point, positions="last", **asked)

    return protocol(
        f"How does the model come to say {answer!r} after {prompt!r}?",
        [
            loading(known, model),
            f"{call('tokenize', text=prompt, model=model)}: check the pieces; positions count them from 0.",
            f"{call('track_race', prompt=prompt, tokens=[answer, rival], model=model)}: does {answer!r} end on top? If "
            "not, the model does not recall it here: stop and say so. Crossings of tokens that are both unlikely mean "
            "nothing.",
            f"{call('track_token', prompt=prompt, token=answer, model=model)}: LAYER is emergence_layer, where it "
            "takes the lead for good.",
            f"{call('logit_lens', prompt=prompt, layers=[-1], k=10, model=model)}: what else is likely; identity_error "
            "must be below 1e-4.",
            f"{ablated('mlp_out')} and {ablated('attn_out')}: the change of the logit difference is what that part of "
            "the layer contributes at the last position. Repeat for the layers around LAYER.",
            f"Controls: {ablated('mlp_out', EARLIER)} and {ablated('attn_out', EARLIER)}, EARLIER being half as deep "
            "as LAYER (without one of the first layers every prompt breaks, so that they are no control); and at LAYER "
            "with a prompt whose answer is another fact.",
            _in_chat(prompt, answer, model) if known is None or known.tokenizer.chat_template is not None else "",
        ],
        "the layers whose ablation lowers the logit difference of this fact clearly more than the controls do.",
        "that the fact is stored where the lens first shows it (the lens reads what the last layers would make of a "
        "residual); that an ablation with a large KL which lowers both tokens alike is about this fact; that a layer "
        "is unnecessary because ablating it alone does little: others may take over.",
    )


def _in_chat(prompt: str, answer: str, model: str | None) -> str:
    more = {"max_new_tokens": 20, "model": model}
    return (
        "To ask in chat, where the model has a template: the first token of a reply is seldom the answer, so that the "
        f"answer's opening must be appended. {call('generate_with_hooks', prompt=prompt, chat=True, **more)} shows how "
        f"it opens; OPENING is what stands before {answer!r}. If that does not come, the model does not recall it in "
        f"chat: stop. {call('track_token', prompt=prompt, token=answer, chat='OPENING', model=model)} then reads the "
        "token where the model is about to say it; the other calls take chat in the same way."
    )


def compare_prompts(known: Model | None, a: Text, b: Text, model: ModelName = None) -> str:
    """Find the layer where two prompts part, and the position that makes the difference."""
    return protocol(
        f"Where do the runs of {a!r} and {b!r} part, and which position makes the difference?",
        [
            loading(known, model),
            f"{call('tokenize', text=a, model=model)} and {call('tokenize', text=b, model=model)}: the number of "
            "tokens, and the positions at which they differ.",
            f"{call('compare', a=a, b=b, model=model)}: cosine, distance and KL of the lens by layer, at the last "
            "position; top_a and top_b are what each prompt ends in.",
            f"Control: {call('compare', a=a, b=a, model=model)} must give cosine 1 and KL 0 in every layer.",
            f"With the same number of tokens: {call('causal_trace', clean=a, corrupt=b, metric='kl', model=model)}: "
            "which LAYER and POSITION, patched from a into b, change b most. Cells before the first difference are 0 "
            "by construction.",
            call(
                "patch_activations",
                donor=a,
                recipient=b,
                targets=[{"layer": LAYER, "position": POSITION}],
                model=model,
            )
            + ": does b now end as a does? Control: the same layer at a position that carries nothing.",
        ],
        "the first layer from which the KL stays large, and the cells that move b's answer to a's.",
        "that a low cosine means a different answer (compare the KL), or that two prompts are treated alike because "
        "one position is: look at positions that differ too.",
    )
