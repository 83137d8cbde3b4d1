"""What `make sanitize` runs under compute-sanitizer, rehearsed in the PTX emulator."""

import contextlib
import json
import math
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from dsv4_kernels.backends import SM90
from dsv4_kernels.compiled import Kernel
from dsv4_kernels.padding import padded_shape
from dsv4_kernels.sm90 import gemm as sm90
from dsv4_kernels.sm90.heuristic import choose_config
from dsv4_kernels.sm90.spec import Gemm
from dsv4_kernels.types import MoeShape

from tests.emulator.sm90_emulation import emulated
from tests.gpu import racecheck, sanitize
from tests.kernels.test_nvfp4_quantize import launches_as

CASES = sanitize.cases()


@pytest.fixture(autouse=True)
def as_before(monkeypatch, keep_sm90_choice):
    monkeypatch.setattr(sm90, "num_sms", sm90.num_sms)


def parts(count: int, most: int) -> list[int]:
    """The rows of an expert's tiles: equal parts, rounded up to 8."""
    tiles = math.ceil(count / most)
    each = math.ceil(count / max(tiles, 1) / 8) * 8
    return [min(each, count - start) for start in range(0, count, max(each, 1))]


@pytest.mark.parametrize("case", CASES, ids=[f"{case.name}-{case.op}" for case in CASES])
def test_every_size_of_a_tile_is_run(case):
    sizes = getattr(case.config, case.op).tile_n
    rows = [part for count in case.problem.counts for part in parts(count, sizes[-1])]
    taken = {next(size for size in sizes if size >= part) for part in rows}
    assert taken == set(sizes), taken
    assert 0 in case.problem.counts and 1 in case.problem.counts
    assert any(count > 2 * sizes[-1] for count in case.problem.counts)


def fc1_kind(gemm: Gemm) -> tuple[str, bool, bool]:
    return gemm.activations, gemm.gather, gemm.config.cluster > 1


def test_each_way_to_read_rows_is_run():
    """Of those that are chosen for one of the layers at any number of tokens up to 640."""
    ran = {fc1_kind(kernel.gemm) for kernel in served() if kernel.gemm.op == "fc1"}
    sanitize.sm90_problems.use_choice(choose_config)
    layers = [padded_shape(SM90, shape) for shape in sanitize.LAYERS.values()]
    chosen = {fc1_kind(sm90.gemms(layer, n)[0]) for layer in layers for n in range(1, 641)}
    assert chosen <= ran
    assert chosen >= {("bf16", True, False), ("bf16", False, True), ("fp8", False, True)}


def test_fc1_is_run_in_tiles_of_384_weight_rows():
    of_m = {case.title: sanitize.gemm_of(case) for case in CASES if case.op == "fc1"}
    narrow = MoeShape(1, 1, 1, *sanitize.SIZES["fc1"], 1, False)
    sanitize.sm90_problems.use_choice(choose_config)
    chosen = sm90.gemms(narrow, 1)[0].config
    assert chosen.tile_m == 384 and of_m["1-rows 2x3 fc1"].config == chosen


def served() -> list[Kernel]:
    return sanitize.kernels()[sanitize.SERVED]


def test_all_that_runs_is_compiled(emulation):
    served, followed = sanitize.kernels().values()
    for case in CASES:
        sanitize.choose(case, 3)
        gemm = sm90.gemms(case.problem.shape, case.problem.num_tokens)[case.op == "fc2"]
        assert Kernel(sm90.compile_now, gemm, sanitize.ARCH) in served
        assert Kernel(racecheck.compile_gemm, gemm, sanitize.ARCH) in followed
    sanitize.sm90_problems.use_choice(choose_config)
    for shape in sanitize.LAYERS.values():
        for num_tokens in sanitize.LAYER_TOKENS:
            for gemm in sm90.gemms(padded_shape(SM90, shape), num_tokens):
                assert Kernel(sm90.compile_now, gemm, sanitize.ARCH) in served
                if shape.fp8:
                    assert Kernel(racecheck.compile_gemm, gemm, sanitize.ARCH) in followed


@pytest.mark.parametrize("name", [sanitize.SERVED, sanitize.FOLLOWED])
def test_the_kernels_of_the_folder_are_run(name, tmp_path, monkeypatch):
    monkeypatch.setattr(sm90, "compile_now", sm90.compile_now)
    monkeypatch.setattr(sanitize, "use_cache", lambda cache: None)
    (tmp_path / name).mkdir(0o700)
    sanitize.use_kernels(tmp_path / name)
    launched: list[Kernel] = []
    monkeypatch.setattr(sm90, "compiled", launched.append)
    gemm = sanitize.gemm_of(CASES[0])
    sm90.compile_gemm.__wrapped__(gemm)
    assert launched[0] in sanitize.kernels()[name]


def smaller(case: sanitize.Case) -> sanitize.Case:
    few = case.problem.counts[:4]
    problem = case.problem._replace(counts=few, num_experts=len(few), num_tokens=sum(few))
    return case._replace(problem=problem)


@pytest.mark.parametrize("case", CASES[:2], ids=[case.op for case in CASES[:2]])
def test_the_gemms_run_and_are_right(emulation, case):
    sanitize.run_gemms([smaller(case)], "cpu", (3,))
    assert len(emulation.statistics) == 1


