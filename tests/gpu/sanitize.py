"""compute-sanitizer over the kernels that sm90 serves with, on a Hopper GPU: `make sanitize`.

    python tests/gpu/sanitize.py all [--out FILE] [--objects FOLDER] [--seconds N]
    CUTE_DSL_ARCH=sm_90a python tests/gpu/sanitize.py compile FOLDER    the GEMMs; needs no GPU
    python tests/gpu/sanitize.py run {gemms,layer} FOLDER [WORD]        what the tools watch

(with PYTHONPATH=.:kernels, from the repository's root). `all` keeps JSON: what ended, and what is
missing and why. `run` takes those with the word in their name.

`gemms`: fc1 and fc2 in every config that can be chosen, on experts of no row, of one, and of a
count in each size of tile_n and past the last; with as many blocks as the GPU has, which splits
every tile, and with three, which leaves some whole. `layer`: router to combine at a few numbers of
tokens, in both formats and both numerics, and the kernels that only W4A4 calls. GEMMs and layers
are compared with the oracle. memcheck watches both; racecheck (shared memory) watches the GEMMs,
and W4A8's layer, in a variant that it can follow, see `racecheck.py`. Whatever a tool reports
fails. Kernels are compiled before: the tools slow a compiler down a hundredfold. Each tensor is an
allocation of its own, so that memcheck knows where it ends. Under a tool a process is slow to
start, and a GEMM adds little: few processes, of many GEMMs each.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from bench.checkout import checkout_commit
from bench.inputs import expert_map, random_weights
from dsv4_kernels import moe
from dsv4_kernels.backends import REFERENCE, SM90
from dsv4_kernels.compile_processes import fill
from dsv4_kernels.compiled import Kernel, KernelCache, use_cache
from dsv4_kernels.padding import padded_shape
from dsv4_kernels.route.gate_route import gate_route
from dsv4_kernels.route.router_topk import router_topk
from dsv4_kernels.rows.expert_layout import expert_layout
from dsv4_kernels.rows.nvfp4_quantize import nvfp4_quantize
from dsv4_kernels.sm90 import gemm as sm90
from dsv4_kernels.sm90.heuristic import choose_config
from dsv4_kernels.sm90.spec import LayerConfig
from dsv4_kernels.trusted_folder import TrustedFolder
from dsv4_kernels.types import ExpertLayout, ExpertWeights, MoeShape, Routing

from tests.gpu import racecheck
from tests.support import sm90_problems
from tests.support.layers import lazy, relative_error, run, workspace_of
from tests.support.sm90_problems import Problem

ROOT = Path(__file__).parents[2]
ARCH = "sm_90a"
FEW_BLOCKS = 3
NOT_RUN = "not run"
# memcheck would also list each driver function that this driver lacks.
OPTIONS = {"memcheck": ["--report-api-errors", "no"], "racecheck": []}
# Folders of objects: the kernels that serve, and those that racecheck follows.
SERVED, FOLLOWED = "served", "followed"
SUMMARY = re.compile(
    r"========= (?:ERROR SUMMARY: (?P<errors>\d+) error"
    r"|RACECHECK SUMMARY: (?P<hazards>\d+) hazards? displayed)"
)

# Rows of an expert for which unlike kernels are chosen.
ROWS = (1, 4, 29, 43, 90, 118, 140)
SIZES = {"fc1": (768, 192), "fc2": (448, 768)}  # hidden, intermediate: a part of a tile is left
LAYER = MoeShape(16, 5, 4, 512, 384, 256, False)
# Of NVFP4's layers other ranks own some experts; of MXFP4's none.
LAYERS = {
    f"{weight_format} {activations}": LAYER._replace(
        num_local_experts=num_local, weight_format=weight_format, fp8=activations == "fp8"
    )
    for weight_format, num_local in (("nvfp4", 5), ("mxfp4", 16))
    for activations in ("bf16", "fp8")
}
LAYER_TOKENS = (7, 40, 200, 256)  # smallest tiles, small ones, larger ones; fp8: clusters
MANY_TOKENS, MANY_COLUMNS = 1100, 4128  # to quantise, in two launches and several chunks
LIMIT = 10.0


class Case(NamedTuple):
    name: str
    op: str
    config: LayerConfig
    problem: Problem

    @property
    def title(self) -> str:
        return f"{self.name} {self.op}"


def configs() -> dict[tuple[str, str], LayerConfig]:
    """By name and op: what can be chosen for K = 768, and FC1's tiles of 384 weight rows, which are
    chosen where these divide M."""
    shape = MoeShape(1, 1, 1, 768, 768, 1, False)
    found = {(f"{rows}-rows", op): choose_config(shape, rows) for rows in ROWS for op in SIZES}
    _, inter = SIZES["fc1"]
    return found | {("1-rows 2x3", "fc1"): choose_config(shape._replace(intermediate=inter), 1)}


def row_counts(tile_n: tuple[int, ...]) -> tuple[int, ...]:
    """Of the experts: each size of tile_n full and barely begun, two tiles, three, none, one."""
    most = tile_n[-1]
    begun = [1, *(n + 1 for n in tile_n[:-1])]
    return (0, *begun, *tile_n, most + 1, 2 * most + 3, 0)


def cases() -> list[Case]:
    found = []
    for (name, op), config in configs().items():
        counts = row_counts(getattr(config, op).tile_n)
        problem = Problem(name, sum(counts), len(counts), 1, *SIZES[op], limit=LIMIT, counts=counts)
        found.append(Case(name, op, config, problem))
    return found


def choose(case: Case, num_blocks: int) -> None:
    """Have sm90 run the case's config on that many blocks."""
    sm90_problems.use_choice(lambda shape, num_tokens: case.config)
    sm90.num_sms = lambda device: num_blocks


