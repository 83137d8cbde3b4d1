"""Whole servers at V4's layer sizes: this plugin beside vLLM's own experts.

    python -m bench.serve run --out serve.json --format nvfp4 --seconds 480
    python -m bench.serve run --out serve.json --format nvfp4 --in-turn --seconds 1000
    python -m bench.serve run --out serve.json --format mxfp4 --topology dp2-ep --seconds 900
    python -m bench.serve report serve.json [--plot serve.svg]
    python -m bench.serve report serve.json --profile

One `vllm serve` a contender, all started at once and all on the same GPU, with as many layers as
fit (fewer than the model's), random weights (bench.random_weights) and a KV cache of the same size.
Their log-probabilities are compared first. Then they are loaded in turn by `vllm bench serve`'s own
code, the most telling loads first, and again until the seconds are over. What was measured is kept
after every load, beside other formats' and versions' in the same file.

In turn, each server has the GPU for itself, with up to 24 layers: with fewer, a step of few
sequences is the host's. One starts after another, is compared with the first, and measured in its
share of the seconds. So do servers of a topology, which have several GPUs and all of the model's
layers; each rank draws its weights by a tensor's name, so that servers of different topologies hold
different models.
"""

import argparse
import importlib.metadata
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from bench import serve_report
from bench.arguments import call, run_and_report
from bench.random_weights import real_config
from bench.released import num_layers
from bench.serve_contenders import Bench, Contender, contender
from bench.serve_load import Clocks, Load
from bench.timing import query_gpu

from vllm_dsv4_moe.commands.tiny import write_json

GIB = 2**30
KV_BYTES = 4 * GIB
OTHER_BYTES = 14 * GIB  # of a server beside layers, embedding and head; the KV cache is in it
LAYER_OVERHEAD = 1.08  # what else than routed experts is in a layer
MAX_LAYERS = 24
DECODES = (Load(64, 32, 512), Load(256, 32, 512), Load(8, 32, 512), Load(1, 32, 512))
PROMPTS = (
    Load(64, 2048, 256),
    Load(16, 2048, 1),
    Load(4, 8000, 1),
    Load(4, 2048, 1),
    Load(64, 8000, 256),
)
PEERS = {"nvfp4": "marlin,humming", "mxfp4": "default"}
OURS = {"nvfp4": ("plugin",), "mxfp4": ("plugin", "plugin_fp8")}
ARGUMENTS = (
    "--load-format=dummy",
    "--max-model-len=8448",
    "--max-num-seqs=256",
    "--max-num-batched-tokens=8192",
    "--kv-cache-dtype=fp8",
    "--block-size=256",
    "--no-enable-prefix-caching",
    # One process that speaks HTTP would be the bound at 256 requests.
    "--api-server-count=4",
    # Otherwise the log names a kernel once, however often it is compiled.
    "--jit-monitor-verbose",
)
SEQUENCES = (1, 8, 32, 64, 256)  # of the decode steps that are measured
EXTENSION = "--worker-extension-cls=bench.serve_worker.ServeWorker"
TOGETHER = (f"--kv-cache-memory-bytes={KV_BYTES}", "--gpu-memory-utilization=0.2", EXTENSION)
ALONE = ("--gpu-memory-utilization=0.92",)
EP = "--enable-expert-parallel"
TOPOLOGIES = {"tp2": ("-tp=2",), "tp2-ep": ("-tp=2", EP), "dp2-ep": ("-dp=2", EP)}
PARTS = ("decodes", "steps", "prompts", "profile", "starts")
# The others replay a graph of one rank, whose collectives would wait for the other's.
PARTS_OF_RANKS = ("decodes", "prompts")
MOST_TIMES = 5  # that a load is measured
START_SECONDS = 120  # of a server alone, whose kernels are compiled; 75 of them are imports


def run_together(
    bench: Bench, contenders: Sequence[Contender], parts: Sequence[str], arguments: Sequence[str]
) -> None:
    reserved = START_SECONDS * len(contenders) * ("starts" in parts)
    with Clocks() as clocks, bench.started(contenders, (*arguments, *TOGETHER)):
        measure(bench, parts, clocks, reserved)


