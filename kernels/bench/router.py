"""Routing, routing with layout, and gate with routing, against vLLM's kernels in the same run.

    python -m bench.router --out router.json [--commit ABC]

Every case is compared with the reference before it is timed. vLLM's part needs a Python that has
vLLM; without it, ours are timed alone. The bars: no slower with routing and the gate, 0.6 with the
layout. Logits and ids stay in L2, where the kernel before leaves
them; the gate's weights are cold, as a layer finds them.
"""

import functools
import importlib.metadata
import importlib.util
import itertools
from collections.abc import Callable

import torch
from bench.arguments import one_command
from bench.inputs import expert_map
from bench.released import released_shape
from bench.timing import cold_sets, print_table, time_us, time_warm_us, write_results
from dsv4_kernels import reference
from dsv4_kernels.route.gate_route import gate_route, make_scratch
from dsv4_kernels.route.router_topk import router_topk
from dsv4_kernels.rows.expert_layout import expert_layout, make_layout, scratch_size
from dsv4_kernels.types import Routing

TOP_K, SCALING, TILE, VOCAB = 6, 2.5, 64, 4096
NUM_TOKENS = (1, 8, 32, 128, 512, 2048, 8192)
GATE_TOKENS = (1, 4, 8, 16, 32, 64)
HAS_VLLM = importlib.util.find_spec("vllm") is not None


