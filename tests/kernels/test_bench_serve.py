"""bench.serve without servers: what it keeps, the bars' arithmetic, the report, the kernels."""

import contextlib
import copy
import itertools
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from bench import serve, serve_contenders, serve_load, serve_report
from bench.arguments import call
from bench.random_weights import MEMORY_FRACTION, real_config
from bench.serve_contenders import Bench
from bench.serve_load import Clocks, Load, kv_tokens, step_ms, sum_and_count
from bench.timing import query_gpu

ROOT = Path(__file__).parents[2]
H200_BYTES = 143_771 * 2**20


def a_run(faster: float = 1.4, expert_format: str = "nvfp4") -> dict:
    """Every load twice, of this plugin and two peers, of which Marlin is the better."""
    times = {"plugin": 1.0, "marlin": faster, "humming": faster * 1.1}
    loads = [
        {
            "contender": name,
            "load": load.name,
            "step_ms": 10 * time + more,
            "median_tpot_ms": 11 * time + more,
            "median_itl_ms": 12 * time + more,
            "total_token_throughput": 1000 / (time + more),
        }
        for load in (*serve.DECODES, *serve.PROMPTS)
        for more in (0.0, 0.002)
        for name, time in times.items()
    ]
    steps = {
        name: {"graph_ms": [3 * time + i * 1e-3 for i in range(20)], "step_ms": [4 * time] * 20}
        for name, time in times.items()
    }
    kernels = [{"name": f"k{i}", "us": 100.0 - i, "launches": 2.0} for i in range(20)]
    return {
        "gpu": "NVIDIA H200",
        "driver": "580.1",
        "cores": 16,
        "vllm": "0.32.0",
        "commit": "0123abc",
        "model": "flash",
        "format": expert_format,
        "mtp": 0,
        "layers": 8,
        "servers": [{"contender": n, "ready_s": 90 + t, "kv_tokens": 5} for n, t in times.items()],
        "loads": loads,
        "steps": steps,
        "profile": [
            {"contender": name, "step": "decode 1", "kernels": kernels[i:], "moe_us": 60.0}
            for i, name in enumerate(times)
        ],
        "starts": [
            {"contender": n, "layers": 24, "ready_s": 60 + t, "kv_tokens": 1000}
            for n, t in times.items()
        ],
    }


def missed(run: dict) -> list[str]:
    return [bar.name for bar in serve_report.bars(run) if not bar.met]


def test_bars_that_are_met():
    run = a_run()
    assert not missed(run)
    assert serve_report.speedup(run, "64 × 32 + 512", "step_ms") == pytest.approx(1.4, abs=1e-3)


@pytest.mark.parametrize(
    ("faster", "names"),
    [
        (1.27, ["64 × 32 + 512: engine's step", "256 × 32 + 512: engine's step"]),
        (1.2, [f"{n} × 32 + 512: {what}" for n in (64, 256) for what in ("engine's step", "TPOT")]),
    ],
)
def test_decode_bars_that_are_missed(faster, names):
    assert missed(a_run(faster)) == names


def test_mxfp4_is_held_against_its_own_bar():
    limits = {bar.limit for bar in serve_report.bars(a_run(1.0, "mxfp4")) if "×" in bar.limit}
    assert limits == {"≥ 0.95×"}
    assert not [name for name in missed(a_run(0.96, "mxfp4")) if "TPOT" in name]
    assert [name for name in missed(a_run(0.94, "mxfp4")) if "TPOT" in name]


def test_batch_1_is_paired_by_repeat():
    run = a_run()
    mean, half = serve_report.paired(run, "graph_ms")["marlin"]
    assert mean == pytest.approx(1.2) and half == pytest.approx(0, abs=1e-9)
    run["steps"]["marlin"]["graph_ms"] = [
        ours + 0.048 + (0.01 if i % 2 else -0.01)
        for i, ours in enumerate(run["steps"]["plugin"]["graph_ms"])
    ]
    (graph, step) = serve_report.step_bars(run)
    assert graph.measured == "6.0 ± 0.6 µs" and step.met
    run["layers"] = 9
    assert not next(serve_report.step_bars(run)).met


def change_ready(run: dict) -> None:
    run["starts"][0]["ready_s"] += 2


