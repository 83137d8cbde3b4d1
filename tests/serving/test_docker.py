"""The image's recipe without an engine: its RUN lines are executed in a plain directory."""

import json
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
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
    has = sysconfig.get_path("purelib")
    (site / "image.pth").write_text(f"import site; site.addsitedir({has!r})\n")
    return venv


def test_run_lines_install_the_plugin(dockerfile, image, tmp_path):
    """Every ENV folder becomes one under tmp_path, COPY copies, and RUN runs, in their order."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env = {**env, "PATH": f"{image}/bin:{os.environ['PATH']}"}
    # All of them take minutes; every deployment's command is checked below.
    env["DEPLOYMENTS"] = "flash-b200"
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
    assert ran >= 4
    (wheel,) = (tmp_path / "root/wheels").glob("*.whl")
    found = subprocess.run(
        [
            image / "bin/python",
            "-I",
            "-c",
            "import vllm_dsv4_moe, dsv4_kernels; "
            "print(vllm_dsv4_moe.__file__, dsv4_kernels.__path__[0])",
        ],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert found.stdout.count(str(image)) == 2
    assert (image / "bin/dsv4-moe").exists()
    manifest = json.loads((tmp_path / "root/kernels/flash-b200/manifest.json").read_text())
    assert manifest["arch"] == "sm_100a" and len(manifest["objects"]) > 0


def test_runs_as_a_plain_user_with_preflight_and_health_check(dockerfile):
    last = {name: value for name, value in dockerfile}
    assert int(last["USER"].split(":")[0]) > 0
    assert "/health" in last["HEALTHCHECK"]
    assert "/configs/serve" in last["ENTRYPOINT"]
    serve = (DOCKER / "serve").read_text()
    assert serve.index("dsv4-moe doctor") < serve.index("exec vllm serve")
    assert (ROOT / "configs" / "flash-b200.yaml").exists() and last["CMD"] == '["flash-b200"]'


def test_versions_are_pinned_and_agree(dockerfile):
    tag = next(value for name, value in dockerfile if name == "ARG").split("=")[1]
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]["vllm"]
    assert re.fullmatch(r"v\d+\.\d+\.\d+", tag)
    assert compose["build"]["args"]["VLLM_VERSION"] == tag
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert compose["image"] == f"vllm-dsv4-moe:{version}"
    assert f"VLLM={tag[1:]} " in (ROOT / "tests/setup.sh").read_text()


def test_kernels_of_every_deployment_are_compiled(dockerfile):
    """The sizes of one rank: experts over all GPUs, tokens of all data-parallel ranks."""
    deployments = next(v for n, v in dockerfile if n == "ARG" and v.startswith("DEPLOYMENTS"))
    paths = sorted((ROOT / "configs").glob("*.yaml"))
    assert sorted(deployments.split("=")[1].strip('"').split()) == [path.stem for path in paths]
    sys.path.insert(0, str(DOCKER))
    try:
        from compile import command
    finally:
        sys.path.pop(0)
    commands = {path.stem: command(Path("/k"), path)[2:] for path in paths}
    assert commands["flash-b200"] == [
        "--arch=sm_100a", "--model=flash", "--ep-size=1", "--max-num-tokens=8192",
        "--out=/k/flash-b200",
    ]  # fmt: skip
    assert commands["pro-8xh200"][:3] == ["--arch=sm_90a", "--model=pro", "--ep-size=8"]
    assert "--max-num-tokens=32768" in commands["flash-4xh200"]


@pytest.fixture
def stand_ins(tmp_path):
    """docker/serve with a doctor that is content and a vllm that says how it was called."""
    for name, body in {
        "dsv4-moe": "exit ${DOCTOR:-0}",
        "vllm": 'echo "vllm $@ objects=${VLLM_DSV4_MOE_KERNEL_OBJECTS:-none}"',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "kernels/flash-b200").mkdir(parents=True)

    def serve(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
        folders = {"CONFIGS": str(ROOT / "configs"), "KERNELS": str(tmp_path / "kernels")}
        return subprocess.run(
            ["/bin/sh", DOCKER / "serve", *arguments],
            env={"PATH": f"{tmp_path}:/usr/bin:/bin", **folders, **environment},
            capture_output=True,
            text=True,
        )

    return serve


def test_serve_gives_the_server_its_config_and_kernels(stand_ins, tmp_path):
    done = stand_ins("flash-b200", "--port=9000")
    config = ROOT / "configs/flash-b200.yaml"
    objects = tmp_path / "kernels/flash-b200"
    assert done.stdout == f"vllm serve --config {config} --port=9000 objects={objects}\n"
    assert "objects=none" in stand_ins("pro-8xh200").stdout
    assert "objects=/mine" in stand_ins("flash-b200", VLLM_DSV4_MOE_KERNEL_OBJECTS="/mine").stdout


def test_serve_starts_only_after_a_clean_preflight(stand_ins):
    done = stand_ins("flash-b200", DOCTOR="1")
    assert (done.returncode, done.stdout) == (1, "")


def test_serve_names_the_deployments_that_there_are(stand_ins):
    done = stand_ins("flash-b100")
    assert done.returncode == 1 and "flash-b200.yaml" in done.stderr
