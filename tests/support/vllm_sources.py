"""Where the Python sources of both supported vLLMs are.

The installed vLLM is one version; the other's files are put where `make test` puts them, or where
VLLM_NEXT_SOURCES says.
"""

import functools
import importlib.util
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NEXT = Path(os.environ.get("VLLM_NEXT_SOURCES", ROOT / ".venv/vllm-sources/0.33.0"))


@functools.cache
def sources(version: str) -> Path:
    """The folder that holds the package vllm of that version, 0.32 or 0.33."""
    if version == "0.33":
        if not (NEXT / "vllm").is_dir():
            pytest.fail(
                f"{NEXT} has no vLLM 0.33 sources: `make setup` puts them there, or set "
                "VLLM_NEXT_SOURCES to a folder that holds its package"
            )
        return NEXT
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.origin is not None, "vllm is not installed: run `make setup`"
    return Path(spec.origin).parents[1]


def next_with_installed_operators(folder: Path) -> Path:
    """A folder for PYTHONPATH: vLLM 0.33's Python with the installed vLLM's compiled parts."""
    package = folder / "vllm"
    package.mkdir()
    compiled = (sources("0.32") / "vllm").glob("*.so")
    for path in (*(sources("0.33") / "vllm").iterdir(), *compiled):
        (package / path.name).symlink_to(path)
    return folder


def installed_under_another_version(folder: Path, version: str) -> Path:
    """A folder for PYTHONPATH: the installed vLLM, which says that it is that version."""
    package = folder / "vllm"
    package.mkdir()
    for path in (sources("0.32") / "vllm").iterdir():
        if path.name not in ("_version.py", "__pycache__"):
            (package / path.name).symlink_to(path)
    numbers = tuple(map(int, version.split(".")))
    (package / "_version.py").write_text(
        f"__version__ = {version!r}\n__version_tuple__ = {numbers}\n"
    )
    return folder