def change_tokens(run: dict) -> None:
    run["starts"][0]["kv_tokens"] = 999


def change_prefill(run: dict) -> None:
    for row in run["loads"]:
        if row["load"] == "4 × 8000 + 1" and row["contender"] == "humming":
            row["total_token_throughput"] = 900


def change_to_failure(run: dict) -> None:
    for row in run["loads"]:
        if row["load"] == "8 × 32 + 512" and row["contender"] == "plugin":
            del row["median_tpot_ms"]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (change_ready, "ready, beyond the sooner peer"),
        (change_tokens, "KV tokens, fewer"),
        (change_prefill, "4 × 8000 + 1: prefill"),
        (change_to_failure, "8 × 32 + 512: TPOT"),
    ],
)
def test_a_bar_that_is_missed(change, name):
    run = a_run()
    change(run)
    assert missed(run) == [name]


def test_the_report_shows_every_load_and_what_failed():
    failed = copy.deepcopy(a_run())
    failed["servers"][1] = {"contender": "marlin", "failure": "boom"}
    failed["loads"] = [row for row in failed["loads"] if row["contender"] != "marlin"]
    failed |= {"steps": {}, "starts": [], "profile": []}
    shown = serve_report.markdown({"runs": {"a": a_run(), "b": failed}})
    assert shown.count("NVFP4, vLLM 0.32.0, V4-Flash's layer sizes, 8 of 43 layers") == 2
    assert "| 64 × 32 + 512: TPOT, ms | 11.00 | 15.40 | 16.94 | 1.40× |" in shown
    assert "| 64 × 32 + 512: TPOT, ms | 11.00 | - | 16.94 | 1.54× |" in shown
    assert "| ready, all at once, s | 91 | failed | 92 |  |" in shown
    assert "| alone, 24 layers: KV tokens | 1,000 | 1,000 | 1,000 |  |" in shown


def test_nothing_measured_meets_nothing():
    run = a_run() | {"servers": [], "loads": [], "steps": {}, "starts": []}
    assert not any(bar.met for bar in serve_report.bars(run))
    runs = {"runs": {"": run}}
    assert serve_report.markdown(runs) and "| yes |" not in serve_report.details(runs)


def test_the_profile_shows_what_takes_most_side_by_side():
    shown = serve_report.details({"runs": {"": a_run(), "other": a_run() | {"profile": []}}})
    assert shown.count("| 8 × 32 + 512: TPOT | ≥ 1.15× | 1.40× | yes |") == 2
    assert "| `k0` | 100 (2) | - | - |" in shown and "| `k2` | 98 (2) | 98 (2) | 98 (2) |" in shown
    assert "`k12`" not in shown and f"| all others | {sum(100 - i for i in range(12, 20))}" in shown
    assert f"| in all | {sum(100 - i for i in range(20))} |" in shown


def test_the_plot_is_written(tmp_path):
    serve_report.plot({"runs": {"a": a_run(), "b": a_run(1.1)}}, tmp_path / "serve.svg")
    assert "Humming" in (tmp_path / "serve.svg").read_text()


def test_the_engines_step_is_the_mean_between_two_looks():
    metrics = """# HELP vllm:inter_token_latency_seconds Histogram
vllm:inter_token_latency_seconds_bucket{engine="0",le="0.01"} 5.0
vllm:inter_token_latency_seconds_sum{engine="0",model_name="tiny"} 1.5
vllm:inter_token_latency_seconds_count{engine="0",model_name="tiny"} 100.0
"""
    assert sum_and_count(metrics) == (1.5, 100)
    assert step_ms((1.0, 50), (1.5, 100)) == pytest.approx(10)
    assert step_ms((1.5, 100), (1.5, 100)) is None


def test_kv_tokens_are_read_from_the_log(tmp_path):
    log = tmp_path / "log"
    log.write_text("INFO GPU KV cache size: 1,234,567 tokens, Maximum concurrency\n")
    assert kv_tokens(log) == 1_234_567
    log.write_text("")
    assert kv_tokens(log) is None


