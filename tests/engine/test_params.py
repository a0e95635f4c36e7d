"""Weights from files: every dtype and layout gives the same model, and nothing changes them."""

import dataclasses
import zlib

import numpy as np
import pytest
import tiny_files
from naive import naive
from recording import Replace
from tolerances import REFERENCE, assert_close, assert_moved, assert_same

from engine import LayerHook, ZeroAblateHook, forward, generate, load_model
from engine.config import Rope
from engine.errors import DamagedFile
from engine.ops import linear
from engine.params import Joined, Linear, Norm
from engine.synthetic import CONFIG, synthetic

IDS = [70, 3, 99, 5, 5, 180, 12]
NAMES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
}


def logits(model, ids=IDS):
    return forward(model, ids, logits_at="all").logits[0]


def assert_holds(model, tensors: dict[str, np.ndarray]) -> None:
    assert_same(model.params.embed, tensors["model.embed_tokens.weight"])
    assert_same(model.params.final_norm.weight, tensors["model.norm.weight"])
    for layer in range(2):
        for field, array in model.params.layer(layer).arrays():
            assert_same(array, tensors[f"model.layers.{layer}.{NAMES[field]}.weight"].T)


@pytest.fixture(scope="module")
def small():
    """Weights of the size a trained model has, so that a few layers do not saturate."""
    return {name: array * (0.3 if array.ndim == 2 else 1) for name, array in tiny_files.weights().items()}


@pytest.fixture(scope="module")
def in_f32(tmp_path_factory, small):
    return load_model(tiny_files.hf_directory(tmp_path_factory.mktemp("f32") / "m", small))


@pytest.mark.parametrize("shards", [1, 3])
def test_f32_tensors_arrive_unchanged_from_one_file_or_shards(tmp_path, small, in_f32, shards):
    model = load_model(tiny_files.hf_directory(tmp_path / "m", small, shards=shards))
    assert_holds(model, small)
    assert_same(logits(model), logits(in_f32))


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_half_precision_tensors_arrive_as_the_numbers_they_stand_for(tmp_path, small, dtype):
    def rounded(array):
        if dtype == "F16":
            return array.astype(np.float16).astype(np.float32)
        return (array.view(np.uint32) & 0xFFFF0000).view(np.float32)

    model = load_model(tiny_files.hf_directory(tmp_path / "m", small, dtype=dtype))
    assert_holds(model, {name: rounded(array) for name, array in small.items()})
    assert {array.dtype for _, array in model.params.layer(0).arrays()} == {np.dtype(np.float32)}


def test_a_gguf_of_f32_tensors_is_the_directory_it_was_made_from(tmp_path, small, in_f32):
    model = load_model(tiny_files.gguf_file(tmp_path / "m.gguf", small, kinds={}))
    assert_holds(model, small)
    stored_eps = float(np.float32(in_f32.config.norm_eps))
    assert model.config == dataclasses.replace(in_f32.config, norm_eps=stored_eps)
    assert_close(logits(model), logits(in_f32))


def test_a_loaded_directory_computes_what_the_reference_computes(in_f32):
    assert_close(logits(in_f32), naive(in_f32, IDS).logits, REFERENCE["synthetic"])


def test_a_tied_model_unembeds_with_its_embeddings_and_an_untied_one_does_not(tmp_path, small, in_f32):
    assert in_f32.params.unembed is in_f32.params.embed
    head = np.random.default_rng(9).standard_normal(small["model.embed_tokens.weight"].shape).astype(np.float32)
    untied = small | {"lm_head.weight": head}
    for path in (
        tiny_files.hf_directory(tmp_path / "m", untied, tie_word_embeddings=False),
        tiny_files.gguf_file(tmp_path / "m.gguf", untied, kinds={}),
    ):
        model = load_model(path)
        assert_same(model.params.unembed, head)
        assert_same(model.params.embed, small["model.embed_tokens.weight"])
        assert_close(logits(model), naive(model, IDS).logits, REFERENCE["synthetic"])
        assert_moved(logits(model), logits(in_f32))
        assert model.params.nbytes == in_f32.params.nbytes + head.nbytes


