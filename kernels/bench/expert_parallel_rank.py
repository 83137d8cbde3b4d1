"""One rank of bench.expert_parallel: a contender made, compared with the oracle, and timed."""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from bench.inputs import LIMIT, Inputs, cold_inputs, expert_map, random_inputs, random_weights
from bench.layer import TOLERANCE
from bench.peers import Call, moe_config, mxfp4_method, nvfp4_method, vllm_context
from bench.timing import time_us
from dsv4_kernels import activation_scale, reference
from dsv4_kernels import moe as layers
from dsv4_kernels.backends import Backend, choose_backend
from dsv4_kernels.compiled import KernelCache, use_cache
from dsv4_kernels.trusted_folder import TrustedFolder
from dsv4_kernels.types import ExpertWeights, MoeShape, Routing

STAGES = ("dispatch", "experts", "combine", "together")
# How activations are multiplied, and whether they are quantised before they travel.
OURS = {
    "w4a16": ("bf16", False),
    "w4a8": ("fp8", False),
    "w4a8_packed": ("fp8", True),
    "w4a4": ("nvfp4", False),
    "w4a4_packed": ("nvfp4", True),
}
PEERS: dict[str, dict[str, Callable]] = {
    "nvfp4": {name: partial(nvfp4_method, name) for name in ("marlin", "humming")},
    "mxfp4": {
        "marlin": partial(mxfp4_method, "marlin"),
        "humming_fp8": partial(mxfp4_method, "humming", fp8_activations=True),
    },
}
# Relative L2 against bf16 activations. W4A8 is 4.7 % from it, 6.2 % of NVFP4 weights, W4A4 16 %; a
# wrong scale or expert is 40 % or more.
TOLERANCES = {
    "w4a8": 2.0**-3,
    "w4a8_packed": 2.0**-3,
    "humming_fp8": 2.0**-3,
    "w4a4": 2.0**-2,
    "w4a4_packed": 2.0**-2,
}


class Plan(NamedTuple):
    """What a contender's processes are told."""

    contender: str
    shape: MoeShape  # of a rank, in W4A16
    num_ranks: int
    tokens: Sequence[int]  # of a rank
    objects: Path  # a folder of compiled kernels
    rows: Path  # a JSON a line, of each number of tokens


class Contender(NamedTuple):
    kernel: Any  # vLLM's FusedMoEKernel
    w13: torch.Tensor
    w2: torch.Tensor
    padding: int  # columns that a peer's hidden size is rounded up by


@dataclass(frozen=True)
class Rank:
    """This process."""

    number: int
    count: int
    device: str
    shape: MoeShape

    @property
    def ranks(self) -> tuple[int, int]:
        return self.number, self.count

    @property
    def expert_map(self) -> torch.Tensor | None:
        """Its experts are those after the lower ranks'."""
        local = self.shape.num_local_experts
        return expert_map(self.shape.num_experts, local, self.device, first=self.number * local)

    def own(self, tensor: torch.Tensor) -> torch.Tensor:
        """Its part of all ranks' rows."""
        return tensor.chunk(self.count)[self.number].contiguous()

    def weights(self) -> ExpertWeights:
        return random_weights(self.shape, self.device, seed=self.number, equal_scales=True)

    def input_sets(self, num_tokens: int) -> list[Inputs]:
        """Of all ranks' tokens, the same on each."""
        if self.device == "cuda":
            return cold_inputs(self.shape, num_tokens * self.count)
        return [random_inputs(self.shape, num_tokens * self.count, seed, "cpu") for seed in (0, 1)]

    def oracle(self, inputs: Inputs) -> torch.Tensor:
        """Of its own tokens, on the CPU: the sum of what every rank's experts give."""
        part = reference.moe(
            inputs.x, inputs.routing, self.weights(), expert_map=self.expert_map, limit=LIMIT
        )
        total = part.float().cpu()
        dist.all_reduce(total, group=host_group())
        return self.own(total)

    def of_all(self, value: object) -> list[Any]:
        values = [None] * self.count
        dist.all_gather_object(values, value, group=host_group())
        return values

    def microseconds(self, calls: Sequence[Call]) -> float:
        """The slowest rank's."""
        self.of_all(None)
        if self.device == "cuda":
            us = time_us(calls)
        else:
            start = time.perf_counter()
            for each in calls:
                each()
            us = (time.perf_counter() - start) / len(calls) * 1e6
        return max(self.of_all(us))


