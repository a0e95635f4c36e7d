"""What a capture holds is what it lists, and errors about handles and pairs say what would work."""

import numpy as np
import pytest
from clients import ask, connected, refused

from server.app import build_server
from server.lab import Lab

pytestmark = pytest.mark.anyio

P = {"prompt": "hello"}
LAST = 3


@pytest.mark.parametrize(("point", "layer"), [("embed", 0), ("final_norm", LAST)])
async def test_a_point_that_exists_once_is_listed_and_read_at_its_layer(lab: Lab, point: str, layer: int) -> None:
    async with connected(build_server(lab)) as client:
        held = await ask(client, "capture_residuals", **P, points=[point])
        assert (held["layers"], held["norms"][0]["layer"]) == ([layer], layer)
        assert f"{point} exists once, at layer {layer}" in held["notice"]
        by_handle = {"handle": held["handle"], "layer": layer}
        view = await ask(client, "project_through_unembed", vector=by_handle)
        assert view["norm"] == pytest.approx(held["norms"][0]["mean_norm"], rel=1e-5)
        said = await refused(client, "project_through_unembed", vector=by_handle | {"layer": 1})
        assert f"layer 1 is not in the capture, which holds [{layer}]" in said
        asked = await ask(client, "capture_residuals", **P, points=[point], layers=[layer])
        assert "exists once" not in asked["notice"]


async def test_beside_other_points_one_that_exists_once_keeps_its_layer(lab: Lab) -> None:
    async with connected(build_server(lab)) as client:
        held = await ask(client, "capture_residuals", **P, points=["resid_post", "embed"], layers=[2])
        assert [(norm["point"], norm["layer"]) for norm in held["norms"]] == [("resid_post", 2), ("embed", 0)]
        assert held["layers"] == [2, 0]
        lens = await ask(client, "logit_lens", tensor=held["handle"])
        assert [row["layer"] for row in lens["rows"]] == [2]
        said = await refused(client, "logit_lens", tensor=held["handle"], layers=[0])
        assert "layer 0 not in" in said
        assert "holds resid_post of layers [2]" in said
        vector = {"handle": held["handle"], "point": "embed"}
        assert (await ask(client, "embedding_neighbors", vector=vector, k=1))["top"][0]["text"] == "o"


async def test_the_lens_reads_a_capture_of_the_embedding_alone(lab: Lab) -> None:
    async with connected(build_server(lab)) as client:
        held = await ask(client, "capture_residuals", **P, points=["embed"])
        assert [row["layer"] for row in (await ask(client, "logit_lens", tensor=held["handle"]))["rows"]] == [0]


async def test_a_row_of_heads_is_no_vector_and_the_error_says_how_to_get_one(lab: Lab) -> None:
    async with connected(build_server(lab)) as client:
        held = await ask(client, "capture_residuals", **P, points=["z"], layers=[1])
        steer = {"kind": "steer", "layers": [1], "point": "z", "value": 1.0, "vector": {"handle": held["handle"]}}
        said = await refused(client, "forward_ablate", **P, interventions=[steer])
        assert "holds 4 heads of 16 features there, not one vector" in said
        page = await ask(client, "read_tensor", handle=held["handle"], count=16)
        await ask(client, "forward_ablate", **P, interventions=[steer | {"vector": {"values": page["values"]}}])


async def test_a_job_is_no_tensor_and_the_error_says_where_its_result_is(lab: Lab) -> None:
    async with connected(build_server(lab)) as client:
        started = await ask(client, "start_job", tool="logit_lens", arguments=P)
        said = await refused(client, "read_tensor", handle=started["run"])
        assert said == f"{started['run']} is a job, which has no tensors of its own; get_job shows its result"
        assert "no such handle" in await refused(client, "read_tensor", handle="run:gone-00")


PATCH = {"donor": "world", "recipient": "hello"}


async def test_two_donor_rows_for_one_position_are_refused_and_both_named(lab: Lab) -> None:
    def target(donor: int, recipient: int, layer: int = 1) -> dict[str, int]:
        return {"layer": layer, "donor_position": donor, "recipient_position": recipient}

    said = "layer 1: the donor's positions 0 and 2 both go to position 4; one row fits"
    pairs = {"kind": "patch", "layers": [1, 2], "donor": "world", "pairs": [[0, 4], [2, -1]]}
    async with connected(build_server(lab)) as client:
        assert await refused(client, "patch_activations", **PATCH, targets=[target(0, 4), target(2, -1)]) == said
        assert await refused(client, "forward_ablate", **P, interventions=[pairs]) == said
        apart = await ask(client, "patch_activations", **PATCH, targets=[target(0, 4), target(2, 4, layer=2)])
        assert [row["fired"] for row in apart["applied"]] == [1, 1]
        again = await ask(client, "patch_activations", **PATCH, targets=[target(0, 4), target(0, -1)])
        assert [row["fired"] for row in again["applied"]] == [1]


async def test_one_position_for_prompts_of_different_lengths_draws_a_notice(lab: Lab) -> None:
    async with connected(build_server(lab)) as client:
        for donor, position, drawn in (("worlds", 2, True), ("worlds", -1, False), ("world", 2, False)):
            targets = [{"layer": 1, "position": position}]
            told = await ask(client, "patch_activations", donor=donor, recipient="hello", targets=targets)
            said = "the prompts have 6 and 5 tokens: position 2 is 'r' in the donor and 'l' in the recipient"
            assert (said in told["notice"]) == drawn


async def test_the_notice_names_the_pair_of_tokens_that_is_used(lab: Lab) -> None:
    pairs = {
        (("donor_position", 1), ("position", 0)): "position 1 is 'b' in the donor and position 0 is 't' in the",
        (("position", 0), ("recipient_position", 4)): "position 0 is 'a' in the donor and position 4 is 'c' in the",
    }
    async with connected(build_server(lab)) as client:
        for pair, said in pairs.items():
            given = {"donor": "ab", "recipient": "the cat sat", "targets": [{"layer": 0, **dict(pair)}]}
            assert said in (await ask(client, "patch_activations", **given))["notice"]


async def test_what_memory_cannot_hold_is_an_answer_that_says_how_much(lab: Lab, monkeypatch) -> None:
    def too_much(*arguments: object, **named: object) -> None:
        np.ones((1 << 46,), np.float32)

    monkeypatch.setattr("server.tools.reading.forward", too_much)
    async with connected(build_server(lab)) as client:
        said = await refused(client, "capture_residuals", **P)
        assert "beside the weights; unable to allocate 256. TiB" in said
        assert "fewer layers, points or positions" in said
        monkeypatch.undo()
        await ask(client, "capture_residuals", **P)
