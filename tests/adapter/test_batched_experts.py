"""Rows grouped by expert: this plugin's batched experts behind vLLM's own prepare and finalize of
that format, which stand in for DeepEP's low latency, on the reference backend."""

from unittest import mock

import pytest
import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from dsv4_kernels import activation_scale, reference
from dsv4_kernels.moe import workspace_bytes
from dsv4_kernels.sm100.heuristic import unsupported_reason
from vllm.model_executor.layers.fused_moe.prepare_finalize import BatchedPrepareAndFinalize

from tests.support import loading
from tests.support.plain_moe import PlainMoe, rounded
from tests.support.routed_experts import load_experts, routed_experts
from vllm_dsv4_moe.batched_experts import Dsv4BatchedExperts
from vllm_dsv4_moe.commands.deployment import Deployment
from vllm_dsv4_moe.commands.tiny import TinyConfig, write_tiny_checkpoint
from vllm_dsv4_moe.moe_method import batch_rows
from vllm_dsv4_moe.scale_policy import activation_scales
from vllm_dsv4_moe.settings import Settings

ROUND_UP = "vllm.model_executor.layers.fused_moe.all2all_utils.maybe_roundup_layer_hidden_size"
RANKS, TOKENS = 2, 40
CONFIGS = {
    name: TinyConfig(
        layers=2, hash_layers=1, hidden=64, intermediate=64, experts=12, heads=4, expert_format=name
    )
    for name in ("nvfp4", "mxfp4")
}
# vLLM's finalize weights and adds the rows in bf16.
TOLERANCE = 2.0**-7


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("batched")
    return {name: write_tiny_checkpoint(folder / name, c) for name, c in CONFIGS.items()}


def rank_layer(checkpoint, number: int, rank: int, backend="deepep_low_latency", **settings):
    """A rank's layer, loaded."""
    from vllm.config import set_current_vllm_config

    def batched(moe, quant_config, **_):
        assert quant_config.quant_dtype is None, "these dispatches quantise what they are told to"
        return BatchedPrepareAndFinalize(batch_rows(moe), moe.num_local_experts, RANKS, rank)

    config = CONFIGS[checkpoint.name]
    vllm_config = loading.engine_config(checkpoint, {"formats": config.expert_format})
    tensors = PlainMoe(checkpoint, number).tensors
    if config.expert_format == "mxfp4":
        tensors = {name.replace(".scale", ".weight_scale"): t for name, t in tensors.items()}
    with (
        set_current_vllm_config(vllm_config),
        mock.patch("vllm_dsv4_moe.moe_method.maybe_make_prepare_finalize", batched),
        # Asks DeepEP which hidden sizes it has.
        mock.patch(ROUND_UP, lambda hidden_size, *_, **__: hidden_size),
    ):
        layer = routed_experts(vllm_config, config, ep=(RANKS, rank), all2all=backend, **settings)
        load_experts(layer, tensors.items())
        layer.quant_method.process_weights_after_loading(layer)
    return layer


