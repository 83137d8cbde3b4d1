"""MXFP4 experts in vLLM's layers: what was stored is loaded, on every rank, and loaded again."""

from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from dsv4_kernels import backends

from tests.support import loading
from tests.support.gathered_ranks import GatheredRanks
from tests.support.layers import relative_error
from tests.support.plain_moe import PlainMoe
from tests.support.routed_experts import loaded_experts, random_tokens, routed_experts
from vllm_dsv4_moe.commands.tiny import TinyConfig, write_tiny_checkpoint
from vllm_dsv4_moe.packed_dispatch import PackedDispatch

CONFIG = TinyConfig(
    layers=1, hash_layers=0, hidden=64, intermediate=64, experts=12, heads=4, expert_format="mxfp4"
)
TOLERANCE = 0.006  # of rounding to bf16
# Ranks' rows are rounded to bf16 once more, before they are added.
SUM_TOLERANCE = 2.0**-7


@pytest.fixture(scope="module")
def vllm_config(checkpoint):
    return loading.engine_config(checkpoint, {"formats": "mxfp4"})


@pytest.fixture(scope="module")
def plain(checkpoint):
    return PlainMoe(checkpoint, 0, "fp8")


@pytest.fixture(scope="module")
def tensors(plain):
    """Under the names that vLLM's models give them."""
    return {
        name.replace(".scale", ".weight_scale"): tensor
        for name, tensor in plain.tensors.items()
        if name.startswith("experts.")
    }


def rank_layer(vllm_config, tensors, **options):
    return loaded_experts(vllm_config, CONFIG, tensors, **options)


@pytest.fixture(scope="module")
def tokens():
    return random_tokens(40, CONFIG)


@pytest.fixture(scope="module")
def expected(plain, tokens):
    x, weights, ids = tokens
    return plain.routed(x, ids, weights.double()).float()


RANKS = {
    "one": [{}],
    "expert parallel": [{"ep": (4, rank)} for rank in range(4)],
    "round robin, uneven": [{"ep": (5, r), "placement": "round_robin"} for r in range(5)],
    "tensor parallel": [{"tp": (2, rank)} for rank in range(2)],
}


@pytest.mark.parametrize("ranks", RANKS.values(), ids=RANKS)
def test_ranks_add_up_to_plain_arithmetic(vllm_config, tensors, tokens, expected, ranks):
    parts = [rank_layer(vllm_config, tensors, **options) for options in ranks]
    total = sum(layer.forward_modular(*tokens).float() for layer in parts)
    tolerance = TOLERANCE if len(parts) == 1 else SUM_TOLERANCE
    assert relative_error(total, expected) <= tolerance


@pytest.mark.parametrize("scale_dtype", [torch.float8_e8m0fnu, torch.uint8], ids=str)
def test_every_scale_and_code_is_loaded_as_it_is_stored(vllm_config, tensors, scale_dtype):
    """vLLM's models hand scales over as uint8; what they would convert is never converted."""
    tensors = dict(tensors)
    stored = {}
    for position, shard in enumerate(("w1", "w3", "w2")):
        scales = torch.arange(128).view(64, 2) + 63 * position  # 0 to 254 in all
        codes = torch.arange(64 * 32).view(64, 32) % 256
        stored[shard] = (scales.to(torch.uint8), codes.to(torch.uint8))
        tensors[f"experts.7.{shard}.weight_scale"] = stored[shard][0].view(scale_dtype)
        tensors[f"experts.7.{shard}.weight"] = stored[shard][1].view(torch.int8)
    layer = rank_layer(vllm_config, tensors)
    for shard, loaded_scales, loaded_codes in (
        ("w1", layer.w13_weight_scale[7, :64], layer.w13_weight[7, :64]),
        ("w3", layer.w13_weight_scale[7, 64:], layer.w13_weight[7, 64:]),
        ("w2", layer.w2_weight_scale[7], layer.w2_weight[7]),
    ):
        assert torch.equal(loaded_scales, stored[shard][0])
        assert torch.equal(loaded_codes, stored[shard][1])


def test_eplb_moves_every_tensor_of_an_expert(vllm_config, tensors):
    layer = rank_layer(vllm_config, tensors, ep=(4, 1), redundant=4)
    moved = {name: tuple(param.shape) for name, param in layer.named_parameters()}
    assert moved == {
        "w13_weight": (4, 128, 32),
        "w13_weight_scale": (4, 128, 2),
        "w13_weight_scale_2": (4, 2),
        "w2_weight": (4, 64, 32),
        "w2_weight_scale": (4, 64, 2),
        "w2_weight_scale_2": (4,),
    }
    assert [len(weight) for weight in layer.get_expert_weights()] == [4] * 6
    runs = layer.quant_method.moe_kernel.fused_experts.layer
    assert {part.data_ptr() for part in runs.weights} == {p.data_ptr() for p in layer.parameters()}


def test_weights_that_are_loaded_again_replace_the_first_in_place(checkpoint, tmp_path, tokens):
    config = loading.engine_config(checkpoint, {"formats": "mxfp4"})
    model = loading.load_model(config)
    experts = model.model.layers[0].ffn.experts.routed_experts
    before = {name: param.data_ptr() for name, param in experts.named_parameters()}
    other = write_tiny_checkpoint(tmp_path / "other", TinyConfig(**vars(CONFIG) | {"seed": 7}))
    loading.reload_weights(config, model, other)
    assert {name: param.data_ptr() for name, param in experts.named_parameters()} == before
    x, weights, ids = tokens
    expected = PlainMoe(other, 0, "fp8").routed(x, ids, weights.double()).float()
    assert relative_error(experts.forward_modular(*tokens), expected) <= TOLERANCE


