"""Load a checkpoint as vLLM does, in this process: config resolution, model, weights."""

import contextlib
import os

import pytest

from tests.support.cpu_build import HAS_CPU_BUILD, REASON

# Before anything is set: on a GPU the other tests' kernels must not run in the interpreter.
if not HAS_CPU_BUILD:
    pytest.skip(REASON, allow_module_level=True)

# Before Triton is imported.
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_CI_ENV", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

from vllm_dsv4_moe.commands.serving import free_port


def engine_config(checkpoint: Path, settings: dict | None = None, **arguments):
    """The VllmConfig of `vllm serve checkpoint`, with the plugin called as vLLM calls it."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    given = {"max_model_len": 256, "max_num_seqs": 4, "max_num_batched_tokens": 256}
    config = EngineArgs(
        model=str(checkpoint),
        additional_config={"dsv4_moe": settings or {}},
        enforce_eager=True,
        **(given | arguments),
    ).create_engine_config()
    return config


def load_model(config) -> torch.nn.Module:
    """The model with its weights, on the CPU, as one rank."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import (
        init_distributed_environment,
        initialize_model_parallel,
        model_parallel_is_initialized,
    )
    from vllm.model_executor.model_loader import get_model

    with set_current_vllm_config(config):
        if not model_parallel_is_initialized():
            address = f"tcp://127.0.0.1:{free_port()}"
            init_distributed_environment(1, 0, address, 0, backend="gloo")
            initialize_model_parallel()
        # Like the CPU's worker: stand-ins for what vLLM calls although there is no accelerator.
        with mock.patch("torch.cuda.Event"), mock.patch("torch.accelerator.empty_cache"):
            return get_model(vllm_config=config)


def reload_weights(config, model: torch.nn.Module, checkpoint: Path | None = None) -> None:
    """As vLLM's `reload_weights` does, in place; the model's own checkpoint where none is given."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload import inplace

    path = None if checkpoint is None else str(checkpoint)
    with set_current_vllm_config(config):
        inplace.reload_weights(config, model, None, path, True)


@contextlib.contextmanager
def on_gpu(capability):
    """What the plugin asks vLLM's platform, answered as on that GPU; yields the mock that stands
    for the compilation of its kernels."""
    answers = {"get_device_capability": lambda: capability, "is_cpu": lambda: True}
    platform = SimpleNamespace(**answers)
    with (
        mock.patch("vllm_dsv4_moe.moe_method.current_platform", platform),
        mock.patch("vllm_dsv4_moe.moe_method.COMPILATION") as compilation,
    ):
        yield compilation