def run_in_turn(
    bench: Bench, contenders: Sequence[Contender], parts: Sequence[str], arguments: Sequence[str]
) -> None:
    """Each alone, for as much of the time that is left as any after it has."""
    with Clocks() as clocks:
        for started, one in enumerate(contenders):
            kept = bench.left() * (1 - 1 / (len(contenders) - started))
            with bench.started([one], (*arguments, *ALONE, EXTENSION)):
                measure(bench, parts, clocks, kept)


def measure(bench: Bench, parts: Sequence[str], clocks: Clocks, until: float) -> None:
    """What is asked for of the servers that run, in the order of what it tells, and loads again
    until no more than so many seconds are left."""
    bench.compare()
    if "decodes" in parts:
        bench.loads(DECODES, 1, clocks, until)
    if "steps" in parts:
        bench.attempt("steps", bench.steps)
    if "prompts" in parts:
        bench.loads(PROMPTS, 1, clocks, until)
    if "profile" in parts:
        bench.profile()
    bench.attempt("memory", bench.memory)
    again = DECODES * ("decodes" in parts) + PROMPTS * ("prompts" in parts)
    for number in range(2, MOST_TIMES + 1):
        if not bench.loads(again, number, clocks, until + 5):
            break


def capture_sizes(drafted: int) -> tuple[str, ...]:
    """Graphs of the steps that are measured alone: others take memory that servers share."""
    sizes = (str(sequences * (1 + drafted)) for sequences in SEQUENCES)
    return ("--cudagraph-capture-sizes", *sizes)


def gpu_facts() -> dict:
    name, driver, mib, mhz = query_gpu("name", "driver_version", "memory.total", "clocks.max.sm")
    return {"gpu": name, "driver": driver, "memory_mib": int(mib), "max_sm_mhz": int(mhz)}


def layers_that_fit(config: dict, servers: int, memory_bytes: int) -> int:
    """How many layers each of so many servers can have beside its drafts', MAX_LAYERS at most."""
    hidden, inter = config["hidden_size"], config["moe_intermediate_size"]
    layer = 3 * config["n_routed_experts"] * hidden * inter * 9 / 16 * LAYER_OVERHEAD
    others = OTHER_BYTES + 4 * config["vocab_size"] * hidden
    drafts = config["num_nextn_predict_layers"]
    return min(MAX_LAYERS, int((memory_bytes / servers - others) / layer) - drafts)


def keeper(path: Path, key: str, results: dict) -> Callable[[], None]:
    """Writes the results beside those of other versions and formats in the file."""

    def keep() -> None:
        kept = json.loads(path.read_text()) if path.exists() else {"runs": {}}
        kept["runs"][key] = results
        part = path.with_suffix(".part")
        write_json(part, kept)
        part.rename(path)

    return keep