def test_as_many_layers_as_fit():
    flash, v41 = (real_config(model, "nvfp4", 4) for model in ("flash", "v41"))
    fit = [serve.layers_that_fit(flash, servers, H200_BYTES) for servers in (1, 2, 3)]
    assert fit == [24, 14, 8]
    drafts = real_config("flash", "nvfp4", 4, mtp=2)
    assert serve.layers_that_fit(drafts, 3, H200_BYTES) == 8 - 2
    assert serve.layers_that_fit(v41, 2, H200_BYTES) == 6


def test_runs_of_other_versions_are_kept(tmp_path):
    path = tmp_path / "serve.json"
    results: dict = {"loads": []}
    serve.keeper(path, "a", {"x": 1})()
    keep = serve.keeper(path, "b", results)
    keep()
    results["loads"].append(1)
    keep()
    assert json.loads(path.read_text()) == {"runs": {"a": {"x": 1}, "b": {"loads": [1]}}}


def test_a_warm_up_is_short():
    assert Load(256, 32, 512).warm_up() == Load(256, 32, 8)
    assert Load(64, 8000, 256).warm_up() == Load(4, 8000, 8)
    assert Load(4, 2048, 1).warm_up() == Load(4, 2048, 1)


@pytest.mark.parametrize("drafted", [0, 1, 2])
def test_every_step_that_is_measured_has_a_graph(drafted):
    sizes = set(map(int, serve.capture_sizes(drafted)[1:]))
    sequences = {load.requests for load in (*serve.DECODES, *serve.PROMPTS) if load.new > 1}
    sequences |= set(serve_contenders.PROFILED_SEQUENCES)
    assert {n * (1 + drafted) for n in sequences} <= sizes


def test_a_time_in_which_a_kernel_was_compiled_does_not_count():
    run = a_run()
    mine = [r for r in run["loads"] if (r["contender"], r["load"]) == ("plugin", "8 × 32 + 512")]
    mine[0] |= {"compiled": ["_scan"], "median_tpot_ms": 0.1}
    of = (run, "plugin", "8 × 32 + 512", "median_tpot_ms")
    assert serve_report.value(*of) == mine[1]["median_tpot_ms"]
    says = "8 × 32 + 512, this plugin: kernels were compiled each time: _scan"
    assert says not in serve_report.details({"runs": {"": run}})
    mine[1]["compiled"] = ["_scan"]
    assert serve_report.value(*of) == 0.1
    assert says in serve_report.details({"runs": {"": run}})


def test_of_several_times_the_best_counts():
    run = a_run()
    for load, metric, worse in (
        ("8 × 32 + 512", "median_tpot_ms", 2),
        ("4 × 2048 + 1", "total_token_throughput", 0.5),
    ):
        row = next(r for r in run["loads"] if (r["contender"], r["load"]) == ("plugin", load))
        before = serve_report.value(run, "plugin", load, metric)
        run["loads"].append(row | {metric: row[metric] * worse})
        assert serve_report.value(run, "plugin", load, metric) == before


def test_a_server_that_cannot_be_profiled_costs_no_other(monkeypatch, tmp_path):
    results: dict = {}
    config = real_config("flash", "nvfp4", 4) | {"vocab_size": 300}
    bench = Bench(tmp_path, config, results, lambda: None, deadline=0)
    bench.servers = {name: SimpleNamespace(complete=lambda *_, **__: {}) for name in "ab"}
    bench.loaded = lambda *_: {}

    def rpc(server, method: str, *arguments) -> dict:
        if server is bench.servers["a"]:
            raise RuntimeError("no graph")
        return {"kernels": []}

    monkeypatch.setattr(serve_contenders, "rpc", rpc)
    bench.profile()
    assert results["failures"] == [{"part": "profile of a", "failure": "no graph"}]
    assert [row["contender"] for row in results["profile"]] == ["b"] * 3


def test_servers_that_share_a_gpu_keep_to_their_share(tmp_path):
    config = real_config("flash", "nvfp4", 4) | {"vocab_size": 300}
    bench = Bench(tmp_path, config, {}, lambda: None, deadline=0)
    one = serve.contender("marlin", "nvfp4")
    shares = [bench.environment(one, count)[MEMORY_FRACTION] for count in (3, 1)]
    assert 0.3 < float(shares[0]) < 1 / 3 and shares[1] == ""


