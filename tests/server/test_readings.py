"""What a reading says besides its numbers: the layer it reads, the token that was meant, which control, which heads."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_files
import tokenizer_dirs
from clients import ask, connected, refused

from engine import Intervention, Model, RecordHook, compile_interventions, forward, replacements, trace_forward
from engine.distribution import softmax_of
from engine.lens import lens_logits
from server.app import build_server
from server.lab import Lab

PROMPT, DONOR = "abcabcabcab", "abdabdabdab"
FRANCE, GERMANY = "The capital of France is", "The capital of Germany is"
pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def real() -> Lab:
    lab = Lab()
    lab.load("smollm2-135m-instruct", "dense")
    return lab


def probabilities(model: Model, prompt: str, *made: Intervention) -> np.ndarray:
    ids = model.encode(prompt)
    return softmax_of(forward(model, ids, hook=compile_interventions(model, made, len(ids))).logits[0, -1])


# --- which layer ----------------------------------------------------------------------------------------------


READINGS = {
    "logit_lens": {"prompt": PROMPT},
    "track_token": {"prompt": PROMPT, "token": "c"},
    "track_race": {"prompt": PROMPT},
    "compare": {"a": PROMPT, "b": DONOR},
    "capture_residuals": {"prompt": PROMPT, "lens_k": 2},
}


@pytest.mark.parametrize("tool", READINGS)
async def test_a_reading_names_the_layer_that_is_the_models_own_answer_or_says_that_none_is(
    lab: Lab, tool: str
) -> None:
    async with connected(build_server(lab)) as client:
        whole = await ask(client, tool, **READINGS[tool])
        part = await ask(client, tool, **READINGS[tool], layers=[0, 2])
    assert whole["own_answer"] == 3
    assert "own answer" not in whole["notice"]
    assert "own_answer" not in part
    assert part["notice"].count("no row here is the model's own answer") == 1
    assert "layer 3 of synthetic" in part["notice"]


async def test_compare_names_the_layer_of_its_tops(lab: Lab) -> None:
    async with connected(build_server(lab)) as client:
        answer = await ask(client, "compare", a=PROMPT, b=DONOR, layers=[2, 1])
        lens = await ask(client, "logit_lens", prompt=PROMPT, layers=[2], k=5)
    assert answer["top_layer"] == 2
    assert [token["id"] for token in answer["top_a"]] == [token["id"] for token in lens["rows"][0]["top"]]


async def test_compare_tells_both_models_notices(lab: Lab) -> None:
    lab.load("synthetic", "bf16")
    plain, rounded = (item.handle for item in lab.models)
    async with connected(build_server(lab)) as client:
        answers = [
            await ask(client, "compare", a=a, b=b, prompt=PROMPT) for a, b in ((plain, rounded), (rounded, plain))
        ]
        same = await ask(client, "compare", a=plain, b=plain, prompt=PROMPT)
    assert all(answer["notice"].count("rounded to bfloat16") == 1 for answer in answers)
    assert answers[0]["notice"].startswith("a: synthetic weights")
    assert same["notice"].count("synthetic weights") == 1


async def test_runners_whose_texts_are_alike_are_two(lab: Lab, synthetic: Model) -> None:
    trace = trace_forward(synthetic, synthetic.encode(PROMPT), capture_layers=range(4))
    lens = [lens_logits(synthetic, trace.residuals[layer][-1]) for layer in range(4)]
    first = 200
    second = next(i for i in range(201, 256) if len({bool(row[i] > row[first]) for row in lens}) == 2)
    texts = [synthetic.tokenizer.piece(i) for i in (first, second)]
    assert texts[0] == texts[1]
    async with connected(build_server(lab)) as client:
        answer = await ask(client, "track_race", prompt=PROMPT, tokens=[first, second])
    leads = [(first, second)[int(np.argmax(row["probabilities"]))] for row in answer["rows"]]
    assert len({*leads}) == 2, "both must lead somewhere"
    assert [row["leader"] for row in answer["rows"]] == [f"{texts[0]} ({lead})" for lead in leads]
    changes = [layer for layer in range(1, 4) if leads[layer] != leads[layer - 1]]
    assert [c["layer"] for c in answer["crossings"]] == changes


async def test_a_lens_of_a_capture_reads_the_point_that_is_asked_for_and_names_those_left(
    lab: Lab, synthetic: Model
) -> None:
    points = ["resid_mid", "mlp_out", "resid_post"]
    record = RecordHook.for_layers([1], points=points)
    forward(synthetic, synthetic.encode(PROMPT), hook=record)
    async with connected(build_server(lab)) as client:
        held = await ask(client, "capture_residuals", prompt=PROMPT, points=points, layers=[1], lens_k=1)
        default = await ask(client, "logit_lens", tensor=held["handle"], k=1)
        middle = await ask(client, "logit_lens", tensor=held["handle"], k=1, point="resid_mid")
        of_prompt = await ask(client, "logit_lens", prompt=PROMPT, layers=[1], k=1, point="resid_mid")
        told = await refused(client, "logit_lens", tensor=held["handle"], point="resid_pre")
    for answer, point in ((default, "resid_post"), (middle, "resid_mid"), (of_prompt, "resid_mid")):
        best = softmax_of(lens_logits(synthetic, record.get(point)[1][-1]))
        assert answer["point"] == point
        assert answer["rows"][0]["top"][0]["probability"] == pytest.approx(float(best.max()), rel=5e-4)
    assert held["lens"] == default["rows"]
    for answer in (held, default):
        assert "the lens reads resid_post, not resid_mid, mlp_out" in answer["notice"]
    assert "not mlp_out" not in middle["notice"]
    assert "holds resid_mid, mlp_out, resid_post, not resid_pre" in told


async def test_a_capture_that_the_lens_cannot_read_stays(lab: Lab) -> None:
    async with connected(build_server(lab)) as client:
        held = await ask(client, "capture_residuals", prompt=PROMPT, points=["mlp_out", "z"], lens_k=2)
        page = await ask(client, "read_tensor", handle=held["handle"], tensor="mlp_out.3", count=2)
    assert "lens" not in held
    assert "the lens reads nothing, not mlp_out, z, which are not the residual stream" in held["notice"]
    assert len(page["values"]) == 2


async def test_one_point_that_the_lens_leaves_is_told_in_the_singular(lab: Lab) -> None:
    async with connected(build_server(lab)) as client:
        held = await ask(client, "capture_residuals", prompt=PROMPT, points=["embed", "mlp_out"], lens_k=1)
    assert "the lens reads embed, not mlp_out, which is not the residual stream" in held["notice"]


# --- which token ----------------------------------------------------------------------------------------------

UNSPACED = {
    "track_token": {"prompt": FRANCE, "token": "Paris"},
    "track_race": {"prompt": FRANCE, "tokens": ["Paris", " the"]},
    "forward_ablate": {"prompt": FRANCE, "layers": [3], "point": "mlp_out", "token": "Paris"},
    "forward_steer": {
        "prompt": FRANCE,
        "steers": [{"layer": 3, "vector": {"random_seed": 1}, "alpha": 1}],
        "token": " the",
        "against": "Paris",
    },
    "patch_activations": {
        "donor": FRANCE,
        "recipient": "Hello, my name",
        "targets": [{"layer": 9, "position": -1}],
        "token": "Paris",
    },
    "kv_inject_test": {"recipient": GERMANY, "donor": FRANCE, "target": "Paris", "layers": [3]},
    "prefill_inject": {"recipient": GERMANY, "donor": FRANCE, "token": "Paris", "layers": [3], "max_new_tokens": 1},
    "causal_trace": {"clean": FRANCE, "corrupt": GERMANY, "token": "Paris", "layers": [3], "positions": [-1]},
}


@pytest.mark.real
@pytest.mark.parametrize("tool", UNSPACED)
async def test_a_token_without_its_space_draws_a_notice_where_the_spaced_one_is_far_likelier(
    real: Lab, tool: str
) -> None:
    spaced = json.loads(json.dumps(UNSPACED[tool]).replace('"Paris"', '" Paris"'))
    async with connected(build_server(real)) as client:
        without = await ask(client, tool, **UNSPACED[tool])
        with_space = await ask(client, tool, **spaced)
    assert "'Paris' (38634) was asked about, but ' Paris' (7042) is" in without["notice"]
    assert "asked about" not in with_space.get("notice", "")


@pytest.mark.real
async def test_the_twin_is_told_by_what_is_likely_not_by_the_space(real: Lab) -> None:
    opened = 'Its capital, written "'
    model = real.models[0].model
    likely = {text: probabilities(model, opened)[model.tokenizer.single(text)] for text in ("Paris", " Paris")}
    assert likely["Paris"] > 10 * likely[" Paris"]
    async with connected(build_server(real)) as client:
        fine = await ask(client, "track_token", prompt=opened, token="Paris")
        wrong = await ask(client, "track_token", prompt=opened, token=" Paris")
    assert "asked about" not in fine.get("notice", "")
    assert "' Paris' (7042) was asked about, but 'Paris' (38634) is" in wrong["notice"]


@pytest.mark.parametrize("kind", tokenizer_dirs.SENTENCEPIECE)
async def test_pieces_with_and_without_their_mark_are_twins(tmp_path: Path, kind: str) -> None:
    words = tokenizer_dirs.KINDS[kind]()
    rows = np.random.default_rng(1).standard_normal((words.get_vocab_size(), 32)).astype(np.float32)
    plain, marked = map(words.token_to_id, ("Paris", f"{tokenizer_dirs.MARK}Paris"))
    rows[plain] = -rows[marked]  # what one is likely for the other is not
    tensors = tiny_files.weights() | {"model.embed_tokens.weight": 4 * rows}
    path = tiny_files.hf_directory(tmp_path / "pieces", tensors, vocab_size=len(rows))
    words.save(str(path / "tokenizer.json"))
    lab = Lab()
    model = lab.load(str(path), "dense").model
    clean, corrupt = "Paris in", "in Paris"
    logits = forward(model, model.encode(clean)).logits[0, -1]
    unlikely, likely = sorted([plain, marked], key=lambda i: logits[i])
    assert logits[likely] - logits[unlikely] > np.log(10)
    asked, meant = (f"{model.tokenizer.piece(i)!r} ({i})" for i in (unlikely, likely))
    of_trace = {"clean": clean, "corrupt": corrupt, "layers": [1]}
    async with connected(build_server(lab)) as client:

        async def told(token: int) -> list[str]:
            text = model.tokenizer.piece(token)
            answers = [
                await ask(client, "track_token", prompt=clean, token=text),
                await ask(client, "causal_trace", **of_trace, token=text),
                await ask(client, "causal_trace", **of_trace, token=model.tokenizer.single(" in"), against=text),
            ]
            return [answer.get("notice", "") for answer in answers]

        assert [f"{asked} was asked about, but {meant} is" in notice for notice in await told(unlikely)] == [True] * 3
        assert [f"{meant} was asked about" in notice for notice in await told(likely)] == [False] * 3


# --- which heads ----------------------------------------------------------------------------------------------


async def test_pairs_name_heads_where_layers_and_heads_would_name_their_product(lab: Lab, synthetic: Model) -> None:
    pairs, product = [[1, 0], [2, 3]], Intervention("zero", (1, 2), "z", heads=(0, 3))
    each = [Intervention("zero", (layer,), "z", heads=(head,)) for layer, head in pairs]
    meant = probabilities(synthetic, PROMPT, *each)
    assert np.abs(meant - probabilities(synthetic, PROMPT, product)).max() > 1e-4
    item = {"kind": "zero", "point": "z", "heads": pairs}
    async with connected(build_server(lab)) as client:
        own = await ask(client, "forward_ablate", prompt=PROMPT, point="z", heads=pairs, token=5)
        within = await ask(client, "forward_ablate", prompt=PROMPT, point="z", heads=pairs, layers="all", token=5)
        described = await ask(client, "forward_ablate", prompt=PROMPT, interventions=[item], token=5)
    for answer in (own, within, described):
        assert answer["token"]["probability"] == pytest.approx(float(meant[5]), rel=1e-4)
        assert [(row["layer"], row["heads"]) for row in answer["applied"]] == [(1, [0]), (2, [3])]


async def test_pairs_name_heads_of_means_donors_and_caches(lab: Lab, synthetic: Model) -> None:
    ids, pairs = synthetic.encode(PROMPT), ((1, 0), (2, 1))
    donor = synthetic.encode(DONOR)
    mean = replacements(synthetic, len(ids), "mean", [donor], (), "v", heads=pairs)
    record = RecordHook.for_layers([1, 2], points=["v"])
    forward(synthetic, donor, hook=record)
    whole = {layer: dict(enumerate(np.moveaxis(v, 1, 0))) for layer, v in record.get("v").items()}
    patched = [
        Intervention("patch", (layer,), "v", heads=(head,), rows={p: row[[head]] for p, row in whole[layer].items()})
        for layer, head in pairs
    ]
    meant = probabilities(synthetic, PROMPT, *patched)
    np.testing.assert_allclose(probabilities(synthetic, PROMPT, *mean), meant, rtol=1e-5)
    named = {"point": "v", "heads": [list(pair) for pair in pairs]}
    async with connected(build_server(lab)) as client:
        described = {"kind": "patch", "donor": DONOR, **named}
        answers = [
            await ask(client, "forward_ablate", prompt=PROMPT, interventions=[described], token=5),
            await ask(client, "forward_ablate", prompt=PROMPT, mode="mean", mean_over=[DONOR], **named, token=5),
        ]
        moved = await ask(client, "prefill_inject", recipient=PROMPT, donor=DONOR, what="v", heads=named["heads"])
    assert [a["token"]["probability"] for a in answers] == pytest.approx([float(meant[5])] * 2, rel=1e-4)
    assert moved["layers"] == [1, 2]
    assert moved["rows_replaced"] == 2 * (len(ids) - 1)


async def test_the_vectors_of_pairs_may_differ_between_layers_in_python_too(synthetic: Model) -> None:
    row = np.ones(synthetic.config.d_head, np.float32)
    pairs = Intervention("steer", (), "z", "all", ((1, 0), (3, 2), (1, 3)), value=2.0, vector=row)
    each = [Intervention("steer", (layer,), "z", "all", (head,), value=2.0, vector=row) for layer, head in pairs.heads]
    np.testing.assert_allclose(
        probabilities(synthetic, PROMPT, pairs), probabilities(synthetic, PROMPT, *each), rtol=1e-5
    )


WRONG_HEADS = {
    "mixed": ({"heads": [0, [1, 2]]}, ["mixes numbers and pairs", "[layer, head]"]),
    "no layers": ({"heads": [0]}, ["say which layers", "[layer, head] pairs"]),
    "other layers": ({"heads": [[1, 0]], "layers": [1, 2]}, ["pairs in layers [1]", "[1, 2]", "leave layers out"]),
    "no such head": ({"heads": [[1, 4]]}, ["head 4", "0 to 3"]),
    "no such layer": ({"heads": [[4, 0]]}, ["layer 4", "0 to 3"]),
}


@pytest.mark.parametrize("case", WRONG_HEADS)
@pytest.mark.parametrize("tool", ["forward_ablate", "attention_pattern"])
async def test_heads_that_name_nothing_are_refused(lab: Lab, tool: str, case: str) -> None:
    arguments, told = WRONG_HEADS[case]
    where = {"point": "z"} if tool == "forward_ablate" else {}
    async with connected(build_server(lab)) as client:
        said = await refused(client, tool, prompt=PROMPT, **arguments, **where)
    assert [word for word in told if word not in said] == []


async def test_nothing_is_ablated_without_layers_only_where_nothing_else_was_said(lab: Lab) -> None:
    other = {"kind": "zero", "layers": [1]}
    async with connected(build_server(lab)) as client:
        await ask(client, "forward_ablate", prompt=PROMPT, interventions=[other])
        said = await refused(client, "forward_ablate", prompt=PROMPT, interventions=[other], point="mlp_out")
    assert "say which layers" in said


# --- attention ------------------------------------------------------------------------------------------------


@pytest.mark.real
@pytest.mark.parametrize("asked", [{"k": 1}, {"k": 50, "positions": "all"}, {"positions": "all", "chat": True}])
async def test_the_sharp_heads_come_first_and_fill_an_answer(real: Lab, asked: dict) -> None:
    async with connected(build_server(real)) as client:
        result = await client.call_tool("attention_pattern", {"prompt": FRANCE, "layers": "all"} | asked)
    answer = result.structured_content
    entropies = [row["entropy"] for row in answer["rows"]]
    assert len(result.content[0].text) < 8000
    assert len(entropies) > 3
    assert entropies == sorted(entropies)
    assert all(row["position"] > 0 for row in answer["rows"])
    assert f"the {len(entropies)} sharpest of" in answer["notice"]


@pytest.mark.real
async def test_heads_left_out_of_attention_are_reached_by_pairs(real: Lab) -> None:
    async with connected(build_server(real)) as client:
        whole = await ask(client, "attention_pattern", prompt=FRANCE, layers="all")
        listed = {(row["layer"], row["head"]) for row in whole["rows"]}
        left = next([layer, head] for layer in range(30) for head in range(9) if (layer, head) not in listed)
        one = await ask(client, "attention_pattern", prompt=FRANCE, heads=[left])
    assert [(row["layer"], row["head"]) for row in one["rows"]] == [tuple(left)]
    assert one["rows"][0]["entropy"] >= whole["rows"][-1]["entropy"]
    assert "notice" not in one


# --- interventions in words -----------------------------------------------------------------------------------


async def test_a_knockout_says_that_the_rest_is_renormalised(lab: Lab) -> None:
    cut = {"kind": "knockout", "layers": [1], "keys": [0]}
    async with connected(build_server(lab)) as client:
        knocked = await ask(client, "forward_ablate", prompt=PROMPT, interventions=[cut, cut])
        zeroed = await ask(client, "forward_ablate", prompt=PROMPT, layers=[1], point="attn_pattern")
    assert knocked["notice"].count("scaled to the sum of 1") == 1
    assert "a row with nothing left becomes zero" in knocked["notice"]
    assert "scaled" not in zeroed["notice"]


async def test_an_unrelated_control_shows_its_text(lab: Lab, synthetic: Model) -> None:
    async with connected(build_server(lab)) as client:
        answer = await ask(client, "kv_inject_test", recipient=PROMPT, donor=DONOR, target="d", layers=[1])
    drawn = np.random.default_rng(0).integers(0, synthetic.config.d_vocab, len(DONOR))
    assert answer["unrelated_donor"] == synthetic.tokenizer.decode([int(i) for i in drawn])


async def test_positions_of_a_patch_are_the_same_positions_of_the_donor(lab: Lab) -> None:
    async with connected(build_server(lab)) as client:

        async def patched(**where: object) -> dict:
            item = {"kind": "patch", "layers": [1], "donor": DONOR, **where}
            return await ask(client, "forward_ablate", prompt=PROMPT, interventions=[item])

        assert await patched(positions=[2, -1]) == await patched(pairs=[[2, 2], [-1, -1]])
        assert await patched(positions="last") == await patched(pairs=[[-1, -1]])
        assert await patched(positions="all") == await patched()
        both = {"kind": "patch", "layers": [1], "donor": DONOR, "positions": [2], "pairs": [[2, 2]]}
        said = await refused(client, "forward_ablate", prompt=PROMPT, interventions=[both])
        idle = {"kind": "zero", "layers": [1], "vector": {"random_seed": 1}, "over": ["a"]}
        told = await refused(client, "forward_ablate", prompt=PROMPT, interventions=[idle])
    assert "positions [3] are the pairs [[3, 3]]" in said
    assert "over (mean, resample do)" in told
    assert "vector (steer, set_component, project_out do)" in told


async def test_two_donor_rows_for_one_position_are_refused(lab: Lab) -> None:
    targets = [{"layer": 1, "donor_position": p, "recipient_position": 4} for p in (2, 3)]
    async with connected(build_server(lab)) as client:
        said = await refused(client, "patch_activations", donor=DONOR, recipient=PROMPT, targets=targets)
        once = await ask(client, "patch_activations", donor=DONOR, recipient=PROMPT, targets=[targets[0]] * 2)
    assert "positions 2 and 3 both go to position 4" in said
    assert [row["fired"] for row in once["applied"]] == [1]


async def test_a_patch_reports_a_layer_once(lab: Lab) -> None:
    targets = [{"layer": layer, "position": p} for p in (4, 2) for layer in (1, 2)]
    async with connected(build_server(lab)) as client:
        answer = await ask(client, "patch_activations", donor=DONOR, recipient=PROMPT, targets=targets)
    assert [(row["layer"], row["positions"], row["fired"]) for row in answer["applied"]] == [
        (1, [4, 2], 2),
        (2, [4, 2], 2),
    ]


# --- random directions ----------------------------------------------------------------------------------------


async def test_a_random_direction_takes_the_norm_of_another_vector(lab: Lab) -> None:
    other = {"minus": [{"token": "a", "space": "embed"}, {"token": "b", "space": "embed"}]}
    async with connected(build_server(lab)) as client:
        size = (await ask(client, "project_through_unembed", vector=other))["norm"]
        plain = await ask(client, "project_through_unembed", vector={"random_seed": 3})
        alike = await ask(client, "project_through_unembed", vector={"random_seed": 3, "norm_of": other})
    assert plain["norm"] == pytest.approx(1, rel=1e-5)
    assert alike["norm"] == pytest.approx(size, rel=1e-5)
    assert [t["id"] for t in alike["top"]] == [t["id"] for t in plain["top"]]


async def test_a_random_direction_takes_the_norm_of_the_row_that_is_steered(lab: Lab) -> None:
    drawn, of_row = {"random_seed": 3}, {"random_seed": 3, "norm_of": "row"}
    steer = {"kind": "steer", "layers": [1], "value": 0.5}
    async with connected(build_server(lab)) as client:
        by_unit = await ask(
            client, "forward_ablate", prompt=PROMPT, interventions=[steer | {"vector": drawn, "unit": "row"}]
        )
        described = await ask(client, "forward_ablate", prompt=PROMPT, interventions=[steer | {"vector": of_row}])
        own = await ask(client, "forward_steer", prompt=PROMPT, steers=[{"layer": 1, "vector": of_row, "alpha": 0.5}])
        elsewhere = await refused(client, "embedding_neighbors", vector=of_row)
        twice = await refused(
            client, "forward_ablate", prompt=PROMPT, interventions=[steer | {"vector": of_row, "unit": "raw"}]
        )
    assert by_unit == described == own
    assert by_unit["kl"] > 1e-6
    assert "norm_of 'row' is for a steering vector" in elsewhere
    assert "give one of the two" in twice


# --- numbers --------------------------------------------------------------------------------------------------


@pytest.mark.real
async def test_what_shows_as_zero_is_not_listed(real: Lab) -> None:
    steer = {"layer": 29, "vector": {"token": 0, "space": "unembed"}, "alpha": 1e5}
    async with connected(build_server(real)) as client:
        result = await client.call_tool("forward_steer", {"prompt": FRANCE, "steers": [steer]})
        lens = await ask(client, "track_token", prompt=FRANCE, token=" Paris")
    listed = [entry["probability"] for entry in result.structured_content["effect"]]
    assert listed[0] == pytest.approx(1)
    assert len(listed) < 5
    assert min(listed) >= 1e-12
    assert all(row["probability"] == 0 or row["probability"] >= 1e-12 for row in lens["rows"])
    assert any(row["probability"] == 0 for row in lens["rows"]), "its first layers have it at 1e-13"


# --- size -----------------------------------------------------------------------------------------------------

MOST = 8000
"""Characters of an answer, four to a token."""


@pytest.mark.real
@pytest.mark.parametrize("prompt", [FRANCE, "Yesterday, during the international competition,"])
async def test_a_lens_of_all_layers_is_a_short_answer(real: Lab, prompt: str) -> None:
    async with connected(build_server(real)) as client:
        result = await client.call_tool("logit_lens", {"prompt": prompt, "k": 5})
    rows = result.structured_content["rows"]
    assert len(result.content[0].text) < MOST
    assert [len(row["top"]) for row in rows] == [5] * 30
    model = real.models[0].model
    best = softmax_of(forward(model, model.encode(prompt)).logits[0, -1]).max()
    assert rows[-1]["top"][0]["probability"] == pytest.approx(float(best), rel=5e-4)


@pytest.mark.real
@pytest.mark.parametrize("k", [3, 5, 10])
async def test_a_capture_with_a_lens_is_a_short_answer_and_its_handle_has_the_rest(real: Lab, k: int) -> None:
    async with connected(build_server(real)) as client:
        result = await client.call_tool("capture_residuals", {"prompt": FRANCE, "lens_k": k})
        held = result.structured_content
        rest = await ask(client, "logit_lens", tensor=held["handle"], k=k)
    listed = len(held["lens"][0]["top"])
    assert len(result.content[0].text) < MOST
    assert listed >= 3
    assert [row["top"] for row in held["lens"]] == [row["top"][:listed] for row in rest["rows"]]
    told = f"the lens lists {listed} of {k} tokens of each row"
    assert (told in held.get("notice", "")) == (listed < k)


async def test_norms_say_what_others_do_not(lab: Lab) -> None:
    async with connected(build_server(lab)) as client:
        one = await ask(client, "capture_residuals", prompt=PROMPT, layers=[1])
        rows = await ask(client, "capture_residuals", prompt=PROMPT, layers=[1], positions=[1, 2])
        points = await ask(client, "capture_residuals", prompt=PROMPT, layers=[1], points=["z", "mlp_out"])
    assert [[*answer["norms"][0]] for answer in (one, rows)] == [
        ["layer", "mean_norm"],
        ["layer", "mean_norm", "max_norm"],
    ]
    assert [[*norm] for norm in points["norms"]] == [
        ["point", "layer", "mean_norm", "max_norm"],
        ["point", "layer", "mean_norm"],
    ]
