"""The gate inside the router: small batches go from hidden states to experts in one launch.

DeepSeek-V4's model hands vLLM's runner its hidden states as the logits, and the runner applies the
gate to them. A runner without a gate hands them on as they are: then the router applies the gate.
"""

import functools
from collections.abc import Callable

import torch
from dsv4_kernels.route.gate_route import MAX_TOKENS, GateScratch, make_scratch
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import FusedMoEConfig, GateLinear
from vllm.v1.worker.ubatching import dbo_current_ubatch_id

logger = init_logger("vllm.dsv4_moe")


# The fewest tokens that one launch gates and routes faster than vLLM's kernel for at most 16 and
# this project's router after it: 5.6 us against 5.0 at 1 token of Pro, 6.5 against 6.0 at 16; hash
# layers, which only weigh, 4.0 against 3.4 at 1 and 4.9 against 5.0 at 4 (H200, 97c6d5b).
FEWEST_DENSE, FEWEST_HASH = 17, 4


class FusedGate:
    """A layer's gate, for its router to apply.

    linear is vLLM's module, which serves the batches where one launch is not faster; its weight
    is (num_experts, hidden) bf16. op has the signature of gate_route.
    """

    def __init__(self, linear: GateLinear, op: Callable, is_hash: bool) -> None:
        self.linear = linear
        self.op = op
        self.fewest = 1
        if linear.allow_ll_bf16_gemm:
            self.fewest = FEWEST_HASH if is_hash else FEWEST_DENSE
        # 0 without micro-batches.
        self.num_lanes = max(1, get_current_vllm_config().parallel_config.num_ubatches)

    def fits(self, num_tokens: int) -> bool:
        return self.fewest <= num_tokens <= MAX_TOKENS

    @property
    def weight(self) -> torch.Tensor:
        return self.linear.weight

    def scratch(self) -> GateScratch:
        """The running micro-batch's scratch; all layers of a shape share it.

        Call this for every batch, large ones too: then vLLM's profiling run allocates it, before
        any graph capture.
        """
        num_experts, hidden = self.weight.shape
        lanes = _lane_scratch(hidden, num_experts, self.weight.device, self.num_lanes)
        return lanes[dbo_current_ubatch_id()]


@functools.cache
def _lane_scratch(
    hidden: int, num_experts: int, device: torch.device, num_lanes: int
) -> list[GateScratch]:
    # Captured, its zeroing would wait for a replay, and the counters must be zero before.
    assert device.type != "cuda" or not torch.cuda.is_current_stream_capturing()
    return [make_scratch(hidden, num_experts, device) for _ in range(num_lanes)]


def fused_gate(
    gate: torch.nn.Module | None, moe_config: FusedMoEConfig, op: Callable | None, is_hash: bool
) -> FusedGate | None:
    """The gate for the router to apply, or None where vLLM's runner goes on applying it.

    op is None where the layer's settings or its backend leave the gate to vLLM.
    """
    if op is None or gate is None:
        return None
    reason = unsupported_reason(gate, moe_config)
    if reason is not None:
        logger.info_once("dsv4-moe: vLLM applies the gate: %s", reason)
        return None
    assert isinstance(gate, GateLinear)
    fused = FusedGate(gate, op, is_hash)
    kind = "hash" if is_hash else "dense"
    logger.info_once(
        "dsv4-moe: one launch gates and routes %d to %d tokens in %s layers",
        fused.fewest, MAX_TOKENS, kind,
    )  # fmt: skip
    return fused


def unsupported_reason(gate: torch.nn.Module, moe_config: FusedMoEConfig) -> str | None:
    """What keeps this gate from being applied by gate_route, or None."""
    if not isinstance(gate, GateLinear):
        return f"it is a {type(gate).__name__}"
    wanted = (moe_config.num_logical_experts, moe_config.hidden_dim)
    if not gate.is_unquantized or gate.bias is not None:
        return "it is quantised, or has a bias inside"
    if gate.weight.dtype != torch.bfloat16 or tuple(gate.weight.shape) != wanted:
        return f"its weight is {gate.weight.dtype} {tuple(gate.weight.shape)}"
    if gate.out_dtype != torch.float32:
        return f"its logits are {gate.out_dtype}"
    if moe_config.is_lora_enabled:
        return "LoRA may change it"
    if moe_config.pcp_size > 1:
        return "prefill context parallelism gathers logits"
    return None