def test_a_row_has_the_clocks_of_its_own_time(monkeypatch):
    clocks, row = Clocks(), {}
    clocks.samples = [(1980.0, 100.0)]
    with clocks.during(row):
        clocks.samples += [(1300.0, 690.0), (1200.0, 700.0), (1250.0, 695.0)]
    assert (row["sm_mhz"], row["watts"]) == (1250, 695) and row["seconds"] < 5
    monkeypatch.setenv("PATH", "")
    with Clocks() as clocks, clocks.during(row := {}):
        pass
    assert row.keys() == {"seconds"}


def test_the_gpu_that_is_asked_is_the_one_that_is_used(tmp_path, monkeypatch):
    command = tmp_path / "nvidia-smi"
    command.write_text('#!/bin/sh\necho "$1, $2"\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert query_gpu("name") == ["--id=0", "--query-gpu=name"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    assert query_gpu("name")[0] == "--id=1"


def test_a_load_is_left_out_when_there_is_no_time_for_it(tmp_path):
    results: dict = {}
    config = real_config("flash", "nvfp4", 4)
    bench = Bench(tmp_path, config | {"vocab_size": 300}, results, lambda: None, deadline=0)
    bench.servers = {"plugin": None, "marlin": None}
    load, slow = Load(8, 32, 512), Load(64, 32, 512)
    rows = [
        {"contender": "marlin", "load": slow.name, "seconds": 40.0},
        {"contender": "marlin", "load": slow.name, "seconds": 30.0},
        {"contender": "plugin", "load": slow.name, "seconds": 20.0},
        {"contender": "plugin", "load": slow.name, "seconds": 99.0, "compiled": ["_scan"]},
        {"contender": "plugin", "load": slow.name, "seconds": 99.0, "failure": "none"},
    ]
    results["loads"] = rows
    assert bench.expected_seconds(slow) == 60
    assert 30 < bench.expected_seconds(load) < 60
    assert not bench.loads([load, slow], 1, None, 0)


@pytest.mark.parametrize(("time", "met"), [(0.8, True), (0.9, False)])
def test_w4a8_is_a_column_and_has_its_own_bars(time, met):
    run = a_run(faster=1.0, expert_format="mxfp4")
    rows = [row for row in run["loads"] if row["contender"] == "plugin"]
    of_w4a8 = [
        row
        | {
            "contender": "plugin_fp8",
            "median_tpot_ms": 11 * time,
            "total_token_throughput": 1000 / time,
        }
        for row in rows
    ]
    run["loads"] += of_w4a8
    run["servers"].insert(1, {"contender": "plugin_fp8", "ready_s": 90, "kv_tokens": 5})
    found = {bar.name: bar for bar in serve_report.bars(run) if bar.name.startswith("W4A8")}
    assert len(found) == len(serve.DECODES) + len(serve.PROMPTS)
    assert found["W4A8, 64 × 32 + 512: TPOT"].met
    assert found["W4A8, 4 × 8000 + 1: prefill"].met == met
    table = serve_report.markdown({"runs": {"": run}})
    assert "| this plugin, W4A16 | this plugin, W4A8 | Marlin |" in table
    (row,) = (row for row in table.splitlines() if row.startswith("| 8 × 32 + 512: TPOT"))
    assert row.endswith(f"| 1.00× / {1 / time:.2f}× |")


def test_a_topology_is_that_of_the_deployment_and_has_no_graph_of_one_rank():
    deployment = yaml.safe_load((ROOT / "configs/flash-2xh200.yaml").read_text())
    assert serve.TOPOLOGIES["dp2-ep"] == ("-dp=2", "--enable-expert-parallel")
    assert deployment["data-parallel-size"] == 2 and deployment["enable-expert-parallel"]
    assert f"--max-num-batched-tokens={deployment['max-num-batched-tokens']}" in serve.ARGUMENTS
    assert f"--gpu-memory-utilization={deployment['gpu-memory-utilization']}" in serve.ALONE
    of_ranks = {"topology": "dp2-ep", "in_turn": True, "layers": 43}
    run = a_run() | of_ranks | {"starts": [], "steps": {}, "profile": []}
    assert not [name for name in missed(run) if name.startswith("1 sequence")]
    shown = serve_report.markdown({"runs": {"": run}})
    assert "43 of 43 layers, random weights; each server alone, dp2-ep, each rank on one" in shown
    assert "| KV tokens of a rank | 5 | 5 | 5 |  |" in shown


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--topology=tp2", "--parts", "steps", "decodes"], "with --topology, decodes and prompts"),
        (["--in-turn", "--parts", "starts"], "with --in-turn, decodes and steps and prompts and"),
    ],
)
def test_parts_that_servers_in_turn_have_not(monkeypatch, given, says):
    monkeypatch.setattr(serve, "gpu_facts", lambda: {})
    monkeypatch.setattr(serve.signal, "signal", lambda *_: None)
    arguments = serve.build_parser().parse_args(["run", "--out=x", "--commit=a", *given])
    with pytest.raises(ValueError, match=says):
        arguments.call(arguments)


