"""A model's MoE layers as `vllm serve` builds them on a GPU, without one.

vLLM's loader, runner and RoutedExperts, this plugin's method, router and experts; the platform's
compute capability is made up, Triton's kernels are interpreted, the GEMMs run in the PTX emulator.
What comes out is what the same layers give on the reference backend.
"""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from dsv4_kernels.sm90 import gemm as sm90
from dsv4_kernels.sm100 import gemm as sm100

from tests.emulator import sm90_emulation, sm100_emulation
from tests.support import loading
from tests.support.serve_probe import fused_and_kept
from vllm_dsv4_moe.commands.tiny import TinyConfig, write_tiny_checkpoint

# 48 is padded on either GPU.
CONFIG = TinyConfig(layers=2, hash_layers=1, hidden=128, intermediate=48, experts=12, heads=4)
GPUS = {
    "sm100": ((10, 0), sm100, sm100_emulation.Emulation),
    "sm90": ((9, 0), sm90, sm90_emulation.Emulation),
}
# The settings that give the reference backend the GPU backend's numerics.
REFERENCE = {
    "sm100": {"backend": "reference"},
    "sm90": {"backend": "reference", "activations": "bf16"},
}
# Sums in another order round a code of NVFP4, or a bf16 value, another way now and then.
TOLERANCE = {"sm100": 2e-3, "sm90": 2.0**-8}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("emulated") / "tiny", CONFIG)


@pytest.fixture(scope="module", params=list(GPUS))
def gpu(request, checkpoint):
    """name, launches of GEMMs so far, and (config, MoE layers): ours, and the reference's."""
    from vllm_dsv4_moe.warm_up import WarmUp

    capability, module, emulation = GPUS[request.param]
    emulation = emulation(mode="random", seed=2)
    with (
        loading.on_gpu(capability),
        mock.patch.object(module, "launch", emulation.launch),
        mock.patch("vllm_dsv4_moe.runner.fused_gate", fused_and_kept),
        mock.patch("vllm_dsv4_moe.moe_method.WARM_UP", WarmUp()),
        # One size instead of every power of two: Triton's interpreter is slow.
        mock.patch("vllm_dsv4_moe.warm_up.layer_token_counts", lambda layer: [2]),
        mock.patch("torch.cuda.synchronize"),
    ):
        yield SimpleNamespace(
            name=request.param,
            launches=emulation.statistics,
            ours=load(checkpoint, {}),
            reference=load(checkpoint, REFERENCE[request.param]),
        )


def load(checkpoint, settings: dict) -> tuple:
    """vLLM's config and the model's MoE layers."""
    config = loading.engine_config(checkpoint, settings)
    layers = [layer.ffn for layer in loading.load_model(config).model.layers]
    for layer in layers:
        layer.gate.weight.data.copy_(gate_weights())
    return config, layers


def test_auto_chose_the_backend_and_load_launched_it(gpu):
    for layer in gpu.ours[1]:
        method = layer.experts.routed_experts.quant_method
        assert method.settings.backend == "auto"
        assert method.backend.name == gpu.name
        router = layer.experts.router
        assert router.route.__module__ == "dsv4_kernels.route.router_topk"
        assert router.gate.op.__module__ == "dsv4_kernels.route.gate_route"
    # FC1 and FC2, for a layer with a table and for one with a bias.
    assert len(gpu.launches) == 2 * 2


def integers(*size: int) -> torch.Tensor:
    return torch.randint(-3, 4, size, generator=torch.Generator().manual_seed(len(size)))


def gate_weights() -> torch.Tensor:
    """Of a gate that looks at 8 values, whose sums are exact in any order and in bf16."""
    weights = torch.zeros(CONFIG.experts, CONFIG.hidden)
    weights[:, :8] = integers(CONFIG.experts, 8) / 64
    return weights


def output(config, layers, number: int, x, token_ids) -> torch.Tensor:
    from vllm.forward_context import set_forward_context

    with set_forward_context(None, config, num_tokens=len(x)):
        return layers[number](x.clone(), token_ids).float()


@pytest.mark.parametrize("num_tokens", [1, 32])
@pytest.mark.parametrize("kind", ["hash", "dense"])
def test_the_layer_gives_what_the_reference_gives(gpu, kind, num_tokens):
    """Gate, router, routed experts and shared expert, by the model's own call."""
    number = ["hash", "dense"].index(kind)
    generator = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(num_tokens, CONFIG.hidden, generator=generator).bfloat16()
    x[:, :8] = integers(num_tokens, 8)
    token_ids = torch.arange(num_tokens, dtype=torch.int32) + 7
    before = len(gpu.launches)
    ours = output(*gpu.ours, number, x, token_ids)
    assert len(gpu.launches) == before + 2
    expected = output(*gpu.reference, number, x, token_ids)
    assert len(gpu.launches) == before + 2
    assert expected.norm() > 0
    error = (ours - expected).norm() / expected.norm()
    assert error < TOLERANCE[gpu.name], error
