"""Every Triton kernel compiles to machine code for the GPUs that are served, without one here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.mark.parametrize("capability", [90, 100])
def test_every_kernel_compiles(capability, tmp_path):
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": str(ROOT / "kernels"),
    }
    done = subprocess.run(
        [sys.executable, str(HERE / "compile_kernels.py"), str(capability)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    compiled = {line.split(":")[0] for line in done.stdout.splitlines()}
    kernels = {
        line.split("(")[0].removeprefix("def ")
        for file in (ROOT / "kernels" / "dsv4_kernels").rglob("*.py")
        for line in file.read_text().splitlines()
        if line.startswith("def _") and line.split("(")[0].endswith("_kernel")
    }
    assert compiled == kernels
