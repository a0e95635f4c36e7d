"""transformers as the reference: one model in float32 and in true float64, with torch hooks.

load                from the GGUF file, or from a directory
in_float64          makes the float32 that transformers' code asks for by name mean float64
Reference           run, with points recorded and changes made by torch hooks; caches; greedy tokens
"""

import copy
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "OMP_WAIT_POLICY": "passive"}

import numpy as np
import torch
import transformers
from oracle.cases import Case, Change, Ids, Transplant
from transformers.cache_utils import DynamicCache

Array = np.ndarray
Tensor = torch.Tensor

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()


def load(path: Path) -> torch.nn.Module:
    """A model in float32 from a GGUF file or a directory; stored f16 and bf16 are upcast, nothing is cut."""
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    if path.suffix == ".gguf":
        return transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, **options).eval()
    return transformers.AutoModelForCausalLM.from_pretrained(path, **options).eval()


@contextmanager
def in_float64() -> Iterator[None]:
    """RMSNorm, the rotary embedding and the softmax of transformers compute in float32 whatever the weights are; a
    quotient of whole numbers has the default dtype.
    """
    with ExitStack() as stack:
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float64)
        for owner, name, to in (
            (torch, "float32", torch.float64),
            (torch, "float", torch.float64),
            (torch.Tensor, "float", torch.Tensor.double),
        ):
            stack.enter_context(patch.object(owner, name, to))
        yield


def doubled(model: torch.nn.Module) -> torch.nn.Module:
    """A float64 copy; rotary frequencies are computed anew, not widened."""
    twin = copy.deepcopy(model).double()
    rotary = twin.model.rotary_emb
    with in_float64():
        rotary.inv_freq = rotary.compute_default_rope_parameters(twin.config)[0]
    return twin


View = Callable[[Tensor, int], Tensor]
"""(what a module takes or gives, d_head) -> a view of it, (b, s, heads, d_head)."""


def flat(x: Tensor, d_head: int) -> Tensor:
    """Heads side by side: (b, s, heads * d_head)."""
    return x.unflatten(-1, (-1, d_head))


def as_is(x: Tensor, d_head: int) -> Tensor:
    """(b, s, heads, d_head)."""
    return x


def heads_first(x: Tensor, d_head: int) -> Tensor:
    """(b, heads, s, d_head)."""
    return x.transpose(1, 2)


@dataclass(frozen=True)
class Site:
    """Where a point of the engine is in a model of transformers, with the layer's number still to be filled in.

    `side` says what of the module: "in", "out", "first" and "weights" (the parts of attention's output), or "shared",
    an input that the layer reads again, so that it is changed in place. `view` finds the heads, at points that have
    heads. The engine's array is what is there times `scale`.
    """

    module: str
    side: str
    view: View | None = None
    scale: float = 1.0


_LAYER = "model.layers.{}"
_ATTENTION = f"{_LAYER}.self_attn"
SITES: dict[str, Site] = {
    "embed": Site("model.embed_tokens", "out"),
    "resid_pre": Site(_LAYER, "in"),
    "q": Site(f"{_ATTENTION}.q_proj", "out", flat),
    "k": Site(f"{_ATTENTION}.k_proj", "out", flat),
    "v": Site(f"{_ATTENTION}.v_proj", "out", flat),
    "attn_pattern": Site(_ATTENTION, "weights"),
    "z": Site(f"{_ATTENTION}.o_proj", "in", flat),
    "attn_proj": Site(f"{_ATTENTION}.o_proj", "out"),
    "attn_out": Site(_ATTENTION, "first"),
    "resid_mid": Site(f"{_LAYER}.post_attention_layernorm", "shared"),
    "mlp_act": Site(f"{_LAYER}.mlp.down_proj", "in"),
    "mlp_proj": Site(f"{_LAYER}.mlp.down_proj", "out"),
    "mlp_out": Site(f"{_LAYER}.mlp", "out"),
    "resid_post": Site(_LAYER, "out"),
    "final_norm": Site("model.norm", "out"),
}
"""Every point of the engine, in Llama."""

_PART: dict[str, Callable[[Any], Tensor]] = {
    "out": lambda out: out,
    "first": lambda out: out[0],
    "weights": lambda out: out[1],
}


@dataclass(frozen=True)
class Run:
    """logits (s, d_vocab); points {(point, layer): array} in the engine's layout, without the batch axis."""

    logits: Array
    points: dict[tuple[str, int], Array]

    def stacked(self, point: str) -> Array:
        """A point at all its layers: (layers, ...)."""
        return np.stack([x for (name, _), x in self.points.items() if name == point])

    @property
    def resid_post(self) -> Array:
        """(layers, s, d_model)."""
        return self.stacked("resid_post")


