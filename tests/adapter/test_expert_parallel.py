"""Expert parallelism through vLLM's own placement, weight loading and EPLB code, on one CPU.

Each simulated rank has a real RoutedExperts layer; what the ranks give adds up to the one layer
that holds all experts. EPLB's exchange runs a thread a rank over a mailbox instead of NCCL.
"""

import threading
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from tests.support.layers import relative_error
from tests.support.plain_moe import PlainMoe
from tests.support.routed_experts import loaded_experts, random_tokens
from vllm_dsv4_moe.commands.tiny import TinyConfig

CONFIG = TinyConfig(layers=1, hash_layers=0, hidden=64, intermediate=32, experts=12, heads=4)
# fp32 sums of at most top_k rows, each rounded to bf16, in another grouping.
TOLERANCE = 2.0**-7


@pytest.fixture(scope="module")
def tensors(checkpoint):
    tensors = PlainMoe(checkpoint, 0).tensors
    # So small a product that warm-up gives this expert's FC2 a scale of its own.
    tensors["experts.5.w3.weight_scale_2"] /= 4096
    return tensors


def rank_layer(vllm_config, tensors, ep_size, ep_rank, **options):
    """One rank's layer with this plugin's method, loaded and processed."""
    return loaded_experts(vllm_config, CONFIG, tensors, ep=(ep_size, ep_rank), **options)


TOKENS = random_tokens(40, CONFIG)


def output(layer, x, weights, ids) -> torch.Tensor:
    return layer.forward_modular(x, weights, ids).float()


@pytest.fixture(scope="module")
def whole(vllm_config, tensors):
    return output(rank_layer(vllm_config, tensors, 1, 0), *TOKENS)


@pytest.mark.parametrize("placement", ["linear", "round_robin"])
@pytest.mark.parametrize("ep_size", [2, 4, 5])
def test_ranks_add_up_to_the_whole_layer(vllm_config, tensors, whole, ep_size, placement):
    """12 experts on 5 ranks are uneven; round robin interleaves them."""
    layers = [
        rank_layer(vllm_config, tensors, ep_size, rank, placement=placement)
        for rank in range(ep_size)
    ]
    maps = torch.stack([layer.expert_map for layer in layers])
    assert ((maps >= 0).sum(0) == 1).all()
    assert (maps[0, 1] == -1) == (placement == "round_robin")
    total = sum(output(layer, *TOKENS) for layer in layers)
    assert relative_error(total, whole) <= TOLERANCE


def test_tensor_parallel_ranks_add_up_too(vllm_config, tensors):
    """Each rank has every expert, and 16 of its 32 intermediate values."""
    whole = output(rank_layer(vllm_config, tensors, 1, 0, activations="bf16"), *TOKENS)
    halves = [
        output(rank_layer(vllm_config, tensors, 1, 0, tp=(2, rank), activations="bf16"), *TOKENS)
        for rank in range(2)
    ]
    assert relative_error(sum(halves), whole) <= TOLERANCE
    assert relative_error(halves[0], whole) > 0.1


class Mailbox:
    """EPLB's way between ranks that are threads of one process."""

    needs_profile_buffer_reservation = False

    def __init__(self, num_ranks: int) -> None:
        self.barrier = threading.Barrier(num_ranks, timeout=300)
        self.sent: dict[tuple, list[torch.Tensor]] = {}

    def of(self, rank: int):
        receives: list[tuple] = []

        def add_send(tensors, dst_rank, expert_id):
            self.sent[rank, dst_rank, expert_id] = [tensor.clone() for tensor in tensors]

        def add_recv(tensors, src_rank, expert_id):
            receives.append((tensors, (src_rank, rank, expert_id)))

        def execute():
            self.barrier.wait()
            for tensors, key in receives:
                for tensor, sent in zip(tensors, self.sent[key], strict=True):
                    tensor.copy_(sent)
            receives.clear()
            self.barrier.wait()

        return SimpleNamespace(
            add_send=add_send,
            add_recv=add_recv,
            execute=execute,
            set_transfer_context=lambda *_: None,
            needs_profile_buffer_reservation=False,
        )


