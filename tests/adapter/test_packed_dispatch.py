"""W4A4 and W4A8 tokens between data-parallel ranks, through vLLM's own prepare and finalize:
quantised on their own rank, gathered as bytes, with the output of tokens gathered in bf16."""

import dataclasses
import functools
from types import SimpleNamespace

import pytest
import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from dsv4_kernels import reference
from dsv4_kernels.packed_tokens import unpack_tokens
from dsv4_kernels.types import Fp8Rows
from vllm.model_executor.layers.fused_moe.prepare_finalize.naive_dp_ep import (
    MoEPrepareAndFinalizeNaiveDPEPModular,
)

from tests.support.gathered_ranks import GatheredRanks
from tests.support.layers import relative_error
from tests.support.plain_moe import PlainMoe
from tests.support.routed_experts import loaded_experts
from vllm_dsv4_moe import packed_dispatch
from vllm_dsv4_moe.commands.tiny import TinyConfig
from vllm_dsv4_moe.packed_dispatch import PackedDispatch

CONFIG = TinyConfig(layers=1, hash_layers=0, hidden=64, intermediate=32, experts=12, heads=4)
TOKENS = (40, 32)  # of the two ranks
# Settings, and the bytes of a token that travels.
MODES = {
    "warmup": ({"activation_scale": "warmup"}, 48),
    "token": ({"activation_scale": "token"}, 64),
    "fp8": ({"activations": "fp8"}, 80),
}
# Two ranks' parts of a layer are rounded to bf16 before they are added.
TOLERANCE = 2.0**-7


@pytest.fixture(scope="module")
def load(checkpoint, vllm_config):
    tensors = PlainMoe(checkpoint, 0).tensors
    return functools.partial(loaded_experts, vllm_config, CONFIG, tensors)


@pytest.fixture
def ranks():
    ranks = GatheredRanks(len(TOKENS))
    with ranks.installed():
        yield ranks


def tokens() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, routing weights and ids of all ranks; the first token is padding."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(TOKENS), CONFIG.hidden, generator=generator).bfloat16()
    logits = torch.randn(sum(TOKENS), CONFIG.experts, generator=generator)
    weights, ids = reference.router_topk(logits, CONFIG.top_k, scaling=1.5)
    x[0], weights[0], ids[0] = torch.nan, 0, -1
    return x, weights, ids


def outputs(ranks: GatheredRanks, layers: list) -> list[torch.Tensor]:
    parts = [part.split(TOKENS) for part in tokens()]
    return ranks.run(lambda rank: layers[rank].forward_modular(*(part[rank] for part in parts)))


def dispatched_in_bf16(layers: list) -> None:
    """The same experts, behind vLLM's class."""
    for layer in layers:
        method = layer.quant_method
        plain = MoEPrepareAndFinalizeNaiveDPEPModular(num_dispatchers=len(layers))
        method.moe_kernel = mk.FusedMoEKernel(plain, method.moe_kernel.fused_experts)


@pytest.mark.parametrize("is_expert_parallel", [True, False], ids=["ep", "tp"])
@pytest.mark.parametrize("settings, row_bytes", MODES.values(), ids=MODES)
def test_tokens_travel_packed_and_the_output_is_that_of_bf16(
    load, ranks, settings, row_bytes, is_expert_parallel
):
    """Without expert parallelism every rank has its part of every expert."""
    kind = "ep" if is_expert_parallel else "tp"
    layers = [load(**{kind: (2, rank)}, dp=(2, rank), **settings) for rank in range(2)]
    kernels = [layer.quant_method.moe_kernel for layer in layers]
    assert all(isinstance(kernel.prepare_finalize, PackedDispatch) for kernel in kernels)
    packed = outputs(ranks, layers)
    (travelled,) = ranks.travelled
    assert travelled.dtype == torch.uint8
    assert travelled.shape == (sum(TOKENS), row_bytes)
    moe_layer = kernels[0].fused_experts.layer
    rows, x = unpack_tokens(travelled, moe_layer), tokens()[0][1:]
    if isinstance(rows, Fp8Rows):
        expected = Fp8Rows(*reference.fp8_quantize(x, None)[:2])
    else:
        expected, _ = reference.nvfp4_quantize(x, moe_layer.activation_scales.fc1)
    for name, part, quantised in zip(rows._fields, rows, expected, strict=True):
        mine = part if name == "global_scales" and len(part) == 1 else part[1:]
        assert torch.equal(mine.contiguous().view(torch.uint8), quantised.view(torch.uint8)), name
    assert all(kernel.fused_experts.layer.saturated.item() == 0 for kernel in kernels)

    dispatched_in_bf16(layers)
    unpacked = outputs(ranks, layers)
    assert ranks.travelled[1].dtype == torch.bfloat16
    for ours, expected in zip(packed, unpacked, strict=True):
        assert torch.equal(ours, expected)

    whole = load(**settings).forward_modular(*tokens()).float()
    assert (packed[0][0] == 0).all()
    error = relative_error(torch.cat(packed).float(), whole)
    # Each rank's part of a product is quantised with scales of its own without expert parallelism.
    assert error <= (TOLERANCE if is_expert_parallel else 0.1)


@pytest.mark.parametrize("sizes, packs", [((61, 3), True), ((60, 3), False)])
def test_few_tokens_travel_as_they_are_on_every_rank(load, ranks, sizes, packs, monkeypatch):
    """A rank alone cannot tell: it has 3 tokens in both cases."""
    metadata = SimpleNamespace(get_chunk_sizes_across_dp_rank=lambda: list(sizes))
    context = SimpleNamespace(dp_metadata=metadata)
    monkeypatch.setattr(packed_dispatch, "is_forward_context_available", lambda: True)
    monkeypatch.setattr(packed_dispatch, "get_forward_context", lambda: context)
    layers = [load(ep=(2, rank), dp=(2, rank), activations="fp8") for rank in range(2)]
    parts = [part[: sum(sizes)].split(sizes) for part in tokens()]
    given = ranks.run(lambda rank: layers[rank].forward_modular(*(part[rank] for part in parts)))
    assert [len(part) for part in given] == list(sizes)
    (travelled,) = ranks.travelled
    assert travelled.dtype == (torch.uint8 if packs else torch.bfloat16)


def test_w4a16_tokens_travel_in_bf16(load, ranks):
    layers = [load(ep=(2, rank), dp=(2, rank), activations="bf16") for rank in range(2)]
    outputs(ranks, layers)
    assert [tokens.dtype for tokens in ranks.travelled] == [torch.bfloat16]


def test_a_single_rank_and_tensor_parallelism_pack_nothing(load):
    for options in ({}, {"tp": (2, 0)}, {"ep": (2, 0)}):
        kernel = load(**options).quant_method.moe_kernel
        assert not isinstance(kernel.prepare_finalize, PackedDispatch), options


def test_reloaded_scales_are_those_of_the_next_tokens(load, ranks):
    """FC1's scale is copied to where the experts, and so the dispatch, read it."""
    layer = load(ep=(2, 0), dp=(2, 0))
    method = layer.quant_method
    moe_layer = method.moe_kernel.fused_experts.layer
    scales = moe_layer.activation_scales
    reloaded = dataclasses.replace(moe_layer, activation_scales=scales._replace(fc1=scales.fc1 * 2))
    before = scales.fc1.item()
    method._take_over(reloaded)
    assert method.moe_kernel.prepare_finalize.layer.activation_scales.fc1.item() == 2 * before
