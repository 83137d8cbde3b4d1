"""The image's recipe without an engine: its RUN lines are executed in a plain directory."""

import os
import re
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"


def instructions(text: str) -> list[tuple[str, str]]:
    joined = re.sub(r"\\\n\s*", " ", re.sub(r"(?m)^\s*#.*\n", "", text))
    return [tuple(line.split(None, 1)) for line in joined.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def dockerfile() -> list[tuple[str, str]]:
    return instructions((DOCKER / "Dockerfile").read_text())


@pytest.fixture
def image(tmp_path) -> Path:
    """A virtual environment in the place of the image's Python, with what vLLM's image has."""
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    (site,) = venv.glob("lib/python*/site-packages")
    (site / "image.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return venv


def test_run_lines_install_the_plugin(dockerfile, image, tmp_path):
    """Every ENV folder becomes one under tmp_path, COPY copies, and RUN runs, in their order."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env = {**env, "PATH": f"{image}/bin:{os.environ['PATH']}"}
    folders: dict[str, Path] = {}
    ran = 0
    for name, value in dockerfile:
        if name == "ENV":
            for key, path in re.findall(r"(\w+)=(\S+)", value):
                env[key] = path
                if path.startswith("/"):
                    folders[path] = tmp_path / "root" / path[1:]
                    env[key] = str(folders[path])
        elif name == "COPY":
            *sources, target = re.sub(r"--from=\S+\s+", "", value).split()
            target = re.sub(r"\$\{(\w+)\}", lambda m: env[m[1]], target)
            Path(target if target.endswith("/") else Path(target).parent).mkdir(
                parents=True, exist_ok=True
            )
            if "--from" not in value:
                for source in sources:
                    subprocess.run(["cp", "-R", ROOT / source, target], check=True)
        elif name == "RUN":
            done = subprocess.run(
                ["/bin/sh", "-c", value], env=env, capture_output=True, text=True, cwd=tmp_path
            )
            assert done.returncode == 0, f"RUN {value}\n{done.stdout}{done.stderr}"
            ran += 1
    assert ran >= 3
    (wheel,) = (tmp_path / "root/wheels").glob("*.whl")
    found = subprocess.run(
        [
            image / "bin/python",
            "-I",
            "-c",
            "import dsv4_kernels, vllm_dsv4_moe as p; print(p.__file__)",
        ],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert str(image) in found.stdout
    assert (image / "bin/dsv4-moe").exists()


def test_runs_as_a_plain_user_with_preflight_and_health_check(dockerfile):
    last = {name: value for name, value in dockerfile}
    assert int(last["USER"].split(":")[0]) > 0
    assert "/health" in last["HEALTHCHECK"]
    assert "/configs/serve" in last["ENTRYPOINT"]
    serve = (DOCKER / "serve").read_text()
    assert serve.index("dsv4-moe doctor") < serve.index("exec vllm serve")
    assert (ROOT / "configs" / "flash-b200.yaml").exists() and "flash-b200.yaml" in last["CMD"]


def test_versions_are_pinned_and_agree(dockerfile):
    tag = next(value for name, value in dockerfile if name == "ARG").split("=")[1]
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]["vllm"]
    assert re.fullmatch(r"v\d+\.\d+\.\d+", tag)
    assert compose["build"]["args"]["VLLM_VERSION"] == tag
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert compose["image"] == f"vllm-dsv4-moe:{version}"
    assert f"VLLM={tag[1:]} " in (ROOT / "tests/setup.sh").read_text()


@pytest.mark.parametrize("doctor_exit", [0, 1], ids=["healthy", "unhealthy"])
def test_serve_starts_only_after_a_clean_preflight(tmp_path, doctor_exit):
    for name, body in {"dsv4-moe": f"exit {doctor_exit}", "vllm": 'echo "vllm $@"'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        ["/bin/sh", DOCKER / "serve", "--config", "x.yaml"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == doctor_exit
    assert done.stdout == ("" if doctor_exit else "vllm serve --config x.yaml\n")
