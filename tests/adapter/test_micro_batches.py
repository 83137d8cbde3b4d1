"""--enable-dbo: vLLM's two micro-batches, each a thread of one process, by turns through this
plugin's experts. The exchange between ranks, of DeepEP or nixl there, gives way to the other
micro-batch here as it does there, and exchanges nothing.
"""

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from dsv4_kernels.backends import REFERENCE
from dsv4_kernels.moe import workspace_bytes
from vllm import forward_context
from vllm.model_executor.layers.fused_moe.prepare_finalize.no_dp_ep import (
    MoEPrepareAndFinalizeNoDPEPModular,
)
from vllm.v1.worker import ubatching, workspace

from tests.support.plain_moe import PlainMoe
from tests.support.routed_experts import loaded_experts, random_tokens
from vllm_dsv4_moe.commands.tiny import TinyConfig
from vllm_dsv4_moe.experts import Dsv4Experts

CONFIG = TinyConfig(layers=1, hash_layers=0, hidden=64, intermediate=32, experts=12, heads=4)
TOKENS = (24, 16)  # of the two micro-batches
STREAM = object()


class GivesWay(MoEPrepareAndFinalizeNoDPEPModular):
    """As DeepEP's: what a micro-batch sent is received when the other one gives way in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[str, int]] = []

    def supports_async(self) -> bool:
        return True

    def prepare_async(self, *args, **kwargs):
        self.events.append(("dispatch", ubatching.dbo_current_ubatch_id()))
        return (lambda: None), lambda: self.prepare(*args, **kwargs)

    def finalize_async(self, *args):
        self.events.append(("combine", ubatching.dbo_current_ubatch_id()))
        return (lambda: None), lambda: self.finalize(*args)


def run_with_arena(hidden_states, routing, layer, arena, expert_map, out) -> None:
    """The oracle, leaving its micro-batch's number in all of an arena as a GPU would have it."""
    arena.fill_(1 + ubatching.dbo_current_ubatch_id())
    REFERENCE.run(hidden_states, routing, layer, arena, expert_map, out)


@pytest.fixture(scope="module")
def layer(checkpoint, vllm_config):
    """A loaded layer, whose experts ask for an arena."""
    tensors = PlainMoe(checkpoint, 0).tensors
    return loaded_experts(vllm_config, CONFIG, tensors, activations="bf16")


def kernel_of(layer) -> mk.FusedMoEKernel:
    method = layer.quant_method
    theirs = method.moe_kernel.fused_experts.layer
    backend = dataclasses.replace(REFERENCE, run=run_with_arena, tile=lambda shape, tokens: 8)
    moe_layer = dataclasses.replace(theirs, backend=backend)
    experts = Dsv4Experts(method.moe, method.moe_quant_config, moe_layer)
    return mk.FusedMoEKernel(GivesWay(), experts)


def call(kernel, layer, x, weights, ids) -> torch.Tensor:
    return kernel.apply(
        x, layer.w13_weight, layer.w2_weight, topk_weights=weights, topk_ids=ids,
        activation=layer.activation, global_num_experts=CONFIG.experts, expert_map=None,
        apply_router_weight_on_input=False,
    ).clone()  # fmt: skip


@pytest.fixture
def manager():
    """vLLM's, for two micro-batches, asked as on a GPU; a CPU has no streams."""
    workspace.init_workspace_manager(torch.device("cpu"), num_ubatches=2)
    platform = SimpleNamespace(is_cpu=lambda: False, is_rocm=lambda: False)
    with (
        mock.patch.object(ubatching, "current_stream", lambda: STREAM),
        mock.patch.object(mk, "current_platform", platform),
        mock.patch("torch.accelerator.empty_cache"),
    ):
        yield workspace.current_workspace_manager()
    workspace.reset_workspace_manager()


def in_two_micro_batches(kernel, layer, batches) -> list[torch.Tensor]:
    """As vLLM's wrapper runs them: one thread at a time, the first one begins."""
    started = threading.Barrier(3, timeout=300)
    turns = [threading.Event() for _ in batches]
    ubatching._CURRENT_CONTEXTS[:] = [None] * len(batches)

    def run(number: int) -> torch.Tensor:
        context = ubatching.UBatchContext(
            number, STREAM, STREAM, SimpleNamespace(number=number), started,
            turns[number], turns[1 - number], None, None,
        )  # fmt: skip
        with context:
            return call(kernel, layer, *batches[number])

    kept = forward_context._forward_context
    try:
        with ThreadPoolExecutor(len(batches)) as pool:
            running = [pool.submit(run, number) for number in range(len(batches))]
            started.wait()
            turns[0].set()
            return [future.result(timeout=300) for future in running]
    finally:
        forward_context._forward_context = kept


def test_two_micro_batches_give_what_each_gives_alone(layer, manager):
    kernel = kernel_of(layer)
    batches = [random_tokens(count, CONFIG, seed) for seed, count in enumerate(TOKENS)]
    alone = [call(kernel, layer, *batch) for batch in batches]
    kernel.prepare_finalize.events.clear()
    together = in_two_micro_batches(kernel, layer, batches)
    # Each gives way to the other after it has sent, and after it has sent back.
    steps = ("dispatch", "combine")
    assert kernel.prepare_finalize.events == [(s, number) for s in steps for number in (0, 1)]
    for got, wanted in zip(together, alone, strict=True):
        assert torch.equal(got, wanted)


def test_each_micro_batch_has_an_arena(layer, manager):
    kernel = kernel_of(layer)
    experts = kernel.fused_experts
    arena = workspace_bytes(experts.layer.backend, experts.layer.shape)
    in_two_micro_batches(kernel, layer, [random_tokens(n, CONFIG) for n in TOKENS])
    first, second = manager._current_workspaces
    assert min(len(first), len(second)) >= arena > 0
    for number, found in enumerate((first, second)):
        assert int((found == 1 + number).sum()) >= arena