def gemm_of(case: Case) -> sm90.Gemm:
    choose(case, sm90.H200_SMS)
    return sm90.gemms(case.problem.shape, case.problem.num_tokens)[case.op == "fc2"]


def kernels() -> dict[str, list[Kernel]]:
    """By folder: everything that `run` launches."""
    sm90_problems.use_choice(choose_config)
    served = {
        gemm: None
        for shape in LAYERS.values()
        for num_tokens in LAYER_TOKENS
        for gemm in sm90.gemms(padded_shape(SM90, shape), num_tokens)
    }
    followed = {gemm: None for gemm in served if gemm.activations == "fp8"}
    for gemm in map(gemm_of, cases()):
        served[gemm] = followed[gemm] = None
    return {
        SERVED: [Kernel(sm90.compile_now, gemm, ARCH) for gemm in served],
        FOLLOWED: [Kernel(racecheck.compile_gemm, gemm, ARCH) for gemm in followed],
    }


def write_kernels(folder: Path) -> int:
    """Compile what is not there; returns the number of all."""
    found = kernels()
    for name, each in found.items():
        fill(TrustedFolder.make(folder / name, 0o700), each)
    return sum(map(len, found.values()))


def use_kernels(folder: Path) -> None:
    """Run what was written there, in this process."""
    use_cache(KernelCache([TrustedFolder(folder)]))
    if folder.name == FOLLOWED:
        sm90.compile_now = racecheck.compile_gemm


def run_gemms(chosen: list[Case], device: str, block_counts: tuple[int, ...]) -> None:
    for case in chosen:
        inputs = sm90_problems.make_inputs(case.problem)
        exact = sm90_problems.expected(case.problem, inputs, case.op)
        live = sm90_problems.live_rows(inputs)
        given = inputs.to(device)
        for num_blocks in block_counts:
            choose(case, num_blocks)
            out = sm90_problems.run(case.problem, given, case.op).cpu()
            error = (out[live].float() - exact[live]).norm() / exact[live].norm()
            assert error < 2**-8, (case.name, case.op, num_blocks, error)
            assert out[~live].isnan().all(), (case.name, case.op, "padding rows were written")
            print(f"{case.name} {case.op} {num_blocks} blocks: {error:.1e}", flush=True)


def run_layer(shape: MoeShape, token_counts: tuple[int, ...], device: str) -> None:
    """Dense and hash routing, layout, rows gathered, placed or quantised, fc1, fc2, combine."""
    # MXFP4's block scales alone give h a size that W4A8's constant scale is made for.
    weights = random_weights(shape, "cpu", gain=None if shape.weight_format == "mxfp4" else 0.3)
    given = ExpertWeights(*(tensor.to(device, copy=True) for tensor in weights))
    backend, mapping = lazy(SM90), local_experts(shape, device)
    layer = moe.prepare_layer(backend, shape, given, limit=LIMIT, activation_scales=None)
    oracle = moe.prepare_layer(REFERENCE, shape, weights, limit=LIMIT, activation_scales=None)
    workspace = workspace_of(layer)
    for num_tokens in token_counts:
        x, routings = route(num_tokens, device)
        for routing in routings:
            out = run(layer, x, routing, mapping, workspace)
            there = Routing(*(tensor.cpu() for tensor in routing))
            exact = run(oracle, x.cpu(), there, local_experts(shape, "cpu"))
            error = relative_error(out.cpu(), exact)
            bound = 2**-4 if shape.fp8 else 2**-8
            assert error < bound and out.isfinite().all(), (shape, num_tokens, error)
            numerics = "fp8" if shape.fp8 else "bf16"
            print(f"{shape.weight_format} {numerics} layer of {num_tokens} tokens: {error:.1e}")
        quantize(x, expert_layout(routing.ids, shape.num_local_experts, mapping, 128))


