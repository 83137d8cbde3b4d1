"""The layer on the GPU that there is: against the oracle, under CUDA graphs, bit-equal in two runs.

The backend is `auto`'s, at the sizes of V4-Flash and V4-Pro on one rank of eight.
"""

from functools import partial

import pytest
import torch
from bench.inputs import expert_map, random_weights
from bench.released import released_shape
from dsv4_kernels import activation_scale, moe
from dsv4_kernels.backends import BACKENDS, Backend, choose_backend
from dsv4_kernels.packed_tokens import pack_tokens, packs
from dsv4_kernels.types import MoeLayer, MoeShape

from tests.support.layers import lazy, random_call, run, workspace_of

pytestmark = pytest.mark.gpu

eighth = partial(released_shape, ep=8, tokens=2048)
FLASH = eighth("flash")
SHAPES = {
    "flash-ep8": FLASH,
    "pro-ep8": eighth("pro"),
    "v4.1-flash-ep8": eighth("v41"),
    "flash-ep8-fp8": FLASH._replace(fp8=True),
    "pro-ep8-mxfp4-fp8": eighth("pro", "mxfp4")._replace(fp8=True),
    # As one of eight also by experts, so that the oracle fits; 576 columns are padded to 640.
    "v4.1-flash-tp4-mxfp4-fp8": eighth("v41", "mxfp4", tp=4)._replace(fp8=True),
}
LIMIT, SCALING = 10.0, 1.5
# Relative L2 of the median token and of any, from what may fall on either side of a rounding
# point: of bf16 rows and activations in W4A16, of E2M1 codes (a step of a sixth to a half) in W4A4.
# In W4A8 of E4M3 by sums that WGMMA keeps to 13 bits, 0.2 %: sqrt(0.002 * 0.09) is 1.3 %; but one
# value can be most of a token's h, and its step is an eighth.
TOLERANCES = {
    "bf16": (2.0**-8, 2.0**-8),
    "nvfp4": (2.0**-6, 2.0**-6),
    "fp8": (2.0**-5, 2.0**-3),
}


def make_layer(backend: Backend, shape: MoeShape) -> MoeLayer:
    """Outputs are near 1; block scales are from 2^-1 to 2, with 0 and 2^-9 (MXFP4: 2^-127 and
    2^-13)."""
    scale_bytes, odd_bytes = (48, 64), (0, 1)
    if shape.weight_format == "mxfp4":
        scale_bytes, odd_bytes = (126, 128), (0, 114)
    weights = random_weights(shape, scale_bytes=scale_bytes, odd_bytes=odd_bytes, gain=0.3)
    scales = None
    if shape.quantize_activations:
        scales = activation_scale.warmup(weights, limit=LIMIT, scaling=SCALING)
    return moe.prepare_layer(lazy(backend), shape, weights, limit=LIMIT, activation_scales=scales)


def a_call(num_tokens: int, layer: MoeLayer, seed: int, skew: str = "even"):
    """Hidden states and routing, on the rank of `layers`."""
    first = 3 * layer.shape.num_local_experts
    return random_call(num_tokens, layer.shape, seed, skew, first=first, device="cuda")


def check_rows(y: torch.Tensor, expected: torch.Tensor, shape: MoeShape) -> None:
    mode = "nvfp4" if shape.quantize_activations else "fp8" if shape.fp8 else "bf16"
    typical, largest = TOLERANCES[mode]
    norm = expected.float().norm(dim=1)
    errors = (y.float() - expected.float()).norm(dim=1) / norm.clamp(min=1e-30)
    assert (errors <= largest).all(), errors.max()
    assert not (errors[norm > 0].median() > typical), errors[norm > 0].median()


@pytest.fixture(scope="module", params=SHAPES.values(), ids=SHAPES)
def layers(request) -> tuple[MoeLayer, MoeLayer, torch.Tensor]:
    """The backend's layer, the oracle's, and the expert map of rank 3 of 8."""
    capability = torch.cuda.get_device_capability()
    if request.param.fp8 and capability != (9, 0):
        pytest.skip("fp8 is sm90's")
    shape = request.param._replace(quantize_activations=capability[0] == 10)
    backend = choose_backend("auto", shape, capability)
    local = shape.num_local_experts
    mapping = expert_map(shape.num_experts, local, first=3 * local)
    return make_layer(backend, shape), make_layer(BACKENDS["reference"], shape), mapping


@pytest.mark.parametrize("skew", ["even", "one-expert", "none-local", "padding"])
@pytest.mark.parametrize("num_tokens", [1, 7, 32, 129, 2048])
def test_the_layer_is_the_oracle(layers, num_tokens, skew):
    layer, oracle, expert_map = layers
    x, routing = a_call(num_tokens, layer, num_tokens, skew)
    y, expected = run(layer, x, routing, expert_map), run(oracle, x, routing, expert_map)
    assert y.isfinite().all()
    empty = (expert_map[routing.ids.clamp(min=0).long()] < 0).logical_or(routing.ids < 0).all(1)
    assert (y[empty] == 0).all()
    check_rows(y, expected, layer.shape)


