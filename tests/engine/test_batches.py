"""A batch of prompts of one length gives what each prompt gives alone."""

import numpy as np
import pytest
from recording import Replace
from tolerances import SAME, assert_close, assert_moved, far_out

from engine import Intervention, KVCache, SteerHook, ZeroAblateHook, compile_interventions, forward, trace_forward
from engine.errors import PromptError


def hooks(model, n):
    vec = np.random.default_rng(1).standard_normal(model.config.d_model).astype(np.float32)
    return {
        "none": None,
        "steer": SteerHook().add(1, vec, 1.0),
        "ablate": ZeroAblateHook.for_layers([1], positions=[2]),
        "head": compile_interventions(model, [Intervention("zero", (1,), "z", heads=(0,))], n),
        "knockout": compile_interventions(model, [Intervention("knockout", (1,), "attn_pattern", keys=(1,))], n),
        "q": Replace("q", 1, lambda x: x * np.float32(2)),
    }


@pytest.mark.parametrize("name", ["none", "steer", "ablate", "head", "knockout", "q"])
def test_batched_equals_solo(model, ids, donor, name):
    hook = hooks(model, len(ids))[name]
    both = forward(model, [ids, donor, ids], hook=hook, logits_at="all").logits
    tolerance = far_out(model) if name == "ablate" else SAME
    alone, other = (forward(model, tokens, hook=hook, logits_at="all").logits[0] for tokens in (ids, donor))
    for row, expected in zip(both, (alone, other, alone), strict=True):
        assert_close(row, expected, tolerance)
    assert_moved(both[0], both[1])


def test_a_batch_decodes_over_a_cache_like_each_prompt_alone(model, ids, donor):
    cache = KVCache.with_layers(model.config.n_layers)
    forward(model, [ids[:3], donor[:3]], cache=cache)
    rest = forward(model, [ids[3:], donor[3:]], cache=cache, logits_at="all").logits
    for row, tokens in zip(rest, (ids, donor), strict=True):
        assert_close(row, forward(model, tokens, logits_at="all").logits[0][3:])


def test_a_trace_of_a_batch_has_the_batch_axis(model, ids, donor):
    trace = trace_forward(model, [ids, donor], capture_layers=[1])
    assert trace.residuals[1].shape == (2, len(ids), model.config.d_model)
    assert trace.logits.shape == (2, model.config.d_vocab)


def test_prompts_of_different_lengths_are_refused(synthetic):
    with pytest.raises(PromptError, match="same number of tokens"):
        forward(synthetic, [[1, 2], [3]])
