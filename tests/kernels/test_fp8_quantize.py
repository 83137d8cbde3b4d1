"""fp8_quantize against the oracle, bit for bit."""

import pytest
import torch
from dsv4_kernels import reference
from dsv4_kernels.rows.fp8_quantize import fp8_quantize
from dsv4_kernels.types import Fp8Rows

from tests.support.sm90_e4m3 import permuted_columns

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make_rows(kind: str, num_tokens: int, K: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_tokens)
    x = torch.randn((num_tokens, K), generator=generator)
    if kind == "every-bf16":
        bits = torch.arange(num_tokens * K) * 65536 // (num_tokens * K)
        x = bits.to(torch.int16).view(torch.bfloat16).view(num_tokens, K).float()
        x = x.nan_to_num(1.0, 2.0, -2.0)
    elif kind == "edges":
        # Largest numbers at and beside 448 times a power of two; zeros; the smallest and largest.
        edges = torch.tensor([448.0, 450.0, 446.0, 0.0, 7.0, 1e-39, 3.3e38, 224.0, 28.25])
        x = edges[torch.arange(num_tokens) % len(edges)][:, None] * torch.linspace(-1, 1, K)
    elif kind == "ties":
        steps = torch.tensor([1.0625, 1.1875, 2.0**-9 * 1.5, 2.0**-9 * 2.5, 2.0**-10, 17.0, 432.0])
        x = steps.repeat(num_tokens * K)[: num_tokens * K].view(num_tokens, K)
        x[:, 0] = 448.0
    elif kind == "inf-and-nan":
        x[0, 3], x[1, 20], x[1, 21], x[2, 40] = torch.inf, -torch.inf, torch.inf, torch.nan
        x[3, :] = torch.nan
    return x.bfloat16().to(DEVICE)


def untouched(rows: int, K: int) -> Fp8Rows:
    codes = torch.full((rows, K), 7, dtype=torch.uint8, device=DEVICE).view(torch.float8_e4m3fn)
    return Fp8Rows(codes, torch.full((rows,), 7.0, device=DEVICE))


def assert_rows(out: Fp8Rows, rows: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor):
    ours, theirs = out.codes.view(torch.uint8)[rows], permuted_columns(codes.view(torch.uint8))
    nan = codes.isnan()
    assert torch.equal(ours, torch.where(permuted_columns(nan), 0x7F, theirs))
    assert torch.equal(out.scales[rows], scales)


@pytest.mark.parametrize("kind", ["normal", "every-bf16", "edges", "ties", "inf-and-nan"])
@pytest.mark.parametrize("K", [64, 576, 1536])
@pytest.mark.parametrize("early", [False, True])
def test_rows_are_the_oracle_s(early, K, kind):
    x = make_rows(kind, 20, K)
    saturated = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    out = fp8_quantize(x, early=early, saturated=saturated, out=untouched(20, K))
    codes, scales, overflows = reference.fp8_quantize(x, None)
    assert_rows(out, torch.arange(20, device=DEVICE), codes, scales)
    assert saturated == overflows


@pytest.mark.parametrize("num_tokens", [0, 1, 9])
@pytest.mark.parametrize("local", [8, 3], ids=["all-local", "some-foreign"])
def test_every_row_is_its_tokens(num_tokens, local):
    generator = torch.Generator().manual_seed(num_tokens)
    ids = torch.rand((num_tokens, 8), generator=generator).argsort(dim=1)[:, :3].int().to(DEVICE)
    mapping = torch.arange(8, dtype=torch.int32, device=DEVICE)
    mapping[local:] = -1
    layout = reference.expert_layout(ids, local, mapping, 8)
    x = make_rows("normal", num_tokens, 320)
    if num_tokens:
        x[0, 5] = torch.inf
    rows = len(layout.row_to_slot)
    saturated = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    out = fp8_quantize(x, layout.slot_to_row, saturated=saturated, out=untouched(rows, 320))
    live = layout.row_to_slot >= 0
    of_rows = x[layout.row_to_slot[live].long() // 3]
    codes, scales, overflows = reference.fp8_quantize(of_rows, None)
    assert_rows(out, live, codes, scales)
    assert saturated == overflows
    assert (out.codes.view(torch.uint8)[~live] == 7).all() and (out.scales[~live] == 7).all()
    # In their place: rows that are, but for the padding.
    placed = torch.full((rows, 320), torch.nan, device=DEVICE).bfloat16()
    placed[live] = of_rows
    again = fp8_quantize(placed, live=layout.row_to_slot, out=untouched(rows, 320))
    for ours, theirs in zip(again, out, strict=True):
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