class Reference:
    """A transformers model, run in the precision of its weights. Points and caches are Llama's unless `sites` say
    where another family has them and `d_head` how wide its heads are.
    """

    def __init__(self, model: Any, sites: dict[str, Site] = SITES, d_head: int | None = None) -> None:
        self.model = model
        self.sites = sites
        self.double = next(model.parameters()).dtype is torch.float64
        self.layers = range(model.config.num_hidden_layers)
        self.d_head: int = model.model.layers[0].self_attn.head_dim if d_head is None else d_head

    @contextmanager
    def running(self) -> Iterator[None]:
        """Without gradients, and in float64 where the weights are."""
        with torch.no_grad(), in_float64() if self.double else ExitStack():
            yield

    def call(self, ids: Sequence[int], **options: object) -> Tensor:
        """(s, d_vocab) logits of one forward call."""
        with self.running():
            return self.model(input_ids=torch.tensor([list(ids)]), **{"use_cache": False, **options}).logits[0]

    def run(self, ids: Sequence[int], points: Iterable[str] = ("resid_post",), hooks: Iterable["Hook"] = ()) -> Run:
        """One pass with hooks; the points are recorded as the hooks leave them."""
        kept: dict[tuple[str, int], Array] = {}
        wanted = [(point, layer) for point in points for layer in self.layers_of(point)]
        with ExitStack() as stack:
            for hook in hooks:
                stack.callback(hook(self).remove)
            for point, layer in wanted:
                stack.callback(self.record(point, layer, kept).remove)
            logits = self.call(ids).numpy()
        return Run(logits, {key: kept[key] for key in wanted})

    def layers_of(self, point: str) -> Iterable[int]:
        """The layers at which the engine has a point."""
        return {"embed": [0], "final_norm": [self.layers[-1]]}.get(point, self.layers)

    def module(self, point: str, layer: int) -> torch.nn.Module:
        """The module whose input or output the point is."""
        return self.model.get_submodule(self.sites[point].module.format(layer))

    def record(self, point: str, layer: int, kept: dict[tuple[str, int], Array]) -> "Handle":
        """Keep what passes a point."""
        site = self.sites[point]

        def keep(x: Tensor) -> None:
            if site.view is not None:
                x = site.view(x, self.d_head)
                x = x if point == "z" else x.transpose(1, 2)
            kept[point, layer] = x[0].detach().numpy() * site.scale

        if site.side in ("in", "shared"):
            return self.module(point, layer).register_forward_pre_hook(lambda _, args: keep(args[0]))
        return self.module(point, layer).register_forward_hook(lambda _, args, out: keep(_PART[site.side](out)))

    # --- interventions ----------------------------------------------------------------------------------------

    def unembedding(self, token: int) -> Array:
        """A row of W_U."""
        return self.model.lm_head.weight[token].detach().numpy()

    def rows(self, ids: list[int], point: str, layer: int) -> Array:
        """The rows of a point in an unchanged run."""
        return self.run(ids, [point]).points[point, layer]

    def changed(self, case: Case, ids: Ids) -> Run:
        """The run of a case."""
        prompt = ids[case.prompt]
        return self.run(prompt, hooks=[h for change in case.changes for h in self.hooks(change, ids, len(prompt))])

    def hooks(self, change: Change, ids: Ids, length: int) -> list["Hook"]:
        """One torch hook per layer of a change."""
        rows = change.rows(length)
        if change.kind == "knockout":
            return [knockout(layer, rows, change) for layer in change.layers]
        vector = None if change.vector is None else torch.from_numpy(np.array(change.vector.of(self, ids)))
        return [edit(layer, rows, change, vector) for layer in change.layers]

    # --- caches -----------------------------------------------------------------------------------------------

    def prefilled(self, ids: list[int], shift: int = 0) -> DynamicCache:
        """The cache of all ids but the last. Windows are left to the masks: every layer keeps all its rows."""
        cache, positions = DynamicCache(), torch.arange(len(ids) - 1)[None] + shift
        self.call(ids[:-1], past_key_values=cache, use_cache=True, position_ids=positions)
        return cache

    def transplanted(self, case: Transplant, ids: Ids) -> DynamicCache:
        """The recipient's cache after the surgery.

        For realigned keys the donor's run is moved to the positions where the rows go: rotary positions are relative,
        so nothing else changes.
        """
        cache = self.prefilled(ids[case.recipient])
        donor = self.prefilled(ids[case.donor], case.dest - case.source[0] if case.rope == "realign" else 0)
        rows, to = slice(*case.source), slice(case.dest, case.dest + case.source[1] - case.source[0])
        heads = slice(None) if case.heads is None else list(case.heads)
        for layer in case.layers:
            mine, theirs = cache.layers[layer], donor.layers[layer]
            if "k" in case.what:
                mine.keys[:, heads, to] = theirs.keys[:, :, rows][:, heads]
            if "v" in case.what:
                mine.values[:, heads, to] = theirs.values[:, :, rows][:, heads]
        return cache

    def decoded(self, cache: DynamicCache, token: int, steps: int) -> tuple[Array, list[int], list[float]]:
        """(d_vocab,) logits after `token`, then greedy tokens and how far each was ahead of the second."""
        first, made, gaps = None, [], []
        for _ in range(steps):
            logits = self.call([token], past_key_values=cache, use_cache=True)[-1]
            first = logits if first is None else first
            best = logits.topk(2)
            token = int(best.indices[0])
            made.append(token)
            gaps.append(float(best.values[0] - best.values[1]))
        assert first is not None
        return first.numpy(), made, gaps


