"""The packed dispatch on two ranks: vLLM's prepare, experts and finalize, this plugin's method,
Triton's kernels interpreted, the GEMMs in the PTX emulator."""

import functools
from unittest import mock

import pytest
import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from dsv4_kernels import reference
from dsv4_kernels.sm90 import gemm as sm90
from dsv4_kernels.sm100 import gemm as sm100
from vllm.model_executor.layers.fused_moe.prepare_finalize.naive_dp_ep import (
    MoEPrepareAndFinalizeNaiveDPEPModular,
)

from tests.emulator import sm90_emulation, sm100_emulation
from tests.support import loading
from tests.support.gathered_ranks import GatheredRanks
from tests.support.layers import relative_error
from tests.support.plain_moe import PlainMoe
from tests.support.routed_experts import loaded_experts
from vllm_dsv4_moe.commands.tiny import TinyConfig, write_tiny_checkpoint
from vllm_dsv4_moe.packed_dispatch import PackedDispatch
from vllm_dsv4_moe.warm_up import WarmUp

# 48 is padded.
CONFIG = TinyConfig(
    layers=1, hash_layers=0, hidden=128, intermediate=48, experts=4, top_k=2, heads=4
)
TOKENS = (2, 5)  # of the two ranks
# Parts are rounded to bf16 before they are added; sums' last bits move an E4M3 of h by a step.
TOLERANCE = {"sm100": 2.0**-7, "sm90": 2.0**-6}
MODES = {
    "w4a4-warmup": ("sm100", {"activation_scale": "warmup"}),
    "w4a4-token": ("sm100", {"activation_scale": "token"}),
    "w4a8": ("sm90", {"activations": "fp8"}),
}
GPUS = {
    "sm100": ((10, 0), sm100, sm100_emulation.Emulation),
    "sm90": ((9, 0), sm90, sm90_emulation.Emulation),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("emulated") / "tiny", CONFIG)


@pytest.mark.parametrize("backend, settings", MODES.values(), ids=MODES)
def test_packed_tokens_give_what_bf16_tokens_give(checkpoint, backend, settings):
    """Bit for bit, and nearly what the reference backend's one layer gives."""
    config = loading.engine_config(checkpoint)
    load = functools.partial(loaded_experts, config, CONFIG, PlainMoe(checkpoint, 0).tensors)
    capability, gemm, emulation_of = GPUS[backend]
    ranks, emulation = GatheredRanks(2), emulation_of(mode="random", seed=3)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(TOKENS), CONFIG.hidden, generator=generator).bfloat16()
    logits = torch.randn(sum(TOKENS), CONFIG.experts, generator=generator)
    given = (x, *reference.router_topk(logits, CONFIG.top_k, scaling=1.5))
    parts = [part.split(TOKENS) for part in given]
    with (
        ranks.installed(),
        loading.on_gpu(capability),
        mock.patch.object(gemm, "launch", emulation.launch),
        mock.patch("vllm_dsv4_moe.packed_dispatch.FEWEST_TOKENS", 0),
        mock.patch("vllm_dsv4_moe.moe_method.WARM_UP", WarmUp()),
        # One size instead of every power of two: Triton's interpreter is slow.
        mock.patch("vllm_dsv4_moe.warm_up.layer_token_counts", lambda layer: [2]),
        mock.patch("torch.cuda.synchronize"),
    ):
        layers = [load(ep=(2, rank), dp=(2, rank), **settings) for rank in range(2)]
        kernels = [layer.quant_method.moe_kernel for layer in layers]
        assert all(isinstance(kernel.prepare_finalize, PackedDispatch) for kernel in kernels)
        assert {layer.quant_method.backend.name for layer in layers} == {backend}

        def run() -> torch.Tensor:
            return torch.cat(
                ranks.run(lambda rank: layers[rank].forward_modular(*(p[rank] for p in parts)))
            )

        launches = len(emulation.statistics)
        packed = run()
        assert len(emulation.statistics) == launches + 2 * 2
        for layer, kernel in zip(layers, kernels, strict=True):
            plain = MoEPrepareAndFinalizeNaiveDPEPModular(num_dispatchers=2)
            layer.quant_method.moe_kernel = mk.FusedMoEKernel(plain, kernel.fused_experts)
        unpacked = run()
        dtypes = [tokens.dtype for tokens in ranks.travelled]
        assert dtypes == [torch.uint8, torch.bfloat16]
    assert torch.equal(packed, unpacked)
    whole = load(backend="reference", **settings).forward_modular(*given).float()
    assert relative_error(packed.float(), whole) <= TOLERANCE[backend]