def tokens() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, routing weights, ids; expert 7 has no row."""
    generator = torch.Generator().manual_seed(0)
    config = CONFIGS["nvfp4"]
    x = torch.randn(TOKENS, config.hidden, generator=generator).bfloat16()
    logits = torch.randn(TOKENS, config.experts, generator=generator)
    logits[:, 7] = -100
    return x, *reference.router_topk(logits, config.top_k, scaling=1.5)


def plain_output(plain: PlainMoe, x, weights, ids) -> torch.Tensor:
    """Float64, the routing weight after W2."""
    total = torch.zeros(x.shape, dtype=torch.float64)
    read = rounded(x, plain.fc1_scale)
    for expert in ids.unique().tolist():
        token, slot = (ids == expert).nonzero(as_tuple=True)
        rows = plain.expert(expert, read[token], torch.ones(len(token)))
        total.index_add_(0, token, rows * weights[token, slot, None].double())
    return total


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize(
    ("name", "activations", "policy"),
    [
        ("nvfp4", "bf16", "warmup"),
        ("nvfp4", "nvfp4", "warmup"),
        ("nvfp4", "nvfp4", "token"),
        ("mxfp4", "bf16", "warmup"),
        ("mxfp4", "fp8", "warmup"),
    ],
)
def test_ranks_add_up_to_plain_torch(checkpoints, name, activations, policy, number):
    settings = {"activations": activations, "activation_scale": policy}
    layers = [rank_layer(checkpoints[name], number, rank, **settings) for rank in range(RANKS)]
    kernels = [layer.quant_method.moe_kernel for layer in layers]
    assert all(isinstance(kernel.fused_experts, Dsv4BatchedExperts) for kernel in kernels)
    scales = [kernel.fused_experts.layer.activation_scales for kernel in kernels]
    fc1 = fc2 = None
    if activations == "nvfp4":
        fc1 = fc2 = policy
    if activations == "fp8":
        fc1 = "fp8"
    if fc1 == "warmup":
        fc1, fc2 = scales[0].fc1, torch.cat([rank.fc2 for rank in scales]).tolist()
    x, weights, ids = tokens()
    total = sum(layer.forward_modular(x, weights, ids).double() for layer in layers)
    expected = plain_output(PlainMoe(checkpoints[name], number, fc1, fc2), x, weights, ids)
    error = float((total - expected).norm() / expected.norm())
    assert error <= TOLERANCE, error


def test_scales_leave_room_for_products_without_their_weight(checkpoints):
    """They are of a weight of one, not of the largest that the router gives."""
    layer = rank_layer(checkpoints["nvfp4"], 0, 0, activations="nvfp4")
    of_one = layer.w2_activation_scale.clone()
    layer.routed_scaling_factor = 8.0
    assert torch.equal(activation_scales(layer, Settings()).fc2, of_one)
    weights = layer.quant_method.moe_kernel.fused_experts.layer.weights
    routed = activation_scale.warmup(weights, limit=layer.swiglu_limit, scaling=8.0)
    assert torch.equal(routed.fc2, 8 * of_one)


def test_calibrated_scales_are_refused(checkpoints):
    for settings in (
        {"activation_scale": "checkpoint"},
        {"activation_scale": "file", "activation_scale_file": "scales.json"},
    ):
        with pytest.raises(ValueError, match="applies after W2: use the warmup or token policy"):
            rank_layer(checkpoints["nvfp4"], 0, 0, activations="nvfp4", **settings)


def test_rooms_that_are_not_whole_tiles_are_refused(checkpoints):
    shape = rank_layer(checkpoints["nvfp4"], 0, 0).quant_method.shape
    shape = shape._replace(hidden=128, quantize_activations=True)
    assert shape.batch_rows == 256 * RANKS
    assert unsupported_reason(shape) is None
    says = unsupported_reason(shape._replace(batch_rows=100))
    assert "100 rows, which is not a multiple of 64: choose a max_num_batched_tokens" in says


def test_vllm_is_told_what_these_dispatches_ask_for(checkpoints):
    experts = rank_layer(checkpoints["nvfp4"], 0, 1).quant_method.moe_kernel.fused_experts
    assert experts.activation_format() == mk.FusedMoEActivationFormat.BatchedExperts
    assert not experts.expects_unquantized_inputs
    shapes = experts.workspace_shapes(512, 0, 64, 2, 12, 6, None, None)
    assert shapes[2] == (6, 512, 64)


@pytest.mark.parametrize(
    ("activations", "row_bytes"),
    [("bf16", 64 * 2), ("auto", 64 + 4 + 128)],
    ids=["W4A16", "W4A8"],
)
@pytest.mark.parametrize("backend", ["deepep_low_latency", "nixl_ep"])
def test_the_arena_of_a_deployment_is_its_servers(checkpoints, backend, activations, row_bytes):
    from dsv4_kernels.backends import SM90

    checkpoint = checkpoints["mxfp4"]
    served = rank_layer(checkpoint, 0, 0, backend, activations=activations).quant_method.shape
    settings = Settings(formats="mxfp4", activations=activations)
    deployment = Deployment(
        PlainMoe(checkpoint, 0).config, settings, 256, data_parallel=RANKS,
        is_expert_parallel=True, all2all_backend=backend,
    )  # fmt: skip
    planned, _ = deployment.shapes("sm_90a")
    assert planned == served
    # h of every row there is room for, and in W4A8, which pads h, x; no rows to sum.
    rows = served.num_local_experts * served.batch_rows
    assert workspace_bytes(SM90, planned) >= rows * row_bytes
    assert workspace_bytes(SM90, planned) < rows * row_bytes * 1.2