def test_settings_of_config_json_reach_the_decoder(tmp_path, small, in_f32):
    hot = (Rope(tuple(100.0 ** (-i / 8) for i in (0, 2, 4, 6))),) * 2
    settings = ({"rms_norm_eps": 0.1}, {"rope_theta": 100.0}, {"rope_parameters": {"rope_theta": 100.0}})
    for i, setting in enumerate(settings):
        model = load_model(tiny_files.hf_directory(tmp_path / str(i), small, **setting))
        expected = dataclasses.replace(in_f32.config, **({"norm_eps": 0.1} if i == 0 else {"ropes": hot}))
        assert model.config == expected
        assert_moved(logits(model), logits(in_f32))


WIDTHS = (("q", 32), ("k", 16), ("v", 16), ("o", 32))


def test_weights_that_the_config_does_not_account_for_are_refused(tmp_path, small):
    extra = small | {"model.layers.1.self_attn.o_proj.bias": np.zeros(32, np.float32)}
    with pytest.raises(DamagedFile, match=r"o_proj\.bias"):
        load_model(tiny_files.hf_directory(tmp_path / "m", extra))


def test_biases_of_a_file_are_added(tmp_path, small, in_f32):
    bias = np.random.default_rng(4).standard_normal(32).astype(np.float32)
    others = {f"model.layers.{i}.self_attn.{p}_proj.bias": np.zeros(n, np.float32) for i in (0, 1) for p, n in WIDTHS}
    with_bias = small | others | {"model.layers.1.self_attn.o_proj.bias": bias}
    model = load_model(tiny_files.hf_directory(tmp_path / "m", with_bias, attention_bias=True))
    assert_same(model.params.layer(1).o.bias, bias)
    projected = forward(model, IDS, hook=Replace("z", 1, np.zeros_like), stop=2, logits_at="none").residual
    without = forward(in_f32, IDS, hook=Replace("z", 1, np.zeros_like), stop=2, logits_at="none").residual
    assert_moved(projected, without)


# --- matrices that read the same features ---------------------------------------------------------------------


def test_parts_of_a_layer_lie_beside_each_other(small, in_f32):
    for i in range(2):
        layer = in_f32.params.layer(i)
        for joined, names in ((layer.qkv, "q k v"), (layer.gate_up, "gate up")):
            assert joined.weight.flags.c_contiguous
            parts = [small[f"model.layers.{i}.{NAMES[name]}.weight"].T for name in names.split()]
            assert_same(joined.weight, np.concatenate(parts, axis=1))
            assert all(np.shares_memory(getattr(layer, name).weight, joined.weight) for name in names.split())
    kept = sum(array.nbytes for _, array in layer.stored())
    assert kept == sum(array.nbytes for _, array in layer.arrays()), "each number once"


def test_a_part_without_a_bias_gets_zeros():
    ones = Linear(np.ones((4, 3), np.float32), np.ones(3, np.float32))
    bare = Linear(np.ones((4, 2), np.float32))
    assert Joined.of(ones, bare, ones).bias.tolist() == [1, 1, 1, 0, 0, 1, 1, 1]
    assert Joined.of(bare, bare).bias is None


def test_a_joined_product_is_that_of_its_parts(in_f32):
    layer = in_f32.params.layer(0)
    x = np.random.default_rng(5).standard_normal((2, 5, 32)).astype(np.float32)
    for joined in (layer.qkv, layer.gate_up):
        made = linear(x, joined.weight, joined.bias)
        for own, part in zip(joined.split(made), joined.parts(), strict=True):
            assert np.shares_memory(own, made)
            assert_close(own, linear(x, np.ascontiguousarray(part.weight)))


def test_the_activation_of_an_mlp_has_memory_of_its_own(model, ids):
    class Owner(LayerHook):
        def on_ffn_activation(self, layer, x, pos):
            assert x.flags.c_contiguous
            assert x.base.nbytes == x.nbytes

    for rows in (ids, ids[:1]):
        forward(model, rows, hook=Owner())


# --- architecture as data -------------------------------------------------------------------------------------


