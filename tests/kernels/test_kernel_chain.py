"""Route, layout, quantise and combine as graphs over arena slices, as vLLM replays them."""

import pytest
import torch
from dsv4_kernels import reference
from dsv4_kernels.route.router_topk import router_topk
from dsv4_kernels.rows.combine import combine
from dsv4_kernels.rows.expert_layout import expert_layout
from dsv4_kernels.rows.nvfp4_quantize import nvfp4_quantize
from dsv4_kernels.types import MoeShape, Routing
from dsv4_kernels.workspace import call_bytes, carve

from tests.kernels.test_nvfp4_quantize import unswizzle

TILE, TOP_K, NUM_EXPERTS, NUM_LOCAL, HIDDEN = 128, 6, 384, 48, 1024
SHAPE = MoeShape(NUM_EXPERTS, NUM_LOCAL, TOP_K, HIDDEN, 512, 4096, quantize_activations=True)
pytestmark = pytest.mark.gpu


class Lane:
    """One micro-batch: inputs at fixed addresses, a slice of the arena, a captured graph."""

    def __init__(self, num_tokens: int, arena: torch.Tensor) -> None:
        self.buffers = carve(arena, SHAPE, TILE, num_tokens)
        self.logits = torch.zeros(num_tokens, NUM_EXPERTS, device="cuda")
        self.x = torch.zeros(num_tokens, HIDDEN, dtype=torch.bfloat16, device="cuda")
        self.bias = torch.linspace(-0.1, 0.1, NUM_EXPERTS, device="cuda")
        self.expert_map = torch.full((NUM_EXPERTS,), -1, dtype=torch.int32, device="cuda")
        self.expert_map[96 : 96 + NUM_LOCAL] = torch.arange(NUM_LOCAL, device="cuda")
        self.scale = torch.full((1,), 0.002, device="cuda")
        weights = torch.empty(num_tokens, TOP_K, device="cuda")
        self.routing = Routing(weights, torch.empty_like(weights, dtype=torch.int32))
        self.out = torch.empty_like(self.x)
        self.stream, self.graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()

    def run(self) -> None:
        """The GEMMs are left out: rows are the tokens', gathered where the codes have been read."""
        layout = self.buffers.layout
        router_topk(self.logits, TOP_K, bias=self.bias, scaling=2.5, out=self.routing)
        expert_layout(
            self.routing.ids,
            NUM_LOCAL,
            self.expert_map,
            TILE,
            out=layout,
            scratch=self.buffers.layout_scratch,
        )
        nvfp4_quantize(self.x, self.scale, layout, swizzled=True, out=self.buffers.x)
        self.codes, self.scales = (each.clone() for each in self.buffers.x[:2])
        tokens = layout.row_to_slot.clamp(min=0) // TOP_K
        torch.index_select(self.x, 0, tokens, out=self.buffers.rows)
        combine(self.buffers.rows, layout.slot_to_row, out=self.out)

    def capture(self) -> None:
        with torch.cuda.stream(self.stream):
            self.run()
            self.stream.synchronize()
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.run()

    def load(self, seed: int) -> None:
        """A new batch, of a routing as skewed as the seed says."""
        generator = torch.Generator().manual_seed(seed)
        shape = self.logits.shape
        logits = torch.randn(shape, generator=generator)
        logits[:, 96 : 96 + 2**seed] += seed % 3 * 4.0
        x = torch.randn(self.x.shape, generator=generator)
        with torch.cuda.stream(self.stream):
            self.logits.copy_(logits)
            self.x.copy_(x)
            self.out.fill_(torch.nan)
            # What a launch does not write is not the last one's.
            self.routing.weights.fill_(torch.nan)
            for part in (self.routing.ids, *self.buffers.layout):
                part.fill_(12345)

    def replay(self) -> None:
        with torch.cuda.stream(self.stream):
            self.graph.replay()

    def check(self) -> None:
        self.stream.synchronize()
        ids, expert_map, x = self.routing.ids.cpu(), self.expert_map.cpu(), self.x.cpu()
        logits, bias = self.logits.cpu(), self.bias.cpu()
        expected = reference.router_topk(logits, TOP_K, bias=bias, scaling=2.5)
        assert (ids != expected.ids).sum() <= 1 + ids.numel() // 10000  # near ties
        same, weights = (ids == expected.ids).all(1), self.routing.weights.cpu()
        torch.testing.assert_close(weights[same], expected.weights[same], rtol=1e-6, atol=0)
        layout = reference.expert_layout(ids, NUM_LOCAL, expert_map, TILE)
        for ours, theirs in zip(self.buffers.layout, layout, strict=True):
            assert torch.equal(ours.cpu(), theirs)
        live = layout.row_to_slot >= 0
        gathered = x[layout.row_to_slot[live].long() // TOP_K]
        quantized, _ = reference.nvfp4_quantize(gathered, self.scale.cpu())
        assert torch.equal(self.codes.cpu()[live], quantized.codes)
        scales = unswizzle(self.scales.cpu().view(torch.uint8), len(live), HIDDEN // 16)
        assert torch.equal(scales[live], quantized.block_scales.view(torch.uint8))
        rows = x[layout.row_to_slot.clamp(min=0).long() // TOP_K]
        assert torch.equal(self.out.cpu(), reference.combine(rows, layout.slot_to_row))


def arena(num_bytes: int) -> torch.Tensor:
    return torch.full((num_bytes,), 0x7F, dtype=torch.uint8, device="cuda")


@pytest.mark.parametrize("num_tokens", [1, 7, 64, 500, 3000])
def test_replays_follow_the_routing(num_tokens):
    lane = Lane(num_tokens, arena(call_bytes(SHAPE, TILE, num_tokens)))
    lane.capture()
    for seed in range(5):
        lane.load(seed)
        lane.replay()
        lane.check()


def test_replay_equals_eager_bit_for_bit():
    lane = Lane(300, arena(call_bytes(SHAPE, TILE, 300)))
    lane.capture()
    lane.load(1)
    lane.replay()
    lane.stream.synchronize()
    replayed = [t.clone() for t in (*lane.routing, *lane.buffers.layout, lane.codes, lane.out)]
    lane.load(1)
    with torch.cuda.stream(lane.stream):
        lane.run()
    lane.stream.synchronize()
    eager = (*lane.routing, *lane.buffers.layout, lane.codes, lane.out)
    live = lane.buffers.layout.row_to_slot >= 0
    replayed[-2], eager = replayed[-2][live], (*eager[:-2], eager[-2][live], eager[-1])
    assert all(torch.equal(a, b) for a, b in zip(replayed, eager, strict=True))


def test_lanes_side_by_side_share_no_row():
    """Two micro-batches on two streams, each with its slice; the bytes between stay untouched."""
    sizes = (700, 1500)
    needed = [call_bytes(SHAPE, TILE, size) for size in sizes]
    whole = arena(sum(needed) + 4096)
    slices = (whole[: needed[0]], whole[needed[0] + 4096 :])
    lanes = [Lane(size, part) for size, part in zip(sizes, slices, strict=True)]
    for lane in lanes:
        lane.capture()
    for seed in range(4):
        for lane in lanes:
            lane.load(seed + 1)
        torch.cuda.synchronize()
        for lane in lanes:
            lane.replay()
        for lane in lanes:
            lane.check()
    assert (whole[needed[0] : needed[0] + 4096] == 0x7F).all()
