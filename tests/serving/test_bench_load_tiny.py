"""bench.load on vLLM's CPU build: two tiny models, each loaded in a process of its own."""

from bench import load, load_report

from tests.support.cpu_build import needs_cpu_build
from vllm_dsv4_moe.commands.tiny_config import TinyConfig


@needs_cpu_build
def test_tiny_models_load_and_their_layers_are_timed(tmp_path):
    bench = load.Bench(tmp_path)
    sizes = TinyConfig(layers=3, hash_layers=1, hidden=128, intermediate=64, experts=8, heads=4)
    bench.write_checkpoints(sizes, 2, "cpu")
    loads = [bench.loading(weights, "plugin", "cache") for weights in ("real", "dummy")]
    real, dummy = (load() for load in loads)
    assert (len(real["layers"]), len(dummy["layers"])) == (3, 2)
    for row in (real, dummy):
        assert row["reading_s"] > 0 and row["new_objects"] == 0 and row["compile_s"] is None
        spent = sum(layer["seconds"]["prepare"] for layer in row["layers"])
        assert 0 < spent < load_report.total_seconds(row) < row["load_s"]
