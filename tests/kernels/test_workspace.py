"""The arena: large enough for every call, its views aligned and apart."""

import pytest
import torch
from dsv4_kernels.types import MoeShape, capacity
from dsv4_kernels.workspace import ALIGNMENT, call_bytes, carve, workspace_bytes

SHAPE = MoeShape(6, 6, 3, 64, 48, 33, quantize_activations=True)
FORMATS = {
    "w4a16": SHAPE._replace(quantize_activations=False),
    "w4a4": SHAPE,
    "scale-per-row": SHAPE._replace(scale_per_row=True),
    "w4a8": SHAPE._replace(quantize_activations=False, fp8=True),
    "w4a8-without-limit": SHAPE._replace(quantize_activations=False, fp8=True, scale_per_row=True),
}


@pytest.mark.parametrize("shape", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("tile", [8, 128])
@pytest.mark.parametrize("num_tokens", [1, 15, 33, 700, 1024])
def test_views_are_aligned_and_only_rows_overlap_what_fc2_does_not_read(num_tokens, tile, shape):
    needed = call_bytes(shape, tile, num_tokens)
    workspace = torch.zeros(needed, dtype=torch.uint8)
    buffers = carve(workspace, shape, tile, num_tokens)
    h = [buffers.h] if isinstance(buffers.h, torch.Tensor) else list(buffers.h)
    x, stays = list(buffers.x or ()), [*buffers.layout, buffers.layout_scratch, *h]
    x += [view for view in (buffers.h_bf16, buffers.quantize_scratch) if view is not None]
    for view in [*stays, *x, buffers.rows]:
        assert (view.data_ptr() - workspace.data_ptr()) % ALIGNMENT == 0 or view.numel() == 0
        view.view(torch.uint8).add_(1)
    assert int(workspace.sum()) == sum(v.nbytes for v in [*stays, *x, buffers.rows])
    assert workspace.max() == (2 if x else 1)
    # Past the views that stay, x and rows begin at the same byte, and nothing comes after them.
    first_shared, end_of_x, end_of_rows = (
        sum(-(-v.nbytes // ALIGNMENT) * ALIGNMENT for v in views)
        for views in (stays, x, [buffers.rows])
    )
    assert needed == first_shared + max(end_of_x, end_of_rows)
    assert workspace[:first_shared].max() == 1
    assert buffers.rows.data_ptr() == workspace.data_ptr() + first_shared
    assert not x or x[0].data_ptr() == buffers.rows.data_ptr()


@pytest.mark.parametrize("shape", FORMATS.values(), ids=FORMATS)
def test_buffers_have_the_layout_contracts_sizes(shape):
    rows = capacity(33, 3, 6, 128)
    workspace = torch.empty(call_bytes(shape, 128, 33), dtype=torch.uint8)
    buffers = carve(workspace, shape, 128, 33)
    assert buffers.layout.slot_to_row.shape == (33, 3)
    assert buffers.layout.row_to_slot.shape == (rows,)
    assert buffers.layout.tile_to_expert.shape == (rows // 128,)
    assert buffers.layout.counts.shape == (6,) and buffers.layout.offsets.shape == (7,)
    assert buffers.rows.shape == (rows, 64) and buffers.rows.dtype == torch.bfloat16
    if shape.fp8:
        assert buffers.x.codes.shape == (rows, 64) and buffers.h.codes.shape == (rows, 48)
        assert buffers.x.codes.dtype == buffers.h.codes.dtype == torch.float8_e4m3fn
        assert buffers.x.scales.shape == (rows,)
        assert len(buffers.h.scales) == (rows if shape.scale_per_row else 0)
        assert (buffers.h_bf16 is not None) == shape.scale_per_row
        return
    if not shape.quantize_activations:
        assert buffers.h.shape == (rows, 48) and buffers.h.dtype == torch.bfloat16
        return
    assert buffers.x.codes.shape == (rows, 32) and buffers.h.codes.shape == (rows, 24)
    assert buffers.x.block_scales.shape == (rows, 4) and buffers.h.block_scales.shape == (rows, 4)
    if shape.scale_per_row:
        assert buffers.h_bf16.shape == (rows, 48) and buffers.h_bf16.dtype == torch.bfloat16
    assert len(buffers.x.global_scales) == (rows if shape.scale_per_row else 0)


@pytest.mark.parametrize("num_tokens", [1, 1023, 1024])
def test_the_quantisers_scratch_is_of_x_and_where_rows_have_scales_of_h(num_tokens):
    shape = SHAPE._replace(hidden=64, intermediate=2048)
    rows = capacity(num_tokens, 3, 6, 128)
    x, h = (num_tokens * 4 if num_tokens >= 1024 else 0), (rows * 128 if rows >= 1024 else 0)
    for scale_per_row, expected in ((False, x), (True, max(x, h))):
        shape = shape._replace(scale_per_row=scale_per_row)
        workspace = torch.empty(call_bytes(shape, 128, num_tokens), dtype=torch.uint8)
        scratch = carve(workspace, shape, 128, num_tokens).quantize_scratch
        assert scratch.dtype == torch.uint8 and len(scratch) == expected
    assert (x > 0, h > 0) == (num_tokens >= 1024, num_tokens > 1)
    assert carve(workspace, FORMATS["w4a16"], 128, 1).quantize_scratch is None


TILES = {
    "rising": lambda shape, num_tokens: 8 if num_tokens < 16 else 128,
    "falling": lambda shape, num_tokens: 128 if num_tokens < 31 else 8,
    "zigzag": lambda shape, num_tokens: 64 if num_tokens % 3 else 16,
}


@pytest.mark.parametrize("shape", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("name", TILES)
def test_the_arena_holds_every_call(name, shape):
    tile = TILES[name]
    needed = [call_bytes(shape, tile(shape, t), t) for t in range(1, shape.max_num_tokens + 1)]
    assert workspace_bytes(shape, tile) == max(needed)


def test_the_arena_holds_every_call_where_the_layouts_scratch_falls():
    """From 4097 slots on the layout counts in two launches, with more or fewer programs."""
    shape = SHAPE._replace(max_num_tokens=22000, hidden=16, intermediate=16)
    needed = workspace_bytes(shape, TILES["rising"])
    for num_tokens in range(1300, 22001, 61):
        assert call_bytes(shape, 128, num_tokens) <= needed, num_tokens


def test_a_workspace_that_is_too_small_names_both_sizes():
    needed = call_bytes(SHAPE, 128, 16)
    with pytest.raises(ValueError, match=f"16 tokens need {needed} bytes .* given {needed - 256}"):
        carve(torch.empty(needed - 256, dtype=torch.uint8), SHAPE, 128, 16)


def test_every_tile_of_full_groups_has_its_place():
    """An expert's last tile need not be whole: 45 rows are 6 tiles of 8."""
    shape = SHAPE._replace(quantize_activations=False, batch_rows=45)
    workspace = torch.empty(call_bytes(shape, 8, 33), dtype=torch.uint8)
    assert len(carve(workspace, shape, 8, 33).layout.tile_to_expert) == 6 * 6
