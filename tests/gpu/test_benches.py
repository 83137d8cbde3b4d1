"""Benches whose own checks of their backends run at small sizes, on a Hopper GPU."""

import json
import sys

import pytest
import torch
from bench import expert_parallel, inputs, layer, mxfp4, overlap
from dsv4_kernels import compiled
from dsv4_kernels.types import MoeShape
from safetensors.torch import load_file

from vllm_dsv4_moe.commands.deployment import SIZES
from vllm_dsv4_moe.commands.releases import RELEASES
from vllm_dsv4_moe.commands.tiny import TinyConfig, write_tiny_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9,
        reason="made for compute capability 9",
    ),
]
SHAPE = MoeShape(16, 5, 4, 512, 384, 32, False)
MXFP4 = SHAPE._replace(weight_format="mxfp4")


def test_mxfp4_is_right_and_timed_with_kernels_of_other_processes(monkeypatch, tmp_path):
    monkeypatch.setattr(compiled, "_cache", compiled.KernelCache(()))
    mxfp4.compile_in_processes([MXFP4], tmp_path)
    sets = {8: inputs.cold_inputs(MXFP4, 8)}
    makers = {"sm90": lambda: mxfp4.BACKENDS["sm90"](MXFP4, inputs.random_weights(MXFP4))}
    expected = layer.oracle(MXFP4, inputs.random_weights(MXFP4), sets)
    (row,) = layer.measure(makers, sets, expected, {"sm90": layer.TOLERANCE})
    assert row["error"] < 2.0**-8 and row["us"] > 0


def test_a_wrong_backend_is_not_timed():
    sets = {8: inputs.cold_inputs(SHAPE, 8)}
    expected = layer.oracle(SHAPE, inputs.random_weights(SHAPE), sets)
    makers = {"zeros": lambda: lambda each: lambda: torch.zeros_like(each.x)}
    (row,) = layer.measure(makers, sets, expected, {"zeros": layer.TOLERANCE})
    assert "us" not in row and row["error"] == pytest.approx(1)


def test_the_shared_expert_beside_the_routed_ones_changes_no_sum():
    make_call = layer.ours(SHAPE, inputs.random_weights(SHAPE))
    rows = overlap.bench_tokens(SHAPE, make_call, 8)
    assert len(rows) == len(overlap.LEFT_FREE) * len(overlap.PRIORITIES)
    assert all(row["forked"] > 0 for row in rows)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("ranks", [1, 2])
def test_experts_that_ranks_share_are_right_and_timed(monkeypatch, tmp_path, ranks):
    """One exchanges nothing. Ours and vLLM's default, in processes of their own."""
    if torch.cuda.device_count() < ranks:
        pytest.skip("needs two GPUs")
    monkeypatch.setitem(RELEASES, "flash", dict(zip(SIZES, (16, 2, 4096, 2048), strict=True)))
    monkeypatch.setattr(expert_parallel, "TOKENS", (1, 32))
    out = tmp_path / "out.json"
    names = ("w4a16", "w4a8", "w4a8_packed", "humming_fp8")
    given = [f"--out={out}", "--commit=abc", f"--ranks={ranks}", f"--contenders={','.join(names)}"]
    monkeypatch.setattr(sys, "argv", ["bench.expert_parallel", "run", *given])
    expert_parallel.main()
    rows = json.loads(out.read_text())["rows"]
    assert [(r["contender"], r.get("tokens")) for r in rows] == [
        (n, t) for n in names for t in (1, 32)
    ]
    assert all(row["together_us"] > 0 for row in rows)
    of = {(row["contender"], row["tokens"]): row for row in rows}
    assert of["w4a8", 32]["error"] == of["w4a8_packed", 32]["error"]
    if ranks > 1:
        assert of["w4a8_packed", 32]["gathered_bytes"] < 0.6 * of["w4a8", 32]["gathered_bytes"]


def test_a_checkpoint_made_on_the_gpu_has_the_values_that_its_scales_say(tmp_path):
    config = TinyConfig(layers=1, hash_layers=0, experts=8)
    folder = write_tiny_checkpoint(tmp_path / "gpu", config, "cuda")
    again = write_tiny_checkpoint(tmp_path / "again", config, "cuda")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    name = "layers.0.ffn.experts.3.w1.weight"
    assert (folder / index[name]).read_bytes() == (again / index[name]).read_bytes()
    tensors = load_file(folder / index[name])
    nibbles = torch.cat([tensors[name] & 7, tensors[name] >> 4 & 7])
    assert (nibbles == 7).any() and nibbles.unique().numel() == 8
    scales = [tensors[f"layers.0.ffn.experts.3.{w}.weight_scale"] for w in ("w1", "w3")]
    assert max(float(each.float().max()) for each in scales) == 448  # they share a global scale
