"""nvfp4_quantize against the oracle: codes, scales, global scales and the counter bit-equal."""

import pytest
import torch
from dsv4_kernels import reference
from dsv4_kernels.rows import nvfp4_quantize as op
from dsv4_kernels.rows.nvfp4_quantize import block_scales_shape, choose_config, nvfp4_quantize
from dsv4_kernels.types import ExpertLayout, QuantizedRows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
POISON = 0x7F  # NaN as E4M3


def random_rows(num_tokens: int, K: int, seed: int = 0) -> torch.Tensor:
    """Rows of very different sizes, three of four with zeros of both signs, NaN or infinities."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.exp2(torch.randint(-14, 14, (num_tokens, 1), generator=generator).float())
    x = torch.randn(num_tokens, K, generator=generator) * scale
    x[0::4, :16] = 0.0
    x[0::4, 16:24] = -0.0
    x[1::4, 3] = torch.nan
    x[1::4, 20] = -torch.nan
    x[2::4, 5], x[2::4, 40] = torch.inf, -torch.inf
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
@pytest.mark.parametrize("K", [16, 48, 1088])
def test_rows_in_place_equal_the_oracle(K, policy):
    check_in_place(random_rows(7, max(K, 64))[:, :K].contiguous(), GLOBAL_SCALES[policy])


@pytest.mark.parametrize("policy", ["own", "layer"])
def test_rows_of_two_chunks(policy):
    x = random_rows(4, 4128)
    assert choose_config(258, len(x)).blocks < 258
    check_in_place(x, GLOBAL_SCALES[policy])


@pytest.mark.parametrize("policy", ["own", "layer", "saturating"])
def test_rows_of_five_chunks(policy, monkeypatch):
    config = op.Config(blocks=16, num_warps=1, swizzles=False)
    monkeypatch.setattr(op, "choose_config", lambda *shape: config)
    check_in_place(random_rows(4, 1104), GLOBAL_SCALES[policy])


def check_in_place(x, global_scale) -> None:
    ours, saturated = run(x, global_scale)
    expected, expected_saturated = reference.nvfp4_quantize(x, global_scale)
    assert torch.equal(ours.codes, expected.codes)
    assert torch.equal(ours.block_scales, expected.block_scales.view(torch.uint8))
    assert saturated == expected_saturated
    if global_scale is None:
        assert torch.equal(ours.global_scales, expected.global_scales)


def test_no_quotient_is_close_to_where_rounding_it_to_float32_matters():
    """What `_e2m1` stands on: of all scales, and of all bf16 numbers, which have eight bits."""
    scales = torch.arange(2**23, 2**24)
    for tie in (1.0, 1.25, 1.5, 1.75):  # of E2M1, times powers of two
        halfway = int(tie * 2**24)
        for edge in (halfway - 1 if tie > 1 else 2 * halfway - 1, halfway + 1):
            product = scales * edge
            unit = 2 ** (torch.frexp(product.double()).exponent.long() - 8)
            distance = torch.minimum(product % unit, unit - product % unit)
            close = distance < product * 2.0**-33
            expected = [2**24 - 1] if edge == 2**24 + 1 else []
            assert scales[close].tolist() == expected, (tie, edge)


def only_plain(monkeypatch) -> None:
    """Where the kernel is Python, the way that takes any values is closed."""
    if DEVICE == "cpu":
        monkeypatch.setattr(op, "quantize_any", None)


def all_at_once(monkeypatch) -> None:
    """Where the kernel is Python, what a row costs is its steps."""
    if DEVICE == "cpu":
        monkeypatch.setattr(op, "choose_config", lambda *shape: op.Config(4096, 1, swizzles=False))


# Of all float32, those by which bf16 numbers come closest to what rounds to a tie of E2M1 and is
# none, and to what rounds to another number and is one; and some of four bits and of any.
SIGNIFICANDS = [16777215, 8432299, 8475989, 16689834, 16602454, 12478055, 12687769]
SIGNIFICANDS += [8463506, 16627420, 12433115, 12732709, 8388608, 9437184, 11534336, 15728640]
SIGNIFICANDS += [8388609, 11184811, 14126903, 9586981]


def test_every_bf16_gets_the_code_of_its_quotient(monkeypatch):
    """Those of five binades below the largest of a block; scales are the significands."""
    only_plain(monkeypatch)
    gs = torch.tensor(SIGNIFICANDS, dtype=torch.float64).mul(2.0**-35).float()
    largest = (gs * 6 * 256).bfloat16()
    steps = torch.arange(0, 43 * 15, dtype=torch.int16)
    values = (largest.view(torch.int16)[:, None] - steps).view(torch.bfloat16)
    signs = torch.where(torch.arange(values.numel()) % 3 > 0, 1, -1).view(values.shape)
    blocks = torch.cat(
        [(values * signs).view(-1, 43, 15), largest[:, None, None].expand(-1, 43, 1)], 2
    )
    x = blocks.reshape(len(gs), -1).contiguous()
    ours, saturated = run(x, gs)
    expected, _ = reference.nvfp4_quantize(x, gs)
    assert (expected.block_scales.float() == 256).all() and saturated == 0
    assert torch.equal(ours.block_scales, expected.block_scales.view(torch.uint8))
    wrong = (ours.codes != expected.codes).any(1).nonzero()[:, 0]
    assert len(wrong) == 0, [SIGNIFICANDS[row] for row in wrong]


@pytest.mark.parametrize("is_plain", [True, False], ids=["plain", "any"])
def test_every_bf16_gets_the_scale_of_its_quotients(monkeypatch, is_plain):
    """One value a block: from the least normal scale to the largest, or beyond them both."""
    all_at_once(monkeypatch)
    if is_plain:
        only_plain(monkeypatch)
    gs = torch.tensor([0.011, 1.7e-4, 2.0**-9, 3.1e5])
    binades = 14 if is_plain else 24
    last = (gs * 6 * (460 if is_plain else 6000)).bfloat16().view(torch.int16)
    values = (last[:, None] - torch.arange(128 * binades, dtype=torch.int16)).view(torch.bfloat16)
    x = torch.nn.functional.pad(values[:, :, None], (3, 12)).flatten(1)
    ours, saturated = run(x, gs)
    expected, expected_saturated = reference.nvfp4_quantize(x, gs)
    assert torch.equal(ours.block_scales, expected.block_scales.view(torch.uint8))
    assert torch.equal(ours.codes, expected.codes)
    assert saturated == expected_saturated
    assert (expected_saturated == 0) == is_plain


def layout_of(num_tokens: int, tile: int) -> ExpertLayout:
    """Six slots of 40 experts, of which 12 are here; token 1 has none of them."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.rand(num_tokens, 40, generator=generator).argsort(1)[:, :6]
    ids[1] = torch.arange(30, 36)
    expert_map = torch.full((40,), -1, dtype=torch.int32)
    expert_map[:12] = torch.arange(12, dtype=torch.int32)
    return reference.expert_layout(ids.int(), 12, expert_map, tile)


