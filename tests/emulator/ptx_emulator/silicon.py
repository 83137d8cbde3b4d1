"""The same PTX on the GPU of this machine, through the CUDA driver, for comparison."""

import ctypes
import functools

import numpy as np
import pytest

from tests.emulator.ptx_emulator.scheduler import Launch

_CAPABILITY = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
_SHARED_LIMIT_ATTRIBUTE = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_LOG_BUFFER, _LOG_SIZE = 5, 6  # CU_JIT_ERROR_LOG_BUFFER and its size
_LOG_BYTES = 4096


class Rejected(Exception):
    """The driver's compiler does not take the PTX for this GPU; the message is its own."""


class GpuError(Exception):
    """A call of the CUDA driver failed. The process's context is lost if a kernel did it."""


@functools.cache
def _driver() -> ctypes.CDLL:
    """libcuda with a context on device 0."""
    library = ctypes.CDLL("libcuda.so.1")
    _check(library.cuInit(0), "cuInit")
    context = ctypes.c_void_p()
    _check(library.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0), "cuDevicePrimaryCtxRetain")
    _check(library.cuCtxSetCurrent(context), "cuCtxSetCurrent")
    return library


def _check(status: int, what: str) -> None:
    if status:
        raise GpuError(f"{what}: CUDA driver error {status}")


@functools.cache
def header() -> str:
    """What a PTX module for this GPU begins with."""
    capability = [ctypes.c_int(), ctypes.c_int()]
    for value, attribute in zip(capability, _CAPABILITY, strict=True):
        status = _driver().cuDeviceGetAttribute(ctypes.byref(value), attribute, 0)
        _check(status, "cuDeviceGetAttribute")
    major, minor = (value.value for value in capability)
    version = "8.6" if major == 9 else "9.0"
    return f".version {version}\n.target sm_{major}{minor}a\n.address_size 64\n"


def _load(ptx: str) -> ctypes.c_void_p:
    module = ctypes.c_void_p()
    log = ctypes.create_string_buffer(_LOG_BYTES)
    options = (ctypes.c_int * 2)(_LOG_BUFFER, _LOG_SIZE)
    values = (ctypes.c_void_p * 2)(ctypes.addressof(log), _LOG_BYTES)
    status = _driver().cuModuleLoadDataEx(
        ctypes.byref(module), ptx.encode(), len(options), options, values
    )
    if status:
        raise Rejected(f"driver error {status}: {log.value.decode().strip()}")
    return module


def run(ptx: str, launch: Launch, buffers: list[np.ndarray]) -> None:
    """Run a kernel whose parameters are the addresses of copies of `buffers`; copy them back.

    ptx: from .entry on; clusters by `.reqnctapercluster`. buffers: (bytes,) uint8.
    """
    driver = _driver()
    module = _load(header() + ptx)
    function = ctypes.c_void_p()
    name = launch.kernel.encode()
    _check(driver.cuModuleGetFunction(ctypes.byref(function), module, name), "cuModuleGetFunction")
    shared = ctypes.c_int(launch.shared_bytes)
    _check(
        driver.cuFuncSetAttribute(function, _SHARED_LIMIT_ATTRIBUTE, shared), "cuFuncSetAttribute"
    )
    copies = [_to_device(driver, buffer) for buffer in buffers]
    parameters = (ctypes.c_void_p * len(copies))(*(ctypes.addressof(copy) for copy in copies))
    geometry = [ctypes.c_uint(size) for size in (*launch.grid, *launch.block, launch.shared_bytes)]
    _check(driver.cuLaunchKernel(function, *geometry, None, parameters, None), "cuLaunchKernel")
    _check(driver.cuCtxSynchronize(), "the kernel")
    for buffer, copy in zip(buffers, copies, strict=True):
        target = ctypes.c_void_p(buffer.ctypes.data)
        _check(driver.cuMemcpyDtoH_v2(target, copy, ctypes.c_size_t(buffer.nbytes)), "cuMemcpyDtoH")
        _check(driver.cuMemFree_v2(copy), "cuMemFree")
    _check(driver.cuModuleUnload(module), "cuModuleUnload")


def _to_device(driver: ctypes.CDLL, buffer: np.ndarray) -> ctypes.c_uint64:
    address = ctypes.c_uint64()
    size = ctypes.c_size_t(buffer.nbytes)
    _check(driver.cuMemAlloc_v2(ctypes.byref(address), size), "cuMemAlloc")
    _check(
        driver.cuMemcpyHtoD_v2(address, ctypes.c_void_p(buffer.ctypes.data), size), "cuMemcpyHtoD"
    )
    return address


def compare(
    ptx: str, launch: Launch, before: dict[str, np.ndarray], after: dict[str, np.ndarray]
) -> None:
    """Run a snippet that the emulator ran, on this GPU: every buffer ends the same, or skip it."""
    try:
        run(ptx, launch, list(before.values()))
    except Rejected as error:
        pytest.skip(f"not for this GPU: {error}")
    for name, buffer in before.items():
        np.testing.assert_array_equal(buffer, after[name], f"{name}: the GPU, the emulator")
