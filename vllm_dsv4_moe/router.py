"""The router: logits or hidden states and token ids in, expert ids and weights out.

vLLM's GateLinear makes the logits, or one launch of this project's gates and routes; vLLM's
BaseRouter maps logical experts to the physical copies that EPLB keeps.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import vllm.envs as envs
from dsv4_kernels.route.gate_route import GateScratch
from dsv4_kernels.types import ImageBias, Routing
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.config import RoutingMethodType
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
from vllm.model_executor.layers.fused_moe.router.fused_moe_router import FusedMoERouter

from vllm_dsv4_moe.gate import FusedGate

logger = init_logger("vllm.dsv4_moe")


class Dsv4Router(BaseRouter):
    """sqrt(softplus) scores; the experts are the top k with bias, or a token id's row of a table.

    bias (num_experts,) float32 or table (vocab, top_k) int32, one of them; num_experts counts the
    experts that the checkpoint has, not their EPLB copies. bias_vl (num_experts,) float32 takes
    the place of either for image tokens, whose ids begin at image_sentinel_lo; V4.1's model may
    set it later. gate makes the logits; where it is None, router_logits has them from the runner.
    """

    gate: FusedGate | None = None

    def __init__(
        self,
        vllm_router: FusedMoERouter,
        table: torch.Tensor | None,
        route: Callable,
        *,
        num_experts: int,
        hash_weights: str,
    ) -> None:
        super().__init__(vllm_router.top_k, vllm_router.global_num_experts, vllm_router.eplb_state)
        self.method_type = vllm_router.routing_method_type
        self.scaling = vllm_router.routed_scaling_factor
        self.bias = None if table is not None else vllm_router.e_score_correction_bias
        self.bias_vl = vllm_router.bias_vl
        self.image_sentinel_lo = vllm_router.image_sentinel_lo
        self.table = table
        self.route = route
        self.num_experts = num_experts
        self.hash_weights = hash_weights

    @property
    def routing_method_type(self) -> RoutingMethodType:
        return self.method_type

    def _compute_routing(
        self,
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,
        indices_type: torch.dtype | None,
        *,
        input_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        num_tokens = len(router_logits)
        token_ids = None
        if self.uses_token_ids:
            if input_ids is None or len(input_ids) != num_tokens:
                given = "none" if input_ids is None else str(len(input_ids))
                raise ValueError(
                    f"a layer that routes by token id got {num_tokens} tokens and {given} ids: it "
                    "needs one a token, so prompts of embeddings cannot be served"
                )
            token_ids = input_ids
        rest = (token_ids, padding_mask(num_tokens), indices_type)
        if self.gate is None:
            return self.select(router_logits, *rest)
        scratch = self.gate.scratch()
        if self.gate.fits(num_tokens):
            return self.gate_and_select(hidden_states, scratch, *rest)
        logits, _ = self.gate.linear(hidden_states)
        return self.select(logits, *rest)

    def select(
        self,
        logits: torch.Tensor,
        token_ids: torch.Tensor | None,
        padding: torch.Tensor | None,
        ids_dtype: torch.dtype | None,
    ) -> Routing:
        """Route logits by this layer's bias or table. token_ids only where uses_token_ids."""
        return self.route(logits, self.top_k, **self._options(token_ids, padding, ids_dtype))

    def gate_and_select(
        self,
        hidden_states: torch.Tensor,
        scratch: GateScratch,
        token_ids: torch.Tensor | None,
        padding: torch.Tensor | None,
        ids_dtype: torch.dtype | None,
    ) -> Routing:
        """The gate and `select` in one launch, for a number of tokens that `gate.fits`."""
        assert self.gate is not None
        options = self._options(token_ids, padding, ids_dtype)
        return self.gate.op(hidden_states, self.gate.weight, self.top_k, scratch=scratch, **options)

    def _options(
        self,
        token_ids: torch.Tensor | None,
        padding: torch.Tensor | None,
        ids_dtype: torch.dtype | None,
    ) -> dict[str, Any]:
        return {
            "bias": self.bias,
            "table": self.table,
            "token_ids": token_ids,
            "image_bias": self._image_bias(),
            "padding": padding,
            "scaling": self.scaling,
            "hash_weights": self.hash_weights,
            "ids_dtype": ids_dtype or torch.int32,
        }

    @property
    def uses_token_ids(self) -> bool:
        return self.table is not None or self._image_bias() is not None

    def _image_bias(self) -> ImageBias | None:
        if self.bias_vl is None or self.image_sentinel_lo == 0:
            return None
        return ImageBias(self.bias_vl, self.image_sentinel_lo)

    def check_loaded(self, gate: str) -> None:
        """ValueError for a bias or a table that is missing, or that no layer could route by.

        Rows of the table that name an expert twice are counted in one warning. gate is the
        checkpoint's name of the module that holds them.
        """
        image_bias = self._image_bias()
        biases = {"bias": self.bias, "bias_vl": None if image_bias is None else image_bias.bias}
        for name, bias in biases.items():
            if bias is not None and not math.isfinite(float(bias.abs().amax())):
                raise ValueError(
                    f"{gate}.{name} is missing from the checkpoint, or it is not finite"
                )
        if self.table is None:
            return
        smallest, largest = (int(expert) for expert in self.table.aminmax())
        if smallest == largest == -1:
            raise ValueError(f"{gate}.tid2eid is missing from the checkpoint")
        if smallest < 0 or largest >= self.num_experts:
            outside = (self.table < 0) | (self.table >= self.num_experts)
            row, slot = outside.nonzero()[0].tolist()
            raise ValueError(
                f"{gate}.tid2eid[{row}, {slot}] is {int(self.table[row, slot])}, and expert ids go "
                f"from 0 to {self.num_experts - 1}"
            )
        ids = self.table.sort(dim=1).values
        count = int((ids[:, 1:] == ids[:, :-1]).any(dim=1).sum())
        if count:
            logger.warning_once(
                "dsv4-moe: %d of %d rows of %s.tid2eid name an expert twice: both count",
                count, len(ids), gate,
            )  # fmt: skip


def unsupported_reason(vllm_router: FusedMoERouter) -> str | None:
    """What this router does that Dsv4Router does not, or None. Such a layer keeps vLLM's."""
    if getattr(vllm_router, "scoring_func", None) != "sqrtsoftplus":
        return f"{type(vllm_router).__name__} does not score by sqrt(softplus)"
    if not vllm_router.renormalize:
        return "its weights are not renormalised"
    if getattr(vllm_router, "num_fused_shared_experts", 0):
        return "shared experts are fused into it"
    return None


def padding_mask(num_tokens: int) -> torch.Tensor | None:
    """(num_tokens,) bool, the rows that only fill a CUDA graph's batch, where vLLM says which."""
    if not envs.VLLM_MOE_SKIP_PADDING or not is_forward_context_available():
        return None
    is_padding = get_forward_context().is_padding
    return None if is_padding is None else is_padding[:num_tokens]
