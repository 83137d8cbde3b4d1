"""What a layer costs at load: launches and memory, counted without a GPU.

A launch is an operator of PyTorch that is neither a view nor an allocation, or a kernel of Triton:
`launches.counted_launches`. On a GPU each is one kernel or one copy. Counted is all of the method's
process_weights_after_loading for a layer with a table and one with a bias, checks of scales and of
the router included; what one layer does for all of a shape (compiling, WARM_UP) is left out.
"""

import math
from collections import Counter
from unittest import mock

import pytest
import torch
from dsv4_kernels import activation_scale
from dsv4_kernels.compile_processes import MOST_PROCESSES
from dsv4_kernels.types import ExpertWeights

from tests.support import loading
from tests.support.launches import counted_launches, peak_bytes
from tests.support.serve_probe import fused_and_kept
from vllm_dsv4_moe.commands.tiny import TinyConfig, write_tiny_checkpoint
from vllm_dsv4_moe.moe_method import ModelOptNvFp4Dsv4Method

HOPPER, BLACKWELL = (9, 0), (10, 0)
PROCESS = "process_weights_after_loading"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Of so many experts."""
    folder = tmp_path_factory.mktemp("preparation")

    def write(experts: int):
        path = folder / str(experts)
        if not path.exists():
            sizes = dict(layers=2, hash_layers=1, hidden=128, intermediate=64, heads=4)
            write_tiny_checkpoint(path, TinyConfig(experts=experts, **sizes))
        return path

    return write


def launches(checkpoint, capability, load_format="auto", **settings) -> list[Counter[str]]:
    """Of each layer, while vLLM loads the model."""
    layers: list[Counter[str]] = []
    process = getattr(ModelOptNvFp4Dsv4Method, PROCESS)

    def counting(method, layer) -> None:
        with counted_launches(interpret=False) as launched:
            process(method, layer)
        layers.append(launched)

    with (
        loading.on_gpu(capability),
        mock.patch.object(ModelOptNvFp4Dsv4Method, PROCESS, counting),
        mock.patch("vllm_dsv4_moe.moe_method.WARM_UP"),
        mock.patch("vllm_dsv4_moe.runner.fused_gate", fused_and_kept),
    ):
        config = loading.engine_config(checkpoint, settings, load_format=load_format)
        loading.load_model(config)
    assert len(layers) == 2
    return layers


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
@pytest.mark.parametrize("experts", [7, 8, 20])
def test_sm90_launches_six_a_chunk_of_eight_experts(checkpoint, experts, load_format):
    chunks = math.ceil(experts / 8)
    for launched in launches(checkpoint(experts), HOPPER, load_format):
        assert launched["_shuffle_kernel"] == 2 * chunks
        assert launched.total() <= 6 * chunks + 24, launched


def test_compiling_goes_on_while_weights_are_read(checkpoint):
    """It begins when a layer is built, and nothing waits for it before a layer is prepared."""
    seen = mock.Mock()
    with (
        loading.on_gpu(HOPPER) as compilation,
        mock.patch("vllm_dsv4_moe.moe_method.prepare_layer") as prepare,
        mock.patch("vllm_dsv4_moe.moe_method.take_weights"),
        mock.patch.object(ModelOptNvFp4Dsv4Method, "_build_kernel"),
        mock.patch("vllm_dsv4_moe.runner.fused_gate", fused_and_kept),
    ):
        seen.attach_mock(compilation, "compilation")
        seen.attach_mock(prepare, "prepare")
        loading.load_model(loading.engine_config(checkpoint(8)))
    names = [name for name, *_ in seen.mock_calls]
    assert names == ["compilation.begin", "compilation.begin", "prepare", "prepare"]
    (_, (backend, shape, arch, processes), _), *_ = seen.mock_calls
    assert (backend.name, arch, shape) == ("sm90", "sm_90a", prepare.call_args.args[1])
    assert 1 <= processes <= MOST_PROCESSES


def test_sm100_launches_the_same_whatever_the_experts(checkpoint):
    token = {"activation_scale": "token"}
    few, many = (launches(checkpoint(experts), BLACKWELL, **token) for experts in (7, 20))
    assert few == many
    assert max(layer.total() for layer in many) <= 40, many


def warm_up_weights(experts: int, hidden: int, intermediate: int) -> ExpertWeights:
    """W13 at random; W2, which the warm-up does not read, is memory that nobody touches."""
    generator = torch.Generator().manual_seed(0)
    codes = (experts, 2 * intermediate, hidden // 2)
    scales = torch.rand((experts, 2 * intermediate, hidden // 16), generator=generator)
    return ExpertWeights(
        torch.randint(0, 256, codes, dtype=torch.uint8, generator=generator),
        (scales + 0.5).to(torch.float8_e4m3fn),
        torch.full((experts, 2), hidden**-0.5),
        torch.empty((experts, hidden, intermediate // 2), dtype=torch.uint8),
        torch.empty((experts, hidden, intermediate // 16), dtype=torch.float8_e4m3fn),
        torch.ones(experts),
    )


@pytest.mark.parametrize("experts", [8, 24, 50])
def test_the_warm_up_launches_at_most_64_a_chunk_of_eight_experts(experts):
    """Synthetic tokens are made once for all layers, on the host."""
    weights = warm_up_weights(experts, 64, 32)
    activation_scale.warmup(weights, limit=10.0, scaling=1.5)
    with counted_launches() as launched:
        activation_scale.warmup(weights, limit=10.0, scaling=1.5)
    assert launched.total() <= 64 * (experts // 8), launched


@pytest.mark.slow
def test_the_warm_ups_scratch_at_pros_sizes():
    """Of a chunk, which has the scratch of all of them."""
    weights = warm_up_weights(activation_scale.CHUNK, 7168, 3072)
    activation_scale.warmup(weights, limit=None, scaling=2.5)  # makes the synthetic tokens
    peak = peak_bytes(lambda: activation_scale.warmup(weights, limit=10.0, scaling=2.5))
    assert 100 << 20 < peak <= 300 << 20, f"{peak / 2**20:.0f} MiB"