def host_group() -> dist.ProcessGroup:
    """All ranks, by gloo: for what is exchanged beside what is measured."""
    from vllm.distributed import get_world_group

    return get_world_group().cpu_group


def backend_of(shape: MoeShape) -> Backend:
    """This machine's; ValueError where it cannot run the layer."""
    has_gpu = torch.cuda.is_available()
    return choose_backend("auto", shape, torch.cuda.get_device_capability() if has_gpu else None)


def our_shape(shape: MoeShape, activations: str) -> MoeShape:
    return shape._replace(quantize_activations=activations == "nvfp4", fp8=activations == "fp8")


def ours(name: str, rank: Rank) -> Contender:
    import vllm.model_executor.layers.fused_moe.modular_kernel as mk
    from vllm.model_executor.layers.fused_moe.all2all_utils import maybe_make_prepare_finalize
    from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig

    from vllm_dsv4_moe.experts import Dsv4Experts
    from vllm_dsv4_moe.packed_dispatch import packed_where_gathered

    activations, packs = OURS[name]
    shape, weights, scales = our_shape(rank.shape, activations), rank.weights(), None
    if shape.quantize_activations:
        scales = activation_scale.warmup(weights, limit=LIMIT, scaling=1.0)
    backend = backend_of(shape)
    layer = layers.prepare_layer(backend, shape, weights, limit=LIMIT, activation_scales=scales)
    config = moe_config("auto", shape, rank.ranks, rank.device)
    quant = FusedMoEQuantConfig.make(None, weight_dtype=shape.weight_format)
    exchange = maybe_make_prepare_finalize(
        moe=config, quant_config=quant, allow_new_interface=True, use_monolithic=False
    )
    if packs:
        exchange = packed_where_gathered(exchange, layer)
    kernel = mk.FusedMoEKernel(exchange, Dsv4Experts(config, quant, layer))
    return Contender(kernel, layer.weights.w13, layer.weights.w2, 0)


def contender(name: str, rank: Rank) -> Contender:
    if name in OURS:
        return ours(name, rank)
    make = PEERS[rank.shape.weight_format][name]
    method, module, hidden = make(rank.shape, rank.weights(), rank.ranks)
    padding = hidden - rank.shape.hidden
    return Contender(method.moe_kernel, module.w13_weight, module.w2_weight, padding)


