"""Imports point down only: adapter -> moe, weights, workspace -> op -> types -> libraries.

The rules are in `violations`; each file of both packages is parsed against them, and each rule is
shown to catch what it forbids.
"""

import ast
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"vllm_dsv4_moe": ROOT / "vllm_dsv4_moe", "dsv4_kernels": ROOT / "kernels/dsv4_kernels"}
FILES = {
    ".".join([package, *path.relative_to(folder).with_suffix("").parts]): path
    for package, folder in PACKAGES.items()
    for path in sorted(folder.rglob("*.py"))
}
# What ops stand on, besides the contract itself: programmatic launch, device code of routing, of
# NVFP4 and of slots, compiled kernels.
SHARED = {"types", "pdl", "route.routing", "rows.nvfp4_blocks", "rows.slots"}
SHARED |= {"compiled", "trusted_folder"}
ABOVE_OPS = {
    "moe",
    "batched",
    "backends",
    "padding",
    "packed_tokens",
    "workspace",
    "compile_processes",
}
ARCHITECTURES = {"sm90", "sm100"}
# Everything else that the kernels may import is Python's own.
KERNEL_LIBRARIES = {"torch", "triton", "cutlass", "cuda"}
HEAVY = ("torch", "triton", "cutlass", "vllm", "transformers", "numpy")


