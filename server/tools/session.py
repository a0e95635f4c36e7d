"""Models, handles and tokens: load_model, list_session, release, tokenize, read_tensor."""

import time
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from engine import Model
from engine.errors import InputError, clipped
from engine.ops import Array
from schemas.arguments import ModelRef
from schemas.session import Held, ModelCard, ModelInfo, PlacedToken, Released, SessionInfo, TensorPage, Tokens
from server.call import Call
from server.lab import Lab, LoadedModel
from server.store import RememberedModel

HANDLES_SHOWN, MOST_NAMED, LEFT_SHOWN = 50, 40, 12
"""Handles, tensors of one, and files left aside in one answer; agents pay for each."""

STRETCH = 1 << 20
"""Numbers that statistics are made of at one time."""


def load_model(
    call: Call,
    model: Annotated[
        str, Field(description="smollm2-135m-instruct, synthetic, a directory, a .gguf file, or a hub id (owner/name)")
    ] = "smollm2-135m-instruct",
    weights: Annotated[
        Literal["dense", "scoped", "packed", "bf16"],
        Field(description="packed: .gguf only, least memory; scoped: slow; bf16: half, rounded"),
    ] = "dense",
    dense_layers: Annotated[int | None, Field(ge=1, description="scoped: layers that stay dense; default 1")] = None,
) -> ModelInfo:
    """Load a model; returns its handle, shape and memory. Call this first; later calls return at once.

    Then: tokenize, or go straight to logit_lens.
    """
    started = time.perf_counter()
    loaded = call.lab.load(model, weights, call.tick, call.progress, dense_layers)
    return ModelInfo(**described(loaded).model_dump(), seconds=time.perf_counter() - started)


def described(loaded: LoadedModel) -> ModelCard:
    """A loaded model as agents see it."""
    cfg, params = loaded.model.config, loaded.model.params
    return ModelCard(
        model=loaded.handle,
        notice="; ".join(filter(None, [loaded.notice, _left_aside(loaded.model)])) or None,
        name=loaded.model.name,
        family=cfg.family,
        fingerprint=loaded.model.fingerprint,
        weights=loaded.model.weights,
        conversion=loaded.model.conversion,
        dense_layers=params.keep,
        n_layers=cfg.n_layers,
        d_model=cfg.d_model,
        n_heads=cfg.n_heads,
        n_kv_heads=cfg.n_kv_heads,
        d_head=cfg.d_head,
        d_mlp=cfg.d_mlp,
        d_vocab=cfg.d_vocab,
        n_ctx=cfg.n_ctx,
        bytes_in_memory=params.nbytes,
    )


def _left_aside(model: Model) -> str | None:
    if not model.left_aside:
        return None
    return f"weight files beside the model's own were not read: {_named(model.left_aside, LEFT_SHOWN)}"


def list_session(call: Call, start: Annotated[int, Field(ge=0)] = 0) -> SessionInfo:
    """List the models and the handles, with what each costs, 50 handles a page, the newest first.

    What is not in memory comes back when it is used. Handles stay until they are released, restarts included.
    """
    return held(call.lab, call.owner, start)


def held(lab: Lab, owner: str, start: int = 0) -> SessionInfo:
    """The models, and a page of the handles of one principal: jobs, then records."""
    loaded = {item.handle: item.model for item in lab.models}
    known = {model.handle: model for model in [*lab.known(), *(slot.known for slot in lab.slots)]}
    models = [_held_model(model, loaded.get(handle)) for handle, model in known.items()]
    handles = [
        Held(handle=r.handle, about=str(r.provenance.get("about", "")), bytes=r.nbytes, in_memory=r.in_memory)
        for r in lab.store.records(owner)
    ]
    handles += [
        Held(handle=r.handle, about=f"{r.tool}, {r.state}", bytes=0, in_memory=False) for r in lab.store.runs(owner)
    ]
    in_memory = sum(item.bytes for item in [*models, *handles] if item.in_memory)
    stop = start + HANDLES_SHOWN
    return SessionInfo(
        models=models,
        handles=handles[::-1][start:stop],
        handle_count=len(handles),
        next_start=stop if stop < len(handles) else None,
        bytes_in_memory=in_memory,
    )


