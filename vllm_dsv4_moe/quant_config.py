"""Which layers are ours: RoutedExperts whose checkpoint holds NVFP4. The rest stays vLLM's.

The name `deepseek_v4_fp8` is what vLLM resolves a DeepSeek-V4 checkpoint to, so answering to it
needs no flag. Module level throughout: vLLM pickles the config to its other processes.
"""

import os

import torch
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.quantization import (
    get_quantization_config,
    register_quantization_config,
)
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.quantization.utils.quant_utils import is_layer_skipped

from vllm_dsv4_moe.moe_method import ModelOptNvFp4Dsv4Method
from vllm_dsv4_moe.settings import Settings, read_settings

METHOD_NAME = "deepseek_v4_fp8"
logger = init_logger("vllm.dsv4_moe")


class OurLayers:
    """To be mixed into the class that vLLM has for this method name, before it."""

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if not isinstance(layer, RoutedExperts):
            return super().get_quant_method(layer, prefix)
        if self.is_ours(prefix):
            logger.info_once("dsv4-moe: NVFP4 experts are this plugin's (first: %s)", prefix)
            return ModelOptNvFp4Dsv4Method(layer.moe_config, self.settings())
        method = super().get_quant_method(layer, prefix)
        name = type(method).__name__
        logger.info_once("dsv4-moe: vLLM keeps the experts of %s (%s)", prefix, name)
        return method

    def is_ours(self, prefix: str) -> bool:
        """Whether the experts at prefix are NVFP4, by what vLLM read from config.json."""
        skipped = is_layer_skipped(
            prefix=prefix,
            ignored_layers=self.ignored_layers,
            fused_mapping=self.packed_modules_mapping,
        )
        if skipped or self.expert_dtype != "fp4" or self.moe_quant_algo != "NVFP4":
            return False
        # The class for GPUs also knows which layers (MTP) stayed MXFP4.
        by_layer = getattr(self, "_is_nvfp4_expert_layer", None)
        return by_layer is None or by_layer(prefix)

    def settings(self) -> Settings:
        if getattr(self, "_dsv4_settings", None) is None:
            self._dsv4_settings = read_settings(
                get_current_vllm_config().additional_config, os.environ
            )
        return self._dsv4_settings


class Dsv4Fp8Config(OurLayers, get_quantization_config(METHOD_NAME)):
    """DeepSeek-V4's quantisation as vLLM has it, with this package's NVFP4 experts."""


def install() -> None:
    """Answer for the method name; register_quantization_config overwrites, so again is the same."""
    register_quantization_config(METHOD_NAME)(Dsv4Fp8Config)