def run(arguments: argparse.Namespace) -> None:
    deadline = time.monotonic() + arguments.seconds
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # servers are stopped then, too
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns at each load
    peers = (arguments.peers or PEERS[arguments.format]).split(",")
    ours = arguments.ours.split(",") if arguments.ours else OURS[arguments.format]
    if not set(ours) <= set(serve_report.OURS) or set(peers) & set(serve_report.OURS):
        raise ValueError(
            f"--ours is {','.join(ours)} and --peers {','.join(peers)}: this plugin's are "
            f"{' and '.join(serve_report.OURS)}, and no peers"
        )
    contenders = [contender(name, arguments.format) for name in (*ours, *peers)]
    facts, topology = gpu_facts(), arguments.topology
    in_turn = arguments.in_turn or bool(topology)
    possible = PARTS_OF_RANKS if topology else PARTS[:-1] if in_turn else PARTS
    parts = arguments.parts or possible[: len(PARTS) - 1]
    if not set(parts) <= set(possible):
        raise ValueError(
            f"parts are {' and '.join(parts)}: with {'--topology' if topology else '--in-turn'}, "
            f"{' and '.join(possible)} can be measured"
        )

    def config(servers: int, layers: int | None) -> dict:
        of = (arguments.model, arguments.format)
        if topology:
            all_layers = num_layers(arguments.model)
            return real_config(*of, layers or all_layers, arguments.mtp)
        any_number = real_config(*of, 4, arguments.mtp)
        fit = layers_that_fit(any_number, servers, facts["memory_mib"] * 2**20)
        return real_config(*of, layers or fit, arguments.mtp)

    model = config(1 if in_turn else len(contenders), arguments.layers)
    results = facts | {
        "cores": len(os.sched_getaffinity(0)),
        "vllm": importlib.metadata.version("vllm"),
        "torch": torch.__version__,
        "commit": arguments.commit,
        "model": arguments.model,
        "format": arguments.format,
        "mtp": arguments.mtp,
        "layers": model["num_hidden_layers"],
        "topology": topology,
        "in_turn": in_turn,
    }
    features = ["mtp"] * bool(arguments.mtp)
    features += [topology or "in-turn"] * in_turn
    keys = [arguments.model, arguments.format, *features, results["vllm"]]
    speculative = json.dumps({"method": "mtp", "num_speculative_tokens": arguments.mtp})
    options = (*ARGUMENTS, *[f"--speculative-config={speculative}"] * bool(arguments.mtp))
    with TemporaryDirectory() as folder:
        keep = keeper(arguments.out, "-".join(keys), results)
        bench = Bench(Path(folder), model, results, keep, deadline)
        options += TOPOLOGIES[topology] if topology else capture_sizes(arguments.mtp)
        try:
            (run_in_turn if in_turn else run_together)(bench, contenders, parts, options)
            for one in contenders if "starts" in parts else ():
                if bench.left() > START_SECONDS:
                    bench.start_alone(one, config(1, None), (*options, *ALONE))
        finally:
            if arguments.logs:
                arguments.logs.mkdir(parents=True, exist_ok=True)
                for log in Path(folder).glob("*.log"):
                    shutil.copy(log, arguments.logs)
    found = {"runs": {"": results}}
    print(f"\n{serve_report.markdown(found)}\n\n{serve_report.details(found)}")


def report(arguments: argparse.Namespace) -> None:
    """The README's tables on standard output, and the plot; or bars and kernels of three steps."""
    results = json.loads(arguments.results.read_text())
    print((serve_report.details if arguments.profile else serve_report.markdown)(results))
    if arguments.plot:
        serve_report.plot(results, arguments.plot)


def build_parser() -> argparse.ArgumentParser:
    parser, runner, reporter = run_and_report(__doc__, run, report)
    runner.add_argument("--format", choices=PEERS, default="nvfp4")
    models = ("flash", "v41")
    runner.add_argument("--model", choices=models, default="flash", help="whose layer sizes")
    runner.add_argument("--ours", help="plugin, plugin_fp8 (default: of the format)")
    runner.add_argument("--peers", help="moe backends of vLLM; `default` is its own choice")
    runner.add_argument("--in-turn", action="store_true", help="one server after another")
    runner.add_argument("--topology", choices=TOPOLOGIES, help="servers on several GPUs, in turn")
    runner.add_argument("--layers", type=int, help="(default: what fits; all, with a topology)")
    runner.add_argument("--mtp", type=int, default=0, help="tokens that a draft layer proposes")
    runner.add_argument("--seconds", type=float, default=1200, help="when to stop (1200)")
    runner.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        help=f"what to measure (no starts; with a topology, {' and '.join(PARTS_OF_RANKS)})",
    )
    runner.add_argument("--logs", type=Path, help="a folder to keep the servers' logs in")
    reporter.add_argument("--plot", type=Path, help="an SVG or PNG to write")
    reporter.add_argument(
        "--profile", action="store_true", help="the bars and the kernels of three steps instead"
    )
    return parser


if __name__ == "__main__":
    call(build_parser())