@pytest.mark.parametrize(
    ("given", "layers", "key", "ran"),
    [
        ([], 8, "flash-nvfp4-0.1", "together"),
        (["--in-turn"], 24, "flash-nvfp4-in-turn-0.1", "in turn"),
        (["--topology=tp2"], 43, "flash-nvfp4-tp2-0.1", "in turn"),
    ],
)
def test_servers_in_turn_have_the_gpu_for_themselves(
    monkeypatch, tmp_path, given, layers, key, ran
):
    facts = {"gpu": "H200", "driver": "1", "memory_mib": 143_771, "max_sm_mhz": 1980}
    monkeypatch.setattr(serve, "gpu_facts", lambda: facts)
    monkeypatch.setattr(serve.signal, "signal", lambda *_: None)
    monkeypatch.setattr(serve.importlib.metadata, "version", lambda name: "0.1")
    calls: dict[str, tuple] = {}

    def called(how):
        def run(bench, contenders, parts, arguments):
            calls[how] = (parts, arguments)
            bench.results["servers"] = []
            bench.keep()

        return run

    monkeypatch.setattr(serve, "run_together", called("together"))
    monkeypatch.setattr(serve, "run_in_turn", called("in turn"))
    out = tmp_path / "serve.json"
    arguments = serve.build_parser().parse_args(["run", f"--out={out}", "--commit=a", *given])
    arguments.call(arguments)
    ((found, run),) = json.loads(out.read_text())["runs"].items()
    assert (found, run["layers"], run["in_turn"], [*calls]) == (
        key,
        layers,
        ran == "in turn",
        [ran],
    )
    parts, options = calls[ran]
    assert ("profile" in parts, "--cudagraph-capture-sizes" in options) == (layers < 43,) * 2


def test_each_server_in_turn_is_measured_in_its_share_of_the_seconds(monkeypatch):
    measured: list = []
    bench = SimpleNamespace(left=lambda: 300 - 100 * len(measured))
    bench.started = lambda contenders, arguments: contextlib.nullcontext(
        measured.append(contenders)
    )
    monkeypatch.setattr(
        serve, "measure", lambda bench, parts, clocks, until: measured[-1].append(until)
    )
    serve.run_in_turn(bench, ["a", "b", "c"], (), ())
    assert [(one, round(until)) for one, until in measured] == [("a", 200), ("b", 100), ("c", 0)]


def test_servers_in_turn_are_compared_in_kv_tokens_too():
    run = a_run() | {"starts": [], "in_turn": True}
    shown = serve_report.markdown({"runs": {"": run}})
    assert (
        "random weights; each server alone on one" in shown and "| KV tokens | 5 | 5 | 5 |" in shown
    )
    assert "KV tokens, fewer" not in missed(run)
    run["servers"][0]["kv_tokens"] = 4
    assert "KV tokens, fewer" in missed(run)


def test_a_load_in_which_a_kernel_was_compiled_is_repeated_at_once(tmp_path):
    results: dict = {}
    config = real_config("flash", "nvfp4", 4) | {"vocab_size": 300}
    bench = Bench(tmp_path, config, results, lambda: None, deadline=1e12)
    bench.servers = {"plugin": None, "marlin": None}
    found = {
        "plugin": iter([{"compiled": ["x"]}, {}]),
        "marlin": itertools.repeat({"compiled": ["x"]}),
    }
    bench.loaded = lambda name, load, number: dict(next(found[name]) if number else {})
    bench.load(Load(1, 32, 512), 1, Clocks(), 0)
    names = [(row["contender"], bool(row.get("compiled"))) for row in results["loads"]]
    assert names == [("plugin", True), ("plugin", False), *[("marlin", True)] * 3]


