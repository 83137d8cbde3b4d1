"""Compiled kernels on disk: what their keys depend on, what is trusted, who compiles what."""

import contextlib
import dataclasses
import errno
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest
from cutlass import cute
from dsv4_kernels import compile_processes, compiled
from dsv4_kernels.backends import SM90, SM100
from dsv4_kernels.compile_processes import CompileProcesses, fill
from dsv4_kernels.compiled import Kernel, KernelCache, key_of, object_of
from dsv4_kernels.trusted_folder import TrustedFolder
from dsv4_kernels.types import MoeShape

from tests.support.fake_kernels import FakeGemm, compilations, fake_kernels

ROOT = Path(__file__).parents[2]
PACKAGE = Path(compiled.__file__).parent
PRO = MoeShape(384, 48, 6, 7168, 3072, 8192, False)
REAL = [
    *SM90.kernels(PRO, "sm_90a"),
    *SM100.kernels(PRO._replace(quantize_activations=True), "sm_100a"),
]


@pytest.fixture
def folder(tmp_path) -> TrustedFolder:
    return TrustedFolder.make(tmp_path / "cache", 0o700)


@pytest.fixture
def key_changes():
    """Whether the keys of kernels are all others than before, as a function of what changed."""
    before = list(map(key_of, REAL))
    assert len(set(before)) == len(REAL)

    def changed() -> bool:
        key_of.cache_clear()
        compiled.sources_digest.cache_clear()
        return not {*before} & {*map(key_of, REAL)}

    yield changed
    key_of.cache_clear()
    compiled.sources_digest.cache_clear()


def sources() -> list[Path]:
    files = [path.relative_to(PACKAGE) for path in PACKAGE.rglob("*") if path.is_file()]
    return sorted(path for path in files if "__pycache__" not in path.parts)


def test_one_byte_of_any_source_changes_every_key(tmp_path, monkeypatch, key_changes):
    copy = tmp_path / "dsv4_kernels"
    shutil.copytree(PACKAGE, copy)
    monkeypatch.setattr(compiled, "__file__", str(copy / "compiled.py"))
    assert not key_changes()
    assert Path("moe.py") in sources() and len(sources()) > 25
    for path in map(copy.joinpath, sources()):
        content = path.read_bytes()
        path.write_bytes(content[:-1] + b"#" if content else b"#")
        assert key_changes(), path
        path.write_bytes(content)
    (copy / "room").mkdir()
    (copy / "moe.py").rename(copy / "room/moe.py")
    assert key_changes()


def test_compiled_python_changes_no_key(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "a", ignore=shutil.ignore_patterns("__pycache__"))
    before = compiled.sources_digest(tmp_path / "a")
    (tmp_path / "a/__pycache__").mkdir()
    (tmp_path / "a/__pycache__/moe.pyc").write_bytes(b"1")
    compiled.sources_digest.cache_clear()
    assert compiled.sources_digest(tmp_path / "a") == before


@pytest.mark.parametrize(
    "owner, name, value",
    [
        (platform, "machine", lambda: "riscv64"),
        (metadata, "version", lambda name: "4.8.1"),
        (compiled, "object_options", lambda arch: f"--gpu-arch={arch} --opt-level 0"),
    ],
    ids=["machine", "version", "options"],
)
def test_where_it_is_compiled_changes_every_key(owner, name, value, monkeypatch, key_changes):
    monkeypatch.setattr(owner, name, value)
    assert key_changes()


def variants(value):
    """Every value that differs from this one in one number, string or truth value."""
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield value + 1
    elif isinstance(value, str):
        yield value + "x"
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            for part in variants(getattr(value, field.name)):
                yield dataclasses.replace(value, **{field.name: part})
    else:
        assert isinstance(value, tuple), value
        make = getattr(value, "_make", tuple)
        for i, part in enumerate(value):
            yield from (make([*value[:i], other, *value[i + 1 :]]) for other in variants(part))


@pytest.mark.parametrize("kernel", [REAL[0], REAL[-1]], ids=["sm90", "sm100"])
def test_every_value_of_a_specialisation_is_in_its_key(kernel):
    others = [kernel._replace(gemm=gemm) for gemm in variants(kernel.gemm)]
    others += [kernel._replace(arch="sm_103a"), kernel._replace(compile=object_of)]
    assert len(others) > 10
    assert len({*map(key_of, others), key_of(kernel)}) == len(others) + 1


def test_a_value_without_a_meaning_of_its_own_has_no_key():
    with pytest.raises(TypeError, match="only plain values have a stable key"):
        key_of(Kernel(object_of, FakeGemm("a", object()), "sm_90a"))


