"""On a vLLM where the plugin cannot work: vLLM runs every layer, and options of ours are refused.

It relies on little of vLLM: the registry of quantisation configs and their `get_quant_method`.
"""

import os
from collections.abc import Mapping
from typing import Any

from vllm.model_executor.layers.quantization import (
    get_quantization_config,
    register_quantization_config,
)

from vllm_dsv4_moe import METHOD_NAME, SUPPORTED_VLLM
from vllm_dsv4_moe.settings import CONFIG_KEY, options_in

_VllmsOwn: Any = get_quantization_config(METHOD_NAME)


class VllmsOwnConfig(_VllmsOwn):
    """DeepSeek-V4's quantisation as vLLM has it. ValueError if an option of ours is set."""

    def get_quant_method(self, layer: Any, prefix: str, *args: Any, **kwargs: Any) -> Any:
        options = options_set()
        if options and "experts" in prefix.split("."):
            raise ValueError(
                f"{prefix}: {', '.join(options)} cannot be followed, as vllm-dsv4-moe leaves every "
                "layer of this vLLM to it: unset it, or install vLLM "
                f"{' or '.join(SUPPORTED_VLLM)} without patches"
            )
        return super().get_quant_method(layer, prefix, *args, **kwargs)


def options_set() -> list[str]:
    """The options of ours in the environment and in additional_config."""
    options = options_in(os.environ)
    if CONFIG_KEY in _additional_config():
        options.append(f"{CONFIG_KEY} of additional_config")
    return options


def _additional_config() -> Mapping[str, Any]:
    try:
        from vllm.config import get_current_vllm_config

        config = get_current_vllm_config().additional_config
    except Exception:  # vLLM keeps it elsewhere: then it gave us none
        return {}
    return config if isinstance(config, Mapping) else {}


def install() -> None:
    register_quantization_config(METHOD_NAME)(VllmsOwnConfig)
