"""Compile a CuTe DSL function without a GPU and launch it on host buffers.

    kernel = emulate(function, *fake_arguments, arch="sm_100a")
    statistics = kernel.run(*tensors, stream, mode="random", seed=3, num_sms=4)

The compiled host code is the real one: it builds the tensor maps, the parameters and the launch,
against a runtime that hands the launch to the emulator. Fake arguments are what `cute.compile`
takes (fake tensors, fake streams, numbers, pointers); the arguments of `run` are torch tensors or
NumPy arrays, integers, floats, and None for streams. Every tensor is registered as a region:
what a kernel touches outside of them is a Finding. Further memory that a kernel reaches through
pointers in memory goes into `buffers`.
"""

import ctypes
import functools
import inspect
import subprocess
import tempfile
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.emulator.ptx_emulator.findings import EmulatorError
from tests.emulator.ptx_emulator.parser import parse
from tests.emulator.ptx_emulator.scheduler import Launch, Machine

_PREFIX = "emulated"
_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint32),
    ctypes.c_uint64,
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.c_int,
    ctypes.POINTER(ctypes.c_int32),
)
_ATTRIBUTE_WORDS = 5
_CLUSTER_DIMENSION = 4  # cudaLaunchAttributeClusterDimension


@dataclass
class Statistics:
    """What one call executed."""

    launches: list[Launch] = field(default_factory=list)
    warp_instructions: int = 0
    counts: Counter = field(default_factory=Counter)  # of asynchronous and ordering instructions


def emulate(
    function: Any, *fake_arguments: Any, arch: str, options: str = ""
) -> "EmulatedFunction":
    """Compile with CuTe DSL for `arch` and return something that runs in the emulator."""
    import cutlass.cute as cute
    from cutlass.cutlass_dsl import CuTeDSL

    CuTeDSL._get_dsl().envar.arch = arch  # what the libraries that size a kernel look at
    with tempfile.TemporaryDirectory() as folder:
        kept = options.replace("--enable-tvm-ffi", "")
        everything = f"{kept} --gpu-arch={arch} --keep-ptx --dump-dir={folder}"
        compiled = cute.compile(function, *fake_arguments, options=everything)
        return EmulatedFunction(compiled, fake_arguments, arch)


@functools.cache
def _runtime_object() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="ptx_emulator_"))
    target = folder / "fake_runtime.o"
    source = Path(__file__).with_name("fake_runtime.c")
    subprocess.run(["gcc", "-O1", "-fPIC", "-c", "-o", target, source], check=True)
    return target


