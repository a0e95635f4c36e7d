"""The investigation of "The capital of France is" on the real model, by a real client over stdio."""

import pytest
from clients import ERAS, ask, connected

pytestmark = [pytest.mark.anyio, pytest.mark.real]

FRANCE, ITALY = "The capital of France is", "The capital of Italy is"


def top(entries: list[dict]) -> str:
    return entries[0]["text"]


@pytest.mark.parametrize("mode", ERAS)
async def test_an_agent_finds_reads_steers_patches_and_transplants_the_answer(mode: str) -> None:
    async with connected(mode=mode) as client:
        loaded = await ask(client, "load_model")
        assert loaded["fingerprint"].startswith("b179c9523d0e6a0f")

        tokens = await ask(client, "tokenize", text=FRANCE)
        assert [t["text"] for t in tokens["tokens"]] == ["The", " capital", " of", " France", " is"]

        lens = await ask(client, "logit_lens", prompt=FRANCE)
        assert top(lens["rows"][-1]["top"]) == " Paris"
        assert lens["identity_error"] < 1e-5

        race = await ask(client, "track_race", prompt=FRANCE, tokens=[" Paris", " London"])
        assert race["rows"][-1]["leader"] == " Paris"

        towards = {"minus": [{"token": " London", "space": "unembed"}, {"token": " Paris", "space": "unembed"}]}
        steer = {"layer": 25, "vector": towards, "alpha": 40}
        steered = await ask(client, "forward_steer", prompt=FRANCE, steers=[steer], token=" London")
        assert top(steered["baseline"]) == " Paris"
        assert top(steered["effect"]) == " London"

        patched = await ask(
            client,
            "patch_activations",
            donor=ITALY,
            recipient=FRANCE,
            targets=[{"layer": 15, "position": 3}],
            token=" Rome",
        )
        assert top(patched["effect"]) == " Rome"
        assert patched["recovered"] > 0.8

        text = await ask(client, "generate_with_hooks", prompt=FRANCE, max_new_tokens=4, steers=[steer])
        assert text["baseline"]["text"].startswith(" Paris")
        assert text["hooked"]["text"].startswith(" London")

        moved = await ask(client, "prefill_inject", recipient=FRANCE, donor=ITALY, max_new_tokens=4)
        assert top(moved["injected"]) == " Rome"

        scan = await ask(client, "kv_inject_test", recipient=FRANCE, donor=ITALY, target=" Rome", layers=[22, 23, 24])
        assert scan["donor"] > 0.3 > 0.01 > scan["baseline"]
        assert scan["self_control"]["kl"] < 1e-9
