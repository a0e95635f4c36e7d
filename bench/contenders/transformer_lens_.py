"""TransformerLens, with its documented helpers."""

from typing import Any

import torch
from _serve import Request, serve
from transformer_lens import patching
from transformer_lens.model_bridge import TransformerBridge

SHOWN = (0, 14, 29)
POSTS = [f"blocks.{i}.hook_out" for i in range(30)]


def load(path: str) -> Any:
    torch.set_grad_enabled(False)
    return TransformerBridge.boot_transformers(path, dtype=torch.float32)


def capture(model: Any, r: Request) -> list[float]:
    _, cache = model.run_with_cache(torch.tensor([r["ids"]]), names_filter=POSTS)
    return [x for layer in SHOWN for x in cache[f"blocks.{layer}.hook_out"][0, -1, :4]]


def everything(model: Any, r: Request) -> list[float]:
    _, cache = model.run_with_cache(torch.tensor([r["ids"]]))
    return [x for layer in SHOWN for x in cache[f"blocks.{layer}.mlp.out.hook_in"][0, -1, :4]]


def lens(model: Any, r: Request) -> list[float]:
    _, cache = model.run_with_cache(torch.tensor([r["ids"]]), names_filter=POSTS)
    best = {}
    for layer in range(30):
        rows = model.ln_final(cache[f"blocks.{layer}.hook_out"])
        best[layer] = model.unembed(rows)[0].softmax(-1).topk(10)
    return [best[layer].values[-1, 0] for layer in SHOWN]


def _difference(r: Request) -> Any:
    return lambda logits: logits[0, -1, r["token"]] - logits[0, -1, r["against"]]


def grid(model: Any, r: Request) -> list[float]:
    _, cache = model.run_with_cache(torch.tensor([r["ids"]]))
    found = patching.get_act_patch_resid_pre(model, torch.tensor([r["corrupt"]]), cache, _difference(r))
    return found.ravel().tolist()


def heads(model: Any, r: Request) -> list[float]:
    _, cache = model.run_with_cache(torch.tensor([r["ids"]]))
    found = patching.get_act_patch_attn_head_out_all_pos(model, torch.tensor([r["corrupt"]]), cache, _difference(r))
    return found.ravel().tolist()


def decode(model: Any, r: Request) -> list[float]:
    vector, first = torch.tensor(r["vector"]), len(r["ids"])

    def steer(x: torch.Tensor, hook: Any) -> torch.Tensor:
        x[:, -1] += vector
        return x

    with model.hooks(fwd_hooks=[("blocks.15.hook_out", steer)]):
        made = model.generate(
            torch.tensor([r["ids"]]), max_new_tokens=60, do_sample=False, stop_at_eos=False, verbose=False,
            return_type="tokens",
        )  # fmt: skip
    return made[0, first:].tolist()


def batch(model: Any, r: Request) -> list[float]:
    shown = []
    for start in range(0, 100, 25):
        _, cache = model.run_with_cache(torch.tensor(r["prompts"][start : start + 25]), names_filter=POSTS)
        shown += cache["blocks.29.hook_out"][:, -1, 0].tolist()
    return shown


WORKS = {
    "capture": capture,
    "everything": everything,
    "lens": lens,
    "grid": grid,
    "heads": heads,
    "decode": decode,
    "batch": batch,
}

if __name__ == "__main__":
    serve(load, WORKS)
