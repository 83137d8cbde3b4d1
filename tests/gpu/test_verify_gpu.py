"""`dsv4-moe verify` on a GPU: every kind of layer on its kernels, timed."""

import dataclasses
import re

import pytest
import torch

from vllm_dsv4_moe.commands.cli import main
from vllm_dsv4_moe.commands.demo import GPU_SIZES
from vllm_dsv4_moe.commands.tiny import write_tiny_checkpoint

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("expert_format", ["nvfp4", "mxfp4"])
def test_each_kind_of_layer_is_verified_and_timed(expert_format, tmp_path, capsys):
    sizes = dataclasses.replace(GPU_SIZES, expert_format=expert_format, mtp=1)
    is_hopper = torch.cuda.get_device_capability()[0] == 9
    ours = 3 if is_hopper else {"nvfp4": 2, "mxfp4": 0}[expert_format]
    checkpoint = str(write_tiny_checkpoint(tmp_path / "tiny", sizes, "cuda"))
    assert main(["verify", checkpoint]) == (0 if ours else 2)
    layers = capsys.readouterr().out.splitlines()
    if ours:
        assert layers.pop().startswith(f"verified: {ours} kinds of layer")
    assert len(layers) == 3
    for line in layers:
        if "MXFP4" in line and not is_hopper:
            assert "vLLM's" in line
            continue
        hoppers = "sm90, W4A8" if "MXFP4" in line else "sm90, W4A16"
        assert (hoppers if is_hopper else "sm100, W4A4") in line
        times = re.search(r"us by tokens: 1 (\d+), 64 (\d+), 512 (\d+): ok$", line)
        assert times is not None and all(0 < int(us) < 100_000 for us in times.groups())
