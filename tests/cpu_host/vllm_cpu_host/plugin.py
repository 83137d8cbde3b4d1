"""Two gaps of vLLM 0.32's and 0.33's CPU build that DeepSeek-V4 falls into, filled.

And the way for a test to look into vLLM's processes: CPU_HOST_PROBE=module:function is imported
and called in each of them.
"""

import os
from importlib import import_module

import torch
import torch.distributed as dist


def register() -> None:
    """vLLM's entry point calls this in every process. Does nothing on a GPU, or a second time."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    _check_instructions()
    _complete_the_tile_schedule()
    _give_the_communicator_uneven_collectives()
    if "CPU_HOST_PROBE" in os.environ:
        module, _, function = os.environ["CPU_HOST_PROBE"].partition(":")
        getattr(import_module(module), function)()


def _check_instructions() -> None:
    if not torch.cpu._is_avx512_bf16_supported():
        raise RuntimeError(
            "this CPU lacks avx512_bf16, and vLLM's CPU build has DeepSeek-V4's operators for "
            "avx512_bf16 only: serve on a newer x86 CPU, or on an NVIDIA GPU"
        )


def _complete_the_tile_schedule() -> None:
    """`build` reads the schedules of both compressed kinds; the CPU's builder returns neither."""
    from vllm.models.deepseek_v4.cpu.cpu_mla import DeepseekV4CPUSparseSWAMetadataBuilder as Builder

    if "_cpu_host" in vars(Builder):
        return
    build = Builder.build_tile_scheduler
    Builder._cpu_host = True
    Builder.build_tile_scheduler = lambda self, *args, **kwargs: {
        "c1a": None,
        "c2a": None,
        **build(self, *args, **kwargs),
    }


def _give_the_communicator_uneven_collectives() -> None:
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    if "all_gatherv" not in vars(CpuCommunicator):
        CpuCommunicator.all_gatherv = all_gatherv
        CpuCommunicator.reduce_scatterv = reduce_scatterv


def all_gatherv(self, input_, dim: int = 0, sizes: list[int] | None = None):
    """Rows of all ranks, one after another: (sizes[rank], ...) each -> (sum(sizes), ...)."""
    if isinstance(input_, list | tuple):
        return [all_gatherv(self, tensor, dim, sizes) for tensor in input_]
    assert dim == 0, dim
    sizes = sizes or [len(input_)] * self.world_size
    # gloo gathers equal shapes only.
    padded = input_.new_zeros((max(sizes), *input_.shape[1:]))
    padded[: len(input_)] = input_
    gathered = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded, group=self.device_group)
    return torch.cat([rows[:size] for rows, size in zip(gathered, sizes, strict=True)])


def reduce_scatterv(self, input_, dim: int = -1, sizes: list[int] | None = None):
    """The sum over ranks, of which this rank keeps its rows: (sum(sizes), ...) -> (own, ...)."""
    assert dim == 0, dim
    sizes = sizes or [len(input_) // self.world_size] * self.world_size
    total = input_.clone()
    dist.all_reduce(total, group=self.device_group)
    return total.split(sizes)[self.rank_in_group].clone()