def imports(tree: ast.AST, at_load: bool = True) -> Iterator[tuple[str, bool]]:
    """(dotted name, whether loading the module imports it); `from a import b` is a.b."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, at_load) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            name = "." * node.level + (node.module or "")
            yield from ((f"{name}.{alias.name}", at_load) for alias in node.names)
        else:
            inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from imports(node, at_load and not inside)


def violations(module: str, source: str) -> list[str]:
    tree = ast.parse(source)
    package, _, name = module.partition(".")
    found = []
    for imported, at_load in imports(tree):
        top, _, rest = imported.partition(".")
        ours = module_of(top, rest)
        if imported.startswith("."):
            found.append(f"relative import {imported}")
        elif name.endswith("__init__") and at_load:
            found.append(f"a package's __init__ imports {imported} when it is loaded")
        elif top == "vllm_dsv4_moe" and package != top:
            found.append(f"the kernels import the adapter: {imported}")
        elif top == "vllm" and package != "vllm_dsv4_moe":
            found.append(f"only the adapter imports vllm: {imported}")
        elif package == top == "vllm_dsv4_moe" and crosses_into_commands(name, ours):
            found.append(f"the adapter imports a command: {imported}")
        elif top == "dsv4_kernels" and ours == "reference" and at_load:
            found.append("reference is a backend: import it where that backend runs")
        elif package == "dsv4_kernels":
            found += kernel_violations(name, top, ours)
    if package == "dsv4_kernels":
        found += environment_reads(tree)
    return found


def module_of(package: str, rest: str) -> str:
    """The module that a dotted name in a package is, or lies in: rows.combine of rows.combine.x."""
    parts = rest.split(".")
    while len(parts) > 1 and f"{package}.{'.'.join(parts)}" not in FILES:
        parts.pop()
    return ".".join(parts)


def crosses_into_commands(name: str, ours: str) -> bool:
    return ours.startswith("commands") and not name.startswith("commands")


def kernel_violations(name: str, top: str, ours: str) -> list[str]:
    """Of one import in dsv4_kernels.<name>: dsv4_kernels.<ours>, or another top-level package."""
    if top != "dsv4_kernels":
        known = top in KERNEL_LIBRARIES or top in sys.stdlib_module_names
        return [] if known else [f"kernels stand on {sorted(KERNEL_LIBRARIES)}, not on {top}"]
    if ours == "reference":
        allowed = name == "backends"
        return [] if allowed else ["production code imports reference in backends alone"]
    if name == "types" or (name == "reference" and ours != "types"):
        return [f"{name} imports {ours}"]
    if name in SHARED:
        return [] if ours in SHARED else [f"{name}, which ops share, imports {ours}"]
    room = name.split(".")[0]
    same_gpu = room in ARCHITECTURES and ours.split(".")[0] == room
    if name in ABOVE_OPS or ours in SHARED or same_gpu:
        return []
    return [f"op {name} imports {ours}: ops stand on {sorted(SHARED)} only"]


def environment_reads(tree: ast.AST) -> list[str]:
    nodes = [n for n in ast.walk(tree) if isinstance(n, (ast.Attribute, ast.alias))]
    names = {n.attr if isinstance(n, ast.Attribute) else n.name for n in nodes}
    return [f"kernels take arguments, not os.{n}" for n in names & {"environ", "getenv", "putenv"}]


@pytest.mark.parametrize("module", FILES)
def test_imports_point_down(module):
    assert violations(module, FILES[module].read_text()) == []


CAUGHT = {
    "vllm in a kernel": ("dsv4_kernels.rows.combine", "import vllm.envs"),
    "vllm inside a function": ("dsv4_kernels.moe", "def f():\n    from vllm import envs"),
    "the adapter in a kernel": ("dsv4_kernels.moe", "from vllm_dsv4_moe import settings"),
    "one op in another": ("dsv4_kernels.rows.combine", "from dsv4_kernels.rows import place_rows"),
    "an op's names in another": (
        "dsv4_kernels.rows.combine",
        "from dsv4_kernels.route.router_topk import router_topk",
    ),
    "one GPU's kernels in another's": (
        "dsv4_kernels.sm100.gemm",
        "from dsv4_kernels.sm90.spec import Gemm",
    ),
    "a command in the adapter": (
        "vllm_dsv4_moe.moe_method",
        "def f():\n    from vllm_dsv4_moe.commands import gpus",
    ),
    "moe in an op": ("dsv4_kernels.rows.combine", "from dsv4_kernels.moe import MoeShape"),
    "an op in types": ("dsv4_kernels.types", "from dsv4_kernels.rows.combine import combine"),
    "an op in reference": ("dsv4_kernels.reference", "import dsv4_kernels.rows.combine"),
    "an op in what ops share": ("dsv4_kernels.pdl", "import dsv4_kernels.rows.combine"),
    "reference in an op": (
        "dsv4_kernels.rows.combine",
        "def f():\n    import dsv4_kernels.reference",
    ),
    "reference when backends load": ("dsv4_kernels.backends", "from dsv4_kernels import reference"),
    "reference when the adapter loads": ("vllm_dsv4_moe.x", "import dsv4_kernels.reference"),
    "another library": ("dsv4_kernels.moe", "import scipy"),
    "the environment": ("dsv4_kernels.moe", "import os\nx = os.environ['X']"),
    "getenv": ("dsv4_kernels.moe", "from os import getenv"),
    "a relative import": ("vllm_dsv4_moe.router", "from . import settings"),
    "an import in __init__": ("vllm_dsv4_moe.__init__", "try:\n    import torch\nexcept: pass"),
}


@pytest.mark.parametrize("module, source", CAUGHT.values(), ids=CAUGHT)
def test_the_rules_catch(module, source):
    assert len(violations(module, source)) == 1


ALLOWED = {
    "a GPU's device file": ("dsv4_kernels.sm90.gemm", "import dsv4_kernels.sm90.kernel"),
    "the adapter in a command": (
        "vllm_dsv4_moe.commands.doctor",
        "from vllm_dsv4_moe.settings import Settings",
    ),
    "types in an op": (
        "dsv4_kernels.rows.combine",
        "from dsv4_kernels.types import Routing\nimport os",
    ),
    "an op in moe": ("dsv4_kernels.moe", "from dsv4_kernels.rows.combine import combine"),
    "the reference backend": (
        "dsv4_kernels.backends",
        "def f():\n    import dsv4_kernels.reference",
    ),
    "vllm in the adapter": ("vllm_dsv4_moe.x", "import vllm, os\nx = os.environ"),
}


@pytest.mark.parametrize("module, source", ALLOWED.values(), ids=ALLOWED)
def test_the_rules_allow(module, source):
    assert violations(module, source) == []


@pytest.mark.parametrize("gpu", sorted(ARCHITECTURES))
def test_a_gpus_folder_has_the_functions_of_gpu_folder(gpu):
    """With GpuFolder's parameters, in the modules that `backends.MODULES` names."""
    from dsv4_kernels.backends import MODULES, GpuFolder

    wanted = {name for names in MODULES.values() for name in names}
    assert wanted == {name for name in vars(GpuFolder) if not name.startswith("_")}
    for module, names in MODULES.items():
        tree = ast.parse(FILES[f"dsv4_kernels.{gpu}.{module}"].read_text())
        found = {node.name: node.args for node in tree.body if isinstance(node, ast.FunctionDef)}
        for name in names:
            parameters = inspect.signature(getattr(GpuFolder, name)).parameters.values()
            given = [*found[name].args, *found[name].kwonlyargs]
            assert [arg.arg for arg in given] == [p.name for p in parameters][1:], (gpu, name)


@pytest.mark.parametrize("package", PACKAGES)
def test_loading_a_package_loads_nothing_heavy(package):
    """vLLM imports plugins before it forks: CUDA must not be touched, nor torch loaded, by then."""
    code = f"import sys, {package}; print([m for m in {HEAVY} if m in sys.modules])"
    path = f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'kernels')]}; "
    result = subprocess.run(
        [sys.executable, "-c", path + code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
