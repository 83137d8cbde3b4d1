"""Compile many sm90 GEMMs at once, in processes, into folders of objects; no GPU is needed."""

import json
import multiprocessing
import os
import struct
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from dsv4_kernels.compiled import MANIFEST, load_objects, write_objects
from dsv4_kernels.grouped_gemm_sm90_spec import Gemm

ARCH = "sm_90a"
_FRAME_SIZE = 0x11  # the attribute of a kernel in a cubin's .nv.info: bytes of stack a thread


def compile_objects(gemms: Sequence[Gemm], folder: Path, jobs: int) -> dict[Gemm, str]:
    """Write each GEMM's object to FOLDER/0, FOLDER/1, ... -> what did not compile, and why."""
    jobs = max(1, min(jobs, len(gemms)))
    shares = [list(gemms[i::jobs]) for i in range(jobs)]
    folders = [folder / str(i) for i in range(jobs)]
    # A process that has imported CuTe DSL, or torch with a GPU, must not be forked.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        failed: dict[Gemm, str] = {}
        for found in pool.map(_compile_share, shares, folders):
            failed |= found
    return failed


def _compile_share(gemms: list[Gemm], folder: Path) -> dict[Gemm, str]:
    os.environ["CUTE_DSL_ARCH"] = ARCH  # CuTe DSL reads it when it is imported
    from dsv4_kernels.grouped_gemm_sm90 import compile_gemm

    kernels, failed = {}, {}
    for gemm in gemms:
        try:
            compile_gemm(gemm, ARCH)
        except Exception as error:  # noqa: BLE001 (whatever it is, the candidate is refused for it)
            failed[gemm] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        else:
            kernels[repr(gemm)] = lambda gemm=gemm: compile_gemm(gemm, ARCH)
    write_objects(folder, ARCH, kernels)
    return failed


def load_folders(folder: Path) -> dict[str, Path]:
    """Use the objects of every folder in this one -> the file of each GEMM's repr.

    ValueError if there are none, or if they are of other kernels than this installation's.
    """
    manifests = sorted(folder.glob(f"*/{MANIFEST}"))
    if not manifests:
        raise ValueError(f"{folder} has no compiled candidates: run dsv4-moe tune --compile-only")
    files: dict[str, Path] = {}
    for manifest in manifests:
        load_objects(manifest.parent, ARCH)
        objects = json.loads(manifest.read_text())["objects"]
        files |= {key: manifest.parent / name for key, name in objects.items()}
    return files


def stack_bytes(object_file: bytes) -> int:
    """The largest stack frame of the kernels in the cubin that an object carries."""
    cubin = object_file[object_file.index(b"\x7fELF", 1) :]
    frames = []
    for name, section in _elf_sections(cubin):
        while name == ".nv.info" and section:
            form, attribute, size = struct.unpack_from("<BBH", section)
            length = size if form == 4 else 0  # otherwise the size field is the value itself
            if attribute == _FRAME_SIZE:
                frames.append(struct.unpack_from("<II", section, 4)[1])
            section = section[4 + length :]
    assert frames, "the cubin says nothing of its kernels' stacks"
    return max(frames)


def _elf_sections(elf: bytes) -> list[tuple[str, bytes]]:
    """(name, bytes) of a 64-bit ELF file's sections."""
    (start,) = struct.unpack_from("<Q", elf, 0x28)
    size, count, names_at = struct.unpack_from("<HHH", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", elf, start + i * size) for i in range(count)]
    _, _, _, _, names, _ = headers[names_at]

    def name(offset: int) -> str:
        return elf[names + offset : elf.index(b"\0", names + offset)].decode()

    return [(name(h[0]), elf[h[4] : h[4] + h[5]]) for h in headers]
