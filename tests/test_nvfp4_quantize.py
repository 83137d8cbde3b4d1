"""nvfp4_quantize against the oracle: codes, scales, global scales and the counter bit-equal."""

import pytest
import torch
from dsv4_kernels import reference
from dsv4_kernels.nvfp4_quantize import block_scales_shape, nvfp4_quantize
from dsv4_kernels.types import ExpertLayout, QuantizedRows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
POISON = 0x7F  # NaN as E4M3


def random_rows(num_tokens: int, K: int, seed: int = 0) -> torch.Tensor:
    """Rows of very different sizes, with zeros of both signs, NaN and infinities in some."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.exp2(torch.randint(-14, 14, (num_tokens, 1), generator=generator).float())
    x = torch.randn(num_tokens, K, generator=generator) * scale
    x[0::3, :16] = 0.0
    x[0::3, 16:24] = -0.0
    x[1::3, 3] = torch.nan
    x[1::3, 20] = -torch.nan
    x[2::3, 5], x[2::3, 40] = torch.inf, -torch.inf
    return x.bfloat16()


def unswizzle(scales: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """128x4 blocks -> (rows, columns): inside a block, bytes are [row % 32][row // 32][column]."""
    blocks = scales.view(scales.shape[0] // 128, scales.shape[1] // 4, 32, 4, 4)
    return blocks.permute(0, 3, 2, 1, 4).reshape(scales.shape)[:rows, :columns]


def poisoned(rows: int, K: int, swizzled: bool, own_scales: bool) -> QuantizedRows:
    return QuantizedRows(
        torch.full((rows, K // 2), 0xAA, dtype=torch.uint8, device=DEVICE),
        torch.full(
            block_scales_shape(rows, K, swizzled), POISON, dtype=torch.uint8, device=DEVICE
        ).view(torch.float8_e4m3fn),
        torch.full((rows if own_scales else 0,), torch.nan, device=DEVICE),
    )


def run(x, global_scale, layout=None, swizzled=False) -> tuple[QuantizedRows, int]:
    """On the device, back on the CPU with row-major scales; the counter starts at 5."""
    rows = len(x) if layout is None else len(layout.row_to_slot)
    K = x.shape[1]
    saturated = torch.full((1,), 5, device=DEVICE)
    on_device = ExpertLayout(*(t.to(DEVICE) for t in layout)) if layout else None
    codes, scales, own = nvfp4_quantize(
        x.to(DEVICE),
        None if global_scale is None else global_scale.to(DEVICE),
        on_device,
        swizzled=swizzled,
        saturated=saturated,
        out=poisoned(rows, K, swizzled, own_scales=global_scale is None),
    )
    scales = scales.cpu().view(torch.uint8)
    scales = unswizzle(scales, rows, K // 16) if swizzled else scales
    return QuantizedRows(codes.cpu(), scales, own.cpu()), saturated.item() - 5


GLOBAL_SCALES = {
    "own": None,
    "layer": torch.tensor([0.01]),
    "saturating": torch.tensor([1e-6]),
    "too_large": torch.tensor([1e5]),
    "per_row": torch.tensor([1e-3, 0.5, 3.0, 1e-30, 1.7, 0.011, 5e-4]),
}


@pytest.mark.parametrize("policy", GLOBAL_SCALES)
@pytest.mark.parametrize("K", [16, 48, 1088, 7168])
def test_rows_in_place_equal_the_oracle(K, policy):
    x, global_scale = random_rows(7, max(K, 64))[:, :K].contiguous(), GLOBAL_SCALES[policy]
    ours, saturated = run(x, global_scale)
    expected, expected_saturated = reference.nvfp4_quantize(x, global_scale)
    assert torch.equal(ours.codes, expected.codes)
    assert torch.equal(ours.block_scales, expected.block_scales.view(torch.uint8))
    assert saturated == expected_saturated
    if global_scale is None:
        assert torch.equal(ours.global_scales, expected.global_scales)


def test_every_bf16_below_the_largest_gets_the_code_of_its_quotient():
    """All bf16 numbers of 19 binades, with block scales that are no powers of two."""
    values = torch.arange(0x3800, 0x4180, dtype=torch.int16).view(torch.bfloat16)
    x = torch.cat([values, -values]).repeat_interleave(15)
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    x = torch.cat([x.view(-1, 15), torch.full((len(x) // 15, 1), 15.9).bfloat16()], 1).view(2, -1)
    for scale in (torch.tensor([0.37]), torch.tensor([15.9 / 6 / 448])):
        ours, _ = run(x, scale)
        expected, _ = reference.nvfp4_quantize(x, scale)
        assert torch.equal(ours.codes, expected.codes)


def layout_of(num_tokens: int, tile: int) -> ExpertLayout:
    """Six slots of 40 experts, of which 12 are here; token 1 has none of them."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.rand(num_tokens, 40, generator=generator).argsort(1)[:, :6]
    ids[1] = torch.arange(30, 36)
    expert_map = torch.full((40,), -1, dtype=torch.int32)
    expert_map[:12] = torch.arange(12, dtype=torch.int32)
    return reference.expert_layout(ids.int(), 12, expert_map, tile)


@pytest.mark.parametrize("swizzled", [False, True], ids=["row_major", "swizzled"])
@pytest.mark.parametrize("policy", ["own", "layer", "per_expert"])
def test_rows_of_a_layout_equal_the_oracle_and_others_stay_untouched(policy, swizzled):
    x, layout = random_rows(20, 192), layout_of(20, tile=128)
    per_expert = torch.rand(12, generator=torch.Generator().manual_seed(1)) * 0.01 + 1e-4
    scale = {"own": None, "layer": torch.tensor([0.002]), "per_expert": per_expert}[policy]
    ours, saturated = run(x, scale, layout, swizzled)

    live = layout.row_to_slot >= 0
    experts = layout.tile_to_expert.repeat_interleave(128)[live].long()
    gathered = x[layout.row_to_slot[live].long() // 6]
    row_scale = per_expert[experts] if policy == "per_expert" else scale
    expected, expected_saturated = reference.nvfp4_quantize(gathered, row_scale)
    assert torch.equal(ours.codes[live], expected.codes)
    assert torch.equal(ours.block_scales[live], expected.block_scales.view(torch.uint8))
    assert saturated == expected_saturated > 0
    assert (ours.codes[~live] == 0xAA).all()
    assert (ours.block_scales[~live] == POISON).all()
    if policy == "own":
        assert torch.equal(ours.global_scales[live], expected.global_scales)
        assert ours.global_scales[~live].isnan().all()


def test_scales_beyond_the_last_column_of_a_swizzle_are_zero():
    out = poisoned(1, 80, swizzled=True, own_scales=False)
    x = random_rows(1, 80).to(DEVICE)
    nvfp4_quantize(x, torch.ones(1, device=DEVICE), swizzled=True, out=out)
    assert out.block_scales.shape == (128, 8)
    scales = out.block_scales.cpu().view(torch.uint8)
    scales = scales.view(1, 2, 32, 4, 4).permute(0, 3, 2, 1, 4).reshape(128, 8)
    assert (scales[0, 5:] == 0).all() and (scales[1:] == POISON).all()


def test_no_tokens_and_outputs_made_here():
    assert nvfp4_quantize(random_rows(1, 64)[:0].to(DEVICE), None).codes.shape == (0, 32)
    x = random_rows(3, 64)
    ours = nvfp4_quantize(x.to(DEVICE), None)
    expected, _ = reference.nvfp4_quantize(x, None)
    assert torch.equal(ours.codes.cpu(), expected.codes)
    assert torch.equal(ours.global_scales.cpu(), expected.global_scales)


@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["own", "layer"])
@pytest.mark.parametrize("K", [4096, 7168])
def test_real_sizes(K, policy):
    x, layout = random_rows(2048, K), layout_of(2048, tile=128)
    scale = None if policy == "own" else torch.tensor([0.002])
    ours, saturated = run(x, scale, layout, swizzled=True)
    live = layout.row_to_slot >= 0
    expected, expected_saturated = reference.nvfp4_quantize(
        x[layout.row_to_slot[live].long() // 6], scale
    )
    assert torch.equal(ours.codes[live], expected.codes)
    assert torch.equal(ours.block_scales[live], expected.block_scales.view(torch.uint8))
    assert saturated == expected_saturated


@pytest.mark.parametrize("swizzled", [False, True], ids=["rows", "blocks"])
@pytest.mark.parametrize("policy", ["own", "saturating"])
def test_rows_that_are_not_live_are_skipped(policy, swizzled):
    """With row_to_slot, padding costs nothing, and nothing of it is written or counted."""
    x, global_scale = random_rows(7, 64), GLOBAL_SCALES[policy]
    live = torch.tensor([0, -1, 12, 3, -1, -1, 1], dtype=torch.int32)
    out = poisoned(7, 64, swizzled, own_scales=global_scale is None)
    saturated = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    codes, scales, own = nvfp4_quantize(
        x.to(DEVICE),
        None if global_scale is None else global_scale.to(DEVICE),
        live=live.to(DEVICE),
        swizzled=swizzled,
        saturated=saturated,
        out=out,
    )
    scales = scales.cpu().view(torch.uint8)
    scales = unswizzle(scales, 7, 4) if swizzled else scales
    used = live >= 0
    expected, expected_saturated = reference.nvfp4_quantize(x[used], global_scale)
    assert torch.equal(codes.cpu()[used], expected.codes)
    assert torch.equal(scales[used], expected.block_scales.view(torch.uint8))
    assert (codes.cpu()[~used] == 0xAA).all() and (scales[~used] == POISON).all()
    assert saturated.item() == expected_saturated
    if global_scale is None:
        assert torch.equal(own.cpu()[used], expected.global_scales)
        assert own.cpu()[~used].isnan().all()
