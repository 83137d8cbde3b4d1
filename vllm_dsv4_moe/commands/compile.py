"""Compile the expert kernels ahead of time, with no GPU, so that serving compiles nothing.

What is compiled is what one rank of the server needs, told by the files that `vllm serve --config`
reads, or by a model and how it is divided, and by the settings in the environment. It is kept where
the server looks: in this user's folder under vLLM's cache root, or in a folder for an image,
/opt/dsv4-moe/kernels there.
"""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_dsv4_moe.commands.config import find
from vllm_dsv4_moe.commands.deployment import (
    BACKENDS,
    format_of,
    moe_sizes,
    rank_shape,
    read_deployment,
)
from vllm_dsv4_moe.commands.releases import model_config, text_config
from vllm_dsv4_moe.settings import read_settings

if TYPE_CHECKING:
    from dsv4_kernels.trusted_folder import TrustedFolder
    from dsv4_kernels.types import MoeShape


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", required=True, choices=BACKENDS)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--config",
        nargs="+",
        metavar="FILE",
        help="deployments' names, or files for vllm serve --config",
    )
    what.add_argument(
        "--model", help="pro, flash, v41, or a config.json (or its folder), without drafts"
    )
    parser.add_argument("--out", type=Path, help="folder to fill instead of this user's own")
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
    parser.add_argument(
        "--experts",
        choices=("nvfp4", "mxfp4"),
        help="format (default the one that config.json says, or this GPU's: mxfp4 on Hopper)",
    )


def run(args: argparse.Namespace) -> int:
    # CuTe DSL asks the GPU otherwise, when it is imported.
    os.environ["CUTE_DSL_ARCH"] = args.arch
    from dsv4_kernels.backends import BACKENDS as backends
    from dsv4_kernels.compile_processes import CompileProcesses, num_processes
    from dsv4_kernels.compiled import KernelCache

    start = time.perf_counter()
    paths = map(find, args.config or ())
    shapes = [shape for path in paths for shape in shapes_of_config(path, args.arch)]
    shapes = shapes or [shape_of(args)]
    backend = backends[BACKENDS[args.arch]]
    assert backend.kernels is not None, backend
    needed = [kernel for shape in shapes for kernel in backend.kernels(shape, args.arch)]
    kernels = list(dict.fromkeys(needed))
    folders, writable = folders_to_fill(args.out)
    cache = KernelCache(folders, _warn)
    missing = [kernel for kernel in kernels if not cache.has(kernel)]
    if missing:
        failures = CompileProcesses(missing, writable, num_processes(), os.environ).wait()
        left = [kernel for kernel in missing if not cache.has(kernel)]
        if left:
            raise ValueError(
                f"{len(left)} of {len(missing)} kernels could not be compiled and kept in "
                f"{writable.path}: {'; '.join(dict.fromkeys(failures))}"
            )
    print(
        f"{len(kernels)} kernels for {args.arch} in {' and '.join(str(f.path) for f in folders)}: "
        f"{len(missing)} compiled, {len(kernels) - len(missing)} were there, "
        f"{time.perf_counter() - start:.1f} s"
    )
    return 0


def folders_to_fill(out: Path | None) -> "tuple[list[TrustedFolder], TrustedFolder]":
    """(folders to look through, the one to write to); ValueError or OSError if there is none."""
    from dsv4_kernels.trusted_folder import TrustedFolder

    if out is not None:
        folder = TrustedFolder.make(out, 0o755)
        return [folder], folder
    from vllm_dsv4_moe.kernel_cache import open_folders

    folders, writable = open_folders(_warn)
    if writable is None:
        raise ValueError("there is no folder to write to: name one with --out")
    return folders, writable


def _warn(sentence: str) -> None:
    print(f"dsv4-moe: {sentence}", file=sys.stderr)


def shape_of(args: argparse.Namespace) -> "MoeShape":
    """Of one rank, by the command's options; ValueError where it cannot run."""
    config = text_config(model_config(args.model))
    quant = config.get("quantization_config")
    of_gpu = "mxfp4" if args.arch == "sm_90a" else "nvfp4"
    weight_format = args.experts or (format_of(quant) if quant else of_gpu)
    shape = rank_shape(
        moe_sizes(config),
        args.arch,
        ep_size=args.ep_size,
        tp_size=args.tp_size,
        redundant_experts=args.redundant_experts,
        max_num_tokens=args.max_num_tokens,
        settings=read_settings({}, os.environ),
        limit=config.get("swiglu_limit"),
        weight_format=weight_format,
    )
    return _checked(shape, args.arch)


def shapes_of_config(path: Path, arch: str) -> "list[MoeShape]":
    """Of one rank of `vllm serve --config PATH`: the model's layers and its drafts'."""
    deployment = read_deployment(path, os.environ)
    shapes = [_checked(shape, arch) for shape in deployment.shapes(arch) if shape is not None]
    if not shapes:
        raise ValueError(
            f"{path} has no layer of this plugin's on {arch}: its experts are "
            f"{deployment.weight_format.upper()}, and the setting formats is "
            f"{deployment.settings.formats}"
        )
    return shapes


def _checked(shape: "MoeShape", arch: str) -> "MoeShape":
    from dsv4_kernels.backends import choose_backend

    choose_backend(BACKENDS[arch], shape, None)
    return shape
