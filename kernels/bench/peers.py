"""vLLM's own fused-MoE methods over the benches' weights, called as its layer would call them."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from bench.inputs import LIMIT, Inputs, expert_map
from dsv4_kernels.types import ExpertWeights, MoeShape

Call = Callable[[], torch.Tensor]
MakeCall = Callable[[Inputs], Call]


_CONTEXT = SimpleNamespace(config=None, entered=None)
ALONE = (0, 1)  # rank, and how many ranks share the experts and have tokens of their own


class Peer(NamedTuple):
    method: Any  # vLLM's, with a moe_kernel
    module: Any  # its RoutedExperts
    hidden: int  # the width that the method rounded up to; tokens are padded to it


def vllm_context(ranks: tuple[int, int] = ALONE, device: str = "cuda"):
    """vLLM's configuration and its groups, made once and kept. More ranks than one find each other
    by the environment variables that torchrun sets."""
    if _CONTEXT.config is None:
        from vllm.config import ParallelConfig, VllmConfig, set_current_vllm_config
        from vllm.distributed import init_distributed_environment, initialize_model_parallel
        from vllm.v1.worker.workspace import init_workspace_manager

        rank, num_ranks = ranks
        address, backend = "tcp://127.0.0.1:29511", "nccl" if device == "cuda" else "gloo"
        parallel = ParallelConfig()
        if num_ranks > 1:
            address = "env://"
            parallel = ParallelConfig(
                data_parallel_size=num_ranks,
                enable_expert_parallel=True,
                distributed_executor_backend="external_launcher",
            )
        _CONTEXT.config = VllmConfig(parallel_config=parallel)
        _CONTEXT.entered = set_current_vllm_config(_CONTEXT.config)
        _CONTEXT.entered.__enter__()
        init_distributed_environment(num_ranks, rank, address, rank, backend)
        initialize_model_parallel(1, 1)
        init_workspace_manager(torch.device(device))
    return _CONTEXT.config


def nvfp4_peer(name: str, shape: MoeShape, weights: ExpertWeights) -> MakeCall:
    return calls_of(nvfp4_method(name, shape, weights), shape)


def nvfp4_method(
    name: str, shape: MoeShape, weights: ExpertWeights, ranks: tuple[int, int] = ALONE
) -> Peer:
    """The NVFP4 method with that backend; weights of equal gate and up scales."""
    from vllm.model_executor.layers.quantization.modelopt import (
        ModelOptNvFp4Config,
        ModelOptNvFp4FusedMoE,
    )

    vllm_context(ranks)
    quant = ModelOptNvFp4Config(
        is_checkpoint_nvfp4_serialized=True,
        kv_cache_quant_algo=None,
        exclude_modules=[],
        group_size=16,
    )
    config = moe_config(name, shape, ranks)
    method = ModelOptNvFp4FusedMoE(quant, config)
    module = expert_module(method, config, shape, shape.hidden, shape.intermediate)
    for key, codes, scales in (
        ("w13", weights.w13, weights.w13_block_scales),
        ("w2", weights.w2, weights.w2_block_scales),
    ):
        getattr(module, f"{key}_weight").data.copy_(codes)
        getattr(module, f"{key}_weight_scale").data.copy_(scales)
        getattr(module, f"{key}_input_scale").data.fill_(3e-3)
    module.w13_weight_scale_2.data.copy_(weights.w13_global_scales)
    module.w2_weight_scale_2.data.copy_(weights.w2_global_scales)
    method.process_weights_after_loading(module)
    return Peer(method, module, shape.hidden)


def mxfp4_peer(
    name: str, shape: MoeShape, weights: ExpertWeights, *, fp8_activations: bool = False
) -> MakeCall:
    return calls_of(mxfp4_method(name, shape, weights, fp8_activations=fp8_activations), shape)


def mxfp4_method(
    name: str,
    shape: MoeShape,
    weights: ExpertWeights,
    ranks: tuple[int, int] = ALONE,
    *,
    fp8_activations: bool = False,
) -> Peer:
    """The MXFP4 method with that backend, over sizes that it may round up."""
    from vllm.model_executor.layers.fused_moe.oracle import mxfp4 as oracle
    from vllm.model_executor.layers.quantization.mxfp4 import Mxfp4MoEMethod
    from vllm.model_executor.layers.quantization.utils.quant_utils import kMxfp8Dynamic

    vllm_context(ranks)
    config = moe_config(name, shape, ranks)
    # It asks for the model's configuration, and there is no model.
    asks = mock.patch.object(oracle, "_user_moe_activation_override", return_value=None)
    with asks:
        method = Mxfp4MoEMethod(config, kMxfp8Dynamic if fp8_activations else None)
        hidden, inter = method.maybe_roundup_sizes(
            shape.hidden, shape.intermediate, torch.bfloat16, config.moe_parallel_config
        )
        config.hidden_dim, config.intermediate_size_per_partition = hidden, inter
        module = expert_module(method, config, shape, hidden, inter)
        for key, codes, scales in (
            ("w13", weights.w13, weights.w13_block_scales),
            ("w2", weights.w2, weights.w2_block_scales),
        ):
            parts = 2 if key == "w13" else 1
            copy_padded(codes, getattr(module, f"{key}_weight").data, parts)
            copy_padded(scales, getattr(module, f"{key}_weight_scale").data, parts)
        method.process_weights_after_loading(module)
    print(f"{name}: {method.mxfp4_backend}, {method.experts_cls.__name__}", flush=True)
    return Peer(method, module, hidden)


def copy_padded(source: torch.Tensor, target: torch.Tensor, parts: int) -> None:
    """(experts, parts * rows, columns) into a larger target, each part at the start of its own."""
    rows, columns = source.shape[1] // parts, source.shape[2]
    wide = target.shape[1] // parts
    target.zero_()
    for part in range(parts):
        into = target[:, part * wide : part * wide + rows, :columns]
        into.copy_(source[:, part * rows : (part + 1) * rows])


def moe_config(name: str, shape: MoeShape, ranks: tuple[int, int] = ALONE, device: str = "cuda"):
    """vLLM's description of the layer, on one rank of as many as share the experts. ALONE, it has
    all tokens."""
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import (
        FusedMoEConfig,
        FusedMoEParallelConfig,
        RoutingMethodType,
    )

    local = shape.num_local_experts
    rank, num_ranks = ranks
    parallel = FusedMoEParallelConfig(
        tp_size=1,
        pcp_size=1,
        dp_size=num_ranks,
        ep_size=shape.num_experts // local,
        tp_rank=0,
        pcp_rank=0,
        dp_rank=rank,
        ep_rank=rank,
        sp_size=1,
        use_ep=local != shape.num_experts,
        all2all_backend="allgather_reducescatter",
        enable_eplb=False,
    )
    return FusedMoEConfig(
        num_experts=shape.num_experts,
        experts_per_token=shape.top_k,
        hidden_dim=shape.hidden,
        intermediate_size=shape.intermediate,
        num_local_experts=local,
        num_logical_experts=shape.num_experts,
        activation=MoEActivation.SILU,
        device=torch.device(device),
        routing_method=RoutingMethodType.DeepSeekV3,
        moe_parallel_config=parallel,
        in_dtype=torch.bfloat16,
        moe_backend=name,
        max_num_tokens=shape.max_num_tokens,
        swiglu_limit=LIMIT,
    )


def expert_module(method: Any, config: Any, shape: MoeShape, hidden: int, inter: int):
    """A RoutedExperts with the method's parameters, of these (possibly rounded) sizes."""
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    module = RoutedExperts.__new__(RoutedExperts)
    torch.nn.Module.__init__(module)
    facts = {
        "params_dtype": torch.bfloat16,
        "num_experts": shape.num_local_experts,
        "top_k": shape.top_k,
        "_expert_map": None,
        "moe_config": config,
        "hidden_size": hidden,
        "intermediate_size_per_partition": inter,
        "global_num_experts": shape.num_experts,
        "local_num_experts": shape.num_local_experts,
        "swiglu_limit": LIMIT,
        "swiglu_alpha": None,
        "swiglu_beta": None,
        "activation": config.activation,
        "apply_router_weight_on_input": False,
        "layer_name": "model.layers.3.ffn.experts",
        "prefix": "model.layers.3.ffn.experts",
        "_expert_routing_tables": lambda: None,
    }
    for key, value in facts.items():
        object.__setattr__(module, key, value)
    with torch.device("cuda"):
        method.create_weights(
            module,
            shape.num_local_experts,
            hidden,
            inter,
            torch.bfloat16,
            weight_loader=lambda *_, **__: None,
            global_num_experts=shape.num_experts,
        )
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return module


def calls_of(peer: Peer, shape: MoeShape) -> MakeCall:
    from vllm.forward_context import set_forward_context

    method, module, hidden = peer
    context = vllm_context()
    mapping = expert_map(shape.num_experts, shape.num_local_experts)
    padding = hidden - shape.hidden

    def call(inputs: Inputs) -> Call:
        def run() -> torch.Tensor:
            x = torch.nn.functional.pad(inputs.x, (0, padding)) if padding else inputs.x
            with set_forward_context(None, context, num_tokens=len(x)):
                out = method.moe_kernel.apply(
                    x,
                    module.w13_weight,
                    module.w2_weight,
                    topk_ids=inputs.routing.ids,
                    topk_weights=inputs.routing.weights,
                    activation=module.activation,
                    global_num_experts=shape.num_experts,
                    expert_map=mapping,
                    apply_router_weight_on_input=False,
                )
            return out[:, : shape.hidden]

        return run

    return call
