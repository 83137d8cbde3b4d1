"""A layer whose experts several GPUs share: dispatch, experts and combine apart, and together.

    python -m bench.expert_parallel run --out expert_parallel.json [--format mxfp4] [--model flash]
    python -m bench.expert_parallel report expert_parallel.json

A process a GPU, in the topology of `--data-parallel-size N --enable-expert-parallel`, with vLLM's
all-gather of tokens and reduce-scatter of outputs: every rank has so many tokens, and runs its
experts on those of all. Ours gather bf16, or (`packed`) tokens that are quantised before. Each
contender has processes of its own; its output is first compared with the oracle's, and what is
wrong or fails is reported and not timed. Times are the slowest rank's, of a CUDA graph of as many
steps as keep the weights L2-cold. `experts` is what a rank does between the two exchanges.
"""

import argparse
import contextlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.multiprocessing
from bench.arguments import call, run_and_report
from bench.expert_parallel_rank import OURS, PEERS, STAGES, Plan, backend_of, our_shape, run_rank
from bench.inputs import LIMIT
from bench.released import MODELS, released_shape
from bench.timing import write_results
from dsv4_kernels.compile_processes import CompileProcesses, num_processes
from dsv4_kernels.compiled import arch_of
from dsv4_kernels.trusted_folder import TrustedFolder
from dsv4_kernels.types import MoeShape

from vllm_dsv4_moe.commands.serving import free_port

TOKENS = (1, 32, 512, 8192)  # of a rank


def run(arguments: argparse.Namespace) -> None:
    ranks, num_gpus = arguments.ranks, torch.cuda.device_count()
    if 0 < num_gpus < ranks:
        raise ValueError(f"{ranks} ranks need a GPU each, and there are {num_gpus}: change --ranks")
    shape = shape_of(arguments.model, arguments.format, ranks)
    contenders = default_contenders(shape)
    if arguments.contenders:
        contenders = arguments.contenders.split(",")
    facts = {"model": arguments.model, "format": arguments.format, "ranks": ranks}
    rows: list[dict] = []
    with TemporaryDirectory() as temporary:
        folder = TrustedFolder.make(Path(temporary) / "objects", 0o755)
        compile_kernels(shape, contenders, folder)
        for name in contenders:
            plan = Plan(name, shape, ranks, TOKENS, folder.path, Path(temporary) / "rows")
            rows += run_contender(plan, arguments.seconds)
            write_results(arguments.out, rows, arguments.commit, limit=LIMIT, **facts)
    print("\n".join(table(json.loads(arguments.out.read_text()))))


def shape_of(model: str, weight_format: str, ranks: int) -> MoeShape:
    """Of a rank, in W4A16."""
    num_experts = released_shape(model).num_experts
    if num_experts % ranks:
        raise ValueError(f"{ranks} ranks do not divide {num_experts} experts: change --ranks")
    return released_shape(model, weight_format, ep=ranks, tokens=ranks * max(TOKENS))


def default_contenders(shape: MoeShape) -> list[str]:
    """What ours can be here and, on a GPU, the peers."""
    found = []
    for name, (activations, _) in OURS.items():
        with contextlib.suppress(ValueError):
            backend_of(our_shape(shape, activations))
            found.append(name)
    return found + list(PEERS[shape.weight_format]) * torch.cuda.is_available()


def compile_kernels(shape: MoeShape, contenders: Sequence[str], folder: TrustedFolder) -> None:
    """All that ours may launch, into the folder, by a process a core."""
    modes = {activations for name, (activations, _) in OURS.items() if name in contenders}
    for mode in modes:
        ours = our_shape(shape, mode)
        kernels = backend_of(ours).kernels
        if kernels is not None:
            made = kernels(ours, arch_of(torch.cuda.get_device_capability()))
            failures = CompileProcesses(made, folder, num_processes(), os.environ).wait()
            assert not failures, failures


def run_contender(plan: Plan, seconds: float) -> list[dict]:
    """What its processes measured before they ended, or were ended, and why if that was early."""
    plan.rows.write_text("")
    started, failure = time.monotonic(), None
    processes = torch.multiprocessing.spawn(
        run_rank, (free_port(), plan), plan.num_ranks, join=False
    )
    assert processes is not None
    try:
        while not processes.join(1.0):
            if time.monotonic() - started > seconds:
                raise TimeoutError(f"not done after {seconds:.0f} s")
    except Exception as error:  # one contender's failure must not cost the others' numbers
        print(error, flush=True)
        failure = str(error).strip().splitlines()[-1][:300]
    finally:
        for process in processes.processes:
            process.kill()
            process.join()
    rows = [json.loads(line) for line in plan.rows.read_text().splitlines()]
    return rows + ([] if failure is None else [{"contender": plan.contender, "failure": failure}])


def report(arguments: argparse.Namespace) -> None:
    print("\n".join(table(json.loads(arguments.results.read_text()))))


def table(results: dict) -> Iterator[str]:
    """In Markdown; the last column is over vLLM's fastest."""
    peers = PEERS[results["format"]]
    timed = [row for row in results["rows"] if "together_us" in row]
    yield (
        f"Microseconds a layer of {results['model']}, {results['format'].upper()} experts, on "
        f"{results['ranks']} × {results['gpu']}, commit {results['commit']}."
    )
    yield ""
    yield f"| tokens a rank | | gathered, KiB | {' | '.join(STAGES)} | than vLLM |"
    yield "|---" * (len(STAGES) + 4) + "|"
    for tokens in sorted({row["tokens"] for row in timed}):
        rows = [row for row in timed if row["tokens"] == tokens]
        best = min((r["together_us"] for r in rows if r["contender"] in peers), default=None)
        for row in rows:
            us = " | ".join(f"{row[f'{stage}_us']:.0f}" for stage in STAGES)
            gain = f"{best / row['together_us']:.2f}×" if best else "-"
            kib = row["gathered_bytes"] / 1024
            yield f"| {tokens} | {row['contender']} | {kib:.1f} | {us} | {gain} |"
    for row in results["rows"]:
        if "failure" in row:
            yield f"\n{row['contender']} failed: {row['failure']}"
        elif row not in timed:
            yield f"\n{row['contender']}, {row['tokens']} tokens: an error of {row['error']:.3f}"


def main() -> None:
    parser, runner, _ = run_and_report(__doc__, run, report)
    runner.add_argument("--model", choices=MODELS, default="flash", help="whose layer (flash)")
    runner.add_argument("--format", choices=PEERS, default="mxfp4", help="of the experts (mxfp4)")
    runner.add_argument("--ranks", type=int, default=2, help="GPUs (2); one exchanges nothing")
    names = ", ".join(dict.fromkeys([*OURS, *PEERS["nvfp4"], *PEERS["mxfp4"]]))
    runner.add_argument("--contenders", help=f"of {names} (default: what runs here)")
    runner.add_argument("--seconds", type=float, default=180, help="of a contender, at most (180)")
    call(parser)


if __name__ == "__main__":
    main()
