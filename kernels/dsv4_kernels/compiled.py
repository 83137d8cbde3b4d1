"""Compiled CuTe DSL kernels: from a cache on disk, or compiled now.

A kernel's key is a digest of all that its object depends on: arch, machine, CuTe DSL's version,
compiler options, the values it is specialised on, and every source file of this package. What has
no object under its key is compiled; nothing is ever refused for being of another version.
"""

import dataclasses
import functools
import hashlib
import json
import os
import platform
import tempfile
import warnings
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from dsv4_kernels.trusted_folder import TrustedFolder


class Kernel(NamedTuple):
    """A specialisation. compile, a function of a module, takes gemm and the compiler's options."""

    compile: Callable[[Any, str], Any]
    gemm: Any  # the op's Gemm: numbers, strings, and tuples and dataclasses of them
    arch: str


def arch_of(capability: tuple[int, int]) -> str:
    """What to compile for: instructions of the sm_90a kind exist on that very capability only."""
    return f"sm_{capability[0]}{capability[1]}a"


def options(arch: str) -> str:
    """Of the compiler, for a launcher that this process calls."""
    return f"--gpu-arch={arch}"


def object_options(arch: str) -> str:
    """Of the compiler, for an object. Its host code must run on any CPU of this kind: by default
    it has the vector instructions of the one that compiles."""
    machine = platform.machine()
    cpu = " -mcpu=x86-64" if machine == "x86_64" else ""
    return f"{options(arch)} --host-target 'llvm -mtriple={machine}-unknown-linux-gnu{cpu}'"


@functools.cache
def key_of(kernel: Kernel) -> str:
    """32 hexadecimal digits."""
    facts = {
        "arch": kernel.arch,
        "machine": platform.machine(),
        "nvidia-cutlass-dsl": metadata.version("nvidia-cutlass-dsl"),
        "options": object_options(kernel.arch),
        "sources": sources_digest(Path(__file__).parent),
        "compile": f"{kernel.compile.__module__}.{kernel.compile.__qualname__}",
        "gemm": plain(kernel.gemm),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


@functools.cache
def sources_digest(package: Path) -> str:
    """Of the name and content of every file in the package, compiled Python aside."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            content = path.read_bytes()
            digest.update(f"{path.relative_to(package)} {len(content)} ".encode() + content)
    return digest.hexdigest()


def plain(value: Any) -> Any:
    """What JSON can hold of a specialisation; TypeError for a value whose meaning is not its own.

    Two specialisations are the same kernel exactly if these are equal.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif isinstance(value, tuple) and hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    if isinstance(value, tuple):
        return [plain(part) for part in value]
    raise TypeError(f"a kernel is specialised on {value!r}: only plain values have a stable key")


class KernelCache:
    """Folders of objects, in the order in which they are looked through.

    warn is called once with a sentence for each object that must not be loaded; wait, which is for
    what others still compile, before a launcher is looked for.
    """

    def __init__(
        self,
        folders: Iterable[TrustedFolder],
        warn: Callable[[str], None] = warnings.warn,
        wait: Callable[[], None] = lambda: None,
    ) -> None:
        self.folders = list(folders)
        self.warn = functools.cache(warn)
        self.wait = wait

    def has(self, kernel: Kernel) -> bool:
        fd = self._open(kernel)
        if fd is not None:
            os.close(fd)
        return fd is not None

    def launcher(self, kernel: Kernel) -> Any | None:
        """From the kernel's object; None if there is none that may be loaded."""
        self.wait()
        fd = self._open(kernel)
        if fd is None:
            return None
        try:
            return load_object(f"/proc/self/fd/{fd}", symbol(kernel))
        except Exception as error:  # noqa: BLE001 (whatever it is, the kernel can be compiled)
            self.warn(f"the compiled {kernel.gemm} could not be loaded: {error}")
            return None
        finally:
            os.close(fd)

    def _open(self, kernel: Kernel) -> int | None:
        for folder in self.folders:
            try:
                fd = folder.open_object(key_of(kernel))
            except (OSError, ValueError) as error:
                self.warn(f"a compiled kernel is not used: {error}")
                continue
            if fd is not None:
                return fd
        return None


def symbol(kernel: Kernel) -> str:
    """The prefix of the object's names."""
    return f"dsv4_{key_of(kernel)}"


def object_of(kernel: Kernel) -> bytes:
    """Compile the kernel to an object: the cubin and its host launcher. No GPU is needed."""
    launcher = kernel.compile(kernel.gemm, object_options(kernel.arch))
    with tempfile.TemporaryDirectory() as folder:
        launcher.export_to_c(folder, "kernel", symbol(kernel))
        return Path(folder, "kernel.o").read_bytes()


def load_object(path: str, name: str) -> Any:
    from cutlass.cute.runtime import load_module

    return getattr(load_module(path), name)


_cache = KernelCache(())


def use_cache(cache: KernelCache) -> None:
    """Look there from now on, in this process."""
    global _cache
    _cache = cache


def compiled(kernel: Kernel) -> Any:
    """The kernel's launcher: loaded from the cache in use, or compiled now and not kept."""
    launcher = _cache.launcher(kernel)
    if launcher is None:
        launcher = kernel.compile(kernel.gemm, options(kernel.arch))
    return launcher
