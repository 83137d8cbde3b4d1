"""bench.serve from start to end on vLLM's CPU build: two tiny servers, one of them as the peer."""

import json

import pytest
from bench import serve, serve_contenders, serve_report
from bench.serve_load import Load

from tests.support.cpu_build import needs_cpu_build
from vllm_dsv4_moe.commands.tiny_config import TinyConfig, tiny_config_json

pytestmark = [pytest.mark.timeout(1200), pytest.mark.slow, needs_cpu_build]
FACTS = {"gpu": "none", "driver": "none", "memory_mib": 143_771, "max_sm_mhz": 0}
ARGUMENTS = (
    "--load-format=dummy",
    "--enforce-eager",
    "--max-model-len=512",
    "--max-num-seqs=8",
    "--max-num-batched-tokens=256",
    "--no-enable-prefix-caching",
)


def tiny_contender(name: str, expert_format: str) -> serve_contenders.Contender:
    """The peer is this plugin too, at other numerics."""
    activations = "nvfp4" if name == "plugin" else "bf16"
    settings = {"formats": expert_format, "backend": "reference", "activations": activations}
    given = json.dumps({"dsv4_moe": settings})
    return serve_contenders.Contender(name, (f"--additional-config={given}",))


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Its command line without --out, on tiny servers; the kept runs."""

    def config(model: str, expert_format: str, layers: int, mtp: int = 0) -> dict:
        sizes = TinyConfig(layers=2, hash_layers=1, hidden=256, intermediate=128, vocab=2048)
        return tiny_config_json(sizes)

    monkeypatch.setattr(serve, "gpu_facts", lambda: FACTS)
    monkeypatch.setattr(serve, "real_config", config)
    monkeypatch.setattr(serve, "contender", tiny_contender)
    monkeypatch.setattr(serve, "ARGUMENTS", ARGUMENTS)
    monkeypatch.setattr(serve, "capture_sizes", lambda drafted: ())
    monkeypatch.setattr(serve, "TOGETHER", serve.TOGETHER[-1:])
    monkeypatch.setattr(serve, "ALONE", ())
    monkeypatch.setattr(serve, "DECODES", (Load(4, 8, 6),))
    monkeypatch.setattr(serve, "PROMPTS", (Load(2, 32, 1),))
    monkeypatch.setattr(serve_contenders, "PROFILED_PREFILL", 64)
    monkeypatch.setattr(serve.signal, "signal", lambda *_: None)
    monkeypatch.setattr(serve, "MOST_TIMES", 2)
    out = tmp_path / "serve.json"
    out.write_text(json.dumps({"runs": {"another": {"kept": True}}}))

    def run(*options: str) -> dict:
        given = ["run", "--out", str(out), "--commit", "abc", "--logs", str(tmp_path / "logs")]
        arguments = serve.build_parser().parse_args([*given, "--peers", "marlin", *options])
        arguments.call(arguments)
        return json.loads(out.read_text())["runs"]

    return run


def test_tiny_servers_are_compared_and_loaded(bench, tmp_path, capsys):
    kept = bench("--seconds=1000")
    assert kept["another"] == {"kept": True}
    (run,) = [run for name, run in kept.items() if name.startswith("flash-nvfp4-0.")]
    assert {row["contender"] for row in run["servers"]} == {"plugin", "marlin"}
    assert all(row["ready_s"] > 0 and row["kv_tokens"] > 0 for row in run["servers"])
    # Both hold the same random model: W4A4 and W4A16 of other weights would differ by 1.1.
    (difference,) = [r["difference"] for r in run["agreement"] if r["contender"] == "marlin"]
    assert 0.001 < difference < 0.4
    rows = [row for row in run["loads"] if row["load"] == "4 × 8 + 6"]
    assert [row["contender"] for row in rows] == ["plugin", "marlin", "marlin", "plugin"]
    for row in rows:
        assert row["completed"] == 4 and row["failed"] == 0
        assert 0 < row["step_ms"] and 0 < row["median_tpot_ms"]
    assert serve_report.speedup(run, "2 × 32 + 1", "total_token_throughput") > 0
    # There is no CUDA graph here: these parts fail, and cost no other.
    assert {row["part"] for row in run["failures"]} == {
        "steps",
        "profile of plugin",
        "profile of marlin",
    }
    shown = capsys.readouterr().out
    assert "| 4 × 8 + 6: TPOT, ms |" in shown and "engine's step" in shown
    log = (tmp_path / "logs/plugin.log").read_text()
    assert "this plugin runs NVFP4 experts, on reference: layers 0-1" in log


@pytest.mark.weekly
def test_tiny_servers_of_two_ranks_are_loaded_one_after_another(bench, monkeypatch, capsys):
    monkeypatch.setattr(serve, "MOST_TIMES", 1)
    # A core each; vLLM compiles helpers that gcc alone will not do for.
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    kept = bench("--seconds=1000", "--topology=dp2-ep")
    (run,) = [run for name, run in kept.items() if name.startswith("flash-nvfp4-dp2-ep-0.")]
    assert run["layers"] == 2 and not run.get("failures")
    servers = {row["contender"]: row for row in run["servers"]}
    assert list(servers) == ["plugin", "marlin"]
    assert all("-dp=2" in row["arguments"] and row["kv_tokens"] > 0 for row in servers.values())
    (difference,) = [r["difference"] for r in run["agreement"] if r["contender"] == "marlin"]
    assert 0.001 < difference < 0.4
    order = [row["contender"] for row in run["loads"]]
    assert order == ["plugin", "plugin", "marlin", "marlin"]
    assert all(row["failed"] == 0 for row in run["loads"])
    assert "each server alone, dp2-ep, each rank on one none" in capsys.readouterr().out
