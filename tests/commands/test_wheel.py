"""The wheel holds both packages whole and the deployments, and its command answers where nothing
else is installed."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Package -> its folder in the repository.
PACKAGES = {
    "vllm_dsv4_moe": "vllm_dsv4_moe",
    "vllm_dsv4_moe/configs": "configs",
    "dsv4_kernels": "kernels/dsv4_kernels",
}


def tracked(*folders: str) -> list[str]:
    """What git has of the repository, or of its folders."""
    command = ["git", "-C", ROOT, "ls-files", "-z", *folders]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built of a copy: what the working tree holds beside git's files is not in it."""
    source, wheels = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheels")
    for name in tracked():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*pip, "--wheel-dir", wheels, source], capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = wheels.iterdir()
    return built


def environment() -> dict[str, str]:
    """Without the paths to this repository that the tests may have been started with."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def test_holds_what_git_has_of_both_packages(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = [PurePosixPath(name) for name in archive.namelist()]
    held = sorted(str(name) for name in names if not name.parts[0].endswith(".dist-info"))
    wanted = [
        str(PurePosixPath(package, PurePosixPath(name).relative_to(folder)))
        for package, folder in PACKAGES.items()
        for name in tracked(folder)
    ]
    assert held == sorted(wanted)


@pytest.fixture(scope="module")
def command(wheel, tmp_path_factory):
    """`dsv4-moe` in an environment that holds the wheel and Python alone."""
    venv = tmp_path_factory.mktemp("empty") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    pip = [sys.executable, "-m", "pip", "--python", venv / "bin/python", "install"]
    subprocess.run([*pip, "-q", "--no-deps", "--no-index", wheel], check=True, env=environment())
    return venv / "bin/dsv4-moe"


def answer(command: Path, *words: str) -> tuple[int, str]:
    done = subprocess.run(
        [command, *words], capture_output=True, text=True, env=environment(), cwd=command.parent
    )
    assert done.stderr == ""
    return done.returncode, done.stdout


def test_says_its_version(command):
    assert answer(command, "--version") == (0, f"dsv4-moe {PROJECT['version']}\n")


def test_has_the_deployments(command):
    names = [Path(name).stem for name in tracked("configs")]
    status, listed = answer(command, "config")
    assert status == 0 and [line.split()[0] for line in listed.splitlines()] == sorted(names)
    for name in names:
        assert answer(command, "config", name) == (0, (ROOT / f"configs/{name}.yaml").read_text())


def test_doctor_says_what_is_missing(command):
    status, text = answer(command, "doctor")
    assert status == 1 and "Traceback" not in text
    for library in ("torch", "triton", "vllm", "rich"):
        assert f"BAD  {library:<18} not installed: " in text
    assert f"ok   vllm-dsv4-moe      {PROJECT['version']}\n" in text
    assert f"ok   {'plugin':<18} vLLM loads dsv4_moe = vllm_dsv4_moe:register" in text
    assert text.endswith("not healthy: see what is BAD\n")
