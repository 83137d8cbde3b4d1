"""place_rows against indexing, bit for bit."""

import pytest
import torch
from dsv4_kernels import reference
from dsv4_kernels.rows.place_rows import choose_config, place_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("many", [1, 8192], ids=["as_one_token", "as_many_tokens"])
@pytest.mark.parametrize("hidden", [80, 1536, 4096])
@pytest.mark.parametrize("num_tokens", [0, 1, 9])
@pytest.mark.parametrize("local", [8, 3], ids=["all-local", "some-foreign"])
def test_every_row_is_its_tokens(hidden, num_tokens, local, many, monkeypatch):
    config = choose_config(hidden, many)
    monkeypatch.setattr("dsv4_kernels.rows.place_rows.choose_config", lambda *shape: config)
    generator = torch.Generator().manual_seed(num_tokens)
    ids = torch.rand((num_tokens, 8), generator=generator).argsort(dim=1)[:, :3].int().to(DEVICE)
    mapping = torch.arange(8, dtype=torch.int32, device=DEVICE)
    mapping[local:] = -1
    layout = reference.expert_layout(ids, local, mapping, 8)
    x = torch.randn((num_tokens, hidden), generator=generator).bfloat16().to(DEVICE)
    untouched = torch.full((len(layout.row_to_slot), hidden), 7.0, device=DEVICE).bfloat16()
    out = place_rows(x, layout.slot_to_row, out=untouched.clone())
    live = layout.row_to_slot >= 0
    assert torch.equal(out[live], x[layout.row_to_slot[live].long() // 3])
    assert torch.equal(out[~live], untouched[~live])
