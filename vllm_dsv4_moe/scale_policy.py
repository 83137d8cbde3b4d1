"""A layer's activation scales by the `activation_scale` setting, and the parameter EPLB moves."""

import torch
from dsv4_kernels import activation_scale
from dsv4_kernels.types import ActivationScales
from torch.nn import Module, Parameter
from vllm.model_executor.models.utils import extract_layer_index

from vllm_dsv4_moe.expert_params import expert_weights, local_experts
from vllm_dsv4_moe.settings import Settings


def activation_scales(layer: Module, settings: Settings) -> ActivationScales:
    """The layer's scales, on its device. Call it while weights are in the checkpoint's layout.

    ValueError for scales that the chosen source does not have.
    """
    if settings.activation_scale == "token":
        return activation_scale.token()
    try:
        scales = _from_source(layer, settings)
    except ValueError as error:
        raise ValueError(f"{layer.layer_name}: {error}") from error
    if scales.fc2 is None:
        return scales
    # EPLB moves an expert's parameters between ranks; the scale of its FC2 goes along.
    param = Parameter(scales.fc2.contiguous(), requires_grad=False)
    layer.register_parameter("w2_activation_scale", param)
    return ActivationScales(scales.fc1, param.data)


def _from_source(layer: Module, settings: Settings) -> ActivationScales:
    device = layer.w13_weight.device
    scaling = layer.routed_scaling_factor
    if layer.moe_config.moe_parallel_config.use_batched_activation_format:
        if settings.activation_scale in ("checkpoint", "file"):
            raise ValueError(
                f"activation_scale {settings.activation_scale} is of products that have their "
                "routing weight, which this --all2all-backend applies after W2: use the warmup or "
                "token policy for activation scales"
            )
        scaling = 1.0
    if settings.activation_scale == "checkpoint":
        return activation_scale.checkpoint(
            layer.w13_input_scale.data, layer.w2_input_scale.data, layer.local_num_experts
        )
    if settings.activation_scale == "file":
        return activation_scale.from_file(
            settings.activation_scale_file,
            extract_layer_index(layer.layer_name),
            layer.moe_config.num_logical_experts,
            local_experts(layer),
            device,
        )
    with torch.no_grad():
        return activation_scale.warmup(
            expert_weights(layer),
            limit=layer.swiglu_limit,
            scaling=scaling,
            headroom=int(settings.headroom),
        )
