"""vLLM's RoutedExperts of one rank with this plugin's method, without the model around it."""

from collections.abc import Iterable, Mapping
from types import SimpleNamespace

import torch
from dsv4_kernels import reference

from vllm_dsv4_moe.commands.tiny import TinyConfig
from vllm_dsv4_moe.settings import Settings

LAYER = "model.layers.0.ffn.experts"


def routed_experts(
    vllm_config,
    sizes: TinyConfig,
    *,
    ep=(1, 0),
    tp=(1, 0),
    dp=None,
    all2all="allgather_reducescatter",
    redundant=0,
    placement="linear",
    device="cpu",
    **settings,
):
    """Parameters are not loaded. ep, tp and dp are (size, rank); ep's ranks are dp's as well
    where all2all is not vLLM's default."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.fused_moe import FusedMoEConfig, RoutedExperts
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import (
        FusedMoEParallelConfig,
        RoutingMethodType,
    )
    from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager

    from vllm_dsv4_moe.moe_method import METHODS

    dp = dp or ((1, 0) if all2all == "allgather_reducescatter" else ep)
    parallel = FusedMoEParallelConfig(
        *(tp[0], 1, dp[0], ep[0]), *(tp[1], 0, dp[1], ep[1]), sp_size=1, use_ep=ep[0] > 1,
        all2all_backend=all2all, enable_eplb=redundant > 0,
    )  # fmt: skip
    num_experts = sizes.experts + redundant
    manager = ExpertMapManager(
        256, sizes.top_k, num_experts, redundant, 2, parallel, placement, redundant > 0
    )
    moe_config = FusedMoEConfig(
        num_experts=num_experts,
        experts_per_token=sizes.top_k,
        hidden_dim=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_local_experts=manager.local_num_experts,
        num_logical_experts=sizes.experts,
        activation=MoEActivation.SILU,
        device=device,
        routing_method=RoutingMethodType.Renormalize,
        moe_parallel_config=parallel,
        in_dtype=torch.bfloat16,
        max_num_tokens=256,
        swiglu_limit=10.0,
    )
    quant_config = SimpleNamespace(
        get_quant_method=lambda layer, prefix: METHODS[sizes.expert_format](
            moe_config, Settings(**settings)
        ),
        get_name=lambda: "deepseek_v4_fp8",
        online_quantization_config=None,
    )
    with set_current_vllm_config(vllm_config), torch.device(device):
        return RoutedExperts(
            LAYER, torch.bfloat16, moe_config, quant_config, manager, "w1", "w2", "w3",
            routed_scaling_factor=1.5, swiglu_limit=10.0,
        )  # fmt: skip


def load_experts(layer, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """As vLLM's models do: each checkpoint tensor goes to every physical copy of its expert."""
    config = layer.moe_config
    logical = config.num_logical_experts
    mapping = layer.build_expert_params_mapping(
        "w1", "w2", "w3", logical, config.num_experts - logical, ""
    )
    for name, tensor in tensors:
        for param_name, weight_name, expert, shard in mapping:
            if weight_name in name:
                param = getattr(layer, name.replace(weight_name, param_name).split(".")[-1])
                param.weight_loader(param, tensor, name, shard, expert, return_success=True)


def random_tokens(
    count: int, sizes: TinyConfig, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, routing weights, ids."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, sizes.hidden, generator=generator).bfloat16()
    logits = torch.randn(count, sizes.experts, generator=generator)
    return x, *reference.router_topk(logits, sizes.top_k, scaling=1.5)


def loaded_experts(vllm_config, sizes: TinyConfig, tensors: Mapping[str, torch.Tensor], **options):
    """RoutedExperts with a layer's tensors, processed."""
    from vllm.config import set_current_vllm_config

    layer = routed_experts(vllm_config, sizes, **options)
    with set_current_vllm_config(vllm_config):
        load_experts(layer, tensors.items())
        layer.quant_method.process_weights_after_loading(layer)
    return layer
