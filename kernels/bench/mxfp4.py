"""MXFP4 experts of one layer on one Hopper GPU: what vLLM 0.33 runs them with, beside ours.

    python -m bench.mxfp4 run --out mxfp4.json [--shapes 0,1,2,3] [--backends sm90,humming_fp8]
    python -m bench.mxfp4 report mxfp4.json

As bench.layer, on random MXFP4 weights. The sm90 row runs the exact NVFP4 cast of the same weights:
the same layer, in 18/17 of the bytes, which are what floors count. The peers keep activations in
bf16, or (`_fp8`) quantise them to FP8, as vLLM 0.33 does by default.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from bench.checkout import checkout_commit
from bench.inputs import LIMIT, cold_inputs
from bench.layer import TOKENS, TOLERANCE, measure, oracle, ours, with_floor
from bench.peers import MakeCall, Mxfp4Weights, mxfp4_peer
from bench.timing import write_results
from dsv4_kernels.types import ExpertWeights, MoeShape

SHAPES = {
    "Flash": MoeShape(256, 256, 6, 4096, 2048, 8192, False),
    "Pro, EP8 rank": MoeShape(384, 48, 6, 7168, 3072, 8192, False),
    "V4.1-Flash, EP4 rank": MoeShape(384, 96, 6, 5120, 2304, 8192, False),
    "V4.1-Flash, TP4 rank": MoeShape(384, 384, 6, 5120, 576, 8192, False),
}
# An E4M3 activation is rounded to 3 bits of mantissa, a bf16 one to 7.
FP8_TOLERANCE = 4 * TOLERANCE
CAST_EXPONENT = 9  # of the cast's global scale, 2^-9


def random_mxfp4(shape: MoeShape, device: str = "cuda") -> Mxfp4Weights:
    """Scales from 2^-9 to 2^-6, which is about a trained layer's."""
    generator = torch.Generator(device).manual_seed(0)
    local, hidden, inter = shape.num_local_experts, shape.hidden, shape.intermediate

    def codes_and_scales(rows: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        random = partial(torch.randint, dtype=torch.uint8, device=device, generator=generator)
        return random(0, 256, (local, rows, k // 2)), random(118, 122, (local, rows, k // 32))

    return Mxfp4Weights(*codes_and_scales(2 * inter, hidden), *codes_and_scales(hidden, inter))


def as_nvfp4(weights: Mxfp4Weights) -> ExpertWeights:
    """The same values: 2^(b - 127) is E4M3's 2^(b - 118) times a global scale of 2^-9, for the
    scales of `random_mxfp4`. An MXFP4 block of 32 is two NVFP4 blocks of equal scale."""

    def cast(scales: torch.Tensor) -> torch.Tensor:
        power = torch.exp2(scales.float() - (127 - CAST_EXPONENT))
        return power.repeat_interleave(2, dim=2).to(torch.float8_e4m3fn)

    local, device = len(weights.w13), weights.w13.device
    factor = 2.0**-CAST_EXPONENT
    return ExpertWeights(
        weights.w13,
        cast(weights.w13_scales),
        torch.full((local, 2), factor, device=device),
        weights.w2,
        cast(weights.w2_scales),
        torch.full((local,), factor, device=device),
    )


def _ours(shape: MoeShape, weights: Mxfp4Weights) -> MakeCall:
    return ours(shape, as_nvfp4(weights))


BACKENDS: dict[str, Callable[[MoeShape, Mxfp4Weights], MakeCall]] = {
    "sm90": _ours,
    "marlin": partial(mxfp4_peer, "marlin"),
    "humming": partial(mxfp4_peer, "humming"),
    "humming_fp8": partial(mxfp4_peer, "humming", fp8_activations=True),
    "auto_fp8": partial(mxfp4_peer, "auto", fp8_activations=True),
}


def run(arguments: argparse.Namespace) -> None:
    rows: list[dict] = []
    deadline = time.monotonic() + arguments.seconds
    for number in arguments.shapes.split(","):
        title, shape = list(SHAPES.items())[int(number)]
        inputs = {num_tokens: cold_inputs(shape, num_tokens) for num_tokens in TOKENS}
        expected = oracle(shape, as_nvfp4(random_mxfp4(shape)), inputs)
        for name in arguments.backends.split(","):
            if time.monotonic() > deadline:
                print(f"no time left for {title}, {name}", flush=True)
                continue
            tolerance = FP8_TOLERANCE if name.endswith("_fp8") else TOLERANCE
            make = lambda: BACKENDS[name](shape, random_mxfp4(shape))  # noqa: E731
            rows += with_floor(
                measure(name, make, inputs, expected, tolerance), title, shape, inputs
            )
            write_results(arguments.out, rows, arguments.commit, limit=LIMIT)


def report(arguments: argparse.Namespace) -> None:
    """One line a shape and number of tokens; what was not measured or is wrong has no number."""
    results = json.loads(Path(arguments.results).read_text())
    cells = {(r["model"], r["tokens"], r["backend"]): r for r in results["rows"] if "us" in r}
    names = list(BACKENDS)
    print(f"Microseconds a layer, {results['gpu']}, commit {results['commit']}; × is over floor.\n")
    print(f"| | tokens | floor | {' | '.join(names)} |")
    print("|---" * (3 + len(names)) + "|")
    for title, tokens in dict.fromkeys((model, tokens) for model, tokens, _ in cells):
        row = {name: cells.get((title, tokens, name)) for name in names}
        floor = next(cell["floor_us"] for cell in row.values() if cell)
        shown = [f"{c['us']:.0f} ({c['us'] / floor:.2f}×)" if c else "-" for c in row.values()]
        print(f"| {title} | {tokens} | {floor:.0f} | {' | '.join(shown)} |")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True)
    runner = commands.add_parser("run", help="verify and time, write JSON")
    runner.add_argument("--out", type=Path, required=True)
    runner.add_argument("--shapes", default="0,1", help=f"which of {list(SHAPES)}, from 0")
    runner.add_argument("--backends", default=",".join(BACKENDS))
    runner.add_argument("--seconds", type=float, default=400, help="begin nothing after (400)")
    runner.add_argument("--commit", default=None, help="where there is no git")
    runner.set_defaults(call=run)
    reporter = commands.add_parser("report", help="table of a JSON")
    reporter.add_argument("results")
    reporter.set_defaults(call=report)
    return parser


def main() -> None:
    arguments = build_parser().parse_args()
    if "commit" in arguments and arguments.commit is None:
        arguments.commit = checkout_commit()
    arguments.call(arguments)


if __name__ == "__main__":
    main()