ORDERS = ["row_major", "swizzled", "swizzled_by_a_second_launch"]


def launches_as(monkeypatch, order: str) -> bool:
    """As of few tokens, or of many; whether scales are swizzled."""
    swizzles = order == "swizzled_by_a_second_launch"
    config = lambda *shape: choose_config(*shape)._replace(swizzles=swizzles)  # noqa: E731
    monkeypatch.setattr(op, "choose_config", config)
    return order != "row_major"


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("policy", ["own", "layer"])
def test_rows_of_a_layout_equal_the_oracle_and_others_stay_untouched(policy, order, monkeypatch):
    swizzled = launches_as(monkeypatch, order)
    x, layout = random_rows(20, 1104), layout_of(20, tile=128)
    scale = {"own": None, "layer": torch.tensor([0.002])}[policy]
    check_layout(x, scale, layout, swizzled)


def check_layout(x, scale, layout: ExpertLayout, swizzled: bool) -> None:
    ours, saturated = run(x, scale, layout, swizzled)
    live = layout.row_to_slot >= 0
    tokens = layout.row_to_slot[live].long() // 6
    expected, expected_saturated = reference.nvfp4_quantize(x[tokens], scale)
    assert torch.equal(ours.codes[live], expected.codes)
    assert torch.equal(ours.block_scales[live], expected.block_scales.view(torch.uint8))
    assert saturated == expected_saturated > 0
    assert (ours.codes[~live] == 0xAA).all()
    assert (ours.block_scales[~live] == POISON).all()
    if scale is None:
        assert torch.equal(ours.global_scales[live], expected.global_scales)
        assert ours.global_scales[~live].isnan().all()


def test_scales_beyond_the_last_column_of_a_swizzle_are_zero():
    out = poisoned(1, 80, swizzled=True, own_scales=False)
    x = random_rows(1, 80).to(DEVICE)
    nvfp4_quantize(x, torch.ones(1, device=DEVICE), swizzled=True, out=out)
    assert out.block_scales.shape == (128, 8)
    scales = unswizzle(out.block_scales.cpu().view(torch.uint8), 128, 8)
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
    check_layout(x, scale, layout, swizzled=True)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("policy", ["own", "saturating"])
def test_rows_that_are_not_live_are_skipped(policy, order, monkeypatch):
    """With row_to_slot, padding costs nothing, and nothing of it is written or counted."""
    swizzled = launches_as(monkeypatch, order)
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
