"""What `make sanitize` runs under compute-sanitizer, rehearsed in the PTX emulator."""

import json
import math
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
from dsv4_kernels.backends import SM90
from dsv4_kernels.compiled import Kernel
from dsv4_kernels.padding import padded_shape
from dsv4_kernels.sm90 import gemm as sm90
from dsv4_kernels.sm90.heuristic import choose_config

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


def test_rows_are_gathered_in_some_and_placed_in_others():
    chosen = set()
    for case in CASES:
        sanitize.choose(case, 3)
        gemm = sm90.gemms(case.problem.shape, case.problem.num_tokens)[case.op == "fc2"]
        assert gemm.config == getattr(case.config, case.op)
        chosen.add((gemm.op, gemm.gather, gemm.config.m_blocks))
    assert chosen >= {("fc1", True, 1), ("fc1", True, 2), ("fc1", False, 1), ("fc2", False, 2)}


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


def test_what_ended_is_kept_and_what_outran_its_time_is_named(tmp_path):
    def run(check: sanitize.Check) -> dict:
        if check.case:
            raise subprocess.TimeoutExpired("racecheck", 300)
        return {"tool": check.tool, "findings": 0}

    ends, outruns = sanitize.Check("memcheck", "layer"), sanitize.Check("racecheck", "gemms", "a")
    path = tmp_path / "sanitize.json"
    with ThreadPoolExecutor(1) as pool:
        pending = {pool.submit(run, check): check for check in (outruns, ends)}
        assert not sanitize.keep(pending, {"gpu": "H200"}, path)
        assert sanitize.keep({pool.submit(run, ends): ends}, {}, tmp_path / "other.json")
    kept = json.loads(path.read_text())
    assert (kept["gpu"], kept["outran"]) == ("H200", ["racecheck gemms a"])
    assert kept["runs"] == [{"tool": "memcheck", "findings": 0}]


KEPT = sanitize.ROOT / "kernels/bench/results/sanitize.json"


def test_the_kept_results_are_of_every_check():
    kept = json.loads(KEPT.read_text())
    assert kept["gpu"].startswith("NVIDIA H") and kept["commit"] and not kept["outran"]
    ran = [sanitize.Check(run["tool"], run["work"], run["case"]) for run in kept["runs"]]
    assert ran == sanitize.checks()
    assert all(run["ran"] and not run["findings"] for run in kept["runs"])
