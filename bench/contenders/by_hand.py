"""transformers with hooks and batches written by hand, as a skilled user would."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from _serve import Request, serve
from transformers import AutoModelForCausalLM, DynamicCache

SHOWN = (0, 14, 29)


def load(path: str) -> Any:
    torch.set_grad_enabled(False)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def capture(model: Any, r: Request) -> list[float]:
    kept: dict[int, torch.Tensor] = {}
    with hooks(model, lambda layer, out: kept.__setitem__(layer, out.clone())):
        model.model(torch.tensor([r["ids"]]), use_cache=False)
    return [x for layer in SHOWN for x in kept[layer][0, -1, :4]]


@contextmanager
def hooks(model: Any, see: Any) -> Iterator[None]:
    """Call `see(layer, output)` after every layer; what it returns, if anything, replaces the output."""

    def hook(layer: int) -> Any:
        return lambda module, args, out: see(layer, out)

    handles = [m.register_forward_hook(hook(i)) for i, m in enumerate(model.model.layers)]
    yield
    for handle in handles:
        handle.remove()


MODULES = {
    "self_attn.q_proj": "output",
    "self_attn.k_proj": "output",
    "self_attn.v_proj": "output",
    "self_attn.o_proj": "both",
    "post_attention_layernorm": "input",
    "mlp.down_proj": "both",
}
"""Where every point of a layer is: attn_out is o_proj's output and mlp_act down_proj's input, say."""


def points(model: Any, r: Request) -> list[float]:
    """Inputs and outputs of the modules in question, layers' outputs, and patterns, which only eager attention has."""
    kept: dict[tuple[int, str], torch.Tensor] = {}

    def keep(layer: int, name: str, which: str) -> Any:
        def hook(module: Any, args: Any, out: torch.Tensor) -> None:
            if which != "input":
                kept[layer, name] = out
            if which != "output":
                kept[layer, f"{name} input"] = args[0]

        return hook

    handles = [
        layer.get_submodule(name).register_forward_hook(keep(i, name, which))
        for i, layer in enumerate(model.model.layers)
        for name, which in MODULES.items()
    ]
    model.set_attn_implementation("eager")
    model.model(torch.tensor([r["ids"]]), use_cache=False, output_attentions=True, output_hidden_states=True)
    model.set_attn_implementation("sdpa")
    for handle in handles:
        handle.remove()
    return [x for layer in SHOWN for x in kept[layer, "mlp.down_proj input"][0, -1, :4]]


def lens(model: Any, r: Request) -> list[float]:
    states = model.model(torch.tensor([r["ids"]]), output_hidden_states=True, use_cache=False).hidden_states
    best = {}
    for layer in range(30):
        rows = states[layer + 1] if layer == 29 else model.model.norm(states[layer + 1])  # the last is normed already
        best[layer] = model.lm_head(rows[0]).softmax(-1).topk(10)
    return [best[layer].values[-1, 0] for layer in SHOWN]


def grid(model: Any, r: Request) -> list[float]:
    """All layers of a position in one batch: the rows below a cell's layer are computed again, those above patched."""
    clean, corrupt = (torch.tensor([r[name]]) for name in ("ids", "corrupt"))
    states = model.model(clean, output_hidden_states=True, use_cache=False).hidden_states
    n, out = len(r["ids"]), torch.empty(30, len(r["ids"]))
    for position in range(n):

        def patch(layer: int) -> Any:
            def hook(module: Any, args: Any, kwargs: Any) -> Any:
                x = args[0].clone()
                x[layer, position] = states[layer][0, position]  # noqa: B023
                return (x, *args[1:]), kwargs

            return hook

        handles = [m.register_forward_pre_hook(patch(i), with_kwargs=True) for i, m in enumerate(model.model.layers)]
        last = model.model(corrupt.repeat(30, 1), use_cache=False).last_hidden_state[:, -1]
        for handle in handles:
            handle.remove()
        logits = last @ model.lm_head.weight[[r["token"], r["against"]]].T
        out[:, position] = logits[:, 0] - logits[:, 1]
    return out.ravel().tolist()