@pytest.mark.parametrize("num_tokens", [1, 32, 500])
def test_two_runs_are_bit_equal_whatever_the_arena_held(layers, num_tokens):
    layer, _, expert_map = layers
    x, routing = a_call(num_tokens, layer, seed=1)
    workspace = workspace_of(layer)
    first = run(layer, x, routing, expert_map, workspace).clone()
    run(layer, *a_call(layer.shape.max_num_tokens, layer, 2), expert_map, workspace)
    assert run(layer, x, routing, expert_map, workspace).equal(first)
    assert run(layer, x, routing, expert_map).equal(first)


@pytest.mark.parametrize("skew", ["even", "padding"])
@pytest.mark.parametrize("num_tokens", [1, 32, 2048])
def test_packed_tokens_give_the_same_bits(layers, num_tokens, skew):
    layer, _, expert_map = layers
    if not packs(layer.shape):
        pytest.skip("of layers that quantise activations")
    x, routing = a_call(num_tokens, layer, 3, skew)
    expected, out = run(layer, x, routing, expert_map), torch.full_like(x, torch.nan)
    packed = pack_tokens(x, routing.ids, layer)
    moe.moe(packed, routing, layer, workspace_of(layer), expert_map=expert_map, out=out)
    assert out.equal(expected)


@pytest.mark.parametrize("num_tokens", [1, 32, 512])
def test_graph_replay_is_eager_bit_for_bit_with_changing_routing(layers, num_tokens):
    layer, _, expert_map = layers
    x, routing = a_call(num_tokens, layer, seed=0)
    workspace, out = workspace_of(layer), torch.empty_like(x)

    def call() -> None:
        moe.moe(x, routing, layer, workspace, expert_map=expert_map, out=out)

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    skews = ["even", "one-expert", "none-local", "padding"]
    for seed in range(1, 21):
        new_x, new_routing = a_call(num_tokens, layer, seed, skews[seed % 4])
        x.copy_(new_x)
        routing.weights.copy_(new_routing.weights)
        routing.ids.copy_(new_routing.ids)
        out.fill_(torch.nan)
        graph.replay()
        replayed = out.clone()
        assert run(layer, x, routing, expert_map).equal(replayed), seed


@pytest.mark.parametrize("num_tokens", [1, 512])
def test_a_thousand_replays_are_bit_equal(layers, num_tokens):
    layer, _, expert_map = layers
    x, routing = a_call(num_tokens, layer, seed=0)
    workspace, out = workspace_of(layer), torch.empty_like(x)
    first = moe.moe(x, routing, layer, workspace, expert_map=expert_map, out=out).clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        moe.moe(x, routing, layer, workspace, expert_map=expert_map, out=out)
    differ = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        graph.replay()
        differ += (out != first).sum()
    assert differ == 0


@pytest.mark.parametrize("num_tokens", [1, 64, 512])
def test_layers_without_a_pause_read_what_the_one_before_wrote(layers, num_tokens):
    """In one arena: kernels begin before those before them have ended (`pdl`)."""
    layer, _, expert_map = layers
    x, routing = a_call(num_tokens, layer, 5, "few-experts")
    workspace, outs = workspace_of(layer), [torch.empty_like(x) for _ in range(3)]

    def call(before: torch.Tensor, out: torch.Tensor) -> None:
        moe.moe(before, routing, layer, workspace, expert_map=expert_map, out=out)

    steps = list(zip([x, *outs], outs, strict=False))
    for step in steps:
        call(*step)
        torch.cuda.synchronize()
    expected = outs[-1].clone()
    assert expected.isfinite().all() and expected.any(dim=1).all()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for step in steps:
            call(*step)
    for _ in range(100):
        for out in outs:
            out.fill_(torch.nan)
        graph.replay()
        assert outs[-1].equal(expected)


@pytest.mark.parametrize("factor", [30, 3000])
def test_tokens_of_any_size_saturate_nothing_in_fp8(layers, factor):
    layer, oracle, expert_map = layers
    if not layer.shape.fp8:
        pytest.skip("of fp8")
    x, routing = a_call(64, layer, seed=4)
    x = x * factor
    y, expected = run(layer, x, routing, expert_map), run(oracle, x, routing, expert_map)
    assert y.isfinite().all() and layer.saturated == 0
    check_rows(y, expected, layer.shape)


def test_a_call_allocates_nothing_and_does_not_wait(layers):
    layer, _, expert_map = layers
    x, routing = a_call(64, layer, seed=3)
    workspace, out = workspace_of(layer), torch.empty_like(x)
    moe.moe(x, routing, layer, workspace, expert_map=expert_map, out=out)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        moe.moe(x, routing, layer, workspace, expert_map=expert_map, out=out)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