def test_a_load_is_not_repeated_in_the_seconds_of_the_next_server(tmp_path):
    results: dict = {}
    config = real_config("flash", "nvfp4", 4) | {"vocab_size": 300}
    bench = Bench(tmp_path, config, results, lambda: None, deadline=0)
    bench.servers, bench.left = {"plugin": None}, lambda: 100.0
    bench.loaded = lambda *_: {"compiled": ["x"]}
    bench.load(Load(1, 32, 512), 1, Clocks(), 101)
    assert len(results["loads"]) == 1


@pytest.mark.parametrize("variable", ["DG_JIT_CACHE_DIR", "VLLM_CACHE_ROOT"])
def test_what_deep_gemm_compiles_is_named(monkeypatch, tmp_path, variable):
    monkeypatch.delenv("DG_JIT_CACHE_DIR", raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    root = tmp_path / "deep_gemm" if variable == "VLLM_CACHE_ROOT" else tmp_path
    (root / "cache" / "kernel.sm90_fp8_gemm_1d2d.0a").mkdir(parents=True)
    (log := tmp_path / "log").touch()
    new = iter(["kernel.sm90_fp8_gemm_1d2d.0b"])

    def client(*_) -> dict:
        for name in new:
            (root / "cache" / name).mkdir()
        return {}

    monkeypatch.setattr(serve_load, "bench_serve", client)
    server = SimpleNamespace(log=log, get=lambda path: "")
    of = (server, tmp_path, Load(1, 32, 1), 0, 1.0)
    assert serve_load.measure(*of)["compiled"] == ["sm90_fp8_gemm_1d2d"]
    assert "compiled" not in serve_load.measure(*of)


@pytest.mark.parametrize("given", ["--ours=plugin,plugin_bf16", "--peers=marlin,plugin_fp8"])
def test_names_that_are_not_this_plugins(monkeypatch, given):
    monkeypatch.setattr(serve.signal, "signal", lambda *_: None)
    arguments = serve.build_parser().parse_args(["run", "--out=x", "--commit=a", given])
    with pytest.raises(ValueError, match="this plugin's are plugin and plugin_fp8, and no peers"):
        arguments.call(arguments)


@pytest.mark.parametrize(
    "given, says",
    [
        (["run", "--out=absent/x.json", "--commit=a"], "there is no folder absent"),
        (["report", "absent.json"], "there is no file absent.json"),
    ],
)
def test_files_are_looked_for_before_anything_is_measured(monkeypatch, capsys, given, says):
    monkeypatch.setattr(sys, "argv", ["bench.serve", *given])
    with pytest.raises(SystemExit):
        call(serve.build_parser())
    assert says in capsys.readouterr().err


def test_a_peer_of_any_name_is_a_column():
    run = json.loads(json.dumps(a_run()).replace("humming", "flashinfer_x"))
    assert "| this plugin | Marlin | flashinfer_x |" in serve_report.markdown({"runs": {"": run}})


def test_the_commands_arguments():
    parser = serve.build_parser()
    given = parser.parse_args(["run", "--out", "x.json", "--format", "mxfp4", "--commit", "abc"])
    assert given.call is serve.run and given.parts is None
    given = parser.parse_args(["report", "x.json", "--profile"])
    assert given.call is serve.report and given.profile and given.plot is None


def test_what_a_contender_adds():
    ours, marlin, default = (
        serve.contender(name, "mxfp4") for name in ("plugin", "marlin", "default")
    )
    (w4a16,) = ours.arguments
    assert w4a16.endswith('{"formats": "mxfp4", "activations": "bf16"}}')
    of_nvfp4 = serve.contender("plugin", "nvfp4").arguments
    assert of_nvfp4 == ('--additional-config={"dsv4_moe": {"formats": "nvfp4"}}',)
    assert ours.environment == {} and default.arguments == ()
    (w4a8,) = serve.contender("plugin_fp8", "mxfp4").arguments
    assert w4a8.endswith('{"formats": "mxfp4", "activations": "fp8"}}')
    assert marlin.arguments == ("--moe-backend=marlin",)
    assert marlin.environment == {"VLLM_PLUGINS": "dsv4_random_weights"}
