"""How long a model takes to load on one GPU: this plugin, and vLLM's Marlin and Humming.

    python -m bench.load run --out load.json [--parts rows,compiles,starts]
    python -m bench.load report load.json

Experts of V4-Flash's sizes, all else small: 4 layers that this bench writes as safetensors, and 16
layers of `--load-format dummy`. Every load is a process of its own (bench.load_model) with vLLM's
own worker, which begins with no object of a CuTe DSL kernel where the row says cold. All import
vLLM first, at once, and load in turn; the first alone compiles Triton's kernels. The checkpoint's
files are in the page cache.
Those are the rows. compiles: `dsv4-moe compile` twice, the first time into an empty cache. starts:
whole servers of 16 dummy layers, attention of V4-Flash's sizes too, each backend in turn, with the
caches of the user who runs this: the first start of each fills what they lack.
"""

import argparse
import importlib.metadata
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from bench import load_report
from bench.arguments import call, run_and_report
from bench.load_model import BACKENDS, MAX_NUM_TOKENS, PLUGIN, objects_in
from bench.random_weights import real_config, write_model
from bench.released import layer_sizes

from vllm_dsv4_moe.commands.serving import ServerError, log_tail, serve, server_environment
from vllm_dsv4_moe.commands.tiny import write_json, write_tiny_checkpoint
from vllm_dsv4_moe.commands.tiny_config import TinyConfig, tiny_config_json

SIZES = TinyConfig(**layer_sizes("flash", 4), linear="fp8")
DUMMY_LAYERS = 16
PROCESS_SECONDS = 300
SERVER_ARGUMENTS = (
    "--load-format=dummy",
    "--max-model-len=1024",
    "--max-num-seqs=8",
    f"--max-num-batched-tokens={MAX_NUM_TOKENS}",
)
NOT_OURS = {"VLLM_PLUGINS": ""}
PARTS = ("rows", "compiles", "starts")


class Process(NamedTuple):
    module: str
    started: subprocess.Popen
    log: Path
    at: float  # of time.perf_counter()

    def wait_for(self, path: Path) -> None:
        """Until it has made the file, or ended, or took too long for that."""
        while not path.exists() and self.started.poll() is None:
            if time.perf_counter() - self.at > PROCESS_SECONDS:
                return
            time.sleep(0.05)

    def end(self) -> float:
        """Give it a line, and its seconds once it has ended; RuntimeError with the end of its log
        if it failed."""
        try:
            self.started.communicate(b"\n", PROCESS_SECONDS)
        finally:
            self.started.kill()
        seconds = time.perf_counter() - self.at
        if self.started.returncode:
            raise RuntimeError(
                f"{self.module} ended with {self.started.returncode}\n{log_tail(self.log)}"
            )
        return seconds


