"""The layer through `moe`: the chain of kernels, expert parallelism, refusals."""

from dataclasses import replace

import pytest
import torch
from bench.inputs import random_weights
from dsv4_kernels import moe, reference
from dsv4_kernels.backends import BACKENDS, Backend, choose_backend
from dsv4_kernels.types import ActivationScales, ExpertWeights, MoeShape, Routing

from tests.kernels.test_nvfp4_quantize import unswizzle
from tests.support.layers import random_call, run, workspace_of

SHAPE = MoeShape(6, 6, 3, 64, 48, 33, quantize_activations=True)


def weights_of(shape: MoeShape) -> ExpertWeights:
    """Block scales around 1, and outputs near 1."""
    return random_weights(shape, "cpu", scale_bytes=(40, 64), gain=0.3)


def random_routing(num_tokens: int, shape: MoeShape) -> Routing:
    return random_call(num_tokens, shape, 1)[1]


def unit_scales(num_local_experts: int) -> ActivationScales:
    return ActivationScales(torch.full((1,), 0.01), torch.full((num_local_experts,), 0.01))


def make_layer(shape: MoeShape, weights: ExpertWeights, limit: float | None = 10.0):
    scales = unit_scales(shape.num_local_experts) if shape.quantize_activations else None
    return moe.prepare_layer(
        choose_backend("reference", shape, None),
        shape,
        weights,
        limit=limit,
        activation_scales=scales,
    )


EP_SHAPE = SHAPE._replace(num_experts=16, num_local_experts=16, top_k=4)
POLICIES = {
    "w4a16": lambda local: None,
    "static": lambda local: ActivationScales(torch.full((1,), 0.01), EP_FC2_SCALES[local]),
    "token": lambda local: ActivationScales(None, None),
    "token-fc2": lambda local: ActivationScales(torch.full((1,), 0.01), None),
}
# Different for every expert: a rank that took another's would be seen.
EP_FC2_SCALES = torch.logspace(-3, -1, 16)


def ep_placement(name: str, ranks: int) -> list[list[int]]:
    """The (logical) expert of every local slot, by rank; "redundant" has two copies more each."""
    each = 16 // ranks
    if name == "round-robin":
        return [list(range(rank, 16, ranks)) for rank in range(ranks)]
    linear = [list(range(rank * each, (rank + 1) * each)) for rank in range(ranks)]
    if name == "redundant":
        return [experts + [(3 * rank) % 16, 5] for rank, experts in enumerate(linear)]
    return linear


