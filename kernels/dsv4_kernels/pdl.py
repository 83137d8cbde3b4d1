"""Programmatic dependent launch: a kernel's blocks are placed while the kernel before it drains.

Every Triton kernel of this package takes a constexpr `launch_pdl`, which is Triton's launch option
of that name as well, and begins with wait_for_inputs: it waits for the kernel before it, then lets
the kernel after it be placed. In this order, what runs before a kernel's wait (reads of tensors
that only loading or EPLB writes) sees everything but what the kernel right before it writes.
"""

import functools

import torch
import triton
import triton.language as tl


@functools.cache
def _has_pdl(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def supports_pdl(tensor: torch.Tensor) -> bool:
    """Whether kernels on the tensor's device are launched dependently: from Hopper on."""
    return _has_pdl(tensor.device)


@triton.jit
def wait_for_inputs(launch_pdl: tl.constexpr):
    if launch_pdl:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
