"""Choose the tiles of the expert GEMMs by measuring them on this Hopper GPU, for a model's rank.

Every candidate is compiled, compared with the oracle, and only then timed (whole layer, experts'
weights out of the L2 cache, CUDA-graph replay). What is faster than arithmetic's choice goes to
the table that servers read; serving measures nothing. Exit status 0 also if nothing was faster.
"""

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsv4_kernels.grouped_gemm_sm90_spec import LayerConfig
    from dsv4_kernels.types import MoeShape
    from rich.console import Console

    from vllm_dsv4_moe.tune import Found

TOKENS = tuple(2**i for i in range(14))
SECONDS = 30  # for one candidate's verification, which takes a tenth of one
QUICK_TOKENS = (1, 8, 32, 128, 512, 2048, 8192)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, help="pro, flash, or a config.json (or its folder)"
    )
    parser.add_argument("--ep-size", type=int, default=1, help="ranks that share the experts")
    parser.add_argument("--tp-size", type=int, default=1, help="ranks that share every expert")
    parser.add_argument(
        "--redundant-experts", type=int, default=0, help="EPLB's copies, over all ranks"
    )
    parser.add_argument(
        "--tokens",
        type=_token_counts,
        default=None,
        metavar="N,N,...",
        help="of a call; default 1,2,4,...,8192 (--quick: 1,8,32,128,512,2048,8192)",
    )
    parser.add_argument("--quick", action="store_true", help="fewer candidates and tokens")
    parser.add_argument("--out", type=Path, help="the table; default: what servers read")
    parser.add_argument(
        "--objects", type=Path, help="folder for compiled candidates; found there, or written"
    )
    parser.add_argument(
        "--compile-only", action="store_true", help="fill --objects and stop; needs no GPU"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile")
    parser.add_argument("--commit", help="of this code, where it is no git checkout")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def _token_counts(text: str) -> tuple[int, ...]:
    counts = sorted({int(part) for part in text.split(",")})
    if counts[0] < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: numbers of tokens start at 1")
    return tuple(counts)


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    if args.compile_only and args.objects is None:
        raise ValueError("--compile-only needs a folder to write to: add --objects")
    gpu, commit = ("", "") if args.compile_only else (suitable_gpu(), args.commit or _commit())
    os.environ.setdefault("CUTE_DSL_ARCH", "sm_90a")  # CuTe DSL reads it when it is imported
    # With --json, standard output is the JSON's alone.
    console = Console(highlight=False, stderr=args.json, width=None if sys.stdout.isatty() else 140)
    shape = _shape(args)
    counts = args.tokens or (QUICK_TOKENS if args.quick else TOKENS)
    if not args.compile_only:
        check_table(args.out)

    from vllm_dsv4_moe.tune import all_candidates, gemms_of

    choices = all_candidates(shape, counts, thorough=not args.quick)
    gemms = gemms_of(shape, choices)
    console.print(
        f"hidden {shape.hidden}, intermediate {shape.intermediate}, {shape.num_local_experts} of "
        f"{shape.num_experts} experts: {sum(map(len, choices.values()))} candidates at "
        f"{len(counts)} numbers of tokens, {len(gemms)} kernels"
    )
    with tempfile.TemporaryDirectory(prefix="dsv4_tune_") as scratch:
        folder = args.objects or Path(scratch)
        if args.compile_only and any(folder.glob("*/manifest.json")):
            raise ValueError(f"{folder} has compiled candidates already: name another folder")
        failed = _compile(console, gemms, folder, args.jobs)
        if args.compile_only:
            return 0
        found = _measure(console, shape, choices, folder, failed)
    path = _write(args.out, shape, found, gpu, commit)
    print_findings(console, found)
    console.print(f"written to {path}")
    if args.json:
        print(json.dumps({"gpu": gpu, "commit": commit, "found": [_plain(f) for f in found]}))
    return 0


def suitable_gpu() -> str:
    """The name of the GPU that this process uses; ValueError where the kernels cannot run."""
    import torch

    if not torch.cuda.is_available():
        raise ValueError(
            "tune measures kernels for compute capability 9.0 (H100, H200), and torch sees no "
            "GPU: run it on such a machine (--compile-only works anywhere)"
        )
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) != (9, 0):
        raise ValueError(
            "tune measures kernels for compute capability 9.0 (H100, H200), and this is "
            f"{torch.cuda.get_device_name()} with {major}.{minor}: its kernels have nothing to tune"
        )
    return torch.cuda.get_device_name()


def check_table(out: Path | None) -> None:
    """ValueError before anything is measured if the table could not be written then."""
    from dsv4_kernels.grouped_gemm_sm90_table import SHIPPED, read_entries

    path = SHIPPED if out is None else out
    if path.is_file():
        read_entries(path)
    place = path if path.is_file() else path.parent
    if path.is_dir() or not os.access(place, os.W_OK):
        raise ValueError(f"{path} cannot be written: name a file in a folder of yours with --out")


def _commit() -> str:
    from vllm_dsv4_moe.checkout import checkout_commit

    return checkout_commit()


def _shape(args: argparse.Namespace) -> "MoeShape":
    from vllm_dsv4_moe.compile_command import shape_of

    rest = {"arch": "sm_90a", "max_num_tokens": 1, "scale_per_row": False}
    return shape_of(argparse.Namespace(**vars(args) | rest))


