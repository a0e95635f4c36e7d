"""mechscope's engine: real language models in numpy, open at every step.

from engine import load_model
model = load_model("smollm2-135m-instruct")
"""

from engine.cache import KVCache
from engine.decoder import ForwardResult, forward
from engine.edits import Edit
from engine.errors import EngineError
from engine.forks import Variant
from engine.generate import Generation, generate
from engine.hooks import (
    CompositeHook,
    EditHook,
    LayerHook,
    NoopHook,
    PatchHook,
    RecordHook,
    ScaleHook,
    SteerHook,
    ZeroAblateHook,
)
from engine.injection import kv_inject_test, prefill_inject
from engine.interventions import Intervention, compile_interventions
from engine.lens import (
    embedding_neighbors,
    embedding_row,
    embedding_row_scaled,
    logit_lens_topk,
    project_through_unembed,
    track_race,
    track_token,
    unembedding_row,
)
from engine.load import load_model
from engine.metrics import Metric
from engine.model import Model
from engine.patching import (
    DonorState,
    Trace,
    capture_donor_state,
    map_pre_o_head,
    patch_and_trace,
    run_layer_with_mapped_pre_o_head,
    scoped_layer,
    trace_forward,
)
from engine.points import POINTS
from engine.pools import pooled_rows
from engine.replacements import replacements
from engine.scans import Scan, ablation_scan, alpha_sweep, knockout_scan, patching_grid
from engine.sweep import Sweep, sweep
from engine.trace import StoredTrace, export_trace, load_trace

__all__ = [
    "POINTS",
    "CompositeHook",
    "DonorState",
    "Edit",
    "EditHook",
    "EngineError",
    "ForwardResult",
    "Generation",
    "Intervention",
    "KVCache",
    "LayerHook",
    "Metric",
    "Model",
    "NoopHook",
    "PatchHook",
    "RecordHook",
    "ScaleHook",
    "Scan",
    "SteerHook",
    "StoredTrace",
    "Sweep",
    "Trace",
    "Variant",
    "ZeroAblateHook",
    "ablation_scan",
    "alpha_sweep",
    "capture_donor_state",
    "compile_interventions",
    "embedding_neighbors",
    "embedding_row",
    "embedding_row_scaled",
    "export_trace",
    "forward",
    "generate",
    "knockout_scan",
    "kv_inject_test",
    "load_model",
    "load_trace",
    "logit_lens_topk",
    "map_pre_o_head",
    "patch_and_trace",
    "patching_grid",
    "pooled_rows",
    "prefill_inject",
    "project_through_unembed",
    "replacements",
    "run_layer_with_mapped_pre_o_head",
    "scoped_layer",
    "sweep",
    "trace_forward",
    "track_race",
    "track_token",
    "unembedding_row",
]