class Bench:
    """The folders of one run: checkpoints, caches and logs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoints = {"real": folder / "real", "dummy": folder / "dummy"}
        self.environment = {"TRITON_CACHE_DIR": str(folder / "triton")}
        self.processes = 0
        self.ready: list[Callable[[], None]] = []  # each waits until a process is

    def write_checkpoints(self, sizes: TinyConfig, dummy_layers: int, device: str) -> None:
        write_tiny_checkpoint(self.checkpoints["real"], sizes, device)
        dummy = self.checkpoints["dummy"]
        dummy.mkdir()
        config = TinyConfig(**{**vars(sizes), "layers": dummy_layers})
        write_json(dummy / "config.json", tiny_config_json(config))

    def cache(self, name: str) -> dict[str, str]:
        folder = self.folder / "caches" / name
        folder.mkdir(parents=True, exist_ok=True)
        return {**self.environment, "VLLM_CACHE_ROOT": str(folder)}

    def process(self, module: str, *arguments: object, environment: dict[str, str]) -> "Process":
        """`python -m module`, started."""
        self.processes += 1
        log = self.folder / f"{self.processes}.log"
        with log.open("wb") as output:
            started = subprocess.Popen(
                [sys.executable, "-m", module, *map(str, arguments)],
                cwd=Path(__file__).parents[1],  # where `-m` finds the benches
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=server_environment(environment),
            )
        return Process(module, started, log, time.perf_counter())

    def loading(self, weights: str, backend: str, cache: str) -> Callable[[], dict]:
        """A process that will load; the call that has it do so, when it is ready."""
        load_format = "dummy" if weights == "dummy" else "auto"
        environment = self.cache(cache) | ({} if backend == PLUGIN else NOT_OURS)
        out = self.folder / f"row-{self.processes}.json"
        arguments = ("--load-format", load_format, "--backend", backend)
        checkpoint = self.checkpoints[weights]
        process = self.process(
            "bench.load_model", checkpoint, out, *arguments, environment=environment
        )
        self.ready.append(lambda: process.wait_for(out.with_suffix(".ready")))

        def load() -> dict:
            # No other process imports anything while one loads.
            while self.ready:
                self.ready.pop()()
            process.end()
            return json.loads(out.read_text())

        return load

    def compile(self, arch: str, model: str) -> dict:
        """`dsv4-moe compile` as a whole process, and how many objects it wrote."""
        environment = self.cache("compile")
        cache = Path(environment["VLLM_CACHE_ROOT"])
        before = objects_in(cache)
        arguments = ("compile", "--arch", arch, "--model", model)
        seconds = self.process(
            "vllm_dsv4_moe.commands.cli", *arguments, environment=environment
        ).end()
        new = objects_in(cache).items() - before.items()
        return {"seconds": seconds, "new_objects": len(new)}

    def start_server(self, backend: str) -> dict:
        model = self.folder / "served"
        if not model.exists():
            write_model(model, real_config("flash", "nvfp4", DUMMY_LAYERS))
        log = self.folder / f"server-{backend}.log"
        arguments, environment = list(SERVER_ARGUMENTS), {}
        if backend != PLUGIN:
            arguments += ["--kernel-config", json.dumps({"moe_backend": backend})]
            environment = NOT_OURS
        with serve(model, log, arguments, environment) as server:
            return {"seconds": server.load_seconds}


Case = tuple[dict, Callable[[], dict]]  # what its row says of it, and how to measure it


def loads(bench: Bench) -> Iterator[Case]:
    def one(weights: str, backend: str, objects: str, triton: str, cache: str) -> Case:
        facts = {"weights": weights, "backend": backend, "objects": objects, "triton": triton}
        return facts, bench.loading(weights, backend, cache)

    cases = [one("real", PLUGIN, "cold", "cold", "first")]
    for weights in ("real", "dummy"):
        cases.append(one(weights, PLUGIN, "cold", "warm", weights))
        cases.append(one(weights, PLUGIN, "warm", "warm", weights))
    for peer in BACKENDS[1:]:
        cases += [one(weights, peer, "", "", peer) for weights in ("real", "dummy")]
    yield from cases


def compiles(bench: Bench) -> Iterator[Case]:
    for number in ("first", "second"):
        yield {"run": number}, lambda: bench.compile("sm_90a", "flash")


def starts(bench: Bench, seconds: float) -> Iterator[Case]:
    """Each backend in turn; none begins after that many seconds."""
    deadline = time.monotonic() + seconds
    for backend in itertools.cycle(BACKENDS):
        if time.monotonic() >= deadline:
            return
        yield {"backend": backend}, lambda: bench.start_server(backend)


def measured(facts: dict, measure: Callable[[], dict]) -> dict:
    """The row; a failure is one, and costs no other row."""
    try:
        row = facts | measure()
    except (RuntimeError, ServerError, subprocess.TimeoutExpired) as failure:
        row = facts | {"failure": str(failure)[-2000:]}
    print(json.dumps({key: row[key] for key in row if key != "layers"}), flush=True)
    return row


def kept(path: Path, facts: dict) -> dict[str, Any]:
    """The parts of earlier runs on such a machine, and the commit of each; none of another's."""
    earlier = json.loads(path.read_text()) if path.exists() else {}
    if any(earlier.get(key) != value for key, value in facts.items()):
        earlier = {}
    return {part: earlier.get(part, []) for part in PARTS} | {"commits": earlier.get("commits", {})}


def run(arguments: argparse.Namespace) -> None:
    import torch

    chosen = arguments.parts.split(",")
    if not set(chosen) <= set(PARTS):
        raise ValueError(f"--parts is {arguments.parts}: there are {','.join(PARTS)}")
    facts: dict[str, Any] = {
        "cores": len(os.sched_getaffinity(0)),
        "vllm": importlib.metadata.version("vllm"),
        "layers": {"real": SIZES.layers, "dummy": DUMMY_LAYERS},
    }
    results = facts | {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    results |= kept(arguments.out, results)
    with TemporaryDirectory(dir=arguments.folder) as folder:
        bench = Bench(Path(folder))
        cases = {
            "rows": loads(bench),
            "compiles": compiles(bench),
            "starts": starts(bench, arguments.server_seconds),
        }
        if "rows" in chosen:
            bench.write_checkpoints(SIZES, DUMMY_LAYERS, "cuda")
            torch.cuda.empty_cache()
        for part in chosen:
            results[part] = []
            results["commits"][part] = arguments.commit
            for case in cases[part]:
                results[part].append(measured(*case))
                write_json(arguments.out, results)


def report(arguments: argparse.Namespace) -> None:
    """The README's tables on standard output."""
    print(load_report.markdown(json.loads(arguments.results.read_text())))


def build_parser() -> argparse.ArgumentParser:
    parser, runner, _ = run_and_report(__doc__, run, report)
    runner.add_argument("--folder", help="where 14 GB fit in memory (default: /tmp)")
    runner.add_argument(
        "--parts", default="rows,compiles", help=f"which of {','.join(PARTS)}; the rest is kept"
    )
    runner.add_argument(
        "--server-seconds", type=float, default=300, help="no server is started after (300)"
    )
    return parser


if __name__ == "__main__":
    call(build_parser())
