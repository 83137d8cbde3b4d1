"""The layer on rows grouped by expert, on the GPU that there is: against the oracle, under CUDA
graphs, bit-equal in two runs."""

import pytest
import torch
from dsv4_kernels.backends import BACKENDS, choose_backend
from dsv4_kernels.batched import batched_moe
from dsv4_kernels.types import MoeLayer

from tests.gpu.test_moe_gpu import FLASH, check_rows, make_layer, workspace_of

pytestmark = pytest.mark.gpu

ROOM = 1024  # rows of an expert: of 128 tokens on each of 8 ranks
SHAPE = FLASH._replace(max_num_tokens=ROOM, batch_rows=ROOM)


@pytest.fixture(scope="module", params=["bf16 or nvfp4", "fp8"])
def layers(request) -> tuple[MoeLayer, MoeLayer]:
    """The backend's, and the oracle's."""
    capability = torch.cuda.get_device_capability()
    shape = SHAPE._replace(quantize_activations=capability[0] == 10, fp8=request.param == "fp8")
    if shape.fp8 and capability != (9, 0):
        pytest.skip("fp8 is sm90's")
    backend = choose_backend("auto", shape, capability)
    return make_layer(backend, shape), make_layer(BACKENDS["reference"], shape)


def grouped(num_tokens: int, seed: int, skew: str = "even") -> tuple[torch.Tensor, torch.Tensor]:
    """x, of which rows that do not exist are NaN, and counts."""
    generator = torch.Generator("cuda").manual_seed(seed)
    local = SHAPE.num_local_experts
    keys = torch.rand(num_tokens, SHAPE.num_experts, device="cuda", generator=generator)
    ids = keys.argsort(1)[:, : SHAPE.top_k].flatten()
    counts = torch.bincount(ids, minlength=SHAPE.num_experts)[:local].int()
    if skew == "one-expert":
        counts[:] = 0
        counts[5] = num_tokens
    elif skew == "none":
        counts[:] = 0
    x = torch.randn(local, ROOM, SHAPE.hidden, device="cuda", generator=generator).bfloat16()
    x[~exists(counts)] = torch.nan
    return x, counts


def exists(counts: torch.Tensor) -> torch.Tensor:
    return torch.arange(ROOM, device=counts.device) < counts[:, None]


def run(layer: MoeLayer, x, counts, num_tokens: int, workspace=None) -> torch.Tensor:
    """The rows that exist."""
    workspace = workspace_of(layer) if workspace is None else workspace
    out = torch.full_like(x, torch.nan)
    return batched_moe(x, counts, num_tokens, layer, workspace, out=out)[exists(counts)]


@pytest.mark.parametrize("skew", ["even", "one-expert", "none"])
@pytest.mark.parametrize("num_tokens", [8, 256, 1024])
def test_the_layer_is_the_oracle(layers, num_tokens, skew):
    layer, oracle = layers
    x, counts = grouped(num_tokens, num_tokens, skew)
    y = run(layer, x, counts, num_tokens)
    expected = run(oracle, x, counts, num_tokens)
    assert y.isfinite().all()
    check_rows(y, expected, layer.shape)


@pytest.mark.parametrize("num_tokens", [8, 1024])
def test_graph_replay_is_eager_bit_for_bit_with_changing_counts(layers, num_tokens):
    layer, _ = layers
    x, counts = grouped(num_tokens, 0)
    workspace, out = workspace_of(layer), torch.empty_like(x)
    batched_moe(x, counts, num_tokens, layer, workspace, out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        batched_moe(x, counts, num_tokens, layer, workspace, out=out)
    for seed, skew in enumerate(("even", "one-expert", "none", "even"), start=1):
        new_x, new_counts = grouped(num_tokens, seed, skew)
        x.copy_(new_x)
        counts.copy_(new_counts)
        out.fill_(torch.nan)
        graph.replay()
        replayed = out[exists(counts)]
        assert run(layer, x, counts, num_tokens).equal(replayed), skew


def test_a_call_allocates_nothing_and_does_not_wait(layers):
    layer, _ = layers
    x, counts = grouped(64, seed=3)
    workspace, out = workspace_of(layer), torch.empty_like(x)
    batched_moe(x, counts, 64, layer, workspace, out=out)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        batched_moe(x, counts, 64, layer, workspace, out=out)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
