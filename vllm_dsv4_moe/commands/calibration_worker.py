"""What a calibration run adds to each of vLLM's workers, by `worker_extension_cls`."""

from dataclasses import dataclass
from typing import Any

from dsv4_kernels.moe import recording_layer
from torch import nn
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.models.utils import extract_layer_index

from vllm_dsv4_moe.expert_params import local_experts
from vllm_dsv4_moe.moe_method import ModelOptNvFp4Dsv4Method


class CalibrationWorker:
    """Methods for LLM.collective_rpc; results are plain values, to cross processes."""

    def dsv4_moe_start_recording(self) -> int:
        """Record from the next token on what our layers read; the number of layers."""
        layers = our_layers(self.get_model())  # type: ignore[attr-defined]
        for layer in layers:
            experts = layer.quant_method.moe_kernel.fused_experts
            experts.layer = recording_layer(experts.layer)
        return len(layers)

    def dsv4_moe_recorded(self) -> list[dict[str, Any]]:
        """This rank's magnitudes, one `Recorded` a layer, as dictionaries."""
        found = []
        for layer in our_layers(self.get_model()):  # type: ignore[attr-defined]
            amax = layer.quant_method.moe_kernel.fused_experts.layer.amax
            recorded = Recorded(
                layer=extract_layer_index(layer.layer_name),
                num_experts=layer.moe_config.num_logical_experts,
                fc1=float(amax.fc1),
                experts=local_experts(layer),
                fc2=amax.fc2.tolist(),
            )
            found.append(vars(recorded))
        return found


@dataclass
class Recorded:
    """One layer's largest magnitudes on one rank."""

    layer: int
    num_experts: int  # of all ranks
    fc1: float
    experts: list[int]  # the global id of each local expert
    fc2: list[float]  # one for each local expert


def our_layers(model: nn.Module) -> list[RoutedExperts]:
    return [
        module
        for module in model.modules()
        if isinstance(module, RoutedExperts)
        and isinstance(module.quant_method, ModelOptNvFp4Dsv4Method)
    ]