def test_padded_weights_are_what_is_moved_and_loaded_again(
    checkpoint, tmp_path, tokens, monkeypatch
):
    """By a backend whose tiles are of 96, where the checkpoint has 64."""
    padding = replace(backends.REFERENCE, padded_intermediate=lambda size, fp8: (96, 96))
    monkeypatch.setitem(backends.BACKENDS, "reference", padding)
    config = loading.engine_config(checkpoint, {"formats": "mxfp4"})
    model = loading.load_model(config)
    experts = model.model.layers[0].ffn.experts.routed_experts
    before = {name: (p.data_ptr(), p.shape) for name, p in experts.named_parameters()}
    assert experts.w13_weight.shape == (12, 2 * 96, 32) and experts.w2_weight.shape == (12, 64, 48)
    runs = experts.quant_method.moe_kernel.fused_experts.layer
    assert {part.data_ptr() for part in runs.weights} <= {at for at, _ in before.values()}
    assert all(weight.is_contiguous() for weight in experts.get_expert_weights())
    other = write_tiny_checkpoint(tmp_path / "other", TinyConfig(**vars(CONFIG) | {"seed": 7}))
    x, weights, ids = tokens
    for path in (checkpoint, other):
        loading.reload_weights(config, model, path)
        assert {n: (p.data_ptr(), p.shape) for n, p in experts.named_parameters()} == before
        expected = PlainMoe(path, 0, "fp8").routed(x, ids, weights.double()).float()
        assert relative_error(experts.forward_modular(*tokens), expected) <= TOLERANCE


def test_bf16_activations_give_plain_arithmetic(checkpoint, vllm_config, tensors, tokens):
    layer = rank_layer(vllm_config, tensors, activations="bf16")
    x, weights, ids = tokens
    expected = PlainMoe(checkpoint, 0).routed(x, ids, weights.double()).float()
    assert relative_error(layer.forward_modular(*tokens), expected) <= TOLERANCE


@pytest.mark.parametrize("activations", ["auto", "nvfp4", "fp8", "bf16"])
def test_activations_are_fp8_unless_bf16_is_set(vllm_config, activations):
    shape = routed_experts(vllm_config, CONFIG, activations=activations).quant_method.shape
    assert (shape.weight_format, shape.fp8) == ("mxfp4", activations != "bf16")
    assert not shape.quantize_activations and not shape.scale_per_row


def test_gathered_tokens_travel_quantised(vllm_config, tensors):
    with GatheredRanks(2).installed():
        for activations, packs in (("auto", True), ("bf16", False)):
            layer = rank_layer(vllm_config, tensors, ep=(2, 0), dp=(2, 0), activations=activations)
            dispatch = layer.quant_method.moe_kernel.prepare_finalize
            assert isinstance(dispatch, PackedDispatch) == packs


def test_a_drafts_tensors_have_the_checkpoints_names():
    from vllm_dsv4_moe.expert_params import checkpoint_prefix

    def named(layer_name: str) -> str:
        return checkpoint_prefix(SimpleNamespace(layer_name=layer_name, num_model_layers=43))

    assert named("model.layers.42.ffn.experts") == "layers.42.ffn.experts"
    assert named("model.layers.43.ffn.experts") == "mtp.0.ffn.experts"
    assert named("model.layers.45.ffn.experts") == "mtp.2.ffn.experts"


@pytest.mark.parametrize(
    ("activations", "roundings", "says"),
    [
        ("auto", [0.0], []),
        ("auto", [2.0**-33], ["15 powers of two", "set activations to bf16, which holds 31"]),
        ("bf16", [2.0**-33], ["31 powers of two"]),
        ("auto", [2.0**-34, 2.0**-34, 2.0**-33], ["at most 5.8e-11 of", "at most 1.2e-10 of"]),
    ],
    ids=["exact", "W4A8", "W4A16", "layers"],
)
def test_what_was_rounded_is_logged(
    vllm_config, tensors, monkeypatch, activations, roundings, says
):
    """A backend that cannot hold all scales of an expert says how far off it is and what holds
    more, for the first layer and for those that are farther off."""
    from vllm_dsv4_moe import moe_method

    monkeypatch.setattr(moe_method.Mxfp4Dsv4Method, "logged_rounding", 0.0)
    prepare, said = moe_method.prepare_layer, []
    for rounding in roundings:

        def prepared(*args, rounding=rounding, **kwargs):
            layer = prepare(*args, **kwargs)
            layer.rounding.fill_(rounding)
            return layer

        monkeypatch.setattr(moe_method, "prepare_layer", prepared)
        with mock.patch.object(moe_method.logger, "info") as say:
            rank_layer(vllm_config, tensors, activations=activations)
        said += [call.args[0] % call.args[1:] for call in say.mock_calls]
    assert len(said) == len({rounding for rounding in roundings if rounding})
    assert all(words in " ".join(said) for words in says)
    assert ("bf16" in " ".join(said)) == (activations == "auto" and bool(said))


def test_vllms_weight_loader_takes_nvfp4_alone_for_modelopts():
    from vllm_dsv4_moe.moe_method import METHODS

    assert {name: "ModelOpt" in method.__name__ for name, method in METHODS.items()} == {
        "nvfp4": True,
        "mxfp4": False,
    }