def run_quantize(num_tokens: int, columns: int, device: str) -> None:
    """As for a layer of so many tokens, of which some have no local expert."""
    _, (routing, _) = route(num_tokens, device)
    x = torch.randn(num_tokens, columns, generator=torch.Generator().manual_seed(0)).bfloat16()
    mapping = local_experts(LAYER, device)
    layout = expert_layout(routing.ids, LAYER.num_local_experts, mapping, 128)
    quantize(x.to(device), layout)
    print(f"rows of {num_tokens} tokens: quantised", flush=True)


def local_experts(shape: MoeShape, device: str) -> torch.Tensor | None:
    """As an expert map: from the fifth on; None where all are."""
    return expert_map(shape.num_experts, shape.num_local_experts, device, first=4)


def route(num_tokens: int, device: str) -> tuple[torch.Tensor, tuple[Routing, Routing]]:
    """x, and its tokens' experts by a bias and by a hash table; also from x, in one kernel."""
    generator = torch.Generator().manual_seed(num_tokens)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(device)

    def below(end: int, *size: int) -> torch.Tensor:
        return torch.randint(0, end, size, generator=generator).to(device)

    experts, top_k = LAYER.num_experts, LAYER.top_k
    x, logits = random(num_tokens, LAYER.hidden).bfloat16(), random(num_tokens, experts)
    hashed = {"table": below(experts, 50, top_k), "token_ids": below(50, num_tokens).int()}
    dense = {"bias": random(experts)}
    gate = random(experts, LAYER.hidden).bfloat16()
    hashed_first = hashed | {"token_ids": hashed["token_ids"][:64]}
    for how in (dense, hashed_first):
        gate_route(x[:64], gate, top_k, **how)
    return x, (router_topk(logits, top_k, **dense), router_topk(logits, top_k, **hashed))


def quantize(x: torch.Tensor, layout: ExpertLayout) -> None:
    """What only W4A4 calls, to rows that the layout places and in place."""
    saturated = torch.zeros(1, dtype=torch.int64, device=x.device)
    live = torch.arange(len(x), dtype=torch.int32, device=x.device) - 1
    for swizzled in (True, False):
        options = {"swizzled": swizzled, "saturated": saturated}
        for scale in (None, torch.ones(1, device=x.device)):
            nvfp4_quantize(x, scale, layout, **options)
        nvfp4_quantize(x, None, live=live, **options)


def findings(tool: str, output: str) -> int:
    """Errors or hazards that a tool's summary counts; ValueError if it wrote none."""
    match = SUMMARY.search(output)
    if match is None:
        raise ValueError(f"{tool} wrote no summary:\n{output[-3000:]}")
    return int(match["errors"] or match["hazards"] or 0)


def sanitizer() -> str:
    found = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(found).is_file():
        raise ValueError("there is no compute-sanitizer: install the CUDA toolkit, or set PATH")
    return found


def watched(command: list[str], limit: float) -> tuple[str, float]:
    """What a command wrote, and its seconds; ValueError if it failed, TimeoutExpired if it was
    ended, with its children, after limit seconds, or not begun for want of any."""
    if limit <= 0:
        raise subprocess.TimeoutExpired(command, 0)
    start = time.monotonic()
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "CUTE_DSL_ARCH": ARCH}
    environment["OMP_NUM_THREADS"] = "1"  # several run at a time
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, env=environment, **pipe) as process:
        try:
            output, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(psutil.NoSuchProcess):
                for each in [*psutil.Process(process.pid).children(recursive=True), process]:
                    each.kill()
            raise
    if process.returncode:
        raise ValueError(f"{' '.join(command)} ended with {process.returncode}:\n{output[-6000:]}")
    return output, time.monotonic() - start


class Check(NamedTuple):
    tool: str
    work: str
    word: str  # in the names of its GEMMs or layers, "" for all

    @property
    def title(self) -> str:
        return " ".join(filter(None, self))


def checks() -> list[Check]:
    """Those that take longest come first."""
    found = [Check("racecheck", "layer", name) for name in LAYERS if LAYERS[name].fp8]
    found += [Check("racecheck", "gemms", op) for op in SIZES]
    found += [Check("memcheck", "layer", activations) for activations in ("fp8", "bf16")]
    return [*found, Check("memcheck", "gemms", "")]


