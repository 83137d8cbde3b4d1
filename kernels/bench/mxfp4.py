"""MXFP4 experts of one layer on one Hopper GPU: ours, and what vLLM 0.33 runs them with.

    python -m bench.mxfp4 run --out mxfp4.json [--shapes 0,1,2,3,4] [--backends sm90,sm90_fp8]
    python -m bench.mxfp4 report mxfp4.json

As bench.layer, on random MXFP4 weights. Ours and peers keep activations in bf16, or (`_fp8`)
quantise them to FP8, as vLLM 0.33 does by default, with Humming. Our kernels are compiled first, by
a process a CPU core: only those that these numbers of tokens need.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from bench.arguments import call, run_and_report
from bench.inputs import LIMIT, cold_inputs, random_weights
from bench.layer import TOLERANCE, make, measure, oracle, ours, with_floor
from bench.peers import MakeCall, mxfp4_peer
from bench.released import released_shape
from bench.timing import write_results
from dsv4_kernels.backends import BACKENDS as EXPERT_BACKENDS
from dsv4_kernels.compile_processes import CompileProcesses
from dsv4_kernels.compiled import Kernel, KernelCache, use_cache
from dsv4_kernels.sm90 import gemm as sm90
from dsv4_kernels.trusted_folder import TrustedFolder
from dsv4_kernels.types import ExpertWeights, MoeShape

SHAPES = {
    "Pro, EP8 rank": released_shape("pro", "mxfp4", ep=8),
    "Flash": released_shape("flash", "mxfp4"),
    "V4.1-Flash, EP4 rank": released_shape("v41", "mxfp4", ep=4),
    "V4.1-Flash, TP4 rank": released_shape("v41", "mxfp4", tp=4),
    "V4.1-Flash, TP8 rank": released_shape("v41", "mxfp4", tp=8),
}
WITH_BARS = list(SHAPES)[:3]
# Its bars: the floor and the default peer alone, at these numbers of tokens.
TENSOR_PARALLEL, ITS_TOKENS = "V4.1-Flash, TP4 rank", (32, 48, 128, 512)
TOKENS = (1, 6, 8, 32, 48, 128, 512, 2048, 8192)
# An E4M3 activation is rounded to 3 bits of mantissa, a bf16 one to 7.
FP8_TOLERANCE = 4 * TOLERANCE
BF16_PEERS = ("marlin", "humming")
DEFAULT_PEER = "humming_fp8"
OURS = {"sm90": False, "sm90_fp8": True}
COLUMNS = {
    "sm90": "sm90",
    "sm90_fp8": "sm90 W4A8",
    "marlin": "Marlin",
    "humming": "Humming",
    "humming_fp8": "Humming FP8",
}
# W4A8 beside the default peer, by number of tokens; with fewer, at most 2 us more than bf16.
W4A8_BARS = {48: 1.0, 128: 1.0, 512: 1.0, 2048: 1.4, 8192: 1.6}
W4A8_WITH_BARS = WITH_BARS[:2]
# `auto` is W4A8 while it is slower than bf16 nowhere by more than the larger of these.
AUTO_RATIO, AUTO_US = 1.03, 2.0


def make_ours(fp8: bool, shape: MoeShape, weights: ExpertWeights) -> MakeCall:
    backend = replace(EXPERT_BACKENDS["sm90"], compile_layer=None)
    return ours(shape._replace(fp8=fp8), weights, backend=backend)


BACKENDS: dict[str, Callable[[MoeShape, ExpertWeights], MakeCall]] = {
    **{name: partial(make_ours, fp8) for name, fp8 in OURS.items()},
    "marlin": partial(mxfp4_peer, "marlin"),
    "humming": partial(mxfp4_peer, "humming"),
    "humming_fp8": partial(mxfp4_peer, "humming", fp8_activations=True),
    "auto_fp8": partial(mxfp4_peer, "auto", fp8_activations=True),
}
MEASURED = (*OURS, *BF16_PEERS, DEFAULT_PEER)


def compile_in_processes(shapes: list[MoeShape], path: Path) -> None:
    """Have `sm90` launch kernels from objects that processes without a GPU keep in a folder."""
    gemms = {gemm for shape in shapes for n in TOKENS for gemm in sm90.gemms(shape, n)}
    kernels = [Kernel(sm90.compile_now, gemm, "sm_90a") for gemm in gemms]
    folder = TrustedFolder.make(path, 0o755)
    failures = CompileProcesses(kernels, folder, os.cpu_count() or 1, os.environ).wait()
    assert not failures, failures
    use_cache(KernelCache([folder]))


def run(arguments: argparse.Namespace) -> None:
    deadline = time.monotonic() + arguments.seconds
    shapes = {title: SHAPES[title] for title in shape_titles(arguments.shapes)}
    with tempfile.TemporaryDirectory() as temporary:
        modes = [OURS[name] for name in arguments.backends.split(",") if name in OURS]
        if modes:
            start = time.monotonic()
            compiled = [shape._replace(fp8=fp8) for shape in shapes.values() for fp8 in modes]
            compile_in_processes(compiled, arguments.objects or Path(temporary))
            print(f"compiled in {time.monotonic() - start:.0f} s", flush=True)
        run_shapes(shapes, arguments, deadline)


def run_shapes(shapes: dict[str, MoeShape], arguments, deadline: float) -> None:
    rows: list[dict] = []
    for title, shape in shapes.items():
        if time.monotonic() > deadline:
            print(f"no time left for {title}", flush=True)
            continue
        inputs = {num_tokens: cold_inputs(shape, num_tokens) for num_tokens in TOKENS}
        expected = oracle(shape, random_weights(shape), TOKENS)
        makers, tolerances = {}, {}
        for name in arguments.backends.split(","):
            makers[name] = partial(make, BACKENDS[name], shape, partial(random_weights, shape))
            tolerances[name] = FP8_TOLERANCE if name.endswith("_fp8") else TOLERANCE
        for row in measure(makers, inputs, expected, tolerances):
            rows.append(with_floor(row, title, shape, inputs))
            write_results(arguments.out, rows, arguments.commit, limit=LIMIT)


def shape_titles(numbers: str) -> list[str]:
    return [list(SHAPES)[int(number)] for number in numbers.split(",")]


def bars(cells: dict) -> list[tuple[str, float, float]]:
    """(what, ratio, bar) of every bar that the cells, (model, tokens, backend) -> row, have."""
    found = []
    for title in WITH_BARS:
        for tokens in TOKENS:
            if (title, tokens, "sm90") not in cells:
                continue
            mine = cells[title, tokens, "sm90"]["us"]
            us = {name: cells.get((title, tokens, name), {}).get("us") for name in COLUMNS}
            others = [us[name] for name in BF16_PEERS if us[name]]
            if others:
                found.append((f"{title}, {tokens}: bf16", min(others) / mine, 1.3))
            bar = 1.3 if tokens == 1 else 0.95
            if us[DEFAULT_PEER] and (tokens == 1 or 8 <= tokens <= 128):
                found.append((f"{title}, {tokens}: fp8", us[DEFAULT_PEER] / mine, bar))
    for tokens in ITS_TOKENS:
        mine, peer = (cells.get((TENSOR_PARALLEL, tokens, n)) for n in ("sm90", DEFAULT_PEER))
        what = f"{TENSOR_PARALLEL}, {tokens}"
        if mine:
            found.append((f"{what}: floor", mine["floor_us"] / mine["us"], 1 / 1.15))
        if mine and peer:
            found.append((f"{what}: fp8", peer["us"] / mine["us"], 1.0))
    return found + w4a8_bars(cells) + auto_bars(cells)


def auto_bars(cells: dict) -> list[tuple[str, float, float]]:
    found = []
    for title, tokens in dict.fromkeys((title, tokens) for title, tokens, _ in cells):
        bf16, mine = (cells.get((title, tokens, name)) for name in OURS)
        if bf16 and mine:
            most = max(AUTO_RATIO * bf16["us"], bf16["us"] + AUTO_US)
            found.append((f"{title}, {tokens}: W4A8 as `auto`", most / mine["us"], 1.0))
    return found


def w4a8_bars(cells: dict) -> list[tuple[str, float, float]]:
    found = []
    for title in W4A8_WITH_BARS:
        for tokens in TOKENS:
            names = ("sm90_fp8", "sm90", DEFAULT_PEER)
            mine, bf16, peer = (cells.get((title, tokens, name)) for name in names)
            what = f"{title}, {tokens}: W4A8"
            if mine and bf16 and tokens not in W4A8_BARS:
                found.append((f"{what} beside bf16 + 2 us", (bf16["us"] + 2) / mine["us"], 1.0))
            if mine and peer and tokens in W4A8_BARS:
                found.append((what, peer["us"] / mine["us"], W4A8_BARS[tokens]))
            if mine and peer and peer["error"] > 0:
                found.append((f"{what}'s error", peer["error"] / mine["error"], 1 / 1.05))
    return found


def report(arguments: argparse.Namespace) -> None:
    """The README's table and the bars on standard output. What was not measured, or is wrong, has
    no number."""
    results = json.loads(arguments.results.read_text())
    cells = {(r["model"], r["tokens"], r["backend"]): r for r in results["rows"] if "us" in r}
    print(f"Microseconds a layer, {results['gpu']}, commit {results['commit']}; × is over floor.\n")
    measured = {row["backend"] for row in results["rows"]}
    names = [name for name in COLUMNS if name in measured]
    ratios = {
        title: (mine, [peer for peer in peers if peer in names])
        for title, mine, peers in (
            ("than bf16", "sm90", BF16_PEERS),
            ("than FP8", "sm90", (DEFAULT_PEER,)),
            ("W4A8 than FP8", "sm90_fp8", (DEFAULT_PEER,)),
        )
        if mine in names and any(peer in names for peer in peers)
    }
    header = ["tokens", "floor", *(COLUMNS[name] for name in names), *ratios]
    print(f"| | {' | '.join(header)} |")
    print("|---" * (len(header) + 1) + "|")
    for title, tokens in dict.fromkeys((model, tokens) for model, tokens, _ in cells):
        row = {n: cells[title, tokens, n] for n in names if (title, tokens, n) in cells}
        floor = next(iter(row.values()))["floor_us"]
        us = {name: cell["us"] for name, cell in row.items()}
        shown = [f"{us[n]:.0f} ({us[n] / floor:.2f}×)" if n in us else "-" for n in names]
        for mine, peers in ratios.values():
            others = [us[peer] for peer in peers if peer in us]
            shown.append(f"{min(others) / us[mine]:.2f}×" if others and mine in us else "-")
        print(f"| {title} | {tokens} | {floor:.0f} | {' | '.join(shown)} |")
    found = bars(cells)
    missed = [each for each in found if each[1] < each[2]]
    print(f"\n{len(found) - len(missed)} of {len(found)} bars met")
    for what, ratio, bar in missed:
        print(f"missed: {what} {ratio:.3f}×, bar {bar:.2f}×")


def main() -> None:
    parser, runner, _ = run_and_report(__doc__, run, report)
    runner.add_argument("--shapes", default="0,1,2,3,4", help=f"which of {list(SHAPES)}, from 0")
    runner.add_argument("--backends", default=",".join(MEASURED), help=f"of {', '.join(BACKENDS)}")
    runner.add_argument("--objects", type=Path, help="folder that keeps our compiled kernels")
    runner.add_argument("--seconds", type=float, default=600, help="begin nothing after (600)")
    call(parser)


if __name__ == "__main__":
    main()