@pytest.mark.parametrize("case", [CASES[1], CASES[-1]], ids=["one-block", "a-cluster"])
def test_what_racecheck_follows_is_right(emulation, case):
    case = smaller(case)
    gemm = sanitize.gemm_of(case)
    emulation.kernel = racecheck.EveryLaneArrives
    arrive = "mbarrier.arrive"
    assert emulated(gemm, emulation.kernel).ptx.count(arrive) > emulated(gemm).ptx.count(arrive)
    sanitize.run_gemms([case], "cpu", (4,))


@pytest.mark.parametrize("name", ["nvfp4 bf16", "mxfp4 fp8"])
def test_the_layer_runs_and_is_right(emulation, capsys, name):
    sanitize.run_layer(sanitize.LAYERS[name], (3,), "cpu")
    assert capsys.readouterr().out.count("layer of 3 tokens") == 2


def test_many_rows_are_quantised(monkeypatch, capsys):
    """Fewer here, by the launches of many."""
    launches_as(monkeypatch, "swizzled_by_a_second_launch")
    sanitize.run_quantize(40, 64, "cpu")
    assert "rows of 40 tokens" in capsys.readouterr().out


MEMCHECK = "========= COMPUTE-SANITIZER\n3 blocks: 1e-3\n========= ERROR SUMMARY: {} errors\n"
RACECHECK = "========= RACECHECK SUMMARY: {} hazards displayed ({} errors, 0 warnings)\n"


@pytest.mark.parametrize(
    ("tool", "output", "count"),
    [
        ("memcheck", MEMCHECK.format(0), 0),
        ("memcheck", MEMCHECK.format(12), 12),
        ("memcheck", "========= ERROR SUMMARY: 1 error\n", 1),
        ("racecheck", RACECHECK.format(0, 0), 0),
        ("racecheck", RACECHECK.format(3, 3), 3),
    ],
)
def test_findings_are_counted(tool, output, count):
    assert sanitize.findings(tool, output) == count


def test_a_tool_that_sums_up_nothing_did_not_check():
    with pytest.raises(ValueError, match="memcheck wrote no summary"):
        sanitize.findings("memcheck", "========= COMPUTE-SANITIZER\nSegmentation fault\n")


def test_what_ended_is_kept_and_what_is_missing_is_named(tmp_path):
    def run(check: sanitize.Check) -> dict:
        if check.word == "cut":
            raise subprocess.TimeoutExpired("racecheck", 300)
        if check.word == "late":
            raise subprocess.TimeoutExpired("racecheck", 0)
        if check.word == "wrong":
            raise ValueError("racecheck ended with 1")
        return {"tool": check.tool, "findings": 0}

    ends = sanitize.Check("memcheck", "layer", "")
    others = [sanitize.Check("racecheck", "gemms", word) for word in ("cut", "late", "wrong")]
    path = tmp_path / "sanitize.json"
    with ThreadPoolExecutor(1) as pool:
        pending = {pool.submit(run, check): check for check in (*others, ends)}
        assert not sanitize.keep(pending, {"gpu": "H200"}, path)
        assert sanitize.keep({pool.submit(run, ends): ends}, {}, tmp_path / "other.json")
    kept = json.loads(path.read_text())
    assert kept["gpu"] == "H200"
    assert kept["missing"] == {
        "racecheck gemms cut": "cut off after 300 s",
        "racecheck gemms late": "not run",
        "racecheck gemms wrong": "racecheck ended with 1",
    }
    assert kept["runs"] == [{"tool": "memcheck", "findings": 0}]


def is_running(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def test_a_command_that_is_cut_off_leaves_no_process(tmp_path):
    """Of a tool's program too, which holds the GPU."""
    pid = tmp_path / "pid"
    program = f"sleep 60 & echo $! >{pid}; wait"
    start = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        sanitize.watched(["sh", "-c", program], 1)
    while is_running(int(pid.read_text())):
        assert time.monotonic() - start < 30
        time.sleep(0.01)
    with pytest.raises(subprocess.TimeoutExpired):
        sanitize.watched(["touch", str(tmp_path / "begun")], 0)
    assert not (tmp_path / "begun").exists()


@pytest.mark.parametrize("tool", sanitize.OPTIONS)
def test_every_gemm_and_layer_is_in_one_check(tool):
    words = {"gemms": [], "layer": []}
    for check in sanitize.checks():
        words[check.work] += [check.word] * (check.tool == tool)
    for case in CASES:
        assert sum(word in case.title for word in words["gemms"]) == 1, case.title
    for name, shape in sanitize.LAYERS.items():
        followed = tool == "memcheck" or shape.fp8
        assert sum(word in name for word in words["layer"]) == followed, name


KEPT = sanitize.ROOT / "kernels/bench/results/sanitize.json"


def test_the_kept_results_are_of_every_check():
    kept = json.loads(KEPT.read_text())
    assert kept["gpu"].startswith("NVIDIA H") and kept["commit"] and not kept["missing"]
    ran = [sanitize.Check(run["tool"], run["work"], run["word"]) for run in kept["runs"]]
    assert ran == sanitize.checks()
    assert all(run["ran"] and not run["findings"] for run in kept["runs"])