def test_objects_run_on_any_cpu_of_their_kind(monkeypatch):
    """Their host code has no vector instructions of the machine that compiled them."""
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    wanted = "--gpu-arch=sm_90a --host-target 'llvm -mtriple=x86_64-unknown-linux-gnu -mcpu=x86-64'"
    assert compiled.object_options("sm_90a") == wanted
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert "-mtriple=aarch64-unknown-linux-gnu'" in compiled.object_options("sm_90a")


def read(folder: TrustedFolder, kernel: Kernel) -> bytes | None:
    fd = folder.open_object(key_of(kernel))
    if fd is None:
        return None
    try:
        return Path(f"/proc/self/fd/{fd}").read_bytes()
    finally:
        os.close(fd)


def give_away(path: Path, monkeypatch) -> None:
    """Make it another user's."""
    if os.geteuid() == 0:
        os.chown(path, 54321, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 54321)


def test_an_object_is_found_under_its_key_only(folder, tmp_path):
    first, second = fake_kernels(tmp_path, 2)
    folder.store(key_of(first), b"object")
    assert read(folder, first) == b"object"
    assert read(folder, second) is None
    (file,) = folder.path.iterdir()
    assert file.stat().st_mode & 0o777 == 0o644 and folder.path.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o777])
def test_a_folder_that_others_may_write_is_refused(folder, mode):
    folder.path.chmod(mode)
    with pytest.raises(PermissionError, match=rf"mode {mode:o}, so that others could"):
        TrustedFolder(folder.path)
    with pytest.raises(PermissionError):
        TrustedFolder.make(folder.path, 0o700)


def test_a_folder_of_another_user_is_refused(folder, monkeypatch):
    give_away(folder.path, monkeypatch)
    with pytest.raises(PermissionError, match="belongs to user"):
        TrustedFolder(folder.path)


def test_the_folder_is_made_for_its_readers_whatever_the_umask(tmp_path):
    before = os.umask(0o077)
    try:
        TrustedFolder.make(tmp_path / "image", 0o755)
    finally:
        os.umask(before)
    assert (tmp_path / "image").stat().st_mode & 0o777 == 0o755


def test_no_link_is_followed(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder.path)
    with pytest.raises(OSError):
        TrustedFolder(tmp_path / "link")
    (kernel,) = fake_kernels(tmp_path, 1)
    folder.store(key_of(kernel), b"object")
    (file,) = folder.path.iterdir()
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError) as raised:
        folder.open_object(key_of(kernel))
    assert raised.value.errno == errno.ELOOP


def test_another_users_object_is_not_loaded(folder, tmp_path, monkeypatch):
    (kernel,) = fake_kernels(tmp_path, 1)
    folder.store(key_of(kernel), b"object")
    give_away(next(folder.path.iterdir()), monkeypatch)
    with pytest.raises(PermissionError, match="belongs to user"):
        folder.open_object(key_of(kernel))


def test_an_object_that_cannot_be_written_leaves_nothing(folder, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        folder.store("key", b"object")
    assert not any(folder.path.iterdir())


def test_what_is_loaded_is_what_was_checked(folder, tmp_path, monkeypatch):
    """The loader is given the descriptor, so that a file put in its place meanwhile is not read."""
    (kernel,) = fake_kernels(tmp_path, 1)
    folder.store(key_of(kernel), b"object")

    def load(path: str, name: str) -> bytes:
        (file,) = folder.path.iterdir()
        file.unlink()
        file.write_bytes(b"another")
        assert name == compiled.symbol(kernel)
        return Path(path).read_bytes()

    monkeypatch.setattr(compiled, "load_object", load)
    descriptors = os.listdir("/proc/self/fd")
    assert KernelCache([folder]).launcher(kernel) == b"object"
    assert os.listdir("/proc/self/fd") == descriptors


def test_an_object_that_does_not_load_is_compiled(folder, tmp_path):
    """CuTe DSL's own loader on what is no object; its name and owner are right."""
    (kernel,) = fake_kernels(tmp_path, 1)
    warned: list[str] = []
    folder.store(key_of(kernel), (b"\x7fELF" + bytes(60)))
    assert KernelCache([folder], warned.append).launcher(kernel) is None
    assert len(warned) == 1 and "could not be loaded" in warned[0]


def environ(*paths: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *paths])}


def have(folder: TrustedFolder, kernels: list[Kernel]) -> bool:
    return all(map(KernelCache([folder]).has, kernels))


