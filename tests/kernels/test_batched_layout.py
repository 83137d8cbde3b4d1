"""The layout of rows that came grouped, against what its docstring says."""

import pytest
import torch
from dsv4_kernels.rows.batched_layout import BLOCK, batched_layout
from dsv4_kernels.types import ExpertLayout

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(
    ("counts", "rows", "tile"),
    [
        ((0, 64, 65, 0, 1, 192, 0), 192, 64),
        ((0, 0, 0), 8, 8),
        ((13,), 45, 8),
        ((BLOCK + 300, 0, 2 * BLOCK + 256, 5), 2 * BLOCK + 256, 256),
    ],
)
def test_rows_offsets_and_live_tiles(counts, rows, tile):
    experts = len(counts)
    given = torch.tensor(counts, dtype=torch.int32, device=DEVICE)

    def poison(size: int) -> torch.Tensor:
        return torch.full((size,), -7, dtype=torch.int32, device=DEVICE)

    total = experts * rows
    out = ExpertLayout(
        poison(total).view(-1, 1), poison(total), poison(experts), poison(experts + 1),
        poison(total // tile),
    )  # fmt: skip
    layout = batched_layout(given, tile, out=out)
    exists = torch.arange(rows) < torch.tensor(counts)[:, None]
    identity = torch.where(exists.flatten(), torch.arange(total), -1)
    assert layout.row_to_slot.tolist() == identity.tolist()
    assert layout.slot_to_row.tolist() == identity[:, None].tolist()
    assert layout.counts.tolist() == list(counts)
    live = [
        expert * (rows // tile) + i
        for expert, count in enumerate(counts)
        for i in range(-(-count // tile))
    ]
    assert layout.tile_to_expert.tolist() == live + [-7] * (total // tile - len(live))
    first_rows = [expert * rows for expert in range(experts)]
    assert layout.offsets.tolist() == [*first_rows, len(live) * tile]