def _held_model(known: RememberedModel, model: Model | None) -> Held:
    if model is None:
        about, size = f"{known.name}, {known.weights}: loaded again when it is used", known.nbytes
    else:
        layers = f": {len(model.params.dense_layers)} of {model.config.n_layers} layers dense now"
        about, size = f"{known.name}, {model.weights}{layers * (model.weights == 'scoped')}", model.params.nbytes
    return Held(handle=known.handle, about=about, bytes=size, in_memory=model is not None)


def release(call: Call, handle: Annotated[str, Field(description="any handle; list_session shows them")]) -> Released:
    """Free a capture, cache or ended job for good; a model leaves memory, and its handle brings it back."""
    if handle.startswith("run:") and call.lab.store.run(handle, call.owner).state == "running":
        raise InputError(f"{handle} is running; cancel_job stops it")
    freed = (
        call.lab.release_model(handle) if handle.startswith("model:") else call.lab.store.release(handle, call.owner)
    )
    return Released(handle=handle, bytes_freed=freed)


def tokenize(
    call: Call, text: Annotated[str, Field(min_length=1, max_length=100_000)], model: ModelRef = None
) -> Tokens:
    """Show how the model splits a text: ids, pieces and positions. Positions are what other tools count by."""
    loaded = call.loaded(model)
    ids = call.ids(loaded.model, text)
    if len(ids) > 1000:
        raise InputError(f"the text is {len(ids)} tokens; tokenize shows at most 1000: give a shorter text")
    tokens = [PlacedToken(id=i, text=loaded.model.tokenizer.piece(i), position=p) for p, i in enumerate(ids)]
    return Tokens(model=loaded.handle, notice=loaded.notice, count=len(ids), tokens=tokens)


def read_tensor(
    call: Call,
    handle: Annotated[str, Field(description="an act: or kv: handle")],
    tensor: Annotated[str | None, Field(description="as in resid_post.3; default the first")] = None,
    start: Annotated[int, Field(ge=0)] = 0,
    count: Annotated[int, Field(ge=1, le=500)] = 64,
) -> TensorPage:
    """Page through the numbers of a stored tensor in row-major order, with its statistics."""
    record = call.record(handle)
    names = list(record.tensors)
    name = names[0] if tensor is None else tensor
    if name not in record.tensors:
        raise InputError(
            f"{handle} has no tensor {clipped(name)}; it has {_named(names, MOST_NAMED, ', by point and layer')}"
        )
    array = call.tensors(record)[name]
    flat = array.reshape(-1)
    if start >= flat.size:
        raise InputError(f"start is {start}, but {name} has {flat.size} numbers")
    stop = min(start + count, flat.size)
    return TensorPage(
        handle=handle,
        tensor=name,
        tensors=names[:MOST_NAMED],
        tensor_count=len(names),
        shape=list(array.shape),
        start=start,
        values=[float(v) for v in flat[start:stop]],
        next_start=stop if stop < flat.size else None,
        **statistics(array),
    )


def _named(names: Sequence[str], most: int, by: str = "") -> str:
    more = f" and {len(names) - most} more{by}" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def statistics(array: Array) -> dict[str, float]:
    """Of all numbers of a tensor, in float64, some at a time."""
    flat = array.reshape(-1)
    parts = [slice(start, start + STRETCH) for start in range(0, flat.size, STRETCH)]
    mean = sum(float(flat[part].sum(dtype=np.float64)) for part in parts) / flat.size
    variance = sum(float(np.square(flat[part] - np.float64(mean)).sum()) for part in parts) / flat.size
    squares = sum(float(np.square(flat[part], dtype=np.float64).sum()) for part in parts)
    return {
        "mean": mean,
        "std": variance**0.5,
        "min": float(flat.min()),
        "max": float(flat.max()),
        "norm": squares**0.5,
    }
