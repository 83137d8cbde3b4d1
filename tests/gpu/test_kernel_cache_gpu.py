"""On a GPU: objects compiled without one run, and with a damaged cache the layer is right."""

import os
import sys
from pathlib import Path

import pytest
import torch
from bench.inputs import LIMIT, random_weights
from cutlass import cute
from dsv4_kernels import compile_processes, compiled
from dsv4_kernels.backends import SM90
from dsv4_kernels.moe import moe, prepare_layer, workspace_bytes
from dsv4_kernels.sm90 import gemm
from dsv4_kernels.types import MoeLayer, MoeShape, Routing

from vllm_dsv4_moe import kernel_cache
from vllm_dsv4_moe.kernel_cache import Compilation

pytestmark = [pytest.mark.gpu, pytest.mark.xdist_group("kernel_cache")]
SHAPE = MoeShape(8, 8, 2, 256, 128, 1, False)  # two kernels


@pytest.fixture(scope="module")
def filled(tmp_path_factory) -> Path:
    """A cache root with this GPU's kernels of the shape, from processes that see no GPU."""
    root = tmp_path_factory.mktemp("filled")
    with pytest.MonkeyPatch.context() as patch:
        started = start(root, patch)
        assert len([*root.rglob("*.o")]) == 2 and started.infos == 2
    return root


class Started:
    def __init__(self) -> None:
        self.infos, self.warnings, self.out = 0, [], None

    def info(self, *args) -> None:
        self.infos += 1

    def warning(self, message: str, *args) -> None:
        self.warnings.append(message % args)


def start(root: Path, patch: pytest.MonkeyPatch) -> Started:
    """What a server does up to its first token, with that cache root; the token's output."""
    capability = torch.cuda.get_device_capability()
    if capability[0] != 9:
        pytest.skip("the layer is W4A16, which sm90 runs")
    backend, shape = SM90, SHAPE
    started = Started()
    patch.setenv("VLLM_CACHE_ROOT", str(root))
    patch.setattr(kernel_cache, "IMAGE_FOLDER", root / "no-image")
    patch.setattr(kernel_cache, "logger", started)
    patch.setattr(compiled, "_cache", compiled._cache)
    compilation = Compilation()
    compilation.begin(backend, shape, compiled.arch_of(capability), 2)
    compilation.wait()
    gemm.compile_gemm.cache_clear()
    torch.manual_seed(0)
    weights = random_weights(shape, "cuda")
    layer = prepare_layer(backend, shape, weights, limit=LIMIT, activation_scales=None)
    started.out = one_token(layer)
    return started


def one_token(layer: MoeLayer) -> torch.Tensor:
    x = torch.linspace(-1, 1, SHAPE.hidden, device="cuda").bfloat16()[None]
    ids = torch.tensor([[1, 6]], dtype=torch.int32, device="cuda")
    routing = Routing(torch.tensor([[0.75, 0.25]], device="cuda"), ids)
    size = workspace_bytes(layer.backend, layer.shape)
    workspace = torch.empty(size, dtype=torch.uint8, device="cuda")
    out = torch.full_like(x, torch.nan)
    return moe(x, routing, layer, workspace, out=out).cpu()


@pytest.fixture(scope="module")
def right() -> torch.Tensor:
    """The same token by kernels that this process compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "_cache", compiled.KernelCache(()))
        patch.setattr(Compilation, "begin", lambda *args: None)
        out = start(Path("/nowhere"), patch).out
    assert out.isfinite().all() and out.abs().max() > 0
    return out


def test_objects_run_and_nothing_is_compiled(filled, right, monkeypatch):
    monkeypatch.setattr(cute, "compile", lambda *a, **k: pytest.fail("it compiled"))
    started = start(filled, monkeypatch)
    assert (started.infos, started.warnings) == (0, [])
    assert started.out.equal(right)


def cut_short(folder: Path) -> None:
    path = next(folder.glob("*.o"))
    os.truncate(path, path.stat().st_size // 2)


def change_a_byte(folder: Path) -> None:
    path = next(folder.glob("*.o"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def let_others_write(folder: Path) -> None:
    folder.chmod(0o777)


def put_a_file_there(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    folder.touch()


@pytest.mark.parametrize("damage", [cut_short, change_a_byte, let_others_write, put_a_file_there])
def test_a_damaged_cache_ends_in_a_warning_and_the_right_output(
    damage, filled, right, tmp_path, monkeypatch
):
    (folder,) = filled.iterdir()
    copy = tmp_path / folder.name
    copy.mkdir(0o700)
    for path in folder.glob("*.o"):
        (copy / path.name).write_bytes(path.read_bytes())
    damage(copy)
    started = start(tmp_path, monkeypatch)
    assert len(started.warnings) == 1, started.warnings
    assert started.out.equal(right)


def test_a_full_disk_ends_in_a_warning_and_the_right_output(right, tmp_path, monkeypatch):
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\nulimit -f 8\nexec {sys.executable} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setattr(compile_processes.sys, "executable", str(program))
    started = start(tmp_path / "root", monkeypatch)
    assert started.warnings and not [*tmp_path.rglob("*.o")]
    assert started.out.equal(right)