def heads(model: Any, r: Request) -> list[float]:
    """All heads of a layer in one batch."""
    clean, corrupt = (torch.tensor([r[name]]) for name in ("ids", "corrupt"))
    kept: dict[int, torch.Tensor] = {}
    seen = [
        m.self_attn.o_proj.register_forward_pre_hook(lambda module, args, i=i: kept.__setitem__(i, args[0]))
        for i, m in enumerate(model.model.layers)
    ]
    model.model(clean, use_cache=False)
    for handle in seen:
        handle.remove()
    values = []
    for layer, module in enumerate(model.model.layers):

        def hook(module: Any, args: Any, layer: int = layer) -> Any:
            x = args[0].clone()
            for head in range(9):
                part = slice(64 * head, 64 * head + 64)
                x[head, :, part] = kept[layer][0, :, part]
            return (x,)

        handle = module.self_attn.o_proj.register_forward_pre_hook(hook)
        last = model.model(corrupt.repeat(9, 1), use_cache=False).last_hidden_state[:, -1]
        handle.remove()
        logits = last @ model.lm_head.weight[[r["token"], r["against"]]].T
        values += (logits[:, 0] - logits[:, 1]).tolist()
    return values


SPANS = [*([i] for i in range(30)), *(range(i, 30) for i in reversed(range(30))), *(range(i + 1) for i in range(30))]
"""Layer by layer, from the last down, from the first up: what kv_inject_test moves, beside two controls."""


def kv_scan(model: Any, r: Request) -> list[float]:
    """One run for each transplant."""
    mine, theirs, other = DynamicCache(), DynamicCache(), DynamicCache()
    generator = torch.Generator().manual_seed(0)
    unrelated = torch.randint(0, 49152, (1, len(r["ids"]) - 1), generator=generator)
    for cache, ids in (
        (mine, torch.tensor([r["corrupt"][:-1]])),
        (theirs, torch.tensor([r["ids"][:-1]])),
        (other, unrelated),
    ):
        model.model(ids, past_key_values=cache)
    model.model(torch.tensor([r["ids"][-1:]]), past_key_values=copy.deepcopy(theirs))

    def decoded(layers: Any, donor: Any) -> float:
        cache = copy.deepcopy(mine)
        for layer in layers:
            cache.layers[layer].keys = donor.layers[layer].keys.clone()
            cache.layers[layer].values = donor.layers[layer].values.clone()
        logits = model(torch.tensor([r["corrupt"][-1:]]), past_key_values=cache).logits[0, -1]
        return float(logits.softmax(-1)[r["token"]])

    found = [decoded(span, theirs) for span in SPANS]
    decoded(range(30), mine), decoded(range(30), other), decoded([], mine)
    return found


def kv_batch(model: Any, r: Request) -> list[float]:
    """The prompts as one batch, then all transplants, controls and the donor's last token as one."""
    mine, theirs = torch.tensor(r["corrupt"]), torch.tensor(r["ids"])
    unrelated = torch.randint(0, 49152, (len(theirs) - 1,), generator=torch.Generator().manual_seed(0))
    prompts, cells = DynamicCache(), DynamicCache()
    model.model(torch.stack([mine[:-1], theirs[:-1], unrelated]), past_key_values=prompts)
    for layer, kept in enumerate(prompts.layers):
        which = [*(int(layer in span) for span in SPANS), 0, 2, 0, 1]
        cells.update(kept.keys[which], kept.values[which], layer)
    last = mine[-1:].repeat(len(SPANS) + 4, 1)
    last[-1] = theirs[-1]
    logits = model(last, past_key_values=cells).logits[:, -1].log_softmax(-1)
    (logits.exp() * (logits - logits[-2])).sum(-1)  # KL from the baseline, which is the last cell but one
    return logits[: len(SPANS), r["token"]].exp().tolist()


def decode(model: Any, r: Request) -> list[float]:
    vector, first = torch.tensor(r["vector"]), len(r["ids"])

    def steer(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        out = out.clone()
        out[:, -1] += vector
        return out

    handle = model.model.layers[15].register_forward_hook(steer)
    made = model.generate(
        torch.tensor([r["ids"]]), attention_mask=torch.ones(1, first), max_new_tokens=60, min_new_tokens=60,
        do_sample=False, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    handle.remove()
    return made[0, first:].tolist()


def batch(model: Any, r: Request) -> list[float]:
    shown = []
    for start in range(0, 100, 25):
        kept: dict[int, torch.Tensor] = {}
        with hooks(model, lambda layer, out, kept=kept: kept.__setitem__(layer, out[:, -1].clone())):
            model.model(torch.tensor(r["prompts"][start : start + 25]), use_cache=False)
        shown += kept[29][:, 0].tolist()
    return shown


WORKS = {
    "capture": capture,
    "points": points,
    "lens": lens,
    "grid": grid,
    "heads": heads,
    "kv_scan": kv_scan,
    "kv_batch": kv_batch,
    "decode": decode,
    "batch": batch,
}

if __name__ == "__main__":
    serve(load, WORKS)