def stages(one: Contender, x: torch.Tensor, routing: Routing, rank: Rank) -> dict[str, Call]:
    """A call of each stage, on what those before it gave; `together` returns the output."""
    import vllm.model_executor.layers.fused_moe.modular_kernel as mk
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.prepare_finalize.naive_dp_ep import (
        MoEPrepareAndFinalizeNaiveDPEPModular,
    )

    class Exchanged(MoEPrepareAndFinalizeNaiveDPEPModular):
        """Tokens were exchanged before, and outputs are not."""

        def prepare(self, *_, **__):
            return dispatched

        def finalize(self, output, fused_expert_output, *_):
            self.rows = fused_expert_output

    mapping, num_experts = rank.expert_map, rank.shape.num_experts
    experts, exchange = one.kernel.fused_experts, one.kernel.prepare_finalize

    def padded() -> torch.Tensor:
        return torch.nn.functional.pad(x, (0, one.padding)) if one.padding else x

    def dispatch() -> tuple:
        return exchange.prepare(
            padded(),
            routing.weights,
            routing.ids,
            num_experts,
            mapping,
            False,
            experts.quant_config,
            defer_input_quant=experts.expects_unquantized_inputs,
        )

    def apply(kernel: mk.FusedMoEKernel) -> torch.Tensor:
        out = kernel.apply(
            padded(),
            one.w13,
            one.w2,
            topk_weights=routing.weights,
            topk_ids=routing.ids,
            activation=MoEActivation.SILU,
            global_num_experts=num_experts,
            expert_map=mapping,
            apply_router_weight_on_input=False,
        )
        return out[:, : x.shape[1]]

    dispatched = dispatch()
    _, _, _, ids, weights = dispatched
    if ids is None:  # of one rank, which has nothing to exchange
        weights, ids = routing
    exchanged = Exchanged(num_dispatchers=rank.count)
    alone = mk.FusedMoEKernel(exchanged, experts)
    apply(alone)
    rows, out = exchanged.rows.clone(), torch.empty_like(padded())
    reduce = experts.finalize_weight_and_reduce_impl()
    return {
        "dispatch": dispatch,
        "experts": lambda: apply(alone),
        "combine": lambda: exchange.finalize(out, rows, weights, ids, False, reduce),
        "together": lambda: apply(one.kernel),
    }


@contextlib.contextmanager
def step_of(num_tokens: int, rank: Rank) -> Iterator[None]:
    """vLLM's context of a step in which every rank has as many tokens."""
    from vllm.forward_context import get_forward_context, set_forward_context

    across = torch.full((rank.count,), num_tokens, dtype=torch.int32)
    config = vllm_context(rank.ranks, rank.device)
    with (
        set_forward_context(None, config, num_tokens=num_tokens, num_tokens_across_dp=across),
        contextlib.ExitStack() as stack,
    ):
        if metadata := get_forward_context().dp_metadata:
            stack.enter_context(metadata.sp_local_sizes(1))
        yield


def measured(name: str, one: Contender, num_tokens: int, rank: Rank) -> dict:
    """Error, the bytes of what a rank gathers and, of a right answer, each stage's microseconds."""
    sets = rank.input_sets(num_tokens)
    expected = rank.oracle(sets[0])
    with step_of(num_tokens, rank):
        of_sets = [
            stages(one, rank.own(x), Routing(*map(rank.own, routing)), rank)
            for x, routing, *_ in sets
        ]
        out = of_sets[0]["together"]().float().cpu()
        gathered = [part for part in of_sets[0]["dispatch"]() if part is not None]
        error = max(rank.of_all(float((out - expected).norm() / expected.norm())))
        row = {"error": error, "gathered_bytes": sum(part.nbytes for part in gathered)}
        if error < TOLERANCES.get(name, TOLERANCE):
            for stage in STAGES:
                row[f"{stage}_us"] = rank.microseconds([each[stage] for each in of_sets])
    return row


def run_rank(number: int, port: int, plan: Plan) -> None:
    """One process; the first writes."""
    count = plan.num_ranks
    environment = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in environment.items()}
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    rank = Rank(number, count, "cuda" if torch.cuda.is_available() else "cpu", plan.shape)
    if rank.device == "cuda":
        torch.cuda.set_device(number)
    else:
        # vLLM's CPU build has no collectives of as many rows as each rank has; tests/cpu_host does.
        from vllm.plugins import load_general_plugins

        load_general_plugins()
    use_cache(KernelCache([TrustedFolder(plan.objects)]))
    vllm_context(rank.ranks, rank.device)
    one = contender(plan.contender, rank)
    for num_tokens in plan.tokens:
        found = measured(plan.contender, one, num_tokens, rank)
        row = {"contender": plan.contender, "tokens": num_tokens, **found}
        if number == 0:
            print(row, flush=True)
            with plan.rows.open("a") as file:
                file.write(json.dumps(row) + "\n")