class EmulatedFunction:
    """A compiled CuTe DSL host function whose launches run in the emulator.

    compiled: from `cute.compile(..., options="--keep-ptx")`. fake_arguments: what it was compiled
    with; they say which dimensions are arguments.
    """

    def __init__(self, compiled: Any, fake_arguments: tuple, arch: str):
        self.ptx: str = compiled.__ptx__
        assert self.ptx, "compile with --keep-ptx"
        self.arch = arch
        self.major = 10 if "100" in arch or "103" in arch else 9
        self.kernels = parse(self.ptx)
        self.examples = _runtime_examples(compiled, fake_arguments)
        with tempfile.TemporaryDirectory() as folder:
            compiled.export_to_c(folder, _PREFIX, _PREFIX)
            library = Path(folder) / "emulated.so"
            objects = [Path(folder) / f"{_PREFIX}.o", _runtime_object()]
            subprocess.run(
                ["gcc", "-shared", "-Wl,-Bsymbolic", "-o", library, *objects], check=True
            )
            self.library = ctypes.CDLL(str(library))
        self.entry = getattr(self.library, f"_mlir_{_PREFIX}__mlir_ciface_{compiled.function_name}")
        self._load_module()

    def _load_module(self) -> None:
        module = ctypes.c_void_p(0)
        module_pointer = ctypes.pointer(module)
        library, result = ctypes.pointer(module_pointer), ctypes.pointer(ctypes.c_int(0))
        device = ctypes.pointer(ctypes.c_int32(0))

        def call(name: str, *pointers: Any) -> None:
            raw = [ctypes.cast(p, ctypes.c_void_p).value for p in pointers]
            getattr(self.library, name)((ctypes.c_void_p * len(raw))(*raw))

        call(f"_mlir_{_PREFIX}_cuda_init", library, result)
        call(f"_mlir_{_PREFIX}_cuda_load_to_device", library, device, result)
        self._module = module, module_pointer

    def __call__(self, *arguments: Any) -> None:
        """Run eagerly; what production code calls."""
        self.run(*arguments)

    def run(
        self,
        *arguments: Any,
        mode: str = "eager",
        seed: int = 0,
        num_sms: int = 132,
        buffers: dict[str, Any] | None = None,
        ptx: str | None = None,
        max_instructions: int = 50_000_000,
        produced: Collection[str] = (),
    ) -> Statistics:
        """Call the host function; its launches run before it returns.

        produced: which arguments the kernel before writes, for launches that may overlap with it.
        ptx: run this text instead of the compiled one (to plant faults). Raises Finding.
        """
        machine = Machine(ptx or self.ptx, mode, seed, num_sms, max_instructions, produced)
        keep: list[Any] = []
        packed = [
            p
            for e, a in zip(self.examples, arguments, strict=True)
            for p in _pack(machine, e, a, keep)
        ]
        for name, buffer in (buffers or {}).items():
            _register(machine, buffer, name, keep)
        statistics = Statistics()
        self._invoke(machine, packed, statistics)
        statistics.warp_instructions = machine.instructions
        statistics.counts = machine.counts
        return statistics

    def _invoke(self, machine: Machine, packed: list, statistics: Statistics) -> None:
        failure: list[BaseException] = []

        def on_launch(name, geometry, shared_bytes, params, count, attributes):
            try:
                launch = self._launch(name, geometry, shared_bytes, params, count, attributes)
                statistics.launches.append(launch)
                machine.run(launch)
                return 0
            except BaseException as error:  # it must not cross the C frames
                failure.append(error)
                return 1

        callback = _CALLBACK(on_launch)
        self.library.emulator_configure(callback, machine.num_sms, self.major)
        result = ctypes.c_int32(0)
        pointers = [ctypes.addressof(p) for p in packed] + [ctypes.addressof(result)]
        self.entry((ctypes.c_void_p * len(pointers))(*pointers), len(pointers))
        if failure:
            raise failure[0]
        if result.value:
            raise EmulatorError(f"the host function returned CUDA error {result.value}")

    def _launch(self, name, geometry, shared_bytes, params, count, attributes) -> Launch:
        kernel = self.kernels[name.decode()]
        values = [ctypes.string_at(params[i], size) for i, (_, size) in enumerate(kernel.params)]
        cluster, found = (1, 1, 1), []
        for i in range(count):
            identity, *words = attributes[i * _ATTRIBUTE_WORDS : (i + 1) * _ATTRIBUTE_WORDS]
            if identity == _CLUSTER_DIMENSION:
                cluster = tuple(words[:3])
            found.append((identity, words[0]))
        return Launch(
            kernel.name,
            tuple(geometry[0:3]),
            tuple(geometry[3:6]),
            shared_bytes,
            values,
            cluster,
            tuple(found),
        )