def _compile(console: "Console", gemms: list, folder: Path, jobs: int) -> dict:
    """Objects for the GEMMs in the folder, unless it has some -> what did not compile."""
    from vllm_dsv4_moe.candidate_objects import compile_objects

    if any(folder.glob("*/manifest.json")):
        return {}
    start = time.perf_counter()
    failed = compile_objects(gemms, folder, jobs)
    done = f"{len(gemms) - len(failed)} kernels compiled, {len(failed)} not"
    console.print(f"{done}, {time.perf_counter() - start:.0f} s")
    return failed


def _measure(
    console: "Console", shape: "MoeShape", choices: dict, folder: Path, failed: dict
) -> list["Found"]:
    import torch

    from vllm_dsv4_moe.candidate_objects import load_folders, stack_bytes
    from vllm_dsv4_moe.layer_trial import LayerTrial
    from vllm_dsv4_moe.tune import tune

    start = time.perf_counter()
    files = load_folders(folder)

    def why_not(gemm) -> str | None:
        if gemm in failed or repr(gemm) not in files:
            return failed.get(gemm, f"not among the objects in {folder}")
        spilled = stack_bytes(files[repr(gemm)].read_bytes())
        return f"{spilled} bytes a thread in local memory" if spilled else None

    trial = LayerTrial(shape, list(choices))
    console.print(f"weights, tokens and the oracle's outputs: {time.perf_counter() - start:.0f} s")
    num_sms = torch.cuda.get_device_properties(0).multi_processor_count
    return tune(
        shape,
        choices,
        trial.why_wrong,
        trial.time_us,
        why_not,
        num_sms,
        progress=lambda found: console.print(_line(found)),
        watch=lambda num_tokens, config: deadline(
            f"at {num_tokens} tokens, {config} did not end in {SECONDS} s"
        ),
    )


@contextmanager
def deadline(words: str, seconds: float = SECONDS) -> Iterator[None]:
    """A kernel that does not end cannot be stopped from outside: the process ends and names it."""

    def give_up() -> None:
        print(f"dsv4-moe: {words}: nothing was written", file=sys.stderr, flush=True)
        os._exit(3)

    timer = threading.Timer(seconds, give_up)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _line(found: "Found") -> str:
    ratio = found.arithmetic_us / found.us
    return (
        f"{found.num_tokens:6} tokens: {found.us:8.1f} µs, {found.arithmetic_us:8.1f} by arithmetic"
        f" ({ratio:.3f}×), {found.tried} tried, {len(found.refused)} refused"
    )


def _write(
    out: Path | None, shape: "MoeShape", found: list["Found"], gpu: str, commit: str
) -> Path:
    """Put the layer's entry into the table, in the place of an older one."""
    import torch
    from dsv4_kernels.grouped_gemm_sm90_table import SHIPPED

    path = SHIPPED if out is None else out
    num_sms = torch.cuda.get_device_properties(0).multi_processor_count
    write_entry(path, shape, found, gpu, commit, num_sms)
    return path


def write_entry(
    path: Path, shape: "MoeShape", found: list["Found"], gpu: str, commit: str, num_sms: int
) -> None:
    from dsv4_kernels.grouped_gemm_sm90_table import Entry, layer_of, read_entries, table_text

    from vllm_dsv4_moe.tune import measurements, ranges

    layer = layer_of(shape, num_sms)
    others = read_entries(path) if path.is_file() else []
    entry = Entry(
        layer,
        shape.num_experts,
        shape.top_k,
        gpu,
        commit,
        measurements(found),
        ranges(shape, found),
    )
    kept = [each for each in others if each.layer != layer]
    path.write_text(table_text([*kept, entry]))


def print_findings(console: "Console", found: list["Found"]) -> None:
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for column in ("tokens", "µs", "by arithmetic", "faster"):
        table.add_column(column, justify="right")
    table.add_column("what changed")
    for each in found:
        changed = describe(each.arithmetic, each.config)
        ratio = f"{each.arithmetic_us / each.us:.3f}×"
        us = (f"{each.us:.1f}", f"{each.arithmetic_us:.1f}")
        table.add_row(str(each.num_tokens), *us, ratio, changed or "nothing")
    console.print(table)
    for refusal in {r.reason: r for each in found for r in each.refused}.values():
        base = next(f.arithmetic for f in found if f.num_tokens == refusal.num_tokens)
        words = describe(base, refusal.config)
        console.print(f"refused at {refusal.num_tokens} tokens: {words}: {refusal.reason}")


def describe(base: "LayerConfig", config: "LayerConfig") -> str:
    """What differs, such as `fc1 tile_k 128, fc2 tile_n 8-16`."""
    words = []
    if base.gather != config.gather:
        words.append("fc1 gathers" if config.gather else "rows are placed")
    for op in ("fc1", "fc2"):
        before, after = vars(getattr(base, op)), vars(getattr(config, op))
        for name, value in after.items():
            if value != before[name]:
                text = "-".join(map(str, value)) if isinstance(value, tuple) else str(value)
                words.append(f"{op} {name} {text}")
    return ", ".join(words)


def _plain(found: "Found") -> dict[str, Any]:
    return {
        "tokens": found.num_tokens,
        "us": found.us,
        "arithmetic_us": found.arithmetic_us,
        "changed": describe(found.arithmetic, found.config),
        "tried": found.tried,
        "refused": [
            {"config": describe(found.arithmetic, each.config), "reason": each.reason}
            for each in found.refused
        ],
    }