def physical_routing(routing: Routing, placement: list[list[int]]) -> tuple[Routing, list]:
    """Ids of copies, each use of an expert another one, as EPLB spreads them; a map per rank."""
    logical = [expert for experts in placement for expert in experts]
    copies = [[p for p, e in enumerate(logical) if e == expert] for expert in range(16)]
    if len(logical) == 16:  # no copies: vLLM keeps logical ids, wherever the experts are
        numbers = placement
        ids = routing.ids
    else:
        numbers = list(torch.arange(len(logical)).view(len(placement), -1).tolist())
        flat = [copies[e][use % len(copies[e])] for use, e in enumerate(routing.ids.flatten())]
        ids = torch.tensor(flat, dtype=torch.int32).view_as(routing.ids)
    maps = []
    for local in numbers:
        expert_map = torch.full((len(logical),), -1, dtype=torch.int32)
        expert_map[local] = torch.arange(len(local), dtype=torch.int32)
        maps.append(expert_map)
    return Routing(routing.weights, ids), maps


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("name", ["linear", "round-robin", "redundant"])
def test_the_sum_over_ranks_is_the_single_rank_output(name, ranks, policy):
    """Tolerance: a rank rounds its fp32 sum to bf16, by 2^-8 of it at most, and so does the single
    rank; the rows that are summed are the same. So each element is within 2^-8 of the magnitudes
    that were rounded, cancellation between ranks included.
    """
    weights = weights_of(EP_SHAPE)
    x = torch.randn(33, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    routing = random_routing(33, EP_SHAPE)
    quantise = policy != "w4a16"

    def output(experts: list[int], used: Routing, expert_map, num_experts: int) -> torch.Tensor:
        shape = EP_SHAPE._replace(
            num_experts=num_experts,
            num_local_experts=len(experts),
            quantize_activations=quantise,
            scale_per_row="token" in policy,
        )
        layer = moe.prepare_layer(
            choose_backend("reference", shape, None),
            shape,
            ExpertWeights(*(tensor[experts] for tensor in weights)),
            limit=10.0,
            activation_scales=POLICIES[policy](experts),
        )
        return run(layer, x, used, expert_map=expert_map).float()

    single = output(list(range(16)), routing, None, 16)
    placement = ep_placement(name, ranks)
    used, maps = physical_routing(routing, placement)
    parts = [output(e, used, m, len(m)) for e, m in zip(placement, maps, strict=True)]
    bound = (sum(part.abs() for part in parts) + single.abs()) * 2.0**-8
    assert ((sum(parts) - single).abs() <= bound).all()
    assert single.abs().amax(dim=1).min() > 0, "every token has an output"
    if ranks == 1 and name == "linear":
        assert parts[0].equal(single)


def test_a_token_may_name_one_expert_twice():
    """A hash table's row may: both slots count, also where fewer experts are local than top_k."""
    shape = SHAPE._replace(num_local_experts=1)
    weights = weights_of(shape)
    layer = make_layer(shape, weights)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    expert_map = torch.tensor([-1, -1, 0, -1, -1, -1], dtype=torch.int32)
    shares = torch.tensor([0.5, 0.25, 0.25]).repeat(5, 1)
    thrice = run(layer, x, Routing(shares, torch.full((5, 3), 2)), expert_map=expert_map)
    apart = [
        run(layer, x, Routing(shares, torch.tensor(ids).repeat(5, 1)), expert_map=expert_map)
        for ids in ([2, -1, -1], [-1, 2, 0], [5, 1, 2])
    ]
    torch.testing.assert_close(
        thrice.float(), sum(part.float() for part in apart), rtol=0.02, atol=0
    )


# The kernels' chain around GEMMs that are the oracle's: what is left is layout, quantise, combine,
# the arena, and the order of the calls.


def swizzle(scales: torch.Tensor) -> torch.Tensor:
    blocks = scales.view(torch.uint8).view(len(scales) // 128, 4, 32, -1, 4)
    return blocks.permute(0, 3, 2, 1, 4).reshape(scales.shape).contiguous()


def dequantized(rows, global_scale: torch.Tensor, used: slice) -> torch.Tensor:
    codes = rows.codes[used]
    blocks = rows.block_scales.view(torch.uint8)
    scales = unswizzle(blocks, len(blocks), codes.shape[1] // 8)[used].contiguous()
    scales = scales.view(torch.float8_e4m3fn)
    return reference.nvfp4_dequantize(codes, scales, global_scale.reshape(-1, 1))


def groups(layout):
    starts, counts = layout.offsets.tolist(), layout.counts.tolist()
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(starts[expert], starts[expert] + count)


def oracle_fc1(x, routing_weights, layout, layer, *, out, num_tokens=None) -> None:
    scales, top_k = layer.activation_scales, routing_weights.shape[1]
    for expert, used in groups(layout):
        slots = layout.row_to_slot[used].long()
        if scales is None:
            rows = x[slots // top_k].float()
        else:
            own = x.global_scales[used] if scales.fc1 is None else scales.fc1
            rows = dequantized(x, own, used)
        h = reference.fc1(rows, layer.weights, expert, routing_weights.flatten()[slots], 10.0)
        if isinstance(out, torch.Tensor):
            out[used] = h.bfloat16()
            continue
        quantized, overflow = reference.nvfp4_quantize(h, scales.fc2[expert : expert + 1])
        layer.saturated.add_(overflow)
        out.codes[used] = quantized.codes
        blocks = out.block_scales.view(torch.uint8)
        whole = unswizzle(blocks, *blocks.shape)
        whole[used, : h.shape[1] // 16] = quantized.block_scales.view(torch.uint8)
        out.block_scales.view(torch.uint8).copy_(swizzle(whole))


def oracle_fc2(h, layout, layer, *, out, routing_weights=None, num_tokens=None) -> None:
    assert routing_weights is None, "W4A8 has another oracle"
    scales = layer.activation_scales
    for expert, used in groups(layout):
        if scales is None:
            rows = h[used].float()
        else:
            own = h.global_scales[used] if scales.fc2 is None else scales.fc2[expert : expert + 1]
            rows = dequantized(h, own, used)
        out[used] = reference.fc2(rows, layer.weights, expert).bfloat16()


CHAIN = Backend(
    name="chain",
    majors=(),
    unsupported_reason=lambda shape: None,
    prepare_weights=lambda weights, rounding, fp8: weights,
    tile=lambda shape, num_tokens: 8 if num_tokens < 16 else 32,
    fc1=oracle_fc1,
    fc2=oracle_fc2,
)


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("num_tokens", [1, 17])
@pytest.mark.parametrize("rank", [None, 0, 3], ids=["no-ep", "rank-0-of-4", "rank-3-of-4"])
def test_the_chain_of_kernels_is_the_oracle_bit_for_bit(rank, num_tokens, policy):
    local = list(range(16)) if rank is None else list(range(rank, 16, 4))
    expert_map = torch.full((16,), -1, dtype=torch.int32)
    expert_map[local] = torch.arange(len(local), dtype=torch.int32)
    shape = EP_SHAPE._replace(
        num_local_experts=len(local),
        quantize_activations=policy != "w4a16",
        scale_per_row="token" in policy,
    )
    weights = ExpertWeights(*(tensor[local] for tensor in weights_of(EP_SHAPE)))
    x = torch.randn(num_tokens, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    x[0] *= 1000
    routing = random_routing(num_tokens, EP_SHAPE)
    outputs = []
    for backend in (CHAIN, BACKENDS["reference"]):
        scales = POLICIES[policy](local)
        layer = moe.prepare_layer(backend, shape, weights, limit=10.0, activation_scales=scales)
        workspace = workspace_of(layer)
        out = torch.full_like(x, torch.nan)
        # Twice: the second call finds what the first left in the arena.
        for _ in range(2):
            moe.moe(x, routing, layer, workspace, expert_map=expert_map, out=out)
        outputs.append((out, int(layer.saturated)))
    (ours, our_count), (expected, expected_count) = outputs
    assert ours.equal(expected)
    assert our_count == expected_count
    if rank is None:
        static = policy in ("static", "token-fc2")
        assert (our_count > 0) == static, "one token is 1000 times larger"


@pytest.mark.parametrize(
    "ids",
    [
        [[2, 2, 2, 2]] * 9,
        [[-1, -1, -1, -1]] * 3,
        [[0, 1, 4, 5], [15, -1, 2, 2], [-1, -1, -1, -1], [2**31 - 1, -(2**31), 16, 3]],
    ],
    ids=["all-on-one-expert", "padding-only", "mixed"],
)
def test_the_chain_takes_any_ids(ids):
    """Experts 2 and 3 are local; the rest, and what is no expert, adds nothing."""
    shape = EP_SHAPE._replace(num_local_experts=2)
    weights = ExpertWeights(*(tensor[2:4] for tensor in weights_of(EP_SHAPE)))
    expert_map = torch.full((16,), -1, dtype=torch.int32)
    expert_map[2:4] = torch.arange(2, dtype=torch.int32)
    x = torch.randn(len(ids), 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    routing = Routing(torch.full((len(ids), 4), 0.25), torch.tensor(ids, dtype=torch.int32))
    outputs = []
    for backend in (CHAIN, BACKENDS["reference"]):
        scales = POLICIES["static"]([2, 3])
        layer = moe.prepare_layer(backend, shape, weights, limit=10.0, activation_scales=scales)
        outputs.append(run(layer, x, routing, expert_map=expert_map))
    assert outputs[0].equal(outputs[1])
    has_local = ((routing.ids == 2) | (routing.ids == 3)).any(1)
    assert (outputs[0].abs().amax(1) > 0).equal(has_local)


def test_the_oracle_does_not_depend_on_the_default_dtype():
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    layer, routing = make_layer(SHAPE, weights_of(SHAPE)), random_routing(5, SHAPE)
    expected = run(layer, x, routing)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert run(layer, x, routing).equal(expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_kernels_are_loaded_when_the_weights_are_ready():
    """They may still be compiled by other processes meanwhile."""

    class OnGpu(torch.Tensor):
        is_cuda = True

    done = []

    def prepare_weights(weights, rounding, fp8):
        done.append("weights")
        return weights

    shape = SHAPE._replace(quantize_activations=False)
    backend = replace(
        choose_backend("reference", shape, None),
        prepare_weights=prepare_weights,
        compile_layer=lambda shape, device: done.append("kernels"),
    )
    weights = weights_of(shape)
    weights = weights._replace(w13=weights.w13.as_subclass(OnGpu))
    moe.prepare_layer(backend, shape, weights, limit=10.0, activation_scales=None)
    assert done == ["weights", "kernels"]


def test_no_tokens_is_not_an_error():
    layer = make_layer(SHAPE, weights_of(SHAPE))
    out = run(layer, torch.zeros(0, 64, dtype=torch.bfloat16), random_routing(0, SHAPE))
    assert out.shape == (0, 64)


def test_more_tokens_than_sized_for_names_both_numbers():
    layer = make_layer(SHAPE, weights_of(SHAPE))
    with pytest.raises(ValueError, match="34 tokens .* sized for 33"):
        run(layer, torch.zeros(34, 64, dtype=torch.bfloat16), random_routing(34, SHAPE))


@pytest.mark.parametrize(
    ("name", "capability", "message"),
    [
        ("fp4", None, "there is no fp4 backend in this build: use .*reference"),
        ("auto", (8, 0), "no backend is made for compute capability 8.0"),
    ],
    ids=["unknown", "auto-on-ampere"],
)
def test_a_backend_that_cannot_run_says_why(name, capability, message):
    with pytest.raises(ValueError, match=message):
        choose_backend(name, SHAPE, capability)


def test_a_size_that_nvfp4_cannot_split_is_refused_with_the_remedy():
    shape = SHAPE._replace(intermediate=2304 // 32)
    with pytest.raises(
        ValueError, match="intermediate size 72 .* NVFP4 block, 16: use a smaller t"
    ):
        choose_backend("auto", shape, None)


@pytest.mark.parametrize(
    ("change", "capability", "message"),
    [
        ({"intermediate": 48}, None, "intermediate size 48 .* MXFP4 block, 32: use a smaller t"),
        ({"hidden": 96}, (9, 0), "hidden size 96 is not a multiple of 64: choose vLLM's own"),
        ({"quantize_activations": True}, (9, 0), "these are MXFP4: set activations to auto"),
        ({}, (10, 0), "this layer's are MXFP4, .* leave the layer to vLLM"),
        ({"weight_format": "fp6"}, None, "weight format fp6 is not known: use nvfp4 or mxfp4"),
    ],
    ids=["block", "tile", "w4a4", "sm100", "unknown"],
)
def test_mxfp4_that_no_kernel_takes_is_refused_with_the_remedy(change, capability, message):
    mxfp4 = {"weight_format": "mxfp4", "intermediate": 64, "quantize_activations": False}
    with pytest.raises(ValueError, match=message):
        choose_backend("auto", SHAPE._replace(**(mxfp4 | change)), capability)
