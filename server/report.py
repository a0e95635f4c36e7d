"""A tool's answer -> readable lines for the demo: `show`. One small renderer per tool."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.table import Table

Answer = dict[str, Any]


def show(console: Console, tool: str, arguments: dict[str, Any], answer: Answer) -> None:
    """Print the call as an agent makes it, then its answer."""
    console.print(f"\n[bold cyan]{tool}[/] [dim]{escape(json.dumps(arguments, ensure_ascii=False))}[/]")
    if answer.get("notice"):
        console.print(f"[yellow]{escape(answer['notice'])}[/]")
    for part in _RENDERERS[tool](answer):
        console.print(part)


def _text(words: str) -> str:
    """Model text in quotes on one line, control characters shown."""
    return escape(repr(words))


def _percent(share: float) -> str:
    """What rounding decides is told as small: it differs between machines."""
    return f"{100 * share:.1f}%" if abs(share) >= 0.001 else f"{100 * share:.2f}%" if abs(share) >= 1e-4 else "<0.01%"


def _tops(entries: Sequence[Answer]) -> str:
    return "   ".join(f"{_text(e['text'])} [green]{_percent(e['probability'])}[/]" for e in entries)


def _thinned(rows: list[Answer]) -> list[Answer]:
    """Every third row, and the last."""
    return [row for i, row in enumerate(rows) if i % 3 == 0 or i == len(rows) - 1]


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in columns:
        table.add_column(column, justify="left", no_wrap=True)
    return table


def _model(a: Answer) -> list[RenderableType]:
    return [
        f"{a['name']}: {a['n_layers']} layers, d_model {a['d_model']}, {a['n_heads']} heads on {a['n_kv_heads']} "
        f"key-value heads, {a['d_vocab']} tokens; {a['bytes_in_memory'] / 1e6:.0f} MB, {a['seconds']:.1f} s",
        f"[dim]{a['model']}, weights sha256 {a['fingerprint'][:16]}...[/]",
    ]


def _tokens(a: Answer) -> list[RenderableType]:
    return ["  ".join(f"[dim]{t['position']}[/] {_text(t['text'])} [dim]({t['id']})[/]" for t in a["tokens"])]


def _capture(a: Answer) -> list[RenderableType]:
    norms = a["norms"]
    return [
        f"{', '.join(a['points'])} of {len(a['layers'])} layers at positions {a['positions']}: {a['bytes']} bytes",
        f"mean norm {norms[0]['mean_norm']:.1f} at layer {norms[0]['layer']}, "
        f"{norms[-1]['mean_norm']:.1f} at layer {norms[-1]['layer']}",
        f"[dim]{a['handle']}[/]",
    ]


def _lens(a: Answer) -> list[RenderableType]:
    table = _table("layer", "top tokens at the position")
    for row in a["rows"]:
        table.add_row(str(row["layer"]), _tops(row["top"]))
    error = a.get("identity_error")
    return [table, *([] if error is None else [f"identity error at the last layer: {error:.1e}"])]


def _track(a: Answer) -> list[RenderableType]:
    table = _table("layer", "probability", "rank", "logit")
    for row in _thinned(a["rows"]):
        table.add_row(str(row["layer"]), _percent(row["probability"]), str(row["rank"]), f"{row['logit']:.2f}")
    since = a["emergence_layer"]
    verdict = "does not lead at the end" if since is None else f"leads from layer {since} to the end"
    return [table, f"{_text(a['token']['text'])} {verdict}"]


def _race(a: Answer) -> list[RenderableType]:
    table = _table("layer", *(_text(t["text"]) for t in a["tokens"]), "leader")
    for row in _thinned(a["rows"]):
        table.add_row(str(row["layer"]), *map(_percent, row["probabilities"]), _text(row["leader"]))
    lead = "; ".join(f"layer {c['layer']}: {_text(c['takes'])} passes {_text(c['loses'])}" for c in a["crossings"])
    return [table, f"the lead changes: {lead or 'never'}"]


def _view(a: Answer) -> list[RenderableType]:
    words = "   ".join(f"{_text(e['text'])} [green]{e['score']:.3f}[/]" for e in a["top"])
    return [f"{a['score']}, norm {a['norm']:.2f}", words]


def _page(a: Answer) -> list[RenderableType]:
    return [f"{a['tensor']} {a['shape']}: {a['values']} ... mean {a['mean']:.3f}, std {a['std']:.3f}"]


def _effect(a: Answer) -> list[RenderableType]:
    lines: list[RenderableType] = [f"baseline  {_tops(a['baseline'])}", f"effect    {_tops(a['effect'])}"]
    if "donor" in a:
        lines.append(f"donor     {_tops(a['donor'])}")
    told = [f"KL {a['kl']:.3f} nats"]
    if (d := a.get("logit_difference")) is not None:
        difference = f"logit({_text(d['token'])}) - logit({_text(d['against'])})"
        told.append(f"{difference}: {d['baseline']:.2f} -> {d['effect']:.2f}")
    if a.get("recovered") is not None:
        told.append(f"recovered {100 * a['recovered']:.1f}% of the way to the donor")
    lines.append(", ".join(told))
    return [*lines, _applied(a)]


def _applied(a: Answer) -> str:
    rows = (f"{r['kind']} at {r['point']}, layer {r['layer']}, fired {r['fired']} x" for r in a["applied"])
    return f"[dim]{'; '.join(rows)}[/]"


def _trace(a: Answer) -> list[RenderableType]:
    table = _table(*a["axes"], "value", "recovered")
    for cell in [*a["top"], *a["bottom"][::-1]]:
        recovered = "-" if cell["recovered"] is None else f"{100 * cell['recovered']:.0f}%"
        table.add_row(*(str(cell[axis]) for axis in a["axes"]), f"{cell['value']:.3f}", recovered)
    differs = "; ".join(f"position {d['position']}: {_text(d['clean'])}, {_text(d['corrupt'])}" for d in a["differs"])
    return [
        f"{escape(a['metric'])}: {a['clean']:.3f} clean, {a['corrupt']:.3f} corrupt; the prompts differ at {differs}",
        table,
        f"{a['cells']} cells, {a['identical_cells']} of them identical by construction; {a['layer_rows']} layer rows",
        f"[dim]{a['handle']}[/]",
    ]


def _attention(a: Answer) -> list[RenderableType]:
    table = _table("layer", "head", "entropy", "attends to")
    for row in a["rows"]:
        sources = "   ".join(f"{_text(s['text'])} [green]{_percent(s['weight'])}[/]" for s in row["top"])
        table.add_row(str(row["layer"]), str(row["head"]), f"{row['entropy']:.2f}", sources)
    return [table]


def _comparison(a: Answer) -> list[RenderableType]:
    table = _table("layer", "cosine", "KL of the lens")
    for row in _thinned(a["rows"]):
        cosine = "-" if row["cosine"] is None else f"{row['cosine']:.3f}"
        table.add_row(str(row["layer"]), cosine, f"{row['kl']:.3f}")
    return [table, f"a  {_tops(a['top_a'])}", f"b  {_tops(a['top_b'])}"]


def _generation(a: Answer) -> list[RenderableType]:
    texts = [f"{name:<9} {_text(a[name]['text'])}" for name in ("baseline", "hooked")]
    return [*texts, _applied(a)]


def _injection(a: Answer) -> list[RenderableType]:
    return [
        f"baseline  {_tops(a['baseline'])}",
        f"injected  {_tops(a['injected'])}",
        f"KL {a['kl']:.3f} nats, {a['rows_replaced']} rows of {_text(a['replaced_text'])} replaced by those of "
        f"{_text(a.get('donor_text', 'a kept cache'))}",
        f"baseline  {_text(a['baseline_continuation']['text'])}",
        f"injected  {_text(a['injected_continuation']['text'])}",
        f"[dim]{a.get('handle', 'not kept')}[/]",
    ]


def _scan(a: Answer) -> list[RenderableType]:
    table = _table("layers", "probability", "recovered", "KL")
    for cell in _thinned(a["from_last"]):
        recovered = "-" if cell["recovered"] is None else f"{100 * cell['recovered']:.1f}%"
        table.add_row(cell["layers"], _percent(cell["probability"]), recovered, f"{cell['kl']:.3f}")
    target = f"{_text(a['target'])}: {_percent(a['baseline'])} in the recipient, {_percent(a['donor'])} in the donor"
    controls = (
        f"own cache KL {a['self_control']['kl']:.3f}; unrelated donor {_percent(a['unrelated_control']['probability'])}"
    )
    return [target, table, f"controls: {controls}"]


def _session(a: Answer) -> list[RenderableType]:
    table = _table("bytes", "handle", "holds")
    for held in [*a["models"], *a["handles"]]:
        table.add_row(str(held["bytes"]), held["handle"], held["about"])
    return [table]


def _started(a: Answer) -> list[RenderableType]:
    if (cost := a.get("estimate")) is not None:
        return [f"{cost['forwards']:.1f} passes, about {cost['seconds']:.1f} s and {cost['bytes']} bytes"]
    return [f"[dim]{a['run']}[/]"]


def _job(a: Answer) -> list[RenderableType]:
    left = f" of {a['total']}" if "total" in a else ""
    line = f"{a['tool']} {a['state']}: {a['done']}{left} in {a['seconds']:.1f} s"
    return [line, *(_RENDERERS[a["tool"]](a["result"]) if "result" in a else [])]


def _job_state(a: Answer) -> list[RenderableType]:
    return [a["state"]]


def _released(a: Answer) -> list[RenderableType]:
    return [f"{a['bytes_freed']} bytes freed"]


_RENDERERS: dict[str, Callable[[Answer], list[RenderableType]]] = {
    "load_model": _model,
    "list_session": _session,
    "release": _released,
    "tokenize": _tokens,
    "capture_residuals": _capture,
    "logit_lens": _lens,
    "track_token": _track,
    "track_race": _race,
    "attention_pattern": _attention,
    "forward_ablate": _effect,
    "forward_steer": _effect,
    "patch_activations": _effect,
    "causal_trace": _trace,
    "generate_with_hooks": _generation,
    "prefill_inject": _injection,
    "kv_inject_test": _scan,
    "compare": _comparison,
    "embedding_neighbors": _view,
    "project_through_unembed": _view,
    "read_tensor": _page,
    "start_job": _started,
    "get_job": _job,
    "cancel_job": _job_state,
}
