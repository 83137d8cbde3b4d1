"""The experts class for dispatches that group rows by expert: DeepEP's low latency, nixl."""

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from dsv4_kernels.batched import batched_moe
from dsv4_kernels.types import MoeLayer
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceDelegate

from vllm_dsv4_moe.experts import Dsv4Experts


class Dsv4BatchedExperts(Dsv4Experts):
    """One layer's experts on (local experts, rows, hidden); combine weights and sums the rows."""

    def __init__(
        self,
        moe_config: FusedMoEConfig,
        quant_config: FusedMoEQuantConfig,
        layer: MoeLayer,
        num_dispatchers: int,
    ) -> None:
        super().__init__(
            moe_config, quant_config, layer, moe_config.max_num_tokens, num_dispatchers
        )

    @property
    def expects_unquantized_inputs(self) -> bool:
        """False, which these dispatches insist on; the quant config has them leave rows in bf16."""
        return False

    @staticmethod
    def activation_format() -> mk.FusedMoEActivationFormat:
        return mk.FusedMoEActivationFormat.BatchedExperts

    def workspace_shapes(
        self,
        M: int,
        N: int,
        K: int,
        topk: int,
        global_num_experts: int,
        local_num_experts: int,
        expert_tokens_meta: mk.ExpertTokensMetadata | None,
        activation: MoEActivation,
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """M is an expert's rows."""
        return (0,), self.arena, (local_num_experts, M, K)

    def finalize_weight_and_reduce_impl(self) -> mk.TopKWeightAndReduce:
        return TopKWeightAndReduceDelegate()

    def apply(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: MoEActivation,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        a1q_scale: torch.Tensor | None,
        a2_scale: torch.Tensor | None,
        workspace13: torch.Tensor,
        workspace2: torch.Tensor,
        expert_tokens_meta: mk.ExpertTokensMetadata | None,
        apply_router_weight_on_input: bool,
    ) -> None:
        """topk_ids are this rank's tokens': the others are taken to have as many."""
        assert not apply_router_weight_on_input, "the routing weight belongs before W2"
        assert expert_tokens_meta is not None and expert_tokens_meta.expert_num_tokens is not None
        assert self.num_dispatchers is not None
        shape = self.layer.shape
        num_tokens = len(topk_ids) * self.num_dispatchers
        batched_moe(
            hidden_states,
            expert_tokens_meta.expert_num_tokens[: shape.num_local_experts],
            max(1, min(num_tokens, shape.max_num_tokens)),
            self.layer,
            workspace2.view(torch.uint8),
            out=output,
        )