def variant(**changes):
    return synthetic(1, dataclasses.replace(CONFIG, **changes))


def test_scales_and_caps_of_a_config_act_where_they_say():
    plain = variant()
    base = logits(plain)
    assert_close(logits(variant(logit_scale=0.5)), 0.5 * base)
    assert_close(logits(variant(final_softcap=2.0)), 2 * np.tanh(base / 2))
    embedded = forward(variant(embed_scale=3.0), IDS, hook=None, stop=1, logits_at="none").residual
    by_hand = forward(plain, IDS, hook=Replace("embed", 0, lambda x: 3 * x), stop=1, logits_at="none").residual
    assert_close(embedded, by_hand)
    scaled = forward(variant(residual_scale=0.5), IDS, stop=1, logits_at="none").residual
    assert_moved(scaled, forward(plain, IDS, stop=1, logits_at="none").residual)
    assert_moved(logits(variant(windows=(2,) * 4)), base)
    assert_moved(logits(variant(attn_softcap=0.5)), base)
    assert_moved(logits(variant(ropes=(None,) * 4)), base)


def test_a_parallel_block_adds_both_parts_to_its_input():
    model = variant(parallel=True)
    from recording import everything

    acts = everything(model, IDS)
    assert ("resid_mid", 0) not in acts
    for layer in range(4):
        parts = acts["resid_pre", layer] + acts["attn_out", layer] + acts["mlp_out", layer]
        assert_close(parts, acts["resid_post", layer])


def test_rotary_tables_are_exact_far_from_the_start():
    rope, pos = Rope.plain(10_000.0, 64), np.array([0, 1, 8000])
    cos, sin = rope.table(pos, 8001)
    exact = pos[:, None] * 10_000.0 ** (-np.arange(0, 64, 2) / 64)
    assert np.abs(cos - np.cos(exact)).max() < 1e-7
    assert np.abs(sin - np.sin(exact)).max() < 1e-7


# --- nothing changes the weights ------------------------------------------------------------------------------


def checksum(model) -> int:
    total = 0
    layers = [array for i in range(model.config.n_layers) for _, array in model.params.layer(i).arrays()]
    for array in [*layers, model.params.embed, model.params.unembed, model.params.final_norm.weight]:
        total = zlib.crc32(np.ascontiguousarray(array), total)
    return total


def test_weights_and_results_are_unchanged_after_success_error_and_cancellation(model, ids, donor):
    before, baseline = checksum(model), logits(model, ids)

    def stop_at_layer_two(done, total, what):
        if done == 2:
            raise KeyboardInterrupt

    generate(model, ids, 2, hook=ZeroAblateHook.for_layers([0]))
    model.patch_activations(donor, ids, [(1, -1)], [2])
    model.logit_lens(np.ones(model.config.d_model, np.float32))
    for function in (lambda x: x[..., :-1], lambda x: 1 / 0):
        with pytest.raises(Exception, match=r"must be float32|division by zero"):
            forward(model, ids, hook=Replace("mlp_out", 1, function))
    with pytest.raises(KeyboardInterrupt):
        forward(model, ids, hook=Replace("resid_post", 1, np.zeros_like), tick=stop_at_layer_two)
    assert checksum(model) == before
    assert_same(logits(model, ids), baseline)


def test_a_fingerprint_follows_the_weights():
    assert synthetic(0).fingerprint == synthetic(0).fingerprint != synthetic(1).fingerprint
    assert_same(logits(synthetic(0)), logits(synthetic(0)))
    assert_moved(logits(synthetic(0)), logits(synthetic(1)))


def test_absent_parts_are_the_identity():
    model = synthetic(0)
    p = model.params.layer(0)
    ones = np.ones(64, np.float32)
    with_bias = dataclasses.replace(p, o=Linear(p.o.weight, np.zeros(64, np.float32)))
    normed = dataclasses.replace(p, attn_post_norm=Norm(ones))
    base = logits(model)
    model.params._dense[0] = with_bias
    assert_close(logits(model), base)
    model.params._dense[0] = normed
    assert_moved(logits(model), base)
