"""What W4A4's activation scales cost, and W4A8: relative L2 error of the layer against W4A16.

    PYTHONPATH=kernels python kernels/bench/activation_error.py [--json OUT | --kept]

The same NVFP4 weights and tokens through the oracle, also as W4A16; error is the norm of
the difference over the norm of W4A16's output. Tokens have unit RMS, a few loud channels and one
token in 64 of a single channel, times `size`. It measures numerics, not speed, on a CPU.
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import torch
from dsv4_kernels import activation_scale, reference
from dsv4_kernels.types import ActivationScales, ExpertWeights, Routing, fp8_h_scale

NUM_EXPERTS, TOP_K, HIDDEN, INTERMEDIATE, NUM_TOKENS, SCALING = 8, 4, 512, 256, 128, 2.5
HEADROOMS = (1, 4, 16, 32, 64, 256)
SIZES = (0.03, 0.1, 1, 30, 3000)
LIMITS = (10.0, None)
KEPT = Path(__file__).with_suffix(".json")


class Result(NamedTuple):
    policy: str
    headroom: int | None
    limit: float | None
    size: float
    error: float  # relative L2
    saturated: int  # blocks
    finite: bool


def quantized(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(N, K) to codes, block scales and a global scale, as ModelOpt does it: amax / 2688."""
    scale = values.abs().max() / 2688
    rows, _ = reference.nvfp4_quantize(values, scale.reshape(1))
    return rows.codes, rows.block_scales, scale


def make_weights(generator: torch.Generator) -> ExpertWeights:
    """Normal weights of variance 1 / K, quantised; gate and up share their scale."""
    w13, w2 = [], []
    for _ in range(NUM_EXPERTS):
        w13.append(
            quantized(torch.randn(2 * INTERMEDIATE, HIDDEN, generator=generator) / HIDDEN**0.5)
        )
        w2.append(
            quantized(torch.randn(HIDDEN, INTERMEDIATE, generator=generator) / INTERMEDIATE**0.5)
        )
    codes13, scales13, global13 = map(torch.stack, zip(*w13, strict=True))
    codes2, scales2, global2 = map(torch.stack, zip(*w2, strict=True))
    pairs = global13[:, None].repeat(1, 2)
    return ExpertWeights(codes13, scales13, pairs, codes2, scales2, global2)


def make_tokens(generator: torch.Generator) -> torch.Tensor:
    """Unit RMS; eight channels eight times louder, and every 64th token one channel alone."""
    x = torch.randn(NUM_TOKENS, HIDDEN, generator=generator)
    x[:, ::128] *= 8
    x[::64, 3] = 400
    return x / x.square().mean(1, keepdim=True).sqrt()


def make_routing(generator: torch.Generator) -> Routing:
    logits = torch.randn(NUM_TOKENS, NUM_EXPERTS, generator=generator)
    return reference.router_topk(logits, TOP_K, scaling=SCALING)


def calibrated(
    x: torch.Tensor, routing: Routing, weights: ExpertWeights, limit: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """max|x| and each expert's largest product on these tokens: what a calibration run sees."""
    fc2_amax = torch.zeros(NUM_EXPERTS)
    for expert in range(NUM_EXPERTS):
        tokens, slots = (routing.ids == expert).nonzero(as_tuple=True)
        h = reference.fc1(x[tokens], weights, expert, routing.weights[tokens, slots], limit)
        fc2_amax[expert] = h.abs().max()
    return x.abs().max(), fc2_amax


def policies(
    weights: ExpertWeights, limit: float | None, amax: tuple[torch.Tensor, torch.Tensor]
) -> dict[tuple[str, int | None], ActivationScales]:
    fc1, fc2 = amax
    input_scales = fc1.expand(NUM_EXPERTS) / 2688, fc2 / 2688
    h_scale = fp8_h_scale(limit)
    table: dict[tuple[str, int | None], ActivationScales] = {
        ("fp8", None): ActivationScales(
            None, None if h_scale is None else torch.full((NUM_EXPERTS,), h_scale)
        ),
        ("token", None): activation_scale.token(),
        ("checkpoint", None): activation_scale.checkpoint(*input_scales, NUM_EXPERTS),
        ("file", 4): activation_scale.from_amax(fc1, fc2, headroom=4),
    }
    for headroom in HEADROOMS:
        table["warmup", headroom] = activation_scale.warmup(
            weights, limit=limit, scaling=SCALING, headroom=headroom
        )
    return table


def measure(seed: int = 0) -> list[Result]:
    generator = torch.Generator().manual_seed(seed)
    weights, routing = make_weights(generator), make_routing(generator)
    calibration, tokens = make_tokens(generator), make_tokens(generator)
    results = []
    for limit in LIMITS:
        table = policies(weights, limit, calibrated(calibration, routing, weights, limit))
        for size in SIZES:
            x = (tokens * size).bfloat16()
            exact = reference.moe(x, routing, weights, limit=limit).float()
            for (policy, headroom), scales in table.items():
                saturated = torch.zeros(1, dtype=torch.int64)
                y = reference.moe(
                    x,
                    routing,
                    weights,
                    limit=limit,
                    activation_scales=scales,
                    fp8=policy == "fp8",
                    saturated=saturated,
                ).float()
                error = float((y - exact).norm() / exact.norm())
                finite = bool(y.isfinite().all())
                results.append(Result(policy, headroom, limit, size, error, int(saturated), finite))
    return results


def markdown(results: list[Result], limit: float | None) -> str:
    """One row a policy, one column a token size; saturated blocks in brackets."""
    lines = [
        "| policy | " + " | ".join(f"tokens × {size:g}" for size in SIZES) + " |",
        "|---" * (len(SIZES) + 1) + "|",
    ]
    cells = {(r.policy, r.headroom, r.size): r for r in results if r.limit == limit}
    for policy, headroom in dict.fromkeys((p, h) for p, h, _ in cells):
        name = f"`{policy}`" + ("" if headroom is None else f", headroom {headroom}")
        row = [cells[policy, headroom, size] for size in SIZES]
        text = [f"{r.error:.1%}" + (f" ({r.saturated})" if r.saturated else "") for r in row]
        lines.append(f"| {name} | " + " | ".join(text) + " |")
    return "\n".join(lines)


def kept() -> list[Result]:
    """What `--json` wrote beside this file."""
    return [Result(**entry) for entry in json.loads(KEPT.read_text())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help=f"write the results here too ({KEPT.name})")
    parser.add_argument("--kept", action="store_true", help="print the kept results instead")
    args = parser.parse_args()
    results = kept() if args.kept else measure()
    for limit in LIMITS:
        print(f"swiglu_limit {limit}\n\n{markdown(results, limit)}\n")
    if args.json is not None:
        lines = ",\n ".join(json.dumps(result._asdict()) for result in results)
        args.json.write_text(f"[{lines}]\n")


if __name__ == "__main__":
    main()
