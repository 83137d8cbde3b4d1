"""The row kernels, in per cent of the bandwidth of a large copy measured in the same run.

    python -m bench.rows --out rows.json [--commit ABC]

Counted is what must move, once: of each token that has rows its row read, each row written
(quantise: codes and block scales; place_rows: bf16); each row read, each token written (combine).
Not counted: slot_to_row, a row's own global scale, second reads, the scratch that swizzled scales
go through, tokens without rows and rows without tokens. The layout is of random ids. The layer's
scale leaves room, as one of `warmup` does: no block saturates.
Input sets that together exceed L2 twice take turns, so nothing is found there. Verified before
they are timed.
"""

from functools import partial

import torch
from bench.arguments import one_command
from bench.inputs import expert_map
from bench.timing import cold_sets, copy_bandwidth, print_table, time_us, write_results
from dsv4_kernels import reference
from dsv4_kernels.rows.combine import combine
from dsv4_kernels.rows.expert_layout import expert_layout
from dsv4_kernels.rows.nvfp4_quantize import nvfp4_quantize, scratch_size
from dsv4_kernels.rows.place_rows import place_rows
from dsv4_kernels.types import ExpertLayout, QuantizedRows

TOP_K, TILE, NUM_EXPERTS = 6, 128, 384
BAR = 80.0  # per cent of the copy


def make_layout(num_tokens: int, ranks: int) -> ExpertLayout:
    ids = torch.rand(num_tokens, NUM_EXPERTS, device="cuda").topk(TOP_K).indices.int()
    num_local = NUM_EXPERTS // ranks
    return expert_layout(ids, num_local, expert_map(NUM_EXPERTS, num_local), TILE)


def row_counts(layout: ExpertLayout) -> tuple[int, int]:
    """Rows that exist, and tokens that have any."""
    return int(layout.counts.sum()), int((layout.slot_to_row >= 0).any(1).sum())


def random(rows: int, hidden: int) -> torch.Tensor:
    return torch.randn(rows, hidden, device="cuda", dtype=torch.bfloat16)


def bench_combine(layout: ExpertLayout, hidden: int) -> tuple[float, int]:
    num_tokens = len(layout.slot_to_row)
    moved = 2 * hidden * (row_counts(layout)[0] + num_tokens)
    sets = [random(len(layout.row_to_slot), hidden) for _ in range(cold_sets(moved))]
    outs = [torch.full_like(rows[:num_tokens], torch.nan) for rows in sets]
    combine(sets[0], layout.slot_to_row, out=outs[0])
    some = slice(0, 256)
    assert torch.equal(outs[0][some], reference.combine(sets[0], layout.slot_to_row[some]))
    calls = [
        lambda rows=rows, out=out: combine(rows, layout.slot_to_row, out=out)
        for rows, out in zip(sets, outs, strict=True)
    ]
    return time_us(calls), moved


def bench_place(layout: ExpertLayout, hidden: int) -> tuple[float, int]:
    rows, tokens = row_counts(layout)
    moved = 2 * hidden * (tokens + rows)
    sets = [random(len(layout.slot_to_row), hidden) for _ in range(cold_sets(moved))]
    outs = [torch.zeros_like(random(len(layout.row_to_slot), hidden)) for _ in sets]
    place_rows(sets[0], layout.slot_to_row, out=outs[0])
    live = (layout.row_to_slot >= 0).nonzero()[:512, 0]
    assert torch.equal(outs[0][live], sets[0][layout.row_to_slot[live] // TOP_K])
    calls = [
        lambda x=x, out=out: place_rows(x, layout.slot_to_row, out=out)
        for x, out in zip(sets, outs, strict=True)
    ]
    return time_us(calls), moved


def bench_quantize(
    layout: ExpertLayout, hidden: int, scale: torch.Tensor | None, swizzled: bool
) -> tuple[float, int]:
    rows, tokens = row_counts(layout)
    moved = 2 * hidden * tokens + (hidden // 2 + hidden // 16) * rows
    sets = [random(len(layout.slot_to_row), hidden) for _ in range(cold_sets(moved))]
    saturated = torch.zeros(1, dtype=torch.int64, device="cuda")
    outs = [nvfp4_quantize(x, scale, layout, swizzled=swizzled) for x in sets]
    scratch = torch.empty(scratch_size(len(sets[0]), hidden), dtype=torch.uint8, device="cuda")
    live = (layout.row_to_slot >= 0).nonzero()[:512, 0]
    expected, _ = reference.nvfp4_quantize(sets[0][layout.row_to_slot[live] // TOP_K], scale)
    assert torch.equal(outs[0].codes[live], expected.codes)

    def call(x: torch.Tensor, out: QuantizedRows) -> None:
        options = {"swizzled": swizzled, "saturated": saturated, "scratch": scratch}
        nvfp4_quantize(x, scale, layout, **options, out=out)

    calls = [lambda x=x, out=out: call(x, out) for x, out in zip(sets, outs, strict=True)]
    us = time_us(calls)
    assert not saturated.item(), "rows that saturate are quantised twice"
    return us, moved


def main() -> None:
    arguments = one_command(__doc__)
    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    rows = []
    for num_tokens, hidden, ranks in ((8192, 7168, 1), (8192, 7168, 8), (8192, 4096, 1)):
        layout = make_layout(num_tokens, ranks)
        layer_scale = torch.full((1,), 0.01, device="cuda")
        cases = {
            "combine": partial(bench_combine, layout, hidden),
            "place_rows": partial(bench_place, layout, hidden),
        }
        for policy, scale in (("layer", layer_scale), ("token", None)):
            for swizzled in (False, True):
                order = "swizzled" if swizzled else "row-major"
                name = f"quantise, {policy} scale, {order}"
                cases[name] = partial(bench_quantize, layout, hidden, scale, swizzled)
        for name, bench in cases.items():
            torch.cuda.empty_cache()  # in pieces of what another had, a case took 10 % longer
            us, moved = bench()
            percent = 100 * moved / (us * 1e-6) / bandwidth
            rows.append(
                {
                    "kernel": name,
                    "tokens": num_tokens,
                    "hidden": hidden,
                    "local experts": NUM_EXPERTS // ranks,
                    "us": us,
                    "% of copy": percent,
                    "bar": BAR,
                    "bar met": percent >= BAR,
                }
            )
    print(f"copy: {bandwidth / 1e12:.2f} TB/s")
    print_table(rows)
    write_results(arguments.out, rows, arguments.commit, copy_bytes_per_second=bandwidth)


if __name__ == "__main__":
    main()