def run_check(check: Check, objects: Path, deadline: float) -> dict:
    """One tool over one program: what ran and what was found."""
    tool, work, word = check
    folder = objects / (FOLLOWED if tool == "racecheck" else SERVED)
    program = [sys.executable, __file__, "run", work, str(folder), word]
    command = [sanitizer(), "--tool", tool, *OPTIONS[tool], *program]
    output, seconds = watched(command, deadline - time.monotonic())
    count = findings(tool, output)
    print(f"{check.title}: {count} found, {seconds:.0f} s", flush=True)
    lines = output.splitlines()
    report = [line for line in lines if line.startswith("=========")]
    return {
        **check._asdict(),
        "seconds": round(seconds, 1),
        "ran": [line for line in lines if " blocks: " in line or " tokens: " in line],
        "findings": count,
        "report": report[:400] if count else [],
    }


def check_all(out: Path, objects: Path, commit: str, seconds: float) -> bool:
    """Run every check, several at a time; whether all ended and nothing was found.

    The JSON is written at once and after each check, so that a run that is cut short keeps what it
    showed, and what it did not.
    """
    deadline = time.monotonic() + seconds
    version = watched([sanitizer(), "--version"], seconds)[0].strip().splitlines()[-1]
    facts = {"gpu": torch.cuda.get_device_name(), "commit": commit}
    facts |= {"torch": torch.__version__, "sanitizer": version}
    write(out, facts, [], dict.fromkeys(checks(), NOT_RUN))

    def run_program(arguments: tuple[str, ...]) -> None:
        watched([sys.executable, __file__, *arguments], deadline - time.monotonic())

    num_processes = max(1, len(os.sched_getaffinity(0)) - 2)
    with ThreadPoolExecutor(num_processes) as pool:
        # Each compiles what no other does. Then all is right without a tool, and Triton's kernels
        # are compiled.
        for programs in (
            [("compile", str(objects))] * num_processes,
            [("run", work, str(objects / SERVED)) for work in ("gemms", "layer")],
        ):
            list(pool.map(run_program, programs))
        pending = {pool.submit(run_check, check, objects, deadline): check for check in checks()}
        return keep(pending, facts, out)


def keep(pending: dict[Future, Check], facts: dict, out: Path) -> bool:
    """Write what ended, in the order of `checks`, and why the others are missing, as each is known;
    whether all ended and nothing was found."""
    runs: dict[Check, dict] = {}
    missing = dict.fromkeys(pending.values(), NOT_RUN)
    for future in as_completed(pending):
        check = pending[future]
        try:
            runs[check] = future.result()
            del missing[check]
        except subprocess.TimeoutExpired as error:
            if error.timeout > 0:
                missing[check] = f"cut off after {error.timeout:.0f} s"
        except ValueError as error:
            missing[check] = str(error)
        if check in missing:
            print(f"{check.title}: {missing[check]}", flush=True)
        write(out, facts, [runs[each] for each in pending.values() if each in runs], missing)
    return not missing and not any(run["findings"] for run in runs.values())


def write(out: Path, facts: dict, runs: list[dict], missing: dict[Check, str]) -> None:
    why = {check.title: reason for check, reason in missing.items()}
    out.write_text(json.dumps(facts | {"missing": why, "runs": runs}, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("all", "compile", "run"))
    parser.add_argument("rest", nargs="*")
    parser.add_argument("--out", type=Path, default=ROOT / "kernels/bench/results/sanitize.json")
    parser.add_argument("--objects", type=Path, help="compiled kernels, or where they go")
    parser.add_argument("--commit", help="of these files, where they are no git checkout")
    parser.add_argument("--seconds", type=float, default=900, help="for all, compiling included")
    args = parser.parse_args()
    if args.what == "compile":
        assert os.environ.get("CUTE_DSL_ARCH") == ARCH, "CuTe DSL reads it when it is imported"
        print(write_kernels(Path(args.rest[0])), "kernels")
    elif args.what == "run":
        use_kernels(Path(args.rest[1]))
        word = args.rest[2] if len(args.rest) > 2 else ""
        if args.rest[0] == "gemms":
            num_sms = torch.cuda.get_device_properties(0).multi_processor_count
            chosen = [case for case in cases() if word in case.title]
            run_gemms(chosen, "cuda", (num_sms, FEW_BLOCKS))
        else:
            for name, shape in LAYERS.items():
                if word in name:
                    run_layer(shape, LAYER_TOKENS, "cuda")
            run_quantize(MANY_TOKENS, MANY_COLUMNS, "cuda")
    else:
        objects = args.objects or Path(tempfile.mkdtemp(prefix="sanitize_"))
        commit = args.commit or checkout_commit()
        return 0 if check_all(args.out, objects, commit, args.seconds) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
