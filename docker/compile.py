"""Compile the expert kernels of deployments ahead of time, for the image: no GPU is needed.

    python3 docker/compile.py KERNELS configs/flash-b200.yaml ...

Each goes to a folder of its own, KERNELS/<the file's stem>, which docker/serve gives the server.
"""

import subprocess
import sys
from pathlib import Path

import yaml

ARCHES = {"h200": "sm_90a", "b200": "sm_100a"}


def command(kernels: Path, deployment: Path) -> list[str]:
    """`dsv4-moe compile` with the sizes that one rank of the deployment has."""
    options = yaml.safe_load(deployment.read_text())
    model, gpus = deployment.stem.split("-", 1)
    data_parallel = options.get("data-parallel-size", 1)
    assert options.get("enable-expert-parallel") or data_parallel == 1, deployment
    arguments = {
        "arch": ARCHES[gpus[-4:]],
        "model": model,
        "ep-size": data_parallel * options.get("tensor-parallel-size", 1),
        "max-num-tokens": data_parallel * options["max-num-batched-tokens"],
        "out": kernels / deployment.stem,
    }
    return ["dsv4-moe", "compile", *(f"--{name}={value}" for name, value in arguments.items())]


if __name__ == "__main__":
    kernels, *deployments = map(Path, sys.argv[1:])
    for deployment in deployments:
        subprocess.run(command(kernels, deployment), check=True)
