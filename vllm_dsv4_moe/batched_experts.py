"""The experts class for dispatches that group rows by expert: DeepEP's low latency, nixl."""

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from dsv4_kernels.batched import batched_moe
from dsv4_kernels.types import MoeLayer, Routing
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceDelegate

from vllm_dsv4_moe.experts import Dsv4Experts


class Dsv4BatchedExperts(Dsv4Experts):
    """One layer's experts on x (local experts, rows, hidden) bf16. vLLM's combine multiplies the
    rows by their routing weights and sums them."""

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

    def output_shape(self, rows: int, num_local_experts: int) -> tuple[int, ...]:
        """rows is the number of rows of each expert."""
        return num_local_experts, rows, self.layer.shape.hidden

    def finalize_weight_and_reduce_impl(self) -> mk.TopKWeightAndReduce:
        return TopKWeightAndReduceDelegate()

    def run(
        self,
        hidden_states: torch.Tensor,
        routing: Routing,
        arena: torch.Tensor,
        expert_map: torch.Tensor | None,
        meta: mk.ExpertTokensMetadata | None,
        output: torch.Tensor,
    ) -> None:
        """routing is of this rank's tokens. For the choice of tiles the others count as many."""
        assert meta is not None and meta.expert_num_tokens is not None
        assert self.num_dispatchers is not None
        shape = self.layer.shape
        num_tokens = len(routing.ids) * self.num_dispatchers
        batched_moe(
            hidden_states,
            meta.expert_num_tokens[: shape.num_local_experts],
            max(1, min(num_tokens, shape.max_num_tokens)),
            self.layer,
            arena,
            out=output,
        )
