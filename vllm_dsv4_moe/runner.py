"""Where the router is put in: vLLM builds its MoE layers through a class that can be replaced.

The gate goes with the router where one launch can do both, see gate.py.
"""

import inspect
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.router.fused_moe_router import FusedMoERouter
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

from vllm_dsv4_moe.gate import fused_gate
from vllm_dsv4_moe.moe_method import Dsv4Method
from vllm_dsv4_moe.router import Dsv4Router, unsupported_reason

logger = init_logger("vllm.dsv4_moe")
READ = ("layer_name", "moe_config", "router", "routed_experts", "gate")  # of MoERunner's arguments


class Dsv4MoERunner(MoERunner):
    """vLLM's runner with this package's router, on layers whose experts are this package's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Every model's MoE layers come through here: what is not ours is passed on unread.
        if any(map(_is_ours, (*args, *kwargs.values()))):
            call = inspect.signature(MoERunner.__init__).bind(self, *args, **kwargs)
            _take_router(call.arguments)
            args, kwargs = call.args[1:], call.kwargs
        super().__init__(*args, **kwargs)


def _is_ours(experts: Any) -> bool:
    return isinstance(getattr(experts, "quant_method", None), Dsv4Method)


def _take_router(given: dict[str, Any]) -> None:
    """Put this package's router, and where it can the gate, into what the runner is built with."""
    experts, gate = given["routed_experts"], given.get("gate")
    router = given["router"] = _our_router(given["layer_name"], given["router"], experts)
    if isinstance(router, Dsv4Router):
        op, is_hash = experts.quant_method.gate_op(), router.table is not None
        router.gate = fused_gate(gate, given["moe_config"], op, is_hash)
        given["gate"] = None if router.gate is not None else gate


def _our_router(
    layer_name: str, router: FusedMoERouter, routed_experts: RoutedExperts
) -> FusedMoERouter:
    reason = unsupported_reason(router)
    if reason is not None:
        logger.warning_once("dsv4-moe: vLLM's own router stays in %s: %s", layer_name, reason)
        return router
    # 0.32 keeps the table in its router, 0.33 also in its experts.
    table = getattr(router, "_hash_indices_table", None)
    method = routed_experts.quant_method
    ours = Dsv4Router(
        router,
        table,
        method.router_op(),
        num_experts=routed_experts.moe_config.num_logical_experts,
        hash_weights=method.settings.hash_weights,
    )
    if get_current_vllm_config().load_config.load_format != "dummy":
        _mark_as_not_loaded(ours)
    method.router = ours
    return ours


def _mark_as_not_loaded(router: Dsv4Router) -> None:
    """Replace vLLM's random values, with which a checkpoint without these would go unnoticed."""
    nan = torch.nan
    for tensor, value in ((router.table, -1), (router.bias, nan), (router.bias_vl, nan)):
        if tensor is not None:
            tensor.data.fill_(value)


def install() -> None:
    """Have vLLM build its MoE layers with Dsv4MoERunner.

    RuntimeError if another plugin has replaced the runner, or if its arguments have changed.
    """
    taken = inspect.signature(MoERunner.__init__).parameters
    if not set(READ) <= taken.keys():
        raise RuntimeError(f"vLLM's MoERunner takes {', '.join(taken)}, not all of {READ}")
    present = op_registry_oot.get(MoERunner.__name__)
    if present is Dsv4MoERunner:
        return
    if present is not None:
        raise RuntimeError(
            f"{present.__module__}.{present.__qualname__} has replaced vLLM's MoERunner, which "
            "vllm-dsv4-moe replaces too: name the plugins that you want in VLLM_PLUGINS"
        )
    MoERunner.register_oot(Dsv4MoERunner)
