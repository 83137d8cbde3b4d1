"""Which layers are ours: RoutedExperts in one of the formats that are set. The rest stays vLLM's.

vLLM resolves a DeepSeek-V4 checkpoint to the method `deepseek_v4_fp8`, so a config registered under
that name needs no flag. Its class is at module level: vLLM pickles it to other processes.
"""

import os
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.quantization import (
    QuantizationConfig,
    get_quantization_config,
    register_quantization_config,
)
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.quantization.utils.quant_utils import is_layer_skipped
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform

from vllm_dsv4_moe import METHOD_NAME, options
from vllm_dsv4_moe.layer_config import LayerConfig
from vllm_dsv4_moe.moe_method import METHODS, backend_name, has_backend
from vllm_dsv4_moe.safetensors_files import read_header
from vllm_dsv4_moe.settings import MXFP4_BACKENDS, Settings, read_settings

logger = init_logger("vllm.dsv4_moe")


class OurLayers(QuantizationConfig):
    """Mixin for the class that vLLM has for this method name; the first of the two bases."""

    # What that class has.
    ignored_layers: list[str]
    packed_modules_mapping: dict[str, list[str]]
    expert_dtype: str
    moe_quant_algo: str

    _settings: Settings | None = None
    _announced: frozenset[str] = frozenset()
    _files_checked = False
    _ours: tuple[tuple[str, int], ...] = ()  # (format, layer) built and not announced

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if not isinstance(layer, RoutedExperts):
            return super().get_quant_method(layer, prefix)  # type: ignore[safe-super]
        reason = self.unsupported_reason(layer, prefix)
        if reason is None:
            self._check_files()
            config = get_current_vllm_config()
            refused = options.unsupported_reason(config, layer.moe_config, prefix)
            weight_format = self.weight_format(prefix)
            assert weight_format is not None, prefix
            hf_config = config.model_config.hf_config
            refused = refused or unsupported_config(hf_config, layer, weight_format)
            if refused is not None:
                raise ValueError(f"{prefix}: {refused}")
            self._ours += ((weight_format, extract_layer_index(prefix)),)
            method_class = METHODS[weight_format]
            return method_class(layer.moe_config, self.settings(), self.announce_ours)
        method = super().get_quant_method(layer, prefix)  # type: ignore[safe-super]
        self._announce(f"vLLM keeps the experts as {type(method).__name__}: {reason}", prefix)
        return method

    def unsupported_reason(self, layer: RoutedExperts, prefix: str) -> str | None:
        """Why vLLM's own method runs these experts; None where this package's does."""
        weight_format = self.weight_format(prefix)
        if weight_format is None:
            return "they are neither NVFP4 nor MXFP4"
        settings = self.settings()
        if weight_format not in settings.formats.split(","):
            name = weight_format.upper()
            return f"they are {name}, and the setting formats is {settings.formats}"
        if layer.__class__ is not RoutedExperts:
            return f"{layer.__class__.__name__} does more than route among them"
        if layer.moe_config.moe_backend != "auto":
            return f"--moe-backend {layer.moe_config.moe_backend} asks for it"
        if not current_platform.is_cuda() and not current_platform.is_cpu():
            return "this plugin runs on NVIDIA GPUs"
        capability = current_platform.get_device_capability()
        if not has_backend(settings, capability):
            return "no backend is made for compute capability {}.{}".format(*capability)
        backend = backend_name(settings, capability)
        if weight_format == "mxfp4" and backend not in MXFP4_BACKENDS:
            return f"they are MXFP4, and the {backend} backend runs NVFP4 alone"
        return None

    def weight_format(self, prefix: str) -> str | None:
        """ "nvfp4" or "mxfp4" of the experts at prefix, by what vLLM read from config.json; None
        where they are in neither."""
        skipped = is_layer_skipped(
            prefix=prefix,
            ignored_layers=self.ignored_layers,
            fused_mapping=self.packed_modules_mapping,
        )
        if skipped or self.expert_dtype != "fp4":
            return None
        # The class for GPUs also knows which layers (MTP) stayed MXFP4.
        by_layer = getattr(self, "_is_nvfp4_expert_layer", None)
        is_nvfp4 = self.moe_quant_algo == "NVFP4" and (by_layer is None or by_layer(prefix))
        return "nvfp4" if is_nvfp4 else "mxfp4"

    def settings(self) -> Settings:
        if self._settings is None:
            config = get_current_vllm_config().additional_config
            self._settings = read_settings(config if isinstance(config, dict) else {}, os.environ)
        return self._settings

    def announce_ours(self, weight_format: str, backend: str, numerics: str) -> None:
        """Log once which layers are ours: when the first is loaded, all of a model's are built."""
        layers = tuple(number for kind, number in self._ours if kind == weight_format)
        if layers:
            logger.info(
                "dsv4-moe: this plugin runs %s experts, on %s: layers %s (%s; without %s in the "
                "setting formats they are vLLM's)",
                weight_format.upper(), backend, _ranges(layers), numerics, weight_format,
            )  # fmt: skip
            self._ours = tuple(pair for pair in self._ours if pair[0] != weight_format)

    def _check_files(self) -> None:
        """ValueError for a file cut short: the loader's own error does not say which it is."""
        config = get_current_vllm_config()
        if self._files_checked or config.load_config.load_format == "dummy":
            return
        self._files_checked = True
        # A model's name instead of a folder: vLLM fetches the files later, and checks them.
        for path in sorted(Path(config.model_config.model).glob("*.safetensors")):
            read_header(path)

    def _announce(self, what: str, prefix: str) -> None:
        """Log once who runs the layers of one kind."""
        if what not in self._announced:
            self._announced |= {what}
            logger.info("dsv4-moe: %s (first: %s)", what, prefix)


def unsupported_config(hf_config: Any, layer: RoutedExperts, weight_format: str) -> str | None:
    """Why the layer that config.json describes cannot be served, or None."""
    quant = getattr(hf_config, "quantization_config", None) or {}
    config = LayerConfig(
        layer.swiglu_limit,
        layer.scoring_func,
        layer.moe_config.experts_per_token,
        layer.moe_config.num_logical_experts,
        quant if weight_format == "nvfp4" else {},
    )
    return next(iter(config.problems()), None)


def _ranges(numbers: tuple[int, ...]) -> str:
    """0-2, 5 for the numbers 0, 1, 2 and 5, given in order."""
    words = []
    for _, group in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        members = [number for _, number in group]
        words.append(f"{members[0]}-{members[-1]}" if len(members) > 1 else str(members[0]))
    return ", ".join(words)


_VllmsOwn: Any = get_quantization_config(METHOD_NAME)
for _name in ("expert_dtype", "moe_quant_algo"):
    if not hasattr(_VllmsOwn, _name):
        raise ImportError(f"vLLM's {_VllmsOwn.__name__} has no {_name}")


class Dsv4Fp8Config(OurLayers, _VllmsOwn):
    """DeepSeek-V4's quantisation as vLLM has it, with this package's experts."""


def install() -> None:
    """Register the config under the method's name. A second time changes nothing."""
    register_quantization_config(METHOD_NAME)(Dsv4Fp8Config)
