"""Tokens that are quantised, travel and are placed: the bits of those quantised where they are.

`pack_tokens` and what places it, against the oracle and against quantisers with a layout.
"""

import pytest
import torch
from bench.inputs import random_weights
from dsv4_kernels import moe, reference
from dsv4_kernels.backends import REFERENCE, SM90, SM100, Backend
from dsv4_kernels.packed_tokens import pack_tokens, row_bytes, unpack_tokens
from dsv4_kernels.rows.fp8_quantize import fp8_quantize
from dsv4_kernels.rows.nvfp4_quantize import block_scales_shape, nvfp4_quantize
from dsv4_kernels.rows.place_codes import place_codes
from dsv4_kernels.rows.place_rows import place_rows
from dsv4_kernels.types import (
    ActivationScales,
    ExpertLayout,
    ExpertWeights,
    Fp8Rows,
    MoeLayer,
    MoeShape,
    QuantizedRows,
)

from tests.support.layers import random_call
from tests.support.sm90_e4m3 import permuted_columns

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = {"reference": REFERENCE, "sm100": SM100}
EXPERTS, LOCAL, TOP_K = 20, 8, 3
POLICIES = {"layer": torch.tensor([0.002]), "token": None}
POISON = 0x7F  # NaN as E4M3


def layer_of(backend: Backend, policy: str, hidden: int) -> MoeLayer:
    """Without weights; of W4A8 if the policy is "fp8"."""
    fp8, per_row = policy == "fp8", policy == "token"
    shape = MoeShape(EXPERTS, LOCAL, TOP_K, hidden, 64, 64, not fp8, per_row, fp8=fp8)
    weights = ExpertWeights(*(torch.empty(LOCAL, 0, 0) for _ in ExpertWeights._fields))
    scales = None
    if not fp8:
        fc1 = POLICIES[policy]
        scales = ActivationScales(None if fc1 is None else fc1.to(DEVICE), None)
    saturated = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    return MoeLayer(backend, shape, weights, 10.0, scales, saturated, torch.zeros(1))