# --- torch hooks ------------------------------------------------------------------------------------------------

Handle = torch.utils.hooks.RemovableHandle
Hook = Callable[[Reference], Handle]
"""Registers a torch hook on the reference's model."""


def edit(layer: int, rows: list[int], change: Change, vector: Tensor | None) -> Hook:
    """Replace rows (and heads) at a point by a function of them."""

    def edited(x: Tensor, site: Site, d_head: int) -> Tensor:
        out = x if site.side == "shared" else x.clone()
        by_head = out[:, :, None] if site.view is None else site.view(out, d_head)  # (b, s, heads or 1, ...)
        heads = list(range(by_head.shape[2])) if change.heads is None else list(change.heads)
        where = (slice(None), torch.tensor(rows)[:, None], torch.tensor(heads))
        became = replacement(by_head[where] * site.scale, change, vector, rows) / site.scale
        if change.neurons is not None:
            others = [i for i in range(became.shape[-1]) if i not in change.neurons]
            became[..., others] = by_head[where][..., others]
        by_head[where] = became
        return out

    def register(reference: Reference) -> Handle:
        module, how = reference.module(change.point, layer), (reference.sites[change.point], reference.d_head)
        if how[0].side in ("in", "shared"):
            return module.register_forward_pre_hook(lambda _, args: (edited(args[0], *how), *args[1:]))
        if how[0].side == "first":
            return module.register_forward_hook(lambda _, args, out: (edited(out[0], *how), *out[1:]))
        return module.register_forward_hook(lambda _, args, out: edited(out, *how))

    return register


def replacement(x: Tensor, change: Change, vector: Tensor | None, rows: list[int]) -> Tensor:
    """What the rows, (b, rows, heads or 1, width), become."""
    if change.kind == "zero":
        return torch.zeros_like(x)
    if change.kind == "scale":
        return x * change.value
    assert vector is not None
    if change.pairs:
        return vector[[source for source, _ in change.pairs]][None, :, None].expand_as(x).clone()
    if change.kind == "resample":
        drawn = [int(np.random.default_rng((change.seed, row)).integers(len(vector))) for row in rows]
        return vector[drawn][None, :, None].expand_as(x).clone()
    if change.kind in ("mean", "patch"):
        return vector.expand_as(x).clone()
    unit = vector / vector.norm()
    if change.kind == "steer":
        size = {"raw": 1.0, "unit": 1.0, "row": x.norm(dim=-1, keepdim=True)}[change.unit]
        return x + change.value * size * (vector if change.unit == "raw" else unit)
    component = (x * unit).sum(-1, keepdim=True)
    return x + ((change.value if change.kind == "set_component" else 0.0) - component) * unit


def knockout(layer: int, rows: list[int], change: Change) -> Hook:
    """Minus infinity before the softmax, through the attention mask of one layer."""

    def cut(module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        mask = kwargs["attention_mask"]  # (b, 1, s, s_kv)
        heads = range(module.config.num_attention_heads) if change.heads is None else change.heads
        mask = mask.repeat(1, module.config.num_attention_heads, 1, 1)
        for head in heads:
            for row in rows:
                mask[:, head, row, list(change.keys)] = -torch.inf
        return args, {**kwargs, "attention_mask": mask}

    return lambda reference: reference.module("attn_pattern", layer).register_forward_pre_hook(cut, with_kwargs=True)
