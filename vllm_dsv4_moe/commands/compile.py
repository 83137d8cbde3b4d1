"""Compile the expert kernels ahead of time, with no GPU, so that serving compiles nothing.

What is compiled is what one rank of the server needs, told by the files that `vllm serve --config`
reads, or by a model and how it is divided. It is kept where the server looks: in this user's folder
under vLLM's cache root, or in a folder for an image, /opt/dsv4-moe/kernels there.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsv4_kernels.trusted_folder import TrustedFolder
    from dsv4_kernels.types import MoeShape

BACKENDS = {"sm_90a": "sm90", "sm_100a": "sm100", "sm_103a": "sm100"}
# n_routed_experts, num_experts_per_tok, hidden_size, moe_intermediate_size of the two releases
PRO, FLASH = (384, 6, 7168, 3072), (256, 6, 4096, 2048)
MODELS = {
    "pro": PRO,
    "flash": FLASH,
    "nvidia/DeepSeek-V4-Pro-NVFP4": PRO,
    "nvidia/DeepSeek-V4-Flash-NVFP4": FLASH,
}
CONFIG_KEYS = ("n_routed_experts", "num_experts_per_tok", "hidden_size", "moe_intermediate_size")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", required=True, choices=BACKENDS)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--config", nargs="+", type=Path, metavar="FILE", help="YAML files for vllm serve --config"
    )
    what.add_argument("--model", help="pro, flash, or a config.json (or its folder)")
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
        "--experts", choices=("nvfp4", "mxfp4"), default="nvfp4", help="format (default nvfp4)"
    )
    parser.add_argument(
        "--scale-per-row",
        action="store_true",
        help="for activation_scale token, or without swiglu_limit",
    )


def run(args: argparse.Namespace) -> int:
    # CuTe DSL asks the GPU otherwise, when it is imported.
    os.environ["CUTE_DSL_ARCH"] = args.arch
    from dsv4_kernels.backends import BACKENDS as backends
    from dsv4_kernels.compile_processes import CompileProcesses, num_processes
    from dsv4_kernels.compiled import KernelCache

    start = time.perf_counter()
    shapes = [shape_of_config(path, args.arch) for path in args.config or ()] or [shape_of(args)]
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
    """Of one rank, by the command's options; ValueError where the sizes do not divide."""
    return rank_shape(
        args.model,
        args.arch,
        ep_size=args.ep_size,
        tp_size=args.tp_size,
        redundant_experts=args.redundant_experts,
        max_num_tokens=args.max_num_tokens,
        scale_per_row=args.scale_per_row,
        weight_format=args.experts,
    )


def shape_of_config(path: Path, arch: str) -> "MoeShape":
    """Of one rank of `vllm serve --config PATH`; the layers of a draft model are divided alike."""
    import yaml

    from vllm_dsv4_moe.settings import read_settings

    options = yaml.safe_load(path.read_text()) or {}
    missing = {"model", "max-num-batched-tokens"} - set(options)
    if missing:
        raise ValueError(f"{path} does not say {' and '.join(sorted(missing))}: add it")
    tp, dp, cp = (
        options.get(name, 1)
        for name in ("tensor-parallel-size", "data-parallel-size", "prefill-context-parallel-size")
    )
    ranks = tp * dp * cp
    shares_experts = options.get("enable-expert-parallel", False)
    redundant = 0
    if options.get("enable-eplb", False):
        redundant = _mapping(options, "eplb-config").get("num_redundant_experts", 0)
    settings = read_settings(_mapping(options, "additional-config"), {})
    per_rank = -(-options["max-num-batched-tokens"] // tp) * tp  # sequence parallelism's shards
    return rank_shape(
        options["model"],
        arch,
        ep_size=ranks if shares_experts else 1,
        tp_size=1 if shares_experts else ranks,
        redundant_experts=redundant,
        max_num_tokens=per_rank * dp * cp,
        scale_per_row=settings.activation_scale == "token",
        weight_format="mxfp4" if settings.formats == "mxfp4" else "nvfp4",
    )


def _mapping(options: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """An option that is an object, written as one or as JSON."""
    value = options.get(name, {})
    return json.loads(value) if isinstance(value, str) else value


def rank_shape(
    model: str,
    arch: str,
    *,
    ep_size: int,
    tp_size: int,
    redundant_experts: int,
    max_num_tokens: int,
    scale_per_row: bool,
    weight_format: str,
) -> "MoeShape":
    from dsv4_kernels.backends import choose_backend
    from dsv4_kernels.types import MoeShape

    experts, top_k, hidden, intermediate = model_sizes(model)
    experts += redundant_experts
    for name, size, parts in (
        ("experts", experts, ep_size),
        ("intermediate size", intermediate, tp_size),
        ("tokens", max_num_tokens, 1),
    ):
        if parts < 1 or size < 1 or size % parts:
            raise ValueError(f"{size} {name} cannot be divided among {parts} ranks evenly")
    shape = MoeShape(
        num_experts=experts,
        num_local_experts=experts // ep_size,
        top_k=top_k,
        hidden=hidden,
        intermediate=intermediate // tp_size,
        max_num_tokens=max_num_tokens,
        quantize_activations=arch != "sm_90a" and weight_format == "nvfp4",
        scale_per_row=scale_per_row,
        weight_format=weight_format,
    )
    choose_backend(BACKENDS[arch], shape, None)
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