def tokens(num_tokens: int, hidden: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of different sizes, with blocks that the layer's scale does not fit; ids. Expert 0 is
    every token's but two: token 1 is padding, and so is token 2 but for its last slot."""
    generator = torch.Generator().manual_seed(num_tokens)
    sizes = torch.exp2(torch.randint(-6, 8, (num_tokens, 1), generator=generator).float())
    x = torch.randn(num_tokens, hidden, generator=generator) * sizes
    x[0, 3] = torch.inf
    ids = torch.rand(num_tokens, EXPERTS, generator=generator).argsort(1)[:, :TOP_K]
    ids[:, 0] = 0
    if num_tokens > 2:
        ids[1], ids[2, : TOP_K - 1], x[1] = -1, -1, torch.nan
    return x.bfloat16().to(DEVICE), ids.int().to(DEVICE)


@pytest.mark.parametrize("hidden", [48, 1152])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_tokens_are_the_oracles_rows(backend, policy, hidden):
    layer = layer_of(BACKENDS[backend], policy, hidden)
    x, ids = tokens(5, hidden)
    packed = pack_tokens(x, ids, layer)
    assert packed.shape == (5, row_bytes(layer)) and packed.is_contiguous()
    ours = unpack_tokens(packed, layer)
    used = (ids >= 0).any(1)
    assert used.tolist() == [True, False, True, True, True]
    expected, saturated = reference.nvfp4_quantize(x[used], layer.activation_scales.fc1)
    assert torch.equal(ours.codes[used], expected.codes)
    scales = ours.block_scales.view(torch.uint8)[used]
    assert torch.equal(scales, expected.block_scales.view(torch.uint8))
    gs = ours.global_scales[used] if policy == "token" else ours.global_scales
    assert torch.equal(gs, expected.global_scales)
    assert layer.saturated.item() == saturated > 0


@pytest.mark.parametrize("hidden", [64, 1152])
@pytest.mark.parametrize("backend", [REFERENCE, SM90], ids=["reference", "sm90"])
def test_packed_fp8_tokens_are_the_oracles_rows(backend, hidden):
    layer = layer_of(backend, "fp8", hidden)
    x, ids = tokens(5, hidden)
    ours = unpack_tokens(pack_tokens(x, ids, layer), layer)
    used = (ids >= 0).any(1)
    codes, scales, saturated = reference.fp8_quantize(x[used], None)
    if backend is SM90:
        codes = permuted_columns(codes.view(torch.uint8))
    assert torch.equal(ours.codes[used].view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(ours.scales[used], scales)
    assert layer.saturated.item() == saturated == 1


@pytest.mark.parametrize(
    "policy, hidden, size",
    [
        ("layer", 7168, 4032),
        ("token", 7168, 4048),
        ("layer", 4096, 2304),
        ("token", 48, 48),
        ("fp8", 4096, 4112),
        ("fp8", 48, 64),
    ],
)
def test_bytes_of_a_row(policy, hidden, size):
    assert row_bytes(layer_of(SM100, policy, hidden)) == size


def layout_of(ids: torch.Tensor) -> ExpertLayout:
    """Every second expert is local, 8 of them."""
    expert_map = torch.full((EXPERTS,), -1, dtype=torch.int32)
    expert_map[: 2 * LOCAL : 2] = torch.arange(LOCAL, dtype=torch.int32)
    layout = reference.expert_layout(ids.cpu(), LOCAL, expert_map, tile=128)
    return ExpertLayout(*(part.to(DEVICE) for part in layout))


def poisoned(rows: int, hidden: int) -> QuantizedRows:
    scales = torch.full(block_scales_shape(rows, hidden, True), POISON, dtype=torch.uint8)
    return QuantizedRows(
        torch.full((rows, hidden // 2), 0xAA, dtype=torch.uint8, device=DEVICE),
        scales.view(torch.float8_e4m3fn).to(DEVICE),
        torch.full((rows,), 7.0, device=DEVICE),
    )


def check_placed(num_tokens: int, policy: str, hidden: int) -> None:
    """Rows without a slot stay as they are in both."""
    layer = layer_of(SM100, policy, hidden)
    x, ids = tokens(num_tokens, hidden)
    layout = layout_of(ids)
    rows = len(layout.row_to_slot)
    after = poisoned(rows, hidden)
    nvfp4_quantize(x, layer.activation_scales.fc1, layout, swizzled=True, out=after)
    placed = poisoned(rows, hidden)
    travelled = unpack_tokens(pack_tokens(x, ids, layer), layer)
    assert place_codes(travelled, layout.slot_to_row, out=placed) is placed
    assert torch.equal(placed.codes, after.codes)
    scales = (rows.block_scales.view(torch.uint8) for rows in (placed, after))
    assert torch.equal(*scales)
    if policy == "token":
        assert torch.equal(placed.global_scales, after.global_scales)
    assert (placed.codes != 0xAA).any()


def check_placed_fp8(num_tokens: int, hidden: int) -> None:
    """Rows without a slot stay as they are in both."""
    layer = layer_of(SM90, "fp8", hidden)
    x, ids = tokens(num_tokens, hidden)
    slot_to_row = layout_of(ids).slot_to_row
    size = (int(slot_to_row.max()) + 2, hidden)
    after, placed = (
        Fp8Rows(
            torch.full(size, POISON, dtype=torch.uint8, device=DEVICE).view(torch.float8_e4m3fn),
            torch.full(size[:1], 7.0, device=DEVICE),
        )
        for _ in range(2)
    )
    fp8_quantize(x, slot_to_row, out=after)
    travelled = unpack_tokens(pack_tokens(x, ids, layer), layer)
    assert place_rows(travelled, slot_to_row, out=placed) is placed
    assert torch.equal(placed.codes.view(torch.uint8), after.codes.view(torch.uint8))
    assert torch.equal(placed.scales, after.scales)
    assert (placed.scales != 7).sum() == (slot_to_row >= 0).sum()


@pytest.mark.parametrize("num_tokens, hidden", [(1, 1152), (21, 1152), (5, 64)])
def test_placed_fp8_rows_equal_those_quantised_after(num_tokens, hidden):
    check_placed_fp8(num_tokens, hidden)


@pytest.mark.gpu
@pytest.mark.parametrize("hidden", [4096, 5120, 7168])
@pytest.mark.parametrize("num_tokens", [1, 32, 2048])
def test_fp8_rows_of_real_sizes(num_tokens, hidden):
    check_placed_fp8(num_tokens, hidden)


@pytest.mark.parametrize(
    "num_tokens, hidden", [(1, 1152), (21, 1152), pytest.param(140, 64, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("policy", POLICIES)
def test_placed_codes_equal_those_quantised_after(num_tokens, policy, hidden):
    check_placed(num_tokens, policy, hidden)


@pytest.mark.gpu
@pytest.mark.parametrize("hidden", [4096, 7168])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("num_tokens", [1, 32, 2048])
def test_real_sizes(num_tokens, policy, hidden):
    check_placed(num_tokens, policy, hidden)


def test_no_tokens():
    layer = layer_of(SM100, "token", 64)
    x, ids = torch.empty(0, 64).bfloat16(), torch.empty(0, TOP_K, dtype=torch.int32)
    packed = pack_tokens(x.to(DEVICE), ids.to(DEVICE), layer)
    assert packed.shape == (0, 64)
    slot_to_row = torch.empty(0, TOP_K, dtype=torch.int32, device=DEVICE)
    out = poisoned(128, 64)
    place_codes(unpack_tokens(packed, layer), slot_to_row, out=out)
    assert (out.codes == 0xAA).all()


@pytest.mark.parametrize("policy", [*POLICIES, "fp8"])
def test_the_oracles_layer_gives_the_same_for_both(policy):
    fp8 = policy == "fp8"
    shape = MoeShape(LOCAL, LOCAL, TOP_K, 64, 32, 64, not fp8, fp8=fp8)
    weights = random_weights(shape, "cpu", gain=0.5)
    scales = None
    if not fp8:
        fc1 = POLICIES[policy]
        scales = ActivationScales(fc1, None if fc1 is None else torch.full((LOCAL,), 0.01))
    layer = moe.prepare_layer(REFERENCE, shape, weights, limit=10.0, activation_scales=scales)
    x, routing = random_call(9, shape, seed=0)
    workspace = torch.empty(0, dtype=torch.uint8)
    outputs = [
        moe.moe(given, routing, layer, workspace, out=torch.full_like(x, torch.nan))
        for given in (x, pack_tokens(x, routing.ids, layer))
    ]
    assert torch.equal(*outputs) and outputs[0].norm() > 0
