"""bench.load without a GPU: what is timed, the bars' arithmetic, and the report."""

import ast
import copy
import json
import sys
import types
from collections.abc import Callable
from functools import reduce
from operator import getitem
from pathlib import Path
from types import SimpleNamespace

import pytest
from bench import load, load_report, stopwatch
from bench.load_model import overlap
from bench.stopwatch import Stopwatch

MIB = 2**20


class Clock:
    """Time that passes only when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now

    time = perf_counter


@pytest.fixture
def timed(monkeypatch) -> types.ModuleType:
    """A module whose `prepare` takes a second, then calls `warm_up`, which takes three."""
    clock = Clock()
    monkeypatch.setattr(stopwatch, "time", clock)
    module = types.ModuleType("timed_module")

    def warm_up() -> None:
        clock.now += 3

    def prepare() -> str:
        clock.now += 1
        module.warm_up()
        return "prepared"

    module.prepare, module.warm_up = prepare, warm_up
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_a_phase_is_not_charged_for_those_inside_it(timed):
    watch = Stopwatch()
    watch.time("timed_module:prepare", "prepare", opens_layer=True)
    watch.time("timed_module:warm_up", "warm_up")
    assert [timed.prepare() for _ in range(2)] == ["prepared"] * 2
    timed.warm_up()
    assert [layer.seconds for layer in watch.layers] == [{"prepare": 1, "warm_up": 3}] * 2
    assert watch.outside.seconds == {"warm_up": 3}
    assert watch.began == {"prepare": 100, "warm_up": 101}


def test_memory_is_counted_beyond_what_a_layer_began_with(timed, monkeypatch):
    peaks = iter([0, 700, 950, 720])
    monkeypatch.setattr(stopwatch, "allocated_bytes", lambda: 600)
    monkeypatch.setattr(stopwatch, "peak_bytes", lambda: next(peaks))
    watch = Stopwatch()
    with watch.phase("build"):
        pass
    watch.time("timed_module:prepare", "prepare", opens_layer=True)
    watch.time("timed_module:warm_up", "warm_up")
    timed.prepare()
    (layer,) = watch.layers
    assert layer.extra_bytes == {"prepare": 120, "warm_up": 350}


def test_compiling_lasts_until_the_last_object_is_written():
    began = {"build": 100.0, "prepare": 107.0}
    objects = {Path("a.o"): 103.0, Path("b.o"): 109.0}
    assert overlap(began, objects) == {"reading_s": 7.0, "compile_s": 9.0}
    assert overlap(began, {}) == {"reading_s": 7.0, "compile_s": None}
    assert overlap({"prepare": 107.0}, {}) == {"reading_s": None, "compile_s": None}


def layer(prepare: float, extra: int = 0, **more) -> dict:
    return {"seconds": {"prepare": prepare, **more}, "extra_bytes": {"prepare": extra}}


def a_row(weights: str, backend: str, objects: str, first: dict, **more) -> dict:
    return {
        "weights": weights,
        "backend": backend,
        "objects": objects,
        "triton": "warm" if objects else "",
        "layers": [first, layer(0.02), layer(0.01), layer(0.03)],
        "build_s": 0.0,
        "load_s": 9.0,
        "compile_s": None,
        "reading_s": 4.0,
        "new_objects": 0,
    } | more


def some_results() -> dict:
    """Every bar is met: in all 2.06 s warm, 11.06 s cold, Marlin 1.06 s."""
    rows = []
    for weights in ("real", "dummy"):
        warm = layer(0.5, objects=0.5, warm_up=1.0)
        cold = layer(0.5, objects=0.5, warm_up=1.0, compile=9.0)
        facts = {"compile_s": 14.0, "new_objects": 24}
        rows += [
            a_row(weights, "plugin", "cold", cold, **facts),
            a_row(weights, "plugin", "warm", warm),
            a_row(weights, "marlin", "", layer(1.0)),
            a_row(weights, "humming", "", layer(2.0)),
        ]
    return {
        "gpu": "NVIDIA H200",
        "commits": {"rows": "0123abc", "compiles": "0123abc", "starts": "4567def"},
        "torch": "2.13.0",
        "vllm": "0.32.0",
        "cores": 16,
        "layers": {"real": 4, "dummy": 16},
        "rows": rows,
        "compiles": [{"seconds": 40.0, "new_objects": 24}, {"seconds": 8.0, "new_objects": 0}],
        "starts": [],
    }


def the_bar(results: dict, name: str) -> load_report.Bar:
    (bar,) = [bar for bar in load_report.bars(results) if bar.name == name]
    return bar


def test_bars_that_are_met():
    results = some_results()
    assert all(bar.met for bar in load_report.bars(results))
    assert the_bar(results, "real: median layer prepared").measured == pytest.approx(0.02)
    assert the_bar(results, "real: in all, warm, beyond Marlin").measured == pytest.approx(1.0)
    more = the_bar(results, "dummy: in all, objects cold, beyond warm")
    assert (more.measured, more.limit) == (pytest.approx(9.0), 20)
    hidden = the_bar(results, "real: the same, beyond compiling - reading")
    assert (hidden.measured, hidden.limit) == (pytest.approx(9.0), 10)


COMPILE = "second `dsv4-moe compile`"
# Where in the results another value is, and the bars that are missed then.
CHANGES = {
    "layers": (
        ("rows", 1, "layers", slice(2, None)),
        [layer(0.031), layer(0.032)],
        ["real: median layer prepared"],
    ),
    "marlin": (("rows", 2, "layers"), [layer(0.01)] * 4, ["real: in all, warm, beyond Marlin"]),
    "cold": (
        ("rows", 0, "layers", 0, "seconds", "compile"),
        12.1,
        ["real: in all, objects cold, beyond warm", "real: the same, beyond compiling - reading"],
    ),
    "reading": (("rows", 0, "reading_s"), 13.0, ["real: the same, beyond compiling - reading"]),
    "scratch": (
        ("rows", 5, "layers", 3, "extra_bytes", "prepare"),
        301 * MIB,
        ["scratch while preparing"],
    ),
    "compiled": (("compiles", 1, "new_objects"), 1, [f"{COMPILE}: kernels compiled"]),
    "compile-time": (("compiles", 1, "seconds"), 10.1, [f"{COMPILE}: whole process"]),
    "failure": (("rows", 2, "failure"), "out of memory", ["real: in all, warm, beyond Marlin"]),
}


@pytest.mark.parametrize(("path", "value", "missed"), CHANGES.values(), ids=CHANGES)
def test_a_bar_that_is_missed(path, value, missed):
    results = some_results()
    reduce(getitem, path[:-1], results)[path[-1]] = value
    assert [bar.name for bar in load_report.bars(results) if not bar.met] == missed


def test_the_warm_ups_own_arena_is_no_scratch():
    row = a_row("real", "plugin", "warm", layer(0.5, 80 * MIB, warm_up=1.0))
    row["layers"][0]["extra_bytes"] |= {"warm_up": 900 * MIB, "arena": 700 * MIB}
    assert load_report.scratch_bytes(row) == 200 * MIB


def test_the_report_shows_every_row_and_what_failed():
    results = some_results()
    results["rows"][3]["failure"] = "boom"
    results["starts"] = [
        {"backend": "plugin", "seconds": 70.0},
        {"backend": "marlin", "failure": "boom"},
        {"backend": "plugin", "seconds": 30.0},
        {"backend": "plugin", "seconds": 40.0},
    ]
    lines = load_report.markdown(results).splitlines()
    assert sum(line.startswith("| real, 4 layers |") for line in lines) == 4
    assert "| real, 4 layers | Humming |" + " failed |" * 7 in lines
    cold = "| dummy, 16 layers | this plugin, objects cold | 0.500 | 0.020 | 9.00 | 0.50 | 1.00 |"
    assert f"{cold} 11.06 | 9.0 |" in lines
    assert "| real: median layer prepared | ≤ 0.03 s | 0.02 s | yes |" in lines
    assert "| this plugin | 70 | 35 | 3 |" in lines and "| Marlin | failed | - | 0 |" in lines


def test_nothing_measured_meets_nothing():
    results = some_results()
    results |= {"rows": [], "compiles": []}
    assert not any(bar.met for bar in load_report.bars(copy.deepcopy(results)))
    assert "| - | no |" in load_report.markdown(results)


def test_the_command_has_the_loads_that_the_bars_need():
    bench = SimpleNamespace(loading=lambda *_: None)
    cases = [facts for facts, _ in load.loads(bench)]
    assert len(cases) == 9 and cases[0]["triton"] == "cold"
    wanted = [(row["weights"], row["backend"], row["objects"]) for row in some_results()["rows"]]
    assert sorted((c["weights"], c["backend"], c["objects"]) for c in cases[1:]) == sorted(wanted)


def test_a_process_that_fails_is_a_row_with_the_end_of_its_log(tmp_path):
    bench = load.Bench(tmp_path)
    row = load.measured({"run": 1}, lambda: bench.compile("sm_999", "flash"))
    assert row["run"] == 1 and "invalid choice: 'sm_999'" in row["failure"]


def test_processes_load_in_turn_when_all_are_ready(tmp_path):
    """Each is a script that keeps when it was ready, and when it was given its line."""
    script = """if True:
        import sys, time
        from pathlib import Path
        time.sleep(float(sys.argv[2]))
        out = Path(sys.argv[1])
        out.with_suffix(".ready").write_text(str(time.time()))
        given = sys.stdin.readline()
        out.write_text(repr([given, time.time()]))
    """
    (tmp_path / "a_script.py").write_text(script)
    bench = load.Bench(tmp_path)
    environment = {"PYTHONPATH": str(tmp_path)}
    outs = [tmp_path / f"{seconds}.json" for seconds in ("0.0", "0.5")]
    processes = [bench.process("a_script", out, out.stem, environment=environment) for out in outs]
    for process, out in zip(processes, outs, strict=True):
        process.wait_for(out.with_suffix(".ready"))
    ready = max(float(out.with_suffix(".ready").read_text()) for out in outs)
    for process, out in zip(processes, outs, strict=True):
        assert not out.exists()
        assert process.end() > 0
        given, begun = ast.literal_eval(out.read_text())
        assert given == "\n" and begun >= ready
        ready = begun


def test_the_commands_arguments():
    given = load.build_parser().parse_args(["run", "--out", "x.json", "--commit", "abc"])
    assert given.call is load.run and given.parts == "rows,compiles"
    assert load.build_parser().parse_args(["report", "x.json"]).call is load.report


def test_parts_that_there_are_not():
    given = ["run", "--out=x", "--commit=a", "--parts=rows,start"]
    arguments = load.build_parser().parse_args(given)
    with pytest.raises(ValueError, match="--parts is rows,start: there are rows,compiles,starts"):
        arguments.call(arguments)


def test_parts_of_the_same_machine_are_kept_with_their_commits(tmp_path):
    out = tmp_path / "load.json"
    nothing = {"rows": [], "compiles": [], "starts": [], "commits": {}}
    assert load.kept(out, {"vllm": "0.32.0"}) == nothing
    results = some_results()
    out.write_text(json.dumps(results))
    facts = {key: results[key] for key in ("gpu", "torch", "cores", "vllm", "layers")}
    assert load.kept(out, facts) == {part: results[part] for part in nothing}
    assert load.kept(out, facts | {"vllm": "other"}) == nothing


def test_servers_are_started_in_turn_until_the_time_is_over(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(load, "time", SimpleNamespace(monotonic=lambda: clock.now))
    begun = []
    for facts, _ in load.starts(None, seconds=100):
        begun.append(facts["backend"])
        clock.now += 30
    assert begun == ["plugin", "marlin", "humming", "plugin"]


def test_a_rehearsed_run_is_kept_and_reported(monkeypatch, tmp_path, capsys):
    """The command, but for the GPU: each load and compilation is made up."""
    found = {(r["weights"], r["backend"], r["objects"]): r for r in some_results()["rows"]}
    compiled = iter(some_results()["compiles"])
    measured = ("layers", "build_s", "load_s", "compile_s", "reading_s", "new_objects")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(load.Bench, "write_checkpoints", lambda *_: None)
    monkeypatch.setattr(load.Bench, "compile", lambda *_: next(compiled))

    def loading(_, weights: str, backend: str, cache: str) -> Callable[[], dict]:
        objects = {"plugin": "warm" if (weights, cache) in begun else "cold"}.get(backend, "")
        begun.add((weights, cache))
        row = found[weights, backend, objects]
        return lambda: {key: row[key] for key in measured}

    begun: set[tuple[str, str]] = set()
    monkeypatch.setattr(load.Bench, "loading", loading)
    out = tmp_path / "load.json"
    parser = load.build_parser()
    for parts in ("rows", "compiles"):
        given = ["run", "--out", str(out), "--commit", "0123abc", "--parts", parts]
        arguments = parser.parse_args(given)
        arguments.call(arguments)
    capsys.readouterr()
    load.report(parser.parse_args(["report", str(out)]))
    shown = capsys.readouterr().out
    assert "Triton's kernels cold" in shown and "NVIDIA H200" in shown
    assert shown.count("| yes |") == len(load_report.bars(some_results())) and "| no |" not in shown
