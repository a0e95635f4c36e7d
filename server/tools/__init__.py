"""The tools agents see, in the order they see them. One file per tight group."""

from collections.abc import Callable
from typing import Any

from server.tools.attention import attention_pattern
from server.tools.comparing import compare
from server.tools.effects import forward_ablate, forward_steer, patch_activations
from server.tools.injection import kv_inject_test, prefill_inject
from server.tools.jobs import cancel_job, get_job, start_job
from server.tools.reading import capture_residuals, logit_lens, track_race, track_token
from server.tools.session import list_session, load_model, read_tensor, release, tokenize
from server.tools.tracing import causal_trace
from server.tools.vocabulary import embedding_neighbors, project_through_unembed
from server.tools.writing import generate_with_hooks

SESSION = (load_model, list_session, release, tokenize, read_tensor, start_job, get_job, cancel_job)
"""In every toolset."""

CORE = (
    capture_residuals,
    logit_lens,
    track_token,
    track_race,
    forward_ablate,
    forward_steer,
    patch_activations,
    generate_with_hooks,
)

TOOLS = (
    load_model,
    list_session,
    release,
    tokenize,
    capture_residuals,
    logit_lens,
    track_token,
    track_race,
    attention_pattern,
    forward_ablate,
    forward_steer,
    patch_activations,
    causal_trace,
    generate_with_hooks,
    prefill_inject,
    kv_inject_test,
    compare,
    embedding_neighbors,
    project_through_unembed,
    read_tensor,
    start_job,
    get_job,
    cancel_job,
)

TOOLSETS = {
    "core": tuple(tool for tool in TOOLS if tool in SESSION + CORE),
    "analysis": tuple(tool for tool in TOOLS if tool not in CORE),
    "all": TOOLS,
}
"""What `--toolset` offers."""

KEEPING: dict[Callable[..., Any], tuple[str, ...]] = {prefill_inject: ("keep",)}
"""Arguments that `--read-only` leaves out, because they keep something that a user named.

Jobs stay: a job runs a tool that is offered, with the arguments that are offered, and its `run:` handle is kept as the
`act:` handle of a capture is.
"""

NEVER_JOBS = (list_session, release, tokenize, read_tensor, start_job, get_job, cancel_job)
"""Tools that answer at once: they do not run as jobs."""

PLACELESS = (get_job, cancel_job)
"""Tools whose calls take no place in the gate: they compute nothing, and cancelling a job makes room."""
