"""Check a checkpoint in seconds, without loading a weight.

Reads config.json, the headers of the safetensors files and the hash tables: which layers are hash
or dense, ours or vLLM's, and what multiplies their activations; what is missing, extra or shaped
for another model. Exit status 0: it can be served with this plugin; 1: it cannot; 2: there is
nothing to check.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_dsv4_moe.commands.checkpoint_scales import LayerScales, Range
from vllm_dsv4_moe.commands.inspect_checkpoint import Inspection, Layer, inspect
from vllm_dsv4_moe.settings import read_settings

if TYPE_CHECKING:
    from rich.console import Console


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="its folder")
    parser.add_argument(
        "--details", action="store_true", help="every layer, tensor kind and difference"
    )
    parser.add_argument(
        "--scales", action="store_true", help="statistics of each layer's scales (reads them)"
    )
    parser.add_argument(
        "--block-scale-experts",
        type=int,
        default=8,
        metavar="N",
        help="experts of each layer whose block scales --scales reads (default 8)",
    )
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel size (default 1)")
    parser.add_argument("--dp", type=int, default=1, help="data-parallel size (default 1)")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    if min(args.tp, args.dp) < 1 or args.block_scale_experts < 0:
        raise ValueError("--tp and --dp must be at least 1, --block-scale-experts at least 0")
    settings = read_settings({}, os.environ)
    found = inspect(
        args.checkpoint,
        args.tp,
        args.dp,
        args.scales,
        args.block_scale_experts,
        settings.formats,
        settings.activations,
    )
    if args.json:
        print(json.dumps(asdict(found), indent=1))
    else:
        # A pipe has no width of its own: give the tables what they need.
        console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
        print_summary(console, found, args.tp * args.dp)
        if args.scales:
            print_scales(console, found.scales)
        if args.details:
            print_details(console, found)
    return 1 if found.problems else 0


def print_summary(console: "Console", found: Inspection, num_gpus: int) -> None:
    console.print(f"[bold]{_escape(found.folder)}[/]: {found.model}")
    console.print(
        f"{found.num_tensors:,} tensors, {_size(found.num_bytes)} in {found.num_files} files"
    )
    console.print()
    for line in layer_lines(found.layers):
        console.print(line)
    for experts, modes in found.activations.items():
        listed = ", ".join(f"{mode} on {backend}" for backend, mode in modes.items())
        console.print(f"activations of {experts} experts: {listed}")
    weights = found.weight_bytes_per_gpu
    console.print(
        f"\nweights on each of {num_gpus} GPUs: {_size(sum(weights.values()))}, "
        f"experts {_size(weights['experts'])} and all else {_size(weights['others'])} "
        "(without MTP layers, activations and KV cache)\n"
    )
    for note in found.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    for problem in found.problems:
        console.print(f"[red]problem:[/] {_escape(problem)}", soft_wrap=True)
    if found.problems:
        console.print("[red]this plugin cannot serve it[/]")
    else:
        console.print("[green]every expected tensor is there: this plugin can serve it[/]")


def layer_lines(layers: list[Layer]) -> Iterator[str]:
    """Layers that are the same, side by side, in one line."""

    def kind(layer: Layer) -> tuple:
        return layer.name.partition(".")[0], layer.router, layer.experts, layer.ours

    for (prefix, router, experts, ours), group in groupby(layers, kind):
        members = list(group)
        first, last = (member.name.partition(".")[2] for member in (members[0], members[-1]))
        numbers = first if first == last else f"{first}-{last}"
        owner = "[green]this plugin[/]" if ours else "vLLM"
        size = _size(sum(member.expert_bytes for member in members))
        name = f"{prefix}.{numbers}"
        yield f"{name:<14} {router:<6} {experts} experts, {size:>9}, run by {owner}"


def print_details(console: "Console", found: Inspection) -> None:
    from rich.table import Table

    table = Table("layer", "router", "attention", "experts", "run by", "size", title="Layers")
    for layer in found.layers:
        owner = "this plugin" if layer.ours else "vLLM"
        size = _size(layer.num_bytes)
        table.add_row(layer.name, layer.router, layer.attention, layer.experts, owner, size)
    console.print(table)
    table = Table("tensor", "count", "dtype", "shape", "size", title="Expected tensors")
    for kind in found.kinds:
        shape = _escape(str(list(kind.shape)))
        table.add_row(kind.name, f"{kind.num_tensors:,}", kind.dtype, shape, _size(kind.num_bytes))
    console.print(table)
    for title in ("missing", "mismatched", "extra"):
        for name in getattr(found, title):
            console.print(f"{title}: {name}", markup=False, soft_wrap=True)


def print_scales(console: "Console", scales: list[LayerScales]) -> None:
    from rich.table import Table

    table = Table(title="Scales, least..greatest")
    names = ("w1,w3 global", "w2 global", "w1,w3 input", "w2 input", "blocks", "zero", "at 448")
    for name in ("layer", *names):
        table.add_column(name, overflow="fold")
    for layer in scales:
        ranges = (layer.w13_global, layer.w2_global, layer.w13_input, layer.w2_input, layer.blocks)
        shares = (layer.blocks_zero, layer.blocks_at_max)
        table.add_row(
            layer.layer.removeprefix("layers."),
            *map(_range, ranges),
            *(f"{share / max(1, layer.blocks_read):.2%}" for share in shares),
        )
    console.print(table)
    if scales:
        sampled = scales[0].experts_sampled
        console.print(f"block scales of {sampled} experts a layer; global and input scales of all")


def _range(values: Range) -> str:
    return f"{values.low:.2g}..{values.high:.2g}" if values.low <= values.high else "none"


def _size(num_bytes: int) -> str:
    unit, name = (2**30, "GiB") if num_bytes >= 2**29 else (2**20, "MiB")
    return f"{num_bytes / unit:.1f} {name}"


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
