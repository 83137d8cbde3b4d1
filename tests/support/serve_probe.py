"""What the serving tests put into vLLM's processes, by way of cpu_host's CPU_HOST_PROBE.

`record` keeps what each MoE layer was given and gave, as SERVE_PROBE_DIR/<process>-<call>.pt,
while SERVE_PROBE_DIR/on exists; `record_gated` does with the gate inside the router, as on GPUs,
its kernel in Triton's interpreter. `substitute` has PlainMoe compute every MoE layer instead, from
the checkpoint and the scales that SERVE_PROBE_PLAIN names.
"""

import itertools
import json
import os
from pathlib import Path

import torch

from tests.support.plain_moe import PlainMoe


def keep_chunked_prefill() -> None:
    """vLLM turns chunked prefill off on a CPU without AMX; attention there does it all the same."""
    from vllm.platforms.cpu import CpuPlatform

    update = CpuPlatform.check_and_update_config

    def updated(vllm_config) -> None:
        scheduler = vllm_config.scheduler_config
        asked = scheduler.enable_chunked_prefill, scheduler.max_num_batched_tokens
        update(vllm_config)
        scheduler.enable_chunked_prefill, scheduler.max_num_batched_tokens = asked

    CpuPlatform.check_and_update_config = staticmethod(updated)


def record() -> None:
    keep_chunked_prefill()
    from vllm.forward_context import get_forward_context
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    folder = Path(os.environ["SERVE_PROBE_DIR"])
    forward, calls = MoERunner.forward, itertools.count()

    def recorded(self, hidden_states, router_logits, input_ids=None, shared_experts_input=None):
        given = hidden_states.clone()
        out = forward(self, hidden_states, router_logits, input_ids, shared_experts_input)
        if (folder / "on").exists():
            padding = get_forward_context().is_padding
            entry = {
                "layer": self.layer_id,
                "x": given,
                "token_ids": None if input_ids is None else input_ids.clone(),
                "out": out.clone(),
                "padding": torch.zeros(len(out), dtype=bool)
                if padding is None
                else padding[: len(out)],
                "local_experts": self.routed_experts.local_num_experts,
            }
            file = folder / f"{os.getpid()}-{next(calls):06}.pt"
            torch.save(entry, file.with_suffix(".part"))
            file.with_suffix(".part").rename(file)
        return out

    MoERunner.forward = recorded


def record_gated() -> None:
    from vllm_dsv4_moe import moe_method, runner

    moe_method.Dsv4Method.gate_op = interpreted_gate_op
    runner.fused_gate = fused_and_kept
    record()


def interpreted_gate_op(method):
    from dsv4_kernels.route.gate_route import gate_route

    return gate_route


def fused_and_kept(gate, *others):
    """fused_gate, of a gate that keeps its weight: vLLM packs those of linears on a CPU."""
    from vllm_dsv4_moe.gate import fused_gate

    gate._cpu_skip_gemm_dispatch = True
    return fused_gate(gate, *others)


def substitute() -> None:
    keep_chunked_prefill()
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    plain = json.loads(os.environ["SERVE_PROBE_PLAIN"])
    layers = [
        PlainMoe(Path(plain["checkpoint"]), number, *scales)
        for number, scales in enumerate(plain["scales"])
    ]

    def substituted(self, hidden_states, router_logits, input_ids=None, shared_experts_input=None):
        return layers[self.layer_id](hidden_states, input_ids)

    MoERunner.forward = substituted
