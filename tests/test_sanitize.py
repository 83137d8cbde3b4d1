"""What `make sanitize` runs under compute-sanitizer, rehearsed in the PTX emulator."""

import json
import math
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
from dsv4_kernels import compiled as objects
from dsv4_kernels import grouped_gemm_sm90 as sm90

from tests import racecheck, sanitize
from tests.sm90_emulation import Emulation

CASES = sanitize.cases()


@pytest.fixture(autouse=True)
def as_before():
    table, num_sms = sm90.table_in_use(), sm90.num_sms
    yield
    sm90.use_table(table)
    sm90.num_sms = num_sms


@pytest.fixture
def emulation(monkeypatch) -> Emulation:
    emulation = Emulation()
    monkeypatch.setattr(sm90, "launch", emulation.launch)
    return emulation


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
        gemm = sm90.gemms(case.problem.shape, case.problem.num_tokens, 3)[case.op == "fc2"]
        assert gemm.config == getattr(case.config, case.op)
        chosen.add((gemm.op, gemm.gather, gemm.config.m_blocks))
    assert chosen >= {("fc1", True, 1), ("fc1", True, 2), ("fc1", False, 1), ("fc2", False, 2)}


def test_all_that_runs_is_compiled(emulation):
    compiled = set(sanitize.kernels())
    for case in CASES:
        sanitize.choose(case, 3)
        gemm = sm90.gemms(case.problem.shape, case.problem.num_tokens, 3)[case.op == "fc2"]
        assert repr(gemm) in compiled
    sm90.use_table({})
    assert {repr(gemm) for gemm in sm90.all_gemms(sanitize.LAYER)} <= compiled


@pytest.mark.parametrize("case", CASES[:2], ids=[case.op for case in CASES[:2]])
def test_the_gemms_run_and_are_right(emulation, case):
    few = case.problem.counts[:4]
    problem = case.problem._replace(counts=few, num_experts=len(few), num_tokens=sum(few))
    sanitize.run_gemms([case._replace(problem=problem)], "cpu", (3,))
    assert len(emulation.statistics) == 1


def test_the_layer_runs_and_is_right(emulation, capsys):
    sanitize.run_layer((3,), "cpu")
    assert capsys.readouterr().out.count("layer of 3 tokens") == 2


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


def report(*pairs: tuple[int, int, int]) -> str:
    lines = []
    for write, read, count in pairs:
        lines += [
            f"========= Error: Race reported between Write access at kernel_x_0+{write:#x}",
            f"=========     and Read access at kernel_x_0+{read:#x} [{count} hazards]",
        ]
    return "\n".join(lines)


OPCODES = {0x10: "UBLKCP.S.G", 0x20: "LDS.128", 0x30: "LDS.64", 0x40: "STSM.16", 0x50: "LDS.U.64"}
OPCODES |= {0x08: "STS", 0x60: "STS", 0x70: "STS.128", 0x80: "STS.128"}
WEIGHTS = ((0x10, 0x20, 31 * 6), (0x10, 0x30, 4 * 6))
REPORTS = {
    "the-other-lanes": (report((0x10, 0x20, 31 * 6), (0x10, 0x30, 4 * 6)), 0),
    "lane-0-as-well": (report((0x10, 0x20, 32 * 6), (0x10, 0x30, 4 * 6)), 2),
    "more-codes-than-scales": (report((0x10, 0x20, 31 * 6), (0x10, 0x30, 4 * 5)), 2),
    "another-write": (report((0x40, 0x20, 31)), 1),
    "notes-and-factors": (report(*WEIGHTS, (0x70, 0x20, 5), (0x60, 0x30, 3)), 0),
    "two-notes": (report(*WEIGHTS, (0x70, 0x20, 5), (0x80, 0x20, 5)), 2),
    "a-table": (report(*WEIGHTS, (0x08, 0x30, 4)), 1),
    "a-note-read-as-factors": (report(*WEIGHTS, (0x70, 0x30, 4)), 1),
    "another-read": (report((0x10, 0x50, 4)), 1),
    "an-unknown-address": (report((0x10, 0x99, 31)), 1),
    "too-many": (report((0x10, 0x20, 31 * 10**6), (0x10, 0x30, 4 * 10**6)), 1),
}


@pytest.mark.parametrize(("text", "count"), REPORTS.values(), ids=REPORTS)
def test_only_reads_by_lanes_that_do_not_arrive_are_explained(text, count):
    assert len(racecheck.unexplained(racecheck.hazards(text, OPCODES))) == count


def test_addresses_of_a_kernel_are_those_that_are_reported(tmp_path):
    """The copies of weights and the reads of codes and scales are where the rule looks."""
    gemm = sanitize.gemm_of(CASES[0])
    (path,) = objects.write_objects(
        tmp_path, "sm_90a", {repr(gemm): lambda: sm90.compile_gemm(gemm)}
    )
    opcodes = racecheck.opcodes_of(path, tmp_path)
    assert set(opcodes.values()) >= {"UBLKCP.S.G", "LDS.128", "LDS.64"}
    assert all(address % 16 == 0 for address in opcodes)


def test_kept_hazards_are_judged_again(tmp_path):
    found = racecheck.hazards(report((0x10, 0x20, 31), (0x10, 0x30, 4), (0x40, 0x20, 7)), OPCODES)
    clean = {"tool": "memcheck", "unexplained": []}
    runs = [clean, {"case": "4-rows fc1", "hazards": found, "unexplained": []}]
    path = tmp_path / "sanitize.json"
    path.write_text(sanitize.json_text({"runs": runs}))
    assert len(path.read_text().splitlines()) < 30
    assert not sanitize.explain_again(path)
    kept = json.loads(path.read_text())["runs"][1]
    assert kept["unexplained"] == [["Write at 0x40", "Read at 0x20", 7, ["STSM.16", "LDS.128"]]]
    assert kept["hazards"][0] == ["Write at 0x10", "Read at 0x20", 31, ["UBLKCP.S.G", "LDS.128"]]


def test_what_ended_is_kept_and_what_outran_its_time_is_named(tmp_path):
    def run(check: sanitize.Check) -> dict:
        if check.case:
            raise subprocess.TimeoutExpired("racecheck", 300)
        return {"tool": check.tool, "unexplained": []}

    ends, outruns = sanitize.Check("memcheck", "layer"), sanitize.Check("racecheck", "gemms", "a")
    path = tmp_path / "sanitize.json"
    with ThreadPoolExecutor(1) as pool:
        pending = {pool.submit(run, check): check for check in (outruns, ends)}
        assert not sanitize.keep(pending, {"gpu": "H200"}, path)
        assert sanitize.keep({pool.submit(run, ends): ends}, {}, tmp_path / "other.json")
    kept = json.loads(path.read_text())
    assert (kept["gpu"], kept["outran"]) == ("H200", ["racecheck gemms a"])
    assert kept["runs"] == [{"tool": "memcheck", "unexplained": []}]


KEPT = sanitize.ROOT / "kernels/bench/results/sanitize.json"


def test_the_kept_results_are_judged_as_the_code_does(tmp_path):
    copy = tmp_path / KEPT.name
    copy.write_text(KEPT.read_text())
    sanitize.explain_again(copy)
    assert copy.read_text() == KEPT.read_text()
    kept = json.loads(copy.read_text())
    assert kept["gpu"].startswith("NVIDIA H") and kept["commit"]
    assert {(run["tool"], run["work"]) for run in kept["runs"]} == {
        ("memcheck", "gemms"),
        ("memcheck", "layer"),
        ("racecheck", "gemms"),
    }
    assert all(run["ran"] for run in kept["runs"])
