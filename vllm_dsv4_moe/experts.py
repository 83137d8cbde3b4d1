"""The modular experts class: it runs `dsv4_kernels.moe` in a workspace (arena) that vLLM owns."""

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from dsv4_kernels.moe import moe, workspace_bytes
from dsv4_kernels.types import MoeLayer, Routing
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP


class Dsv4Experts(mk.FusedMoEExpertsModular):
    """One layer's experts behind vLLM's interface: after dispatch, before combine across ranks."""

    # The arena is a whole number of bf16 elements: vLLM gives the workspace the output's dtype.
    def __init__(
        self,
        moe_config: FusedMoEConfig,
        quant_config: FusedMoEQuantConfig,
        layer: MoeLayer,
        max_num_tokens: int | None = None,
        num_dispatchers: int | None = None,
    ) -> None:
        super().__init__(moe_config, quant_config, max_num_tokens, num_dispatchers)
        self.layer = layer
        self.arena = (-(-workspace_bytes(layer.backend, layer.shape) // 2),)

    @property
    def expects_unquantized_inputs(self) -> bool:
        return True

    @staticmethod
    def activation_format() -> mk.FusedMoEActivationFormat:
        return mk.FusedMoEActivationFormat.Standard

    @staticmethod
    def _supports_current_device() -> bool:
        return True

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return False

    @staticmethod
    def _supports_quant_scheme(weight_key, activation_key) -> bool:
        return True

    @staticmethod
    def _supports_activation(activation: MoEActivation) -> bool:
        return activation == MoEActivation.SILU

    @staticmethod
    def _supports_parallel_config(moe_parallel_config) -> bool:
        return True

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
        """The arena is the second workspace, because the output may lie in the first.

        It is sized for the most tokens whatever M is: the first call allocates it, none grows it.
        K is the width of what was dispatched, which may be packed tokens.
        """
        return (0,), self.arena, self.output_shape(M, local_num_experts)

    def output_shape(self, rows: int, num_local_experts: int) -> tuple[int, ...]:
        return rows, self.layer.shape.hidden

    def finalize_weight_and_reduce_impl(self) -> mk.TopKWeightAndReduce:
        return TopKWeightAndReduceNoOP()

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
        assert not apply_router_weight_on_input, "the routing weight belongs before W2"
        routing, arena = Routing(topk_weights, topk_ids), workspace2.view(torch.uint8)
        self.run(hidden_states, routing, arena, expert_map, expert_tokens_meta, output)

    def run(
        self,
        hidden_states: torch.Tensor,
        routing: Routing,
        arena: torch.Tensor,
        expert_map: torch.Tensor | None,
        meta: mk.ExpertTokensMetadata | None,
        output: torch.Tensor,
    ) -> None:
        moe(hidden_states, routing, self.layer, arena, expert_map=expert_map, out=output)