def until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_a_killed_process_left_is_compiled_by_another(folder, tmp_path):
    gate = tmp_path / "gate"
    kernels = fake_kernels(tmp_path, 3, until=str(gate))
    killed = CompileProcesses(kernels, folder, 1, environ())
    until(lambda: compilations(kernels) == ["0"])
    other = CompileProcesses(kernels, folder, 1, environ())
    until(lambda: compilations(kernels) == ["0", "1"])
    os.kill(killed.processes[0].pid, signal.SIGKILL)
    (failure,) = killed.wait()
    assert failure.startswith("exit status -9")
    gate.touch()
    assert other.wait() == []
    assert have(folder, kernels)
    assert compilations(kernels) == ["0", "1", "2", "0"]


def test_the_working_directory_is_not_imported_from(folder, tmp_path, monkeypatch):
    trap = tmp_path / "trap"
    for package in ("dsv4_kernels", "pickle", "tests"):
        (trap / package).mkdir(parents=True)
        (trap / package / "__init__.py").write_text("raise SystemExit('the working directory')")
    monkeypatch.chdir(trap)
    kernels = fake_kernels(tmp_path, 1)
    assert CompileProcesses(kernels, folder, 1, environ("", ".")).wait() == []
    assert have(folder, kernels)


def test_processes_see_no_gpu_and_no_options_of_the_compiler():
    given = {"CUTE_DSL_ARCH": "sm_100a", "CUTE_DSL_KEEP_PTX": "1", "HOME": "/home/x"}
    found = compile_processes._environment(given, "sm_90a")
    path = found.pop("PYTHONPATH")
    assert found.pop("OPENBLAS_NUM_THREADS") == "1"
    assert found == {"CUTE_DSL_ARCH": "sm_90a", "CUDA_VISIBLE_DEVICES": "", "HOME": "/home/x"}
    assert path == str(PACKAGE.parent)


@pytest.mark.parametrize("gpu", ["sm90", "sm100"])
def test_nothing_heavy_is_loaded_to_name_kernels_and_no_torch_to_compile(gpu):
    """Seconds of every process that compiles, and of the server before it starts them."""
    code = f"""
import sys
from dsv4_kernels.types import MoeShape
from dsv4_kernels.{gpu}.compile import kernels
assert kernels(MoeShape(8, 8, 2, 256, 256, 64, {gpu == "sm100"}), "sm_90a")
assert not {{"cutlass", "torch", "triton", "numpy"}} & {{*sys.modules}}, sys.modules
import dsv4_kernels.{gpu}.kernel
assert not {{"torch", "triton"}} & {{*sys.modules}}
"""
    env = compile_processes._environment(os.environ, "sm_90a")
    subprocess.run([sys.executable, "-c", code], env=env, check=True)


def test_a_process_that_cannot_start_is_a_failure(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(compile_processes.sys, "executable", str(tmp_path / "no-python"))
    (failure,) = CompileProcesses(fake_kernels(tmp_path, 1), folder, 8, environ()).wait()
    assert failure.startswith("no process could be started")


def test_a_lock_that_lasts_is_not_waited_for_any_longer(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(compile_processes, "LONGEST_LOCK", 0.3)
    kernels = fake_kernels(tmp_path, 3)
    lock = folder.lock(key_of(kernels[0]))
    begin = time.monotonic()
    fill(folder, kernels)
    os.close(lock)
    assert time.monotonic() - begin > 0.3
    assert compilations(kernels) == ["1", "2", "0"] and have(folder, kernels)


def test_no_locks_are_needed(folder, tmp_path, monkeypatch):
    """Some network file systems have none."""

    def fail(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(compile_processes.TrustedFolder, "lock", fail)
    kernels = fake_kernels(tmp_path, 3)
    fill(folder, kernels)
    assert compilations(kernels) == ["0", "1", "2"] and have(folder, kernels)


def test_what_is_there_is_not_compiled(folder, tmp_path):
    kernels = fake_kernels(tmp_path, 3)
    fill(folder, kernels[:2])
    fill(folder, kernels)
    assert compilations(kernels) == ["0", "1", "2"]


@contextlib.contextmanager
def using(cache: KernelCache):
    compiled.use_cache(cache)
    try:
        yield
    finally:
        compiled.use_cache(KernelCache(()))


def test_a_real_object_is_used_instead_of_the_compiler(folder, monkeypatch):
    monkeypatch.setenv("CUTE_DSL_ARCH", "sm_100a")
    shape = MoeShape(8, 4, 2, 256, 128, 1, True)
    kernel = SM100.kernels(shape, "sm_100a")[0]
    assert CompileProcesses([kernel], folder, 1, os.environ).wait() == []
    monkeypatch.setattr(cute, "compile", lambda *a, **k: pytest.fail("it compiled"))
    with using(KernelCache([folder], pytest.fail)):
        assert callable(compiled.compiled(kernel))
