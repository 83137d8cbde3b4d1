"""Compile the expert kernels ahead of time, with no GPU, so that serving compiles nothing.

Sizes come from the model's config.json, or from the name pro or flash, and are divided as the
server will divide them. Give the server the folder in the option kernel_objects.
"""

import argparse
import json
import os
import time
from pathlib import Path

ARCHES = ("sm_90a", "sm_100a", "sm_103a")
# n_routed_experts, num_experts_per_tok, hidden_size, moe_intermediate_size of the two releases
MODELS = {"pro": (384, 6, 7168, 3072), "flash": (256, 6, 4096, 2048)}
CONFIG_KEYS = ("n_routed_experts", "num_experts_per_tok", "hidden_size", "moe_intermediate_size")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", required=True, choices=ARCHES)
    parser.add_argument(
        "--model", required=True, help="pro, flash, or a config.json (or its folder)"
    )
    parser.add_argument("--out", required=True, type=Path, help="folder to write to")
    parser.add_argument("--ep-size", type=int, default=1, help="ranks that share the experts")
    parser.add_argument("--tp-size", type=int, default=1, help="ranks that share every expert")
    parser.add_argument(
        "--redundant-experts", type=int, default=0, help="EPLB's copies, over all ranks"
    )
    parser.add_argument(
        "--max-num-tokens",
        type=int,
        default=8192,
        help="of one call: max_num_batched_tokens times the data-parallel ranks",
    )
    parser.add_argument("--scale-per-row", action="store_true", help="for activation_scale token")


def run(args: argparse.Namespace) -> int:
    # CuTe DSL asks the GPU otherwise, and writes no objects where there is none of this kind.
    os.environ["CUTE_DSL_ARCH"] = args.arch
    from dsv4_kernels.compiled import write_objects

    shape = shape_of(args)
    start = time.perf_counter()
    kernels = specialisations(shape, args.arch)
    written = write_objects(args.out, args.arch, kernels)
    size = sum(path.stat().st_size for path in written)
    print(
        f"{len(written)} kernels for {args.arch} in {args.out}, {size / 2**20:.1f} MiB, "
        f"{time.perf_counter() - start:.0f} s: hidden {shape.hidden}, intermediate "
        f"{shape.intermediate}, {shape.num_local_experts} of {shape.num_experts} experts a rank"
    )
    return 0


def shape_of(args: argparse.Namespace):
    """The MoeShape of one rank; ValueError where the sizes do not divide."""
    from dsv4_kernels.types import MoeShape

    experts, top_k, hidden, intermediate = model_sizes(args.model)
    experts += args.redundant_experts
    for name, size, parts in (
        ("experts", experts, args.ep_size),
        ("intermediate size", intermediate, args.tp_size),
        ("tokens", args.max_num_tokens, 1),
    ):
        if parts < 1 or size < 1 or size % parts:
            raise ValueError(f"{size} {name} cannot be divided among {parts} ranks evenly")
    shape = MoeShape(
        num_experts=experts,
        num_local_experts=experts // args.ep_size,
        top_k=top_k,
        hidden=hidden,
        intermediate=intermediate // args.tp_size,
        max_num_tokens=args.max_num_tokens,
        quantize_activations=args.arch != "sm_90a",
        scale_per_row=args.scale_per_row,
    )
    reason = _op(args.arch)[0].unsupported(shape)
    if reason is not None:
        raise ValueError(f"{args.arch} kernels cannot run this layer: {reason}")
    return shape


def model_sizes(model: str) -> tuple[int, int, int, int]:
    if model in MODELS:
        return MODELS[model]
    path = Path(model)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{model} is not pro, flash, a config.json or a folder with one")
    config = json.loads(path.read_text())
    missing = [key for key in CONFIG_KEYS if not isinstance(config.get(key), int)]
    if missing:
        raise ValueError(f"{path} has no {', '.join(missing)}: it is not DeepSeek-V4's config")
    return tuple(config[key] for key in CONFIG_KEYS)


def _op(arch: str):
    """(module that chooses, module that compiles) of an arch."""
    if arch == "sm_90a":
        from dsv4_kernels.sm90 import gemm as sm90

        return sm90, sm90
    from dsv4_kernels.sm100 import gemm as sm100
    from dsv4_kernels.sm100 import spec

    return spec, sm100


def specialisations(shape, arch: str) -> dict:
    """Key -> compile function of every kernel that the shape needs."""
    chooser, compiler = _op(arch)
    return {
        repr(gemm): lambda gemm=gemm: compiler.compile_gemm(gemm, arch)
        for gemm in chooser.all_gemms(shape)
    }
