"""gate_route against the oracle's router on the exact logits."""

import pytest
import torch
from dsv4_kernels import reference
from dsv4_kernels.route.gate_route import MAX_TOKENS, GateScratch, gate_route, make_scratch
from dsv4_kernels.types import ImageBias, Routing

from tests.kernels.test_router_topk import on_device

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TABLE = (
    torch.rand(50, 40, generator=torch.Generator().manual_seed(0)).argsort(1)[:, :6].contiguous()
)


def integers(*size: int, seed: int) -> torch.Tensor:
    """Small integers as bf16: their sums of products are exact in fp32, in any order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, size, generator=generator).bfloat16()


def run(x, gate, top_k, scratch, ids_dtype=torch.int32, **options) -> Routing:
    out = Routing(
        torch.full((len(x), top_k), torch.nan, device=DEVICE),
        torch.full((len(x), top_k), 12345, dtype=ids_dtype, device=DEVICE),
    )
    options = {name: on_device(value) for name, value in options.items()}
    gate_route(x.to(DEVICE), gate.to(DEVICE), top_k, out=out, scratch=scratch, **options)
    return Routing(out.weights.cpu(), out.ids.cpu())


def garbage_scratch(hidden: int, num_experts: int) -> GateScratch:
    scratch = make_scratch(hidden, num_experts, torch.device(DEVICE))
    scratch.partials.fill_(torch.nan)
    return scratch


def check(x, gate, top_k, **options) -> None:
    """Twice with the same scratch: the launch leaves its counters at zero."""
    scratch = garbage_scratch(x.shape[1], len(gate))
    expected = reference.router_topk(x.float() @ gate.float().T / 64, top_k, **options)
    for _ in range(2):
        ours = run(x, gate / 64, top_k, scratch, **options)
        assert torch.equal(ours.ids, expected.ids)
        torch.testing.assert_close(ours.weights, expected.weights, rtol=2e-6, atol=0)
    assert scratch.counters.tolist() == [0, 0]


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(
    ("num_tokens", "hidden", "num_experts", "top_k"),
    [(1, 512, 256, 6), (3, 320, 100, 16), (33, 256, 40, 8), (64, 80, 17, 1)],
)
def test_dense_layers(num_tokens, hidden, num_experts, top_k, ids_dtype):
    x, gate = integers(num_tokens, hidden, seed=0), integers(num_experts, hidden, seed=1)
    bias = torch.randn(num_experts, generator=torch.Generator().manual_seed(2))
    check(x, gate, top_k, bias=bias, scaling=2.5, ids_dtype=ids_dtype)


@pytest.mark.parametrize("hash_weights", ["scored", "uniform"])
def test_hash_layers(hash_weights):
    token_ids = torch.tensor([3, 0, -1, 49, 50])
    x, gate = integers(5, 320, seed=0), integers(40, 320, seed=1)
    check(x, gate, 6, table=TABLE, token_ids=token_ids, hash_weights=hash_weights)


@pytest.mark.parametrize("hash_weights", ["scored", "uniform"])
@pytest.mark.parametrize("layer", ["dense", "hash"])
def test_image_tokens(layer, hash_weights):
    x, gate = integers(5, 320, seed=0), integers(40, 320, seed=1)
    bias = torch.randn(2, 40, generator=torch.Generator().manual_seed(2))
    options = {"bias": bias[0]} if layer == "dense" else {"table": TABLE}
    token_ids = torch.tensor([6, 7, 11, 12, 3])
    image = ImageBias(3 * bias[1], 7)
    check(x, gate, 6, token_ids=token_ids, image_bias=image, hash_weights=hash_weights, **options)


@pytest.mark.parametrize("layer", ["dense", "hash"])
def test_padding_rows_go_nowhere(layer):
    x, gate = integers(5, 320, seed=0), integers(40, 320, seed=1)
    padding = torch.tensor([False, True, False, True, True])
    hashed = {"table": TABLE, "token_ids": torch.arange(5)}
    check(x, gate, 6, padding=padding, **(hashed if layer == "hash" else {}))


def test_no_tokens_and_too_many():
    gate = torch.zeros(16, 64, dtype=torch.bfloat16, device=DEVICE)
    assert gate_route(gate[:0], gate, 4).ids.shape == (0, 4)
    with pytest.raises(AssertionError, match=f"{MAX_TOKENS + 1} tokens"):
        gate_route(gate.new_zeros(MAX_TOKENS + 1, 64), gate, 4)


def test_everything_is_made_when_nothing_is_given():
    x, gate = integers(2, 64, seed=0), integers(16, 64, seed=1)
    ours = gate_route(x.to(DEVICE), gate.to(DEVICE), 4, ids_dtype=torch.int64)
    expected = reference.router_topk(x.float() @ gate.float().T, 4)
    assert torch.equal(ours.ids.cpu(), expected.ids.long())


@pytest.mark.gpu
@pytest.mark.parametrize(("hidden", "num_experts"), [(4096, 256), (7168, 384)])
@pytest.mark.parametrize("num_tokens", [1, 8, 32, 64])
def test_real_sizes(num_tokens, hidden, num_experts):
    x, gate = integers(num_tokens, hidden, seed=0), integers(num_experts, hidden, seed=1)
    bias = torch.randn(num_experts, generator=torch.Generator().manual_seed(2))
    check(x, gate, 6, bias=bias, scaling=2.5)


@pytest.mark.gpu
def test_lanes_replay_side_by_side():
    """With a scratch each, as vLLM's micro-batches have: two streams at once, replayed often."""
    gate = (integers(256, 4096, seed=1) / 64).to(DEVICE)
    lanes = []
    for num_tokens in (48, 64):
        x = integers(num_tokens, 4096, seed=num_tokens).to(DEVICE)
        out = Routing(
            torch.empty((num_tokens, 6), device=DEVICE),
            torch.empty((num_tokens, 6), dtype=torch.int32, device=DEVICE),
        )
        scratch, stream = garbage_scratch(4096, 256), torch.cuda.Stream()
        gate_route(x, gate, 6, out=out, scratch=scratch)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            gate_route(x, gate, 6, out=out, scratch=scratch)
        lanes.append((x, out, scratch, stream, graph))
    for _ in range(100):
        for _, out, _, stream, graph in lanes:
            with torch.cuda.stream(stream):
                out.ids.fill_(-7)
                graph.replay()
    torch.cuda.synchronize()
    for x, out, scratch, _, _ in lanes:
        expected = reference.router_topk(x.cpu().float() @ gate.cpu().float().T, 6)
        assert torch.equal(out.ids.cpu(), expected.ids)
        assert scratch.counters.tolist() == [0, 0]