def random(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(size, device="cuda", dtype=dtype)


class Case:
    """One batch of logits with everything that either layer kind routes it by."""

    def __init__(self, num_tokens: int, num_experts: int, ranks: int) -> None:
        self.logits = random(num_tokens, num_experts)
        self.bias = 0.1 * random(num_experts)
        rows = torch.rand(VOCAB, num_experts, device="cuda").argsort(1)
        self.table = rows[:, :TOP_K].int().contiguous()
        self.token_ids = torch.randint(VOCAB, (num_tokens,), device="cuda", dtype=torch.int32)
        self.num_local = num_experts // ranks
        self.expert_map = expert_map(num_experts, self.num_local)
        self.routing = empty_routing(num_tokens)
        self.layout = make_layout(num_tokens, TOP_K, self.num_local, TILE, self.logits.device)
        size = scratch_size(num_tokens, TOP_K, self.num_local)
        self.scratch = torch.empty(size, dtype=torch.int32, device="cuda")

    def options(self, kind: str) -> dict:
        if kind == "dense":
            return {"bias": self.bias}
        return {"table": self.table, "token_ids": self.token_ids}

    def route(self, kind: str) -> Routing:
        options = self.options(kind)
        return router_topk(self.logits, TOP_K, scaling=SCALING, out=self.routing, **options)

    def lay_out(self):
        return expert_layout(
            self.routing.ids,
            self.num_local,
            self.expert_map,
            TILE,
            out=self.layout,
            scratch=self.scratch,
        )

    def verify(self, kind: str) -> None:
        expected = reference.router_topk(self.logits, TOP_K, scaling=SCALING, **self.options(kind))
        check_routing(self.route(kind), expected)
        laid_out = reference.expert_layout(self.routing.ids, self.num_local, self.expert_map, TILE)
        for ours, theirs in zip(self.lay_out(), laid_out, strict=True):
            assert torch.equal(ours, theirs)


def empty_routing(num_tokens: int) -> Routing:
    weights = torch.empty(num_tokens, TOP_K, device="cuda")
    return Routing(weights, torch.empty_like(weights, dtype=torch.int32))


def check_routing(ours: Routing, expected: Routing) -> None:
    """Ids may differ where two random selections are nearly equal: in one slot of 10000."""
    same = ours.ids == expected.ids
    assert (~same).sum() <= 2 + same.numel() // 10000, f"{(~same).sum()} ids differ"
    torch.testing.assert_close(ours.weights[same], expected.weights[same], rtol=1e-3, atol=1e-6)


class Peer:
    """vLLM 0.32's own: what a DeepSeek-V4 layer calls on an H200."""

    def __init__(self) -> None:
        from vllm.config import VllmConfig, set_current_vllm_config

        # Left open: the calls below ask for the current configuration.
        self.context = set_current_vllm_config(VllmConfig())
        self.context.__enter__()

    def route(self, case: Case, kind: str) -> torch.Tensor:
        from vllm.model_executor.layers.fused_moe.router.fused_topk_bias_router import (
            fused_topk_bias,
        )

        hashed = kind == "hash"
        return fused_topk_bias(
            case.logits,
            case.logits,
            "sqrtsoftplus",
            None if hashed else case.bias,
            TOP_K,
            True,
            torch.int32,
            input_tokens=case.token_ids if hashed else None,
            hash_indices_table=case.table if hashed else None,
            routed_scaling_factor=SCALING,
        )[1]

    def lay_out(self, case: Case, ids: torch.Tensor) -> None:
        from vllm.model_executor.layers.fused_moe.moe_align_block_size import moe_align_block_size

        num_experts = case.logits.shape[1]
        moe_align_block_size(ids, TILE, num_experts, case.expert_map, ignore_invalid_experts=True)

    def gate(self, x: torch.Tensor, gate_weight: torch.Tensor) -> torch.Tensor:
        """The tiers of vLLM's GateLinear that a bf16 gate with fp32 logits reaches on Hopper."""
        from vllm.model_executor.kernels.linear.cute_dsl import ll_bf16

        if len(x) <= 16 and ll_bf16.is_available():
            return ll_bf16.ll_bf16_gemm(x, gate_weight)
        return torch.mm(x, gate_weight.T, out_dtype=torch.float32)


def bench_routing(peer: Peer | None) -> list[dict]:
    rows = []
    for num_experts in (256, 384):
        for num_tokens in NUM_TOKENS:
            case = Case(num_tokens, num_experts, ranks=8)
            for kind in ("dense", "hash"):
                case.verify(kind)
                ours = time_warm_us(lambda: case.route(kind))
                theirs = time_warm_us(lambda: peer.route(case, kind)) if peer else None
                rows.append(row(f"route {kind}", num_experts, num_tokens, ours, theirs, bar=1.0))
    return rows


def bench_layout(peer: Peer | None) -> list[dict]:
    rows = []
    for num_experts, ranks in ((256, 1), (256, 8), (384, 8)):
        for num_tokens in NUM_TOKENS:
            case = Case(num_tokens, num_experts, ranks)
            for kind in ("dense", "hash"):
                case.verify(kind)

                def ours() -> None:
                    case.route(kind)
                    case.lay_out()

                def theirs() -> None:
                    assert peer is not None
                    peer.lay_out(case, peer.route(case, kind))

                name = f"route {kind} + layout, {case.num_local} local"
                theirs_us = time_warm_us(theirs) if peer else None
                ours_us = time_warm_us(ours)
                rows.append(row(name, num_experts, num_tokens, ours_us, theirs_us, bar=0.6))
    return rows


def bench_gate(peer: Peer | None) -> list[dict]:
    """In one launch, and as vLLM's gate with this project's router after it ("then")."""
    rows = []
    for shape in map(released_shape, ("flash", "pro")):
        hidden, num_experts = shape.hidden, shape.num_experts
        sets = cold_sets(2 * hidden * num_experts)
        gates = [random(num_experts, hidden, dtype=torch.bfloat16) / 64 for _ in range(sets)]
        scratch = make_scratch(hidden, num_experts, gates[0].device)
        for num_tokens, kind in itertools.product(GATE_TOKENS, ("dense", "hash")):
            case = Case(num_tokens, num_experts, ranks=1)
            x = random(num_tokens, hidden, dtype=torch.bfloat16)
            options = {"scaling": SCALING, **case.options(kind)}

            def one(gate: torch.Tensor) -> Routing:
                return gate_route(x, gate, TOP_K, scratch=scratch, out=case.routing, **options)

            def two(gate: torch.Tensor) -> Routing:
                assert peer is not None
                return router_topk(peer.gate(x, gate), TOP_K, out=case.routing, **options)

            def theirs(gate: torch.Tensor) -> None:
                assert peer is not None
                case.logits = peer.gate(x, gate)
                peer.route(case, kind)

            def us(call: Callable) -> float:
                return time_us([functools.partial(call, gate) for gate in gates])

            logits = x.float() @ gates[0].float().T
            expected = reference.router_topk(logits, TOP_K, **options)
            check_routing(one(gates[0]), expected)
            theirs_us = us(theirs) if peer else None
            sizes = (num_experts, num_tokens)
            name = f"gate {hidden} + route {kind}"
            rows.append(row(name, *sizes, us(one), theirs_us, bar=1.0))
            if peer:
                check_routing(two(gates[0]), expected)
                name = f"gate {hidden}, then route {kind}"
                rows.append(row(name, *sizes, us(two), theirs_us, bar=None))
    return rows


def row(
    name: str,
    num_experts: int,
    num_tokens: int,
    ours: float,
    theirs: float | None,
    bar: float | None,
) -> dict:
    """bar: the largest ratio of ours to theirs that is good enough; None where there is no bar."""
    ratio = ours / theirs if theirs else None
    return {
        "kernel": name,
        "experts": num_experts,
        "tokens": num_tokens,
        "us": ours,
        "vllm_us": theirs,
        "ratio": ratio,
        "bar": bar,
        "bar met": None if ratio is None or bar is None else ratio <= bar,
    }


def main() -> None:
    arguments = one_command(__doc__)
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    peer = Peer() if HAS_VLLM else None
    if peer is None:
        print("this Python has no vLLM: ours alone")
    rows = bench_routing(peer) + bench_layout(peer) + bench_gate(peer)
    print_table(rows)
    version = importlib.metadata.version("vllm") if HAS_VLLM else None
    write_results(arguments.out, rows, arguments.commit, vllm=version)


if __name__ == "__main__":
    main()