def _runtime_examples(compiled: Any, fake_arguments: tuple) -> list[tuple[str, Any, Any]]:
    """(name, annotation, example) of every argument that is passed at run time."""
    execution = compiled.execution_args
    names = list(execution.signature.parameters)
    original = getattr(execution, "original_signature", None) or execution.signature
    parameters = [p for p in original.parameters.values() if p.name != "self"]
    bound = inspect.Signature(
        [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    ).bind(*fake_arguments)
    bound.apply_defaults()
    return [
        (name, execution.signature.parameters[name].annotation, bound.arguments[name])
        for name in names
        if bound.arguments[name] is not None
    ]


_NUMBER_TYPES = {
    "Int8": ctypes.c_int8,
    "Int16": ctypes.c_int16,
    "Int32": ctypes.c_int32,
    "Int64": ctypes.c_int64,
    "Uint8": ctypes.c_uint8,
    "Uint16": ctypes.c_uint16,
    "Uint32": ctypes.c_uint32,
    "Uint64": ctypes.c_uint64,
    "Float32": ctypes.c_float,
    "Float64": ctypes.c_double,
    "Boolean": ctypes.c_bool,
}


def _pack(machine: Machine, example: tuple[str, Any, Any], argument: Any, keep: list) -> list:
    """The ctypes objects whose addresses the host function takes for one argument."""
    name, annotation, fake = example
    if isinstance(fake, (list, tuple)):
        return [
            p
            for i, (f, a) in enumerate(zip(fake, argument, strict=True))
            for p in _pack(machine, (f"{name}[{i}]", None, f), a, keep)
        ]
    if hasattr(fake, "dynamic_shapes_mask"):
        return [_tensor_argument(machine, name, fake, argument, keep)]
    if type(fake).__name__ in ("_FakeStream", "CUstream"):
        return [ctypes.c_void_p(0)]
    if type(fake).__name__ == "_Pointer":
        if isinstance(argument, int):
            return [ctypes.c_void_p(argument)]
        return [ctypes.c_void_p(_register(machine, argument, name, keep))]
    kind = annotation if getattr(annotation, "__name__", "") in _NUMBER_TYPES else type(fake)
    if kind is int:
        kind_name = "Int32"
    elif kind is float:
        kind_name = "Float32"
    else:
        kind_name = kind.__name__
    if kind_name not in _NUMBER_TYPES:
        raise EmulatorError(f"argument {name} of type {kind_name} is not supported")
    return [_NUMBER_TYPES[kind_name](getattr(argument, "value", argument))]


def _tensor_argument(machine: Machine, name: str, fake: Any, tensor: Any, keep: list) -> Any:
    """{data, dynamic shapes, dynamic strides}, as CuTe DSL's host functions take tensors."""
    address = _register(machine, tensor, name, keep)
    shape, strides = list(tensor.shape), _element_strides(tensor)
    # Packed E2M1 tensors are bytes here and elements there, along the contiguous dimension.
    packed = getattr(fake.element_type, "width", 8) == 4
    if packed:
        contiguous = strides.index(1)
        strides = [s if i == contiguous else 2 * s for i, s in enumerate(strides)]
        shape[contiguous] *= 2
    if len(shape) != len(fake.shape):
        raise EmulatorError(f"{name} has shape {tuple(shape)}, compiled for {fake.shape}")
    for given, wanted in zip(shape, fake.shape, strict=True):
        if isinstance(wanted, int) and given != wanted:
            raise EmulatorError(f"{name} has shape {tuple(shape)}, compiled for {fake.shape}")
    for extent, given, wanted in zip(shape, strides, fake.stride, strict=True):
        if isinstance(wanted, int) and given != wanted and extent != 1:
            raise EmulatorError(f"{name} has strides {strides}, compiled for {fake.stride}")
    if address % (fake._assumed_align or 1):
        raise EmulatorError(
            f"{name} is at {address:#x}, compiled for alignment {fake._assumed_align}"
        )
    wide_shape = any(getattr(s, "width", 32) == 64 for s in fake.shape)
    shape_type = ctypes.c_int64 if wide_shape else ctypes.c_int32
    stride_type = ctypes.c_int32 if fake._use_32bit_stride else ctypes.c_int64
    shapes = [s for s, dynamic in zip(shape, fake.dynamic_shapes_mask, strict=True) if dynamic]
    steps = [s for s, dynamic in zip(strides, fake.dynamic_strides_mask, strict=True) if dynamic]

    class Argument(ctypes.Structure):
        _fields_ = [
            ("data", ctypes.c_void_p),
            ("shapes", shape_type * len(shapes)),
            ("strides", stride_type * len(steps)),
        ]

    return Argument(
        address, (shape_type * len(shapes))(*shapes), (stride_type * len(steps))(*steps)
    )


def _element_strides(tensor: Any) -> list[int]:
    if isinstance(tensor, np.ndarray):
        return [s // tensor.itemsize for s in tensor.strides]
    return list(tensor.stride())


def _register(machine: Machine, tensor: Any, name: str, keep: list) -> int:
    """Make the tensor's bytes reachable; returns its address."""
    keep.append(tensor)
    is_array = isinstance(tensor, np.ndarray)
    address = tensor.ctypes.data if is_array else tensor.data_ptr()
    if 0 in tensor.shape:
        return address
    item = tensor.itemsize
    last = sum((n - 1) * s for n, s in zip(tensor.shape, _element_strides(tensor), strict=True))
    machine.memory.add_bytes(address, (last + 1) * item, name, tensor)
    return address