def rearrange(layers, old: torch.Tensor, new: torch.Tensor) -> None:
    """vLLM's exchange of expert weights, from physical-to-logical map old to new."""
    from vllm.distributed.eplb.rebalance_execute import rearrange_expert_weights_inplace

    mailbox, failures = Mailbox(len(layers)), []

    def run(rank: int) -> None:
        group = SimpleNamespace(size=lambda: len(layers), rank=lambda: rank)
        weights = list(layers[rank].get_expert_weights())
        buffer = [torch.empty_like(weight) for weight in weights]
        try:
            rearrange_expert_weights_inplace(
                old[None], new[None], [weights], buffer, group, mailbox.of(rank)
            )
        except BaseException as error:
            failures.append(error)
            mailbox.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(layers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def physical(ids: torch.Tensor, physical_to_logical: torch.Tensor) -> torch.Tensor:
    """Each logical id as one of its copies, by turns from token to token."""
    copies = defaultdict(list)
    for number, logical in enumerate(physical_to_logical.tolist()):
        copies[logical].append(number)
    rows = [
        [copies[logical][token % len(copies[logical])] for logical in row]
        for token, row in enumerate(ids.tolist())
    ]
    return torch.tensor(rows, dtype=ids.dtype)


def test_redundant_experts_and_their_scales_follow_eplb(vllm_config, tensors, whole):
    """4 redundant experts on 4 ranks, rearranged by vLLM's policy for a skewed load."""
    from vllm.distributed.eplb.eplb_state import EplbState
    from vllm.distributed.eplb.policy.default import DefaultEplbPolicy

    layers = [rank_layer(vllm_config, tensors, 4, rank, redundant=4) for rank in range(4)]
    initial = EplbState.build_initial_global_physical_to_logical_map(CONFIG.experts, 4)
    old = torch.tensor(initial)
    x, weights, ids = TOKENS

    def total(placement: torch.Tensor) -> torch.Tensor:
        given = physical(ids, placement)
        return sum(output(layer, x, weights, given) for layer in layers)

    before = total(old)
    assert relative_error(before, whole) <= TOLERANCE
    load_by_expert = torch.tensor([[100, 1, 1, 50, 1, 1, 1, 1, 1, 1, 1, 80]])
    (new,) = DefaultEplbPolicy.rebalance_experts(load_by_expert, 16, 1, 1, 4)
    assert (new != old).sum() > 8 and (new == 0).sum() > 1
    scales = {e: [] for e in range(CONFIG.experts)}
    for layer, held in zip(layers, old.view(4, 4), strict=True):
        for expert, scale in zip(held.tolist(), layer.w2_activation_scale.tolist(), strict=True):
            scales[expert].append(scale)
    assert len({held[0] for held in scales.values()}) > 1

    rearrange(layers, old, new)

    moved = [scale for layer in layers for scale in layer.w2_activation_scale.tolist()]
    assert moved == [scales[expert][0] for expert in new.tolist()]
    assert relative_error(total(new), whole) <= TOLERANCE
    # What the old placement says about the new weights is wrong: they did move.
    assert relative_error(total(old), whole) > 0.1


def test_eplb_moves_every_tensor_of_an_expert(vllm_config, tensors):
    layer = rank_layer(vllm_config, tensors, 4, 1, redundant=4)
    moved = [name for name, _ in layer.named_parameters()]
    assert sorted(moved) == [
        "w13_weight",
        "w13_weight_scale",
        "w13_weight_scale_2",
        "w2_activation_scale",
        "w2_weight",
        "w2_weight_scale",
        "w2_weight_scale_2",
    ]
    assert [len(weight) for weight in layer.get_expert_weights()] == [4] * 7
    runs = layer.quant_method.moe_kernel.fused_experts.layer
    used = {tensor.data_ptr() for tensor in (*runs.weights, runs.activation_scales.fc2)}
    assert used == {param.data_ptr() for param in layer.parameters()}


@pytest.mark.parametrize("ep_rank", range(4))
def test_local_experts_are_vllms_logical_experts(vllm_config, tensors, ep_rank):
    from vllm.distributed.eplb.eplb_state import EplbState

    from vllm_dsv4_moe.expert_params import local_experts

    layer = rank_layer(vllm_config, tensors, 4, ep_rank, redundant=4)
    initial = EplbState.build_initial_global_physical_to_logical_map(CONFIG.experts, 4)
    assert local_experts(layer) == list(initial)[4 * ep_rank : 4 * ep_rank + 4]
