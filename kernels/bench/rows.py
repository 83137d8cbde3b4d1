"""Quantise and combine, in per cent of the bandwidth of a large copy measured in the same run.

    python -m bench.rows --out rows.json [--commit ABC]

Bytes are what must move: each token that has rows read once, each row written (quantise); each row
read once, each token written (combine). Both exceed L2 many times. Verified before they are timed.
"""

import argparse
from pathlib import Path

import torch
from bench.timing import checkout_commit, copy_bandwidth, print_table, time_us, write_results
from dsv4_kernels import reference
from dsv4_kernels.combine import combine
from dsv4_kernels.expert_layout import expert_layout
from dsv4_kernels.nvfp4_quantize import nvfp4_quantize
from dsv4_kernels.types import ExpertLayout

TOP_K, TILE, NUM_EXPERTS = 6, 128, 384


def make_layout(num_tokens: int, ranks: int) -> ExpertLayout:
    ids = torch.rand(num_tokens, NUM_EXPERTS, device="cuda").topk(TOP_K).indices.int()
    num_local = NUM_EXPERTS // ranks
    expert_map = torch.full((NUM_EXPERTS,), -1, dtype=torch.int32, device="cuda")
    expert_map[:num_local] = torch.arange(num_local, device="cuda")
    return expert_layout(ids, num_local, expert_map, TILE)


def bench_combine(layout: ExpertLayout, hidden: int) -> tuple[float, int]:
    num_tokens = len(layout.slot_to_row)
    capacity = len(layout.row_to_slot)
    rows = torch.randn(capacity, hidden, device="cuda", dtype=torch.bfloat16)
    out = torch.full((num_tokens, hidden), torch.nan, device="cuda", dtype=torch.bfloat16)
    combine(rows, layout.slot_to_row, out=out)
    some = slice(0, 256)
    assert torch.equal(out[some], reference.combine(rows, layout.slot_to_row[some]))
    us = time_us([lambda: combine(rows, layout.slot_to_row, out=out)] * 3)
    return us, 2 * hidden * (int(layout.counts.sum()) + num_tokens)


def bench_quantize(
    layout: ExpertLayout, hidden: int, scale: torch.Tensor | None, swizzled: bool
) -> tuple[float, int]:
    x = torch.randn(len(layout.slot_to_row), hidden, device="cuda", dtype=torch.bfloat16)
    saturated = torch.zeros(1, dtype=torch.int64, device="cuda")
    out = nvfp4_quantize(x, scale, layout, swizzled=swizzled)
    live = (layout.row_to_slot >= 0).nonzero()[:512, 0]
    expected, _ = reference.nvfp4_quantize(x[layout.row_to_slot[live] // TOP_K], scale)
    assert torch.equal(out.codes[live], expected.codes)

    def call() -> None:
        nvfp4_quantize(x, scale, layout, swizzled=swizzled, saturated=saturated, out=out)

    tokens = int((layout.slot_to_row >= 0).any(1).sum())
    row_bytes = hidden // 2 + hidden // 16
    return time_us([call] * 3), 2 * hidden * tokens + row_bytes * int(layout.counts.sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON of the table")
    parser.add_argument("--commit", help="where there is no git")
    arguments = parser.parse_args()
    commit = arguments.commit or checkout_commit()
    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    rows = []
    for num_tokens, hidden, ranks in ((8192, 7168, 1), (8192, 7168, 8), (8192, 4096, 1)):
        layout = make_layout(num_tokens, ranks)
        layer_scale = torch.full((1,), 0.002, device="cuda")
        cases = {"combine": bench_combine(layout, hidden)}
        for policy, scale in (("layer", layer_scale), ("token", None)):
            for swizzled in (False, True):
                order = "swizzled" if swizzled else "row-major"
                name = f"quantise, {policy} scale, {order}"
                cases[name] = bench_quantize(layout, hidden, scale, swizzled)
        for name, (us, moved) in cases.items():
            rows.append(
                {
                    "kernel": name,
                    "tokens": num_tokens,
                    "hidden": hidden,
                    "local experts": NUM_EXPERTS // ranks,
                    "us": us,
                    "% of copy": 100 * moved / (us * 1e-6) / bandwidth,
                }
            )
    print(f"copy: {bandwidth / 1e12:.2f} TB/s")
    print_table(rows)
    write_results(arguments.out, rows, commit, copy_bytes_per_second=bandwidth)


if __name__ == "__main__":
    main()
