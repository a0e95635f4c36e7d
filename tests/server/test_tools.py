"""Each tool's answer is what the engine computes, called through a real client in memory."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_files
from clients import ERAS, ask, connected, refused

from engine import (
    Intervention,
    KVCache,
    Metric,
    Model,
    RecordHook,
    SteerHook,
    ZeroAblateHook,
    compile_interventions,
    forward,
    generate,
    kv_inject_test,
    patching_grid,
    pooled_rows,
    prefill_inject,
    trace_forward,
)
from engine.distribution import kl_divergence, softmax_of
from engine.lens import leads, lens_logits
from engine.params import Params
from engine.planted import CIRCUITS
from server.app import build_server
from server.auth import LOCAL
from server.lab import Lab

PROMPT, DONOR = "abcabcabcab", "abdabdabdab"
pytestmark = pytest.mark.anyio


def close(a: float, b: float) -> bool:
    return a == pytest.approx(b, rel=1e-4, abs=1e-7)


def probabilities(model: Model, prompt: str, hook=None) -> np.ndarray:
    return softmax_of(forward(model, model.encode(prompt), hook=hook).logits[0, -1])


@pytest.mark.parametrize("mode", ERAS)
async def test_load_model_describes_the_model_and_loads_it_once(mode: str) -> None:
    async with connected(build_server(), mode) as client:
        first, second = [await ask(client, "load_model", model="synthetic") for _ in range(2)]
    assert first["model"] == second["model"]
    assert (first["n_layers"], first["d_model"], first["d_vocab"]) == (4, 64, 257)


async def test_a_scoped_model_is_loaded_once_per_budget_and_costs_what_is_dense(tmp_path: Path) -> None:
    path = str(tiny_files.gguf_file(tmp_path / "tiny.gguf"))
    async with connected(build_server(Lab())) as client:
        dense = await ask(client, "load_model", model=path)
        one, same, both = [
            await ask(client, "load_model", model=path, weights="scoped", **budget)
            for budget in ({}, {"dense_layers": 1}, {"dense_layers": 2})
        ]
        text = await refused(client, "load_model", model=path, weights="scoped", dense_layers=3)
        held = (await ask(client, "list_session"))["models"]
    assert "tiny has 2 layers; valid: 1 to 2" in text
    assert (dense["weights"], dense["dense_layers"], one["weights"]) == ("dense", 2, "scoped")
    assert one["model"] == same["model"] != both["model"]
    assert (one["dense_layers"], both["dense_layers"]) == (1, 2)
    assert one["bytes_in_memory"] < both["bytes_in_memory"] == dense["bytes_in_memory"]
    assert [item["about"] for item in held] == [
        "tiny, dense",
        "tiny, scoped: 1 of 2 layers dense now",
        "tiny, scoped: 2 of 2 layers dense now",
    ]
    assert [item["bytes"] for item in held] == [m["bytes_in_memory"] for m in (dense, one, both)]


async def test_every_result_on_the_synthetic_model_says_that_it_is_synthetic(lab: Lab) -> None:
    async with connected(build_server(lab)) as client:
        for tool, arguments in EVERY_TOOL_WITH_A_MODEL.items():
            assert "synthetic" in (await ask(client, tool, **arguments))["notice"], tool


async def test_tokenize_gives_ids_pieces_and_positions(lab: Lab) -> None:
    async with connected(build_server(lab)) as client:
        answer = await ask(client, "tokenize", text="aé")
    assert [(t["position"], t["id"]) for t in answer["tokens"]] == [(0, 97), (1, 195), (2, 169)]
    assert answer["tokens"][0]["text"] == "a"


async def test_a_capture_holds_the_rows_it_was_asked_for(lab: Lab, synthetic: Model) -> None:
    async with connected(build_server(lab)) as client:
        held = await ask(
            client, "capture_residuals", prompt=PROMPT, layers=[2, 0], points=["resid_post", "z"], positions=[5, -1]
        )
        page = await ask(client, "read_tensor", handle=held["handle"], tensor="resid_post.2", start=64, count=500)
        heads = await ask(client, "read_tensor", handle=held["handle"], tensor="z.0", count=1)
    expected = synthetic.forward_with_capture(PROMPT, [2])[2]
    assert held["positions"] == [5, 10]
    assert page["shape"] == [2, 64]
    assert heads["shape"] == [2, 4, 16]
    assert page["next_start"] is None
    np.testing.assert_array_equal(np.float32(page["values"]), expected[10])
    norm = next(n for n in held["norms"] if n["point"] == "resid_post" and n["layer"] == 2)
    assert close(norm["mean_norm"], np.linalg.norm(expected[[5, 10]], axis=1).mean())


async def test_the_lens_of_the_last_layer_is_the_models_distribution(lab: Lab, synthetic: Model) -> None:
    async with connected(build_server(lab)) as client:
        answer = await ask(client, "logit_lens", prompt=PROMPT, layers=[1, -1], positions=[3, -1], k=5)
    assert answer["identity_error"] < 1e-6
    assert [(r["layer"], r["position"]) for r in answer["rows"]] == [(1, 3), (1, 10), (3, 3), (3, 10)]
    own = probabilities(synthetic, PROMPT)
    assert all(t["probability"] == pytest.approx(own[t["id"]], rel=5e-4) for t in answer["rows"][-1]["top"])


async def test_a_vector_of_a_capture_of_several_points_says_which(lab: Lab, synthetic: Model) -> None:
    async with connected(build_server(lab)) as client:
        held = await ask(client, "capture_residuals", prompt=PROMPT, layers=[2], points=["mlp_out", "attn_out"])
        unsaid = await refused(client, "embedding_neighbors", vector={"handle": held["handle"]})
        other = await refused(client, "embedding_neighbors", vector={"handle": held["handle"], "point": "z"})
        norms = [
            (await ask(client, "project_through_unembed", vector={"handle": held["handle"], "point": point}))["norm"]
            for point in ("attn_out", "mlp_out")
        ]
    assert "say which point; the capture holds mlp_out, attn_out" in unsaid
    assert "point 'z' is not in the capture; the capture holds mlp_out, attn_out" in other
    told = {norm["point"]: norm["mean_norm"] for norm in held["norms"]}
    assert close(norms[0], told["attn_out"])
    assert close(norms[1], told["mlp_out"])


async def test_layers_as_a_result_tells_them_are_layers(lab: Lab) -> None:
    async with connected(build_server(lab)) as client:
        told, sliced = [
            await ask(client, "track_token", prompt=PROMPT, token="a", layers=layers) for layers in ("1-2", "1:3")
        ]
    assert [row["layer"] for row in told["rows"]] == [row["layer"] for row in sliced["rows"]] == [1, 2]


async def test_a_part_of_a_donor_goes_to_where_it_was_unless_told_otherwise(lab: Lab) -> None:
    async with connected(build_server(lab)) as client:
        pair = {"recipient": "hello", "donor": "world", "max_new_tokens": 1}
        same, told = [await ask(client, "prefill_inject", **pair, source=[2, 4], **to) for to in ({}, {"dest": 0})]
    assert (same["dest"], told["dest"]) == ([2, 4], [0, 2])
    assert (same["replaced_text"], same["donor_text"]) == ("ll", "rl")


async def test_the_lens_reads_a_capture_as_it_reads_a_prompt(lab: Lab) -> None:
    async with connected(build_server(lab)) as client:
        held = await ask(client, "capture_residuals", prompt=PROMPT, positions="all")
        by_handle = await ask(client, "logit_lens", tensor=held["handle"], layers=[2], positions=[4])
        by_prompt = await ask(client, "logit_lens", prompt=PROMPT, layers=[2], positions=[4])
    assert [t["id"] for t in by_handle["rows"][0]["top"]] == [t["id"] for t in by_prompt["rows"][0]["top"]]


async def test_track_token_gives_probability_rank_and_logit_per_layer(lab: Lab, synthetic: Model) -> None:
    residuals = synthetic.forward_with_capture(PROMPT, range(4))
    async with connected(build_server(lab)) as client:
        answer = await ask(client, "track_token", prompt=PROMPT, token="c", position=6)
    for row in answer["rows"]:
        ranked = synthetic.logit_lens(residuals[row["layer"]][6], 257)
        assert ranked[row["rank"]][0] == ord("c")
        assert close(row["probability"], ranked[row["rank"]][1])


async def test_a_token_emerges_where_its_lead_begins_and_not_by_luck() -> None:
    circuit = CIRCUITS["induction"]
    async with connected(build_server()) as client:
        await ask(client, "load_model", model="synthetic:induction")
        lens = await ask(client, "logit_lens", prompt=circuit.prompt, layers=[0], k=1)
        luck = lens["rows"][0]["top"][0]["id"]
        by_luck = await ask(client, "track_token", prompt=circuit.prompt, token=luck, layers=[0])
        written = await ask(client, "track_token", prompt=circuit.prompt, token=circuit.answer)
    assert by_luck["rows"][-1]["rank"] == 0
    assert by_luck["emergence_layer"] is None
    assert "too flat for a lead" in by_luck["notice"]
    assert written["emergence_layer"] == circuit.heads["induction"][0]
    assert "too flat" not in written["notice"]


async def test_a_token_emerges_in_a_layer_that_was_read(lab: Lab, synthetic: Model) -> None:
    lens = [lens_logits(synthetic, row) for row in synthetic.capture_residuals(PROMPT, range(4)).values()]
    best = int(lens[2].argmax())
    assert leads(lens[2], best)
    assert not leads(lens[1], best)
    assert lens[3].argmax() != best
    late = int(lens[3].argmax())
    async with connected(build_server(lab)) as client:
        answer = await ask(client, "track_token", prompt=PROMPT, token=best, layers=[1, 2])
        unread = await ask(client, "track_token", prompt=PROMPT, token=late, layers=[0, 1])
    assert (answer["emergence_layer"], unread["emergence_layer"]) == (2, None)
    assert "ends on top" not in answer["notice"] + unread["notice"]


async def test_a_token_that_is_level_with_another_is_not_said_to_be_in_a_flat_distribution(lab: Lab) -> None:
    model = lab.models[0].model
    best, other = np.argsort(-forward(model, model.encode(PROMPT)).logits[0, -1])[:2]
    unembed = 10 * model.params.unembed
    unembed[other] = unembed[best]
    params = Params(model.params.ends._replace(unembed=unembed), model.params.layer, keep=4)
    lab.models[0].model = replace(model, params=params)
    async with connected(build_server(lab)) as client:
        answer = await ask(client, "track_token", prompt=PROMPT, token=int(best))
    assert answer["rows"][-1]["rank"] == 0
    assert answer["rows"][-1]["probability"] == pytest.approx(0.5, abs=0.01)
    assert answer["emergence_layer"] is None
    assert "ahead of another by no more than rounding" in answer["notice"]
    assert "too flat" not in answer["notice"]


async def test_a_race_names_the_leader_and_the_crossings(lab: Lab) -> None:
    async with connected(build_server(lab)) as client:
        answer = await ask(client, "track_race", prompt=PROMPT, tokens=["c", "x", "e"])
    names = [t["text"] for t in answer["tokens"]]
    leaders = [row["leader"] for row in answer["rows"]]
    assert leaders == [names[int(np.argmax(row["probabilities"]))] for row in answer["rows"]]
    changes = [layer for layer in range(1, 4) if leaders[layer] != leaders[layer - 1]]
    assert [c["layer"] for c in answer["crossings"]] == changes


async def test_forward_ablate_reports_the_effect_and_how_often_it_fired(lab: Lab, synthetic: Model) -> None:
    ids = synthetic.encode(PROMPT)
    async with connected(build_server(lab)) as client:
        answer = await ask(client, "forward_ablate", prompt=PROMPT, layers=[1], positions=[2, 3], token="c")
    base, changed = (
        forward(synthetic, ids, hook=h).logits[0, -1] for h in (None, ZeroAblateHook.for_layers([1], [2, 3]))
    )
    assert close(answer["kl"], kl_divergence(changed, base))
    assert close(answer["token"]["probability"], softmax_of(changed)[ord("c")])
    assert close(answer["token"]["baseline_probability"], softmax_of(base)[ord("c")])
    assert answer["applied"] == [{"kind": "zero", "point": "resid_post", "layer": 1, "positions": [2, 3], "fired": 2}]


async def test_zeroing_a_whole_residual_names_the_points_that_answer_better(lab: Lab) -> None:
    async with connected(build_server(lab)) as client:
        answer = await ask(client, "forward_ablate", prompt=PROMPT, layers=[3])
    assert all(name in answer["notice"] for name in ("attn_out", "mlp_out", "z"))
    assert [t["probability"] for t in answer["effect"]] == pytest.approx([1 / 257] * 5, rel=1e-5)


OVER = {
    "position": (["abcabcabcxx", DONOR], "", "position by position over 2 prompts of 11 tokens"),
    "pooled": (["hello", DONOR], "pooled", "all 16 rows of 2 prompts of 5 to 11 tokens"),
    "other lengths": (["hello", "worlds"], "", "9 rows of 2 prompts of 5 to 6 tokens, the first of each left out; "),
}


@pytest.mark.parametrize("case", OVER)
async def test_mean_ablation_puts_the_mean_of_other_prompts_in_place_and_tells_it(
    lab: Lab, synthetic: Model, case: str
) -> None:
    others, match, told = OVER[case]
    rows = []
    for other in others:
        record = RecordHook.for_layers([2], points=["mlp_out"])
        forward(synthetic, synthetic.encode(other), hook=record)
        rows.append(record.get("mlp_out")[2])

    class Replace(ZeroAblateHook):
        def wants(self, point: str, layer: int) -> bool:
            return point == "mlp_out" and layer == 2

        def at(self, point, layer, x, pos, key_pos=None):
            if case == "position":
                return np.mean(rows, 0, np.float32)[None]
            first, out = 1 if case == "other lengths" else 0, x.copy()
            out[:, first:] = np.concatenate([row[first:] for row in rows]).mean(0)
            return out

    expected = probabilities(synthetic, PROMPT, Replace())
    asked = {"layers": [2], "point": "mlp_out", "mode": "mean", "mean_over": others} | (
        {"match": match} if match else {}
    )
    described = {"kind": "mean", "layers": [2], "point": "mlp_out", "over": others} | (
        {"match": match} if match else {}
    )
    async with connected(build_server(lab)) as client:
        answers = [
            await ask(client, "forward_ablate", prompt=PROMPT, **asked),
            await ask(client, "forward_ablate", prompt=PROMPT, interventions=[described]),
        ]
        text = await ask(client, "generate_with_hooks", prompt=PROMPT, max_new_tokens=2, interventions=[described])
    for answer in answers:
        assert all(close(t["probability"], expected[t["id"]]) for t in answer["effect"])
        assert f"mean at mlp_out: {told}" in answer["notice"]
        assert answer["applied"][0]["positions"] == ("all_but_first" if case == "other lengths" else "all")
    assert told in text["notice"]
    assert ("New tokens' rows: over all rows but each prompt's first" in text["notice"]) == (case == "position")


async def test_ablating_by_the_mean_or_by_rows_of_the_prompt_itself_changes_nothing(lab: Lab) -> None:
    async with connected(build_server(lab)) as client:
        for mode in ("mean", "resample"):
            asked = {"layers": "all", "point": "mlp_out", "mode": mode, "mean_over": [PROMPT]}
            own = await ask(client, "forward_ablate", prompt=PROMPT, **asked)
            pooled = await ask(client, "forward_ablate", prompt=PROMPT, **asked, match="pooled")
            assert own["kl"] == 0
            assert own["effect"] == own["baseline"]
            assert pooled["kl"] > 1e-3


async def test_forward_steer_adds_alpha_times_the_vector_at_the_last_token(lab: Lab, synthetic: Model) -> None:
    direction = synthetic.unembedding_for(ord("x")) - synthetic.unembedding_for(ord("c"))
    vector = {"minus": [{"token": "x", "space": "unembed"}, {"token": "c", "space": "unembed"}]}
    async with connected(build_server(lab)) as client:
        answer = await ask(
            client,
            "forward_steer",
            prompt=PROMPT,
            steers=[{"layer": 2, "vector": vector, "alpha": 3}],
            token="x",
            against="c",
        )
    logits = forward(synthetic, synthetic.encode(PROMPT), hook=SteerHook().add(2, direction, 3.0)).logits[0, -1]
    assert close(answer["logit_difference"]["effect"], logits[ord("x")] - logits[ord("c")])
    assert answer["logit_difference"]["effect"] > answer["logit_difference"]["baseline"] + 1


@pytest.mark.parametrize("place", [{"position": -1}, {"donor_position": 10, "recipient_position": 10}])
async def test_patching_the_last_row_of_the_last_layer_gives_the_donors_answer(lab: Lab, place: dict) -> None:
    async with connected(build_server(lab)) as client:
        answer = await ask(
            client, "patch_activations", donor=DONOR, recipient=PROMPT, targets=[{"layer": -1, **place}], token="d"
        )
    assert answer["effect"] == answer["donor"]
    assert answer["baseline"] != answer["donor"]


async def test_patch_positions_may_differ_between_the_prompts(lab: Lab, synthetic: Model) -> None:
    row = synthetic.forward_with_capture("hello", [1])[1][2]
    targets = [{"layer": 1, "donor_position": 2, "recipient_position": 4}]
    async with connected(build_server(lab)) as client:
        answer = await ask(client, "patch_activations", donor="hello", recipient=PROMPT, targets=targets)

    class Write(ZeroAblateHook):
        def wants(self, point: str, layer: int) -> bool:
            return point == "resid_post" and layer == 1

        def at(self, point, layer, x, pos, key_pos=None):
            x[:, 4] = row

    expected = probabilities(synthetic, PROMPT, Write())
    assert all(close(t["probability"], expected[t["id"]]) for t in answer["effect"])


async def test_generation_shows_the_text_with_and_without_the_hooks(lab: Lab, synthetic: Model) -> None:
    vector = synthetic.unembedding_for(ord("x"))
    steer = {"layer": 3, "vector": {"token": "x", "space": "unembed"}, "alpha": 50}
    async with connected(build_server(lab)) as client:
        answer = await ask(
            client, "generate_with_hooks", prompt=PROMPT, max_new_tokens=6, steers=[steer], ablate_layers=[1]
        )
    assert answer["baseline"]["ids"] == generate(synthetic, synthetic.encode(PROMPT), 6).ids
    text, ids = synthetic.generate_with_hooks(PROMPT, 6, [1], [(3, vector, 50.0)])
    assert (answer["hooked"]["text"], answer["hooked"]["ids"]) == (text, ids)
    assert {(a["kind"], a["fired"]) for a in answer["applied"]} == {("zero", 11 + 5), ("steer", 6)}


async def test_a_text_that_ends_for_want_of_room_says_so(lab: Lab) -> None:
    steer = {"layer": 1, "vector": {"random_seed": 1}, "alpha": 5.0}
    async with connected(build_server(lab)) as client:
        made = await ask(client, "generate_with_hooks", prompt=[1] * 510, max_new_tokens=9, steers=[steer])
    assert [made[side]["stopped"] for side in ("baseline", "hooked")] == ["context"] * 2
    assert made["notice"].count("the context of 512 tokens is full") == 1


async def test_sampling_with_one_seed_repeats_itself_and_alpha_zero_changes_nothing(lab: Lab) -> None:
    arguments = {"prompt": PROMPT, "max_new_tokens": 12, "temperature": 1.5, "seed": 7}
    none = {"layer": 1, "vector": {"random_seed": 3}, "alpha": 0.0}
    async with connected(build_server(lab)) as client:
        first, second = [await ask(client, "generate_with_hooks", **arguments, steers=[none]) for _ in range(2)]
        greedy = await ask(client, "generate_with_hooks", prompt=PROMPT, max_new_tokens=12)
    assert first == second
    assert first["baseline"] == first["hooked"]
    assert first["first_difference"] is None
    assert first["baseline"]["ids"] != greedy["baseline"]["ids"]


async def test_prefill_inject_of_everything_gives_the_donors_answer(lab: Lab, synthetic: Model) -> None:
    async with connected(build_server(lab)) as client:
        answer = await ask(client, "prefill_inject", recipient=PROMPT, donor=DONOR, max_new_tokens=4)
    donor = probabilities(synthetic, DONOR)
    assert all(close(t["probability"], donor[t["id"]]) for t in answer["injected"])
    assert answer["injected_continuation"]["ids"] == generate(synthetic, synthetic.encode(DONOR), 4).ids
    assert answer["rows_replaced"] == 4 * 10


async def test_a_kept_cache_can_be_continued_and_given_as_a_donor(lab: Lab, synthetic: Model) -> None:
    async with connected(build_server(lab)) as client:
        kept = await ask(
            client, "prefill_inject", recipient=PROMPT, donor=DONOR, layers=[1, 2], source=[2, 5], dest=4, keep=True
        )
        goes_on = await ask(client, "generate_with_hooks", prompt="b", cache=kept["handle"], max_new_tokens=20)
        again = await ask(client, "prefill_inject", recipient=PROMPT, donor=kept["handle"], max_new_tokens=20)
    direct = prefill_inject(synthetic, synthetic.encode(PROMPT), synthetic.encode(DONOR), [1, 2], (2, 5), 4)
    assert kept["kl"] == pytest.approx(direct.kl, rel=1e-4)
    assert goes_on["baseline"]["ids"] == kept["injected_continuation"]["ids"] == again["injected_continuation"]["ids"]


async def test_kv_inject_test_scans_layers_both_ways_with_its_controls(lab: Lab, synthetic: Model) -> None:
    async with connected(build_server(lab)) as client:
        answer = await ask(client, "kv_inject_test", recipient=PROMPT, donor=DONOR, target="d", layers=[3, 1])
    direct = kv_inject_test(synthetic, synthetic.encode(PROMPT), synthetic.encode(DONOR), ord("d"), [1, 3])
    assert [c["layers"] for c in answer["per_layer"]] == ["1", "3"]
    assert [c["layers"] for c in answer["from_last"]] == ["3", "1,3"]
    assert [c["layers"] for c in answer["from_first"]] == ["1", "1,3"]
    assert all(
        close(a["probability"], b.probability) for a, b in zip(answer["per_layer"], direct.per_layer, strict=True)
    )
    assert answer["self_control"]["kl"] < 1e-9
    assert answer["unrelated_control"]["kl"] > 1e-3


async def test_a_causal_trace_is_the_engines_grid(lab: Lab, synthetic: Model) -> None:
    clean, corrupt = synthetic.encode(DONOR), synthetic.encode(PROMPT)
    metrics = {
        "probability": ({"token": "d"}, Metric("probability", ord("d"))),
        "logit_difference": ({"token": "d", "against": "c"}, Metric("logit_difference", ord("d"), ord("c"))),
        "kl": ({}, Metric("kl")),
    }
    async with connected(build_server(lab)) as client:
        for name, (tokens, metric) in metrics.items():
            asked = {"clean": DONOR, "corrupt": PROMPT, "metric": name, "point": "attn_out", "k": 3} | tokens
            answer = await ask(client, "causal_trace", **asked)
            grid = patching_grid(synthetic, clean, corrupt, metric, "attn_out")
            for shown, end in zip((answer["top"], answer["bottom"]), grid.ends(3), strict=True):
                assert [(cell["layer"], cell["position"]) for cell in shown] == [c for c, _ in end]
                assert all(close(cell["value"], value) for cell, (_, value) in zip(shown, end, strict=True))
                assert all(close(cell["change"], cell["value"] - answer["corrupt"]) for cell in shown)
            assert len(answer["top"]) <= 3
            assert answer["top"] + answer["bottom"]
            assert close(answer["clean"], grid.donor)
            assert close(answer["corrupt"], grid.baseline)
            assert (answer["cells"], answer["identical_cells"]) == (44, 8)
            page = await ask(client, "read_tensor", handle=answer["handle"], count=44)
            np.testing.assert_allclose(page["values"], grid.values.ravel(), rtol=1e-5, atol=1e-7)
        assert answer["differs"][0] == {"position": 2, "clean": "d", "corrupt": "c"}
        by_head = await ask(client, "causal_trace", **(asked | {"point": "z", "by": "head", "layers": [1]}))
    assert by_head["axes"] == {"layer": [1], "head": [0, 1, 2, 3]}
    assert {cell["head"] for cell in by_head["top"]} <= {0, 1, 2, 3}


async def test_a_trace_of_the_planted_circuit_names_its_heads() -> None:
    circuit = CIRCUITS["induction"]
    asked = {"clean": circuit.prompt, "corrupt": circuit.corrupt, "token": circuit.answer, "point": "z", "by": "head"}
    async with connected(build_server()) as client:
        await ask(client, "load_model", model="synthetic:induction")
        answer = await ask(client, "causal_trace", **asked, metric="logit", k=2)
    assert {(cell["layer"], cell["head"]) for cell in answer["top"]} == set(circuit.heads.values())
    assert all(cell["recovered"] > 0.9 for cell in answer["top"])


async def test_a_trace_counts_what_it_does_not_list_and_says_when_the_token_is_not_the_clean_answer(lab: Lab) -> None:
    asked = {"clean": DONOR, "corrupt": PROMPT, "point": "attn_out"}
    async with connected(build_server(lab)) as client:
        one, all_ = [await ask(client, "causal_trace", **asked, token="d", k=k) for k in (1, 50)]
        ways = [await ask(client, "causal_trace", **asked, token=t, against=a) for t, a in ("dc", "cd")]
    listed = len(all_["top"] + all_["bottom"])
    assert listed > 2
    assert f"{listed - 2} more cells change it: name layers or positions" in one["notice"]
    assert "more cells change it" not in all_["notice"]
    (turned,) = [way for way in ways if "clean is below corrupt" in way["notice"]]
    assert turned["clean"] < turned["corrupt"]


async def test_a_suppressor_that_kl_does_not_see_is_at_the_bottom_of_the_logit() -> None:
    circuit = CIRCUITS["copy-suppression"]
    asked = {"clean": circuit.prompt, "corrupt": circuit.corrupt, "point": "z", "by": "head"}
    layer, head = circuit.heads["suppression"]
    async with connected(build_server()) as client:
        await ask(client, "load_model", model="synthetic:copy-suppression")
        logit = await ask(client, "causal_trace", **asked, token="i")
        difference = await ask(client, "causal_trace", **asked, token="i", against="x")
        kl = await ask(client, "causal_trace", **asked, metric="kl")
        probability = await ask(client, "causal_trace", **asked, token="i", metric="probability")
        by_key = await ask(client, "causal_trace", **(asked | {"point": "k"}), token="i")
        ablated = {"prompt": circuit.prompt, "layers": [layer], "point": "z", "heads": [head]}
        unasked, shown = [await ask(client, "forward_ablate", **ablated, **more) for more in ({}, {"token": "i"})]
    assert (logit["metric"], difference["metric"]) == ("logit of 'i'", "logit_difference of 'i' against 'x'")
    for answer in (logit, difference):
        assert [(cell["layer"], cell["head"]) for cell in answer["top"]] == [circuit.heads["copying"]]
        assert [(cell["layer"], cell["head"]) for cell in answer["bottom"]] == [(layer, head)]
        assert "30 cells that change the metric by less than" in answer["notice"]
        assert "a hundredth of clean - corrupt" in answer["notice"]
        assert "above 1 is past the donor, below 0 is away from the donor" in answer["notice"]
        assert "saturated" not in answer["notice"]
    assert logit["bottom"][0]["change"] == pytest.approx(-14, abs=0.5)
    assert kl["bottom"] == probability["bottom"] == []
    assert "kl is saturated in the corrupt run, where the leading token has 0.99998" in kl["notice"]
    assert "probability is saturated in the corrupt run" in probability["notice"]
    assert "what lowers its logit hardly shows. Metric logit" in probability["notice"]
    assert by_key["axes"]["kv_head"] == [0, 1, 2, 3]
    assert {(c["layer"], c["kv_head"], *c["query_heads"]) for c in by_key["top"] + by_key["bottom"]} == {(2, 3, 6, 7)}
    assert unasked["kl"] < 1e-5
    assert "KL is saturated: the leading token has" in unasked["notice"]
    assert "saturated" not in shown["notice"]
    assert shown["token"]["logit"] - shown["token"]["baseline_logit"] == pytest.approx(14, abs=0.3)


async def test_recovered_is_of_what_was_asked_and_null_where_there_is_no_way(lab: Lab, synthetic: Model) -> None:
    base, clean = (forward(synthetic, synthetic.encode(p)).logits[0, -1] for p in (PROMPT, DONOR))
    gap = clean - base
    far, near = int(np.abs(gap).argmax()), int(np.abs(gap).argmin())
    asked = {"donor": DONOR, "recipient": PROMPT, "targets": [{"layer": 1, "position": -1}]}
    async with connected(build_server(lab)) as client:
        probability = await ask(client, "patch_activations", **asked, token=far)
        difference = await ask(client, "patch_activations", **asked, token=far, against=near)
        trace = await ask(client, "causal_trace", clean=DONOR, corrupt=PROMPT, token=near)
        moved = await ask(client, "prefill_inject", recipient=PROMPT, donor=DONOR, token=far, max_new_tokens=1)
        kept = await ask(client, "prefill_inject", recipient=PROMPT, donor=DONOR, keep=True, max_new_tokens=1)
        by_cache = {"recipient": PROMPT, "donor": kept["handle"], "token": far, "max_new_tokens": 1}
        cached = await ask(client, "prefill_inject", **by_cache)
    d = difference["logit_difference"]
    assert difference["recovered"] == pytest.approx((d["effect"] - d["baseline"]) / (gap[far] - gap[near]), rel=1e-3)
    before, theirs = softmax_of(base)[far], softmax_of(clean)[far]
    part = (probability["token"]["probability"] - before) / (theirs - before)
    assert probability["recovered"] == (pytest.approx(part, rel=1e-3) if abs(theirs - before) >= 0.05 else None)
    assert abs(gap[near]) < 0.1
    assert all(cell["recovered"] is None for cell in trace["top"] + trace["bottom"])
    assert "recovered is null: the logit is" in trace["notice"]
    assert "closer than 0.1" in trace["notice"]
    assert moved["token"]["probability"] == pytest.approx(theirs, rel=1e-3)
    if abs(theirs - before) >= 0.05:
        assert moved["recovered"] == pytest.approx(1, abs=1e-3)
    assert "recovered" not in cached
    assert "the donor is a cache" in cached["notice"]


async def test_heads_that_share_keys_are_told(lab: Lab) -> None:
    async with connected(build_server(lab)) as client:
        answer = await ask(client, "attention_pattern", prompt=PROMPT, layers=[2])
    assert answer["key_groups"] == [[0, 1], [2, 3]]


async def test_attention_patterns_show_the_largest_weights_and_the_entropy(lab: Lab, synthetic: Model) -> None:
    record = RecordHook.for_layers([2], capture_attention=True)
    forward(synthetic, synthetic.encode(PROMPT), hook=record)
    async with connected(build_server(lab)) as client:
        answer = await ask(client, "attention_pattern", prompt=PROMPT, layers=[2], heads=[3], positions=[4, -1], k=11)
    weights = record.attention_weights[2][3]
    assert sorted(row["position"] for row in answer["rows"]) == [4, 10]
    for row in answer["rows"]:
        seen = weights[row["position"], : row["position"] + 1]
        assert [source["weight"] for source in row["top"]] == pytest.approx(sorted(seen, reverse=True), rel=1e-4)
        assert all(close(source["weight"], seen[source["position"]]) for source in row["top"])
        assert all(source["text"] == PROMPT[source["position"]] for source in row["top"])
        assert close(row["entropy"], -(seen * np.log(seen)).sum())


async def test_prompts_captures_and_models_are_compared_layer_by_layer(lab: Lab, synthetic: Model) -> None:
    lab.load("synthetic:induction", "dense")
    handles = {item.model.name: item.handle for item in lab.models}
    traces = [trace_forward(synthetic, synthetic.encode(p), capture_layers=range(4)).residuals for p in (PROMPT, DONOR)]
    a, b = ([trace[layer][-1] for layer in range(4)] for trace in traces)
    async with connected(build_server(lab)) as client:
        prompts = await ask(client, "compare", a=PROMPT, b=DONOR, model="synthetic")
        held = await ask(client, "capture_residuals", prompt=DONOR, positions="all", model="synthetic")
        capture = await ask(client, "compare", a=PROMPT, b=held["handle"], model="synthetic")
        same = await ask(client, "compare", a=DONOR, b=held["handle"], model="synthetic")
        sides = {"a": handles["synthetic"], "b": handles["synthetic:induction"]}
        models = await ask(client, "compare", **sides, prompt=PROMPT, layers=[0, -1])
    for row in prompts["rows"]:
        x, y = a[row["layer"]], b[row["layer"]]
        assert close(row["cosine"], x @ y / np.linalg.norm(x) / np.linalg.norm(y))
        assert close(row["distance"], np.linalg.norm(x - y) / np.linalg.norm(x))
        assert close(row["kl"], kl_divergence(lens_logits(synthetic, y), lens_logits(synthetic, x)))
    assert capture["rows"] == prompts["rows"]
    assert all(row["kl"] < 1e-9 and row["cosine"] == pytest.approx(1) for row in same["rows"])
    assert same["first_divergence"] is None
    assert prompts["first_divergence"] == next(row["layer"] for row in prompts["rows"] if row["kl"] > 0.1)
    assert [row["layer"] for row in models["rows"]] == [0, 3]
    assert all(row["cosine"] is None and row["kl"] > 0 for row in models["rows"])


INTERVENTIONS = {
    "zero": ({"layers": [1], "point": "z", "heads": [1]}, Intervention("zero", (1,), "z", heads=(1,))),
    "scale": (
        {"layers": "2:", "point": "mlp_act", "neurons": [3, -1], "value": 2.0},
        Intervention("scale", (2, 3), "mlp_act", neurons=(3, -1), value=2.0),
    ),
    "steer": (
        {"layers": [1], "vector": {"values": [1.0] * 64}, "value": 0.5, "unit": "row"},
        Intervention("steer", (1,), positions="last", value=0.5, unit="row", vector=np.ones(64, "f4")),
    ),
    "set_component": (
        {"layers": [2], "vector": {"values": [1.0] * 16}, "value": 3.0, "point": "z", "heads": [0]},
        Intervention("set_component", (2,), "z", heads=(0,), value=3.0, vector=np.ones(16, "f4")),
    ),
    "project_out": (
        {"layers": [2], "vector": {"values": [1.0] * 64}, "positions": [-1, 4]},
        Intervention("project_out", (2,), positions=(-1, 4), vector=np.ones(64, "f4")),
    ),
    "knockout": (
        {"layers": [1, 2], "keys": [0, -2], "heads": [2], "positions": "last"},
        Intervention("knockout", (1, 2), "attn_pattern", "last", (2,), keys=(0, -2)),
    ),
}


@pytest.mark.parametrize("kind", INTERVENTIONS)
async def test_an_intervention_means_the_same_in_every_tool(lab: Lab, synthetic: Model, kind: str) -> None:
    described, meant = INTERVENTIONS[kind]
    item, ids = {"kind": kind} | described, synthetic.encode(PROMPT)
    own = {"layer": 0, "vector": {"random_seed": 1}, "alpha": 0}
    hook = compile_interventions(synthetic, [meant], len(ids))
    effect = probabilities(synthetic, PROMPT, hook)
    written = generate(synthetic, ids, 4, hook=compile_interventions(synthetic, [meant], len(ids), 4))
    calls = {
        "forward_ablate": {"prompt": PROMPT},
        "forward_steer": {"prompt": PROMPT, "steers": [own]},
        "patch_activations": {"donor": PROMPT, "recipient": PROMPT, "targets": [{"layer": 0, "position": 0}]},
    }
    async with connected(build_server(lab)) as client:
        for tool, arguments in calls.items():
            answer = await ask(client, tool, **arguments, interventions=[item], token=5)
            assert close(answer["token"]["probability"], effect[5]), tool
            reported = answer["applied"][-len(hook.edits) :]
            assert [(row["kind"], row["fired"]) for row in reported] == [(kind, edit.fired) for edit in hook.edits]
        text = await ask(client, "generate_with_hooks", prompt=PROMPT, max_new_tokens=4, interventions=[item])
    assert text["hooked"]["ids"] == written.ids


async def test_mean_resample_and_patch_run_the_prompts_they_name(lab: Lab, synthetic: Model) -> None:
    ids, donor = synthetic.encode(PROMPT), synthetic.encode(DONOR)
    pool = pooled_rows(synthetic, [donor, synthetic.encode("xyz")], [1], "z")[1][:, [2]]
    rows = pooled_rows(synthetic, [donor], [1], "attn_out")[1]
    over = {"layers": [1], "point": "z", "heads": [2], "over": [DONOR, "xyz"], "match": "pooled"}
    meant = [
        (over | {"kind": "mean"}, Intervention("mean", (1,), "z", heads=(2,), vector=pool.mean(0))),
        (
            over | {"kind": "resample", "seed": 4},
            Intervention("resample", (1,), "z", heads=(2,), vector=pool, seed=4),
        ),
        (
            {"kind": "patch", "layers": [1], "point": "attn_out", "donor": DONOR, "pairs": [[-1, 3], [2, -1]]},
            Intervention("patch", (1,), "attn_out", rows={3: rows[-1], 10: rows[2]}),
        ),
        (
            {"kind": "patch", "layers": [1], "point": "attn_out", "donor": DONOR},
            Intervention("patch", (1,), "attn_out", rows=dict(enumerate(rows))),
        ),
    ]
    async with connected(build_server(lab)) as client:
        for described, item in meant:
            answer = await ask(client, "forward_ablate", prompt=PROMPT, interventions=[described], token=5)
            hook = compile_interventions(synthetic, [item], len(ids))
            assert close(answer["token"]["probability"], probabilities(synthetic, PROMPT, hook)[5])
        resampled = {"layers": [1], "point": "z", "heads": [2], "mode": "resample", "mean_over": [DONOR, "xyz"]}
        resampled["match"] = "pooled"
        answer = await ask(client, "forward_ablate", prompt=PROMPT, token=5, **resampled)
    hook = compile_interventions(synthetic, [Intervention("resample", (1,), "z", heads=(2,), vector=pool)], len(ids))
    assert close(answer["token"]["probability"], probabilities(synthetic, PROMPT, hook)[5])


async def test_vocabulary_views_agree_with_the_engine(lab: Lab, synthetic: Model) -> None:
    async with connected(build_server(lab)) as client:
        near = await ask(client, "embedding_neighbors", token="c", k=4)
        raised = await ask(client, "project_through_unembed", vector={"token": "c", "space": "embed"}, k=4)
    row = synthetic.embedding_for(ord("c"))
    assert [t["id"] for t in near["top"]] == [i for i, _ in synthetic.embedding_neighbors(row, 4)]
    assert near["top"][0]["id"] == ord("c")
    assert near["top"][0]["score"] == pytest.approx(1)
    assert [t["id"] for t in raised["top"]] == [i for i, _ in synthetic.project_through_unembed(row, 4)]


async def test_a_row_of_a_capture_serves_as_a_vector(lab: Lab, synthetic: Model) -> None:
    async with connected(build_server(lab)) as client:
        held = await ask(client, "capture_residuals", prompt=PROMPT, layers=[1, 2], positions=[0, -1])
        spec = {"handle": held["handle"], "layer": 2, "position": -1}
        answer = await ask(client, "project_through_unembed", vector=spec, k=3)
    row = synthetic.capture_residuals(PROMPT, [2])[2]
    assert answer["norm"] == pytest.approx(float(np.linalg.norm(row)), rel=1e-5)
    assert [t["id"] for t in answer["top"]] == [i for i, _ in synthetic.project_through_unembed(row, 3)]


@pytest.mark.parametrize(
    ("prompt", "readable"),
    [
        ("abcab", "abcab-l0-3"),
        ("one two three four five six", "three-four-five-six-l0-3"),
        ("x" * 30, "x" * 20 + "-l0-3"),
    ],
)
async def test_a_handle_says_how_its_prompt_ends(lab: Lab, prompt: str, readable: str) -> None:
    async with connected(build_server(lab)) as client:
        held = await ask(client, "capture_residuals", prompt=prompt)
    assert held["handle"].rpartition("-")[0] == f"act:{readable}"


async def test_a_capture_is_never_read_with_another_models_lens(lab: Lab) -> None:
    async with connected(build_server(lab)) as client:
        held = await ask(client, "capture_residuals", prompt=PROMPT)
        other = (await ask(client, "load_model", model="synthetic:induction"))["model"]
        for tool, arguments in (
            ("logit_lens", {"tensor": held["handle"]}),
            ("compare", {"a": held["handle"], "b": "a"}),
            ("embedding_neighbors", {"vector": {"handle": held["handle"], "layer": 0}}),
        ):
            said = await refused(client, tool, **arguments, model=other)
            assert f"another model; give model='{held['model']}'" in said
        assert (await ask(client, "logit_lens", tensor=held["handle"], model=held["model"]))["rows"]


async def test_the_session_lists_what_is_held_and_release_frees_it(lab: Lab) -> None:
    async with connected(build_server(lab)) as client:
        held = await ask(client, "capture_residuals", prompt=PROMPT)
        before = await ask(client, "list_session")
        freed = await ask(client, "release", handle=held["handle"])
        after = await ask(client, "list_session")
    assert [h["handle"] for h in before["handles"]] == [held["handle"]]
    assert freed["bytes_freed"] == held["bytes"] == before["bytes_in_memory"] - after["bytes_in_memory"]
    assert after["handles"] == []


async def test_many_handles_are_listed_page_by_page(lab: Lab) -> None:
    made = [lab.store.put("act", f"x{i}", LOCAL, {"a": np.zeros(3, np.float32)}, {"about": "y"}) for i in range(120)]
    listed, start = [], 0
    async with connected(build_server(lab)) as client:
        while start is not None:
            page = await ask(client, "list_session", start=start)
            assert len(json.dumps(page)) < 8_000
            assert page["handle_count"] == 120
            assert page["bytes_in_memory"] == 120 * 12 + page["models"][0]["bytes"]
            listed += [held["handle"] for held in page["handles"]]
            start = page.get("next_start")
    assert listed == made[::-1]


async def test_a_released_model_leaves_memory_and_its_handle_brings_it_back(lab: Lab) -> None:
    async with connected(build_server(lab)) as client:
        (model,) = (await ask(client, "list_session"))["models"]
        assert (await ask(client, "release", handle=model["handle"]))["bytes_freed"] == model["bytes"]
        (held,) = (await ask(client, "list_session"))["models"]
        assert (held["handle"], held["in_memory"]) == (model["handle"], False)
        assert "load_model" in await refused(client, "logit_lens", prompt=PROMPT)
        again = await ask(client, "logit_lens", prompt=PROMPT, model=model["handle"])
    assert again["model"] == model["handle"]


async def test_no_answer_is_too_long_for_an_agent(lab: Lab) -> None:
    async with connected(build_server(lab)) as client:
        for tool, arguments in EVERY_TOOL_WITH_A_MODEL.items():
            result = await client.call_tool(tool, arguments)
            assert len(result.content[0].text) < 8_000, tool


def test_the_cache_survives_its_tensors(synthetic: Model) -> None:
    cache = KVCache.with_layers(4)
    ids = synthetic.encode(PROMPT)
    forward(synthetic, ids[:-1], cache=cache)
    copy = KVCache.from_tensors(cache.to_tensors(), synthetic.config)
    expected = forward(synthetic, ids[-1:], cache=cache).logits
    np.testing.assert_array_equal(forward(synthetic, ids[-1:], cache=copy).logits, expected)
    assert trace_forward(synthetic, ids).logits == pytest.approx(expected[0, 0], abs=1e-4)


EVERY_TOOL_WITH_A_MODEL = {
    "load_model": {"model": "synthetic"},
    "tokenize": {"text": PROMPT},
    "capture_residuals": {"prompt": PROMPT},
    "logit_lens": {"prompt": PROMPT},
    "track_token": {"prompt": PROMPT, "token": "c"},
    "track_race": {"prompt": PROMPT},
    "attention_pattern": {"prompt": PROMPT, "layers": [1]},
    "causal_trace": {"clean": DONOR, "corrupt": PROMPT, "token": "d"},
    "compare": {"a": PROMPT, "b": DONOR},
    "forward_ablate": {"prompt": PROMPT, "layers": [1]},
    "forward_steer": {"prompt": PROMPT, "steers": [{"layer": 1, "vector": {"random_seed": 1}, "alpha": 1}]},
    "patch_activations": {"donor": DONOR, "recipient": PROMPT, "targets": [{"layer": 1, "position": 2}]},
    "generate_with_hooks": {"prompt": PROMPT, "max_new_tokens": 2},
    "prefill_inject": {"recipient": PROMPT, "donor": DONOR, "max_new_tokens": 2},
    "kv_inject_test": {"recipient": PROMPT, "donor": DONOR, "target": "d"},
    "embedding_neighbors": {"token": "c"},
    "project_through_unembed": {"token": "c"},
}
