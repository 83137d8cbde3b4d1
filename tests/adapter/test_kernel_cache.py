"""A server's compiled kernels, whatever has happened to the folders that keep them.

Each case ends with every kernel right: from a folder that can be trusted, or compiled here.
"""

import dataclasses
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from dsv4_kernels import compile_processes, compiled
from dsv4_kernels.backends import REFERENCE, SM90
from dsv4_kernels.compile_processes import fill
from dsv4_kernels.compiled import key_of
from dsv4_kernels.trusted_folder import TrustedFolder
from dsv4_kernels.types import MoeShape

from tests.kernels.test_compiled import give_away, until
from tests.support.fake_kernels import compilations, fake_kernels, object_of
from vllm_dsv4_moe import kernel_cache
from vllm_dsv4_moe.kernel_cache import Compilation, num_local_ranks

ROOT = Path(__file__).parents[2]
SHAPE = MoeShape(16, 16, 2, 64, 64, 8, False)


class Server:
    """Starts as often as it is told to; its kernels' objects say which kernel they are."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.image = folder / "image"
        self.user = folder / "vllm" / f"dsv4_moe_kernels-{os.geteuid()}"
        self.kernels = fake_kernels(folder, 3)
        self.backend = dataclasses.replace(SM90, kernels=lambda shape, arch: self.kernels)
        self.infos: list[str] = []
        self.warnings: list[str] = []
        self.loaded = 0
        patch.setenv("VLLM_CACHE_ROOT", str(folder / "vllm"))
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setattr(kernel_cache, "IMAGE_FOLDER", self.image)
        patch.setattr(compiled, "_cache", compiled._cache)
        patch.setattr(compiled, "load_object", self.load)
        log = {"info": self.infos, "warning": self.warnings}
        patch.setattr(
            kernel_cache,
            "logger",
            SimpleNamespace(**{name: self.logs(lines) for name, lines in log.items()}),
        )

    @staticmethod
    def logs(lines: list[str]):
        return lambda message, *args: lines.append(message % args)

    def load(self, path: str, name: str) -> bytes:
        self.loaded += 1
        return Path(path).read_bytes()

    def begin(self) -> Compilation:
        for lines in (self.infos, self.warnings):
            lines.clear()
        self.loaded = 0
        compilation = Compilation()
        compilation.begin(self.backend, SHAPE, "sm_90a", 2)
        return compilation

    def start(self) -> list[str]:
        """Names of what was compiled meanwhile, in whatever process; every kernel is right."""
        before = compilations(self.kernels)
        self.begin()
        self.check()
        return sorted(compilations(self.kernels)[len(before) :])

    def check(self) -> None:
        for kernel in self.kernels:
            launcher = compiled.compiled(kernel)
            content = launcher if isinstance(launcher, bytes) else launcher.content
            assert content == object_of(kernel.gemm), kernel

    def object_of(self, number: int) -> Path:
        (path,) = self.user.glob(f"{key_of(self.kernels[number])}.*.o")
        return path


@pytest.fixture
def server(tmp_path, monkeypatch) -> Server:
    return Server(tmp_path, monkeypatch)


def test_the_first_start_compiles_and_the_second_loads(server):
    assert server.start() == ["0", "1", "2"]
    assert server.loaded == 3 and not server.warnings
    begun, done = server.infos
    assert begun == (
        f"dsv4-moe: compiling 3 kernels for sm_90a, 2 at a time; kept in {server.user}"
    )
    assert done.startswith("dsv4-moe: kernels are compiled: the load waited ")
    assert server.user.stat().st_mode & 0o777 == 0o700
    assert server.start() == []
    assert server.loaded == 3 and not server.warnings and not server.infos


def test_the_first_kernel_that_is_loaded_waits_for_all(server, tmp_path):
    """Whoever asks before whether one is there does not."""
    gate = tmp_path / "gate"
    server.kernels = fake_kernels(tmp_path, 3, until=str(gate))
    compilation = server.begin()
    assert not compilation.cache.has(server.kernels[0])
    opening = threading.Timer(0.5, gate.touch)
    begin = time.monotonic()
    opening.start()
    compiled.compiled(server.kernels[2])
    assert time.monotonic() - begin >= 0.5
    opening.join()
    assert not compilation.running
    server.check()
    assert sorted(compilations(server.kernels)) == ["0", "1", "2"]
    assert server.loaded == 4 and not server.warnings


def test_an_images_kernels_come_first(server):
    fill(TrustedFolder.make(server.image, 0o755), server.kernels[:2])
    assert server.start() == ["2"]
    assert server.loaded == 3 and not server.warnings
    assert len([*server.user.glob("*.o")]) == 1


def test_layers_of_one_shape_compile_once(server):
    compilation = server.begin()
    compilation.begin(server.backend, SHAPE, "sm_90a", 2)
    compilation.begin(REFERENCE, SHAPE, "sm_90a", 2)
    assert len(compilation.running) == 1
    compilation.begin(server.backend, SHAPE._replace(top_k=1), "sm_90a", 2)
    assert len(compilation.running) == 2
    compilation.wait()
    assert sorted(compilations(server.kernels)) == ["0", "1", "2"]


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def change_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def let_others_write(path: Path) -> None:
    path.chmod(0o664)


DAMAGE = [cut_short, change_a_byte, let_others_write]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_object_is_compiled_again(server, damage):
    server.start()
    damage(server.object_of(1))
    assert server.start() == ["1"]
    assert server.loaded == 3
    assert len(server.warnings) == 1 and "a compiled kernel is not used" in server.warnings[0]
    assert server.start() == [] and not server.warnings


def plant(server: Server) -> None:
    """What whoever may write there could have put: objects with the right names, of other code."""
    server.user.mkdir(parents=True, exist_ok=True)
    server.user.chmod(0o700)
    folder = TrustedFolder(server.user)
    for kernel in server.kernels:
        folder.store(key_of(kernel), b"other code")


@pytest.mark.parametrize("mode", [0o770, 0o777], ids=["a-group", "all"])
def test_a_folder_that_others_may_write_is_not_used(server, mode):
    plant(server)
    server.user.chmod(mode)
    assert server.start() == ["0", "1", "2"]
    assert server.loaded == 0
    (warning,) = server.warnings
    assert "compiled kernels are not kept" in warning and "others could put code there" in warning


def test_a_folder_of_another_user_is_not_used(server, monkeypatch):
    plant(server)
    monkeypatch.setattr(kernel_cache, "user_folder", lambda: server.user)
    give_away(server.user, monkeypatch)
    assert server.start() == ["0", "1", "2"]
    assert server.loaded == 0
    (warning,) = server.warnings
    assert "compiled kernels are not kept" in warning and "belongs to user" in warning


def test_an_image_that_others_may_write_is_not_used(server):
    fill(TrustedFolder.make(server.image, 0o755), server.kernels)
    server.image.chmod(0o775)
    assert server.start() == ["0", "1", "2"]
    (warning,) = server.warnings
    assert "compiled kernels of the image are not used" in warning
    assert server.loaded == 3  # from this user's own folder


def test_a_folder_that_cannot_be_written_to(server, monkeypatch):
    fill(TrustedFolder.make(server.user, 0o700), server.kernels[:1])
    monkeypatch.setattr(kernel_cache, "user_folder", lambda: server.user)
    server.user.chmod(0o500)
    uid = os.geteuid()
    if uid == 0:  # may write anywhere
        os.chown(server.user, 54321, -1)
        for path in server.user.iterdir():
            os.chown(path, 54321, -1)
        for path in (server.user, *server.user.parents[:5]):
            path.chmod(path.stat().st_mode | 0o055)
        Path(server.kernels[0].gemm.log).chmod(0o666)
        os.seteuid(54321)
    try:
        assert server.start() == ["1", "2"]
    finally:
        os.seteuid(uid)
    assert server.loaded == 1
    (warning,) = server.warnings
    assert warning == f"dsv4-moe: compiled kernels are not kept: {server.user} cannot be written to"
    assert len(server.infos) == 1


def test_no_place_for_the_folder(server):
    server.user.parent.write_text("a file, where vLLM's cache root should be")
    assert server.start() == ["0", "1", "2"]
    (warning,) = server.warnings
    assert "compiled kernels are not kept" in warning


def test_a_full_disk(server, tmp_path, monkeypatch):
    """No process may write more than 4 KiB into a file, and an object has more."""
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\nulimit -f 8\nexec {sys.executable} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setattr(compile_processes.sys, "executable", str(program))
    compiled_now = server.start()
    assert {*compiled_now} == {"0", "1", "2"}
    assert server.loaded == 0 and not [*server.user.glob("*.o*")]
    assert server.warnings and all("compiled now and not kept: exit" in w for w in server.warnings)
    assert "File too large" in server.warnings[0]


def test_compile_processes_that_are_killed(server, tmp_path):
    """As when memory runs out."""
    gate = tmp_path / "gate"
    server.kernels = fake_kernels(tmp_path, 3, until=str(gate))
    compilation = server.begin()
    until(lambda: len(compilations(server.kernels)) == 2)
    (job,) = compilation.running
    for process in job.processes:
        os.kill(process.pid, signal.SIGKILL)
    gate.touch()
    server.check()
    (warning,) = server.warnings
    assert "compiled now and not kept: exit status -9" in warning
    assert len(server.start()) == 3 and not server.warnings


def test_two_servers_at_once(server, tmp_path):
    gate = tmp_path / "gate"
    server.kernels = fake_kernels(tmp_path, 3, until=str(gate))
    servers = [server.begin(), server.begin()]
    until(lambda: len(compilations(server.kernels)) == 3)
    gate.touch()
    for compilation in servers:
        compilation.wait()
        server.check()
    assert sorted(compilations(server.kernels)) == ["0", "1", "2"]
    assert server.loaded == 6 and not server.warnings


def test_ranks_of_this_machine_share_its_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {*range(32)})
    found = [compile_processes.num_processes(ranks) for ranks in (1, 2, 4, 8, 64)]
    assert found == [16, 16, 8, 4, 1]
    config = SimpleNamespace(local_world_size=2, data_parallel_size_local=4)
    assert num_local_ranks(config) == 8


@pytest.mark.parametrize("name", ["VLLM_CACHE_ROOT", "XDG_CACHE_HOME", "HOME"])
def test_the_cache_root_is_vllms(monkeypatch, name):
    import vllm.envs

    for other in ("VLLM_CACHE_ROOT", "XDG_CACHE_HOME"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "~/there" if name == "VLLM_CACHE_ROOT" else "/there")
    root = kernel_cache.vllm_cache_root()
    assert root == Path(vllm.envs.VLLM_CACHE_ROOT) and "there" in str(root)
