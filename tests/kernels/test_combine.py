"""combine against the oracle, bit for bit."""

import pytest
import torch
from dsv4_kernels import reference
from dsv4_kernels.rows.combine import choose_config, combine

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def check(rows: torch.Tensor, slot_to_row: torch.Tensor) -> torch.Tensor:
    shape = (len(slot_to_row), rows.shape[1])
    out = torch.full(shape, torch.nan, dtype=torch.bfloat16, device=DEVICE)
    combine(rows.to(DEVICE), slot_to_row.to(DEVICE), out=out)
    expected = reference.combine(rows, slot_to_row)
    same = (out.cpu().view(torch.int16) == expected.view(torch.int16)) | expected.isnan()
    assert same.all() and torch.equal(out.cpu().isnan(), expected.isnan())
    return out.cpu()


def random_case(num_tokens: int, top_k: int, hidden: int):
    """Rows in any order, a third of the slots foreign, and rows that nobody reads are NaN."""
    generator = torch.Generator().manual_seed(num_tokens)
    capacity = num_tokens * top_k + 7
    slot_to_row = torch.randperm(capacity, generator=generator)[: num_tokens * top_k]
    foreign = torch.rand(num_tokens * top_k, generator=generator) < 1 / 3
    slot_to_row = torch.where(foreign, -1, slot_to_row).int()
    rows = torch.full((capacity, hidden), torch.nan)
    read = slot_to_row[~foreign].long()
    rows[read] = torch.randn(len(read), hidden, generator=generator)
    return rows.bfloat16(), slot_to_row.view(num_tokens, top_k)


@pytest.mark.parametrize("few", [True, False], ids=["as_few_tokens", "as_many_tokens"])
@pytest.mark.parametrize(
    ("num_tokens", "top_k", "hidden"),
    [(0, 6, 64), (1, 6, 4096), (33, 6, 1024), (5, 16, 48), (3, 1, 7168), (4, 8, 2000)],
)
def test_sizes(num_tokens, top_k, hidden, few, monkeypatch):
    config = choose_config(hidden, 1 if few else 8192)
    assert config.skips != few
    monkeypatch.setattr("dsv4_kernels.rows.combine.choose_config", lambda *shape: config)
    check(*random_case(num_tokens, top_k, hidden))


def test_a_token_with_no_local_expert_is_zero():
    rows, slot_to_row = random_case(4, 6, 256)
    slot_to_row[2] = -1
    assert torch.equal(check(rows, slot_to_row)[2], torch.zeros(256, dtype=torch.bfloat16))


def test_the_sum_is_in_slot_order_and_in_fp32():
    """1 + 2^-20 - 1 is 2^-20 in slot order in fp32; sums in bf16 or in another order lose it."""
    rows = torch.tensor([[1.0], [2.0**-20], [-1.0]]).bfloat16()
    assert check(rows, torch.tensor([[0, 1, 2]], dtype=torch.int32)).item() == 2.0**-20


def test_halves_round_to_even_and_infinities_pass():
    rows = torch.tensor(
        [[1.0, 1.0, torch.inf, torch.inf, -0.0, 3e38], [2.0**-8, 3 * 2.0**-8] + [0] * 4]
    )
    rows = torch.cat([rows, torch.tensor([[0.0, 0.0, 1.0, -torch.inf, -0.0, 3e38]])]).bfloat16()
    check(rows, torch.tensor([[0, 1, 2], [0, 1, -1]], dtype=torch.int32))


@pytest.mark.gpu
@pytest.mark.parametrize("hidden", [4096, 7168])
def test_real_sizes(hidden):
    rows, slot_to_row = random_case(8192, 6, hidden)
    first = check(rows, slot_to_row)
    assert torch.equal(first, check(rows, slot_to_row))
