"""Say whether this machine can serve, before minutes go into loading.

Checks versions, the GPU, that vLLM finds and takes the plugin, which backend would run the experts
and why not the others, and the settings in the environment. Exit status 0 healthy, 1 not.
"""

import argparse
import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, version
from pathlib import Path

from vllm_dsv4_moe.commands import gpus as driver

PLUGIN_GROUP = "vllm.general_plugins"
PLUGIN_NAME = "dsv4_moe"
GIB = 2**30


@dataclass(frozen=True)
class Check:
    """One finding. Only `bad` makes the machine unfit."""

    name: str
    status: str  # ok, note or bad
    text: str


@dataclass(frozen=True)
class Gpu:
    name: str
    capability: tuple[int, int]
    memory: int  # bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the checks as JSON")


def run(args: argparse.Namespace) -> int:
    # vLLM logs to stdout, which is the checks' alone.
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    checks = list(diagnose())
    healthy = all(check.status != "bad" for check in checks)
    if args.json:
        found = {"healthy": healthy, "checks": [asdict(check) for check in checks]}
        print(json.dumps(found, indent=1))
    else:
        _print(checks, healthy)
    return 0 if healthy else 1


def _print(checks: Sequence[Check], healthy: bool) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False, soft_wrap=True)
    marks = {"ok": "[green]ok[/]  ", "note": "[yellow]note[/]", "bad": "[red]BAD[/] "}
    for check in checks:
        console.print(f"{marks[check.status]} {check.name:<18} {escape(check.text)}")
    verdict = "[green]healthy[/]" if healthy else "[red]not healthy: see what is BAD[/]"
    console.print(verdict)


def diagnose() -> Iterator[Check]:
    """Every check, in the order in which a failure explains the next."""
    names = ("vllm", "torch", "triton", "nvidia-cutlass-dsl", "vllm-dsv4-moe")
    installed = {name: _version(name) for name in names}
    yield from check_versions(installed)
    gpus = []
    if installed["torch"]:
        gpus = visible_gpus()
        listed = [str(gpu) for gpu in driver.supported_gpus(driver.visible_gpus())]
        yield from check_devices(gpus, listed, Path("/proc/cpuinfo"))
    yield from check_entry_point(entry_points(group=PLUGIN_GROUP), os.environ)
    yield from check_settings(os.environ)
    if installed["vllm"] and installed["torch"]:
        yield from check_registration()
        yield from check_backends(gpus[0].capability if gpus else None, os.environ)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def check_versions(installed: Mapping[str, str | None]) -> Iterator[Check]:
    from vllm_dsv4_moe import SUPPORTED_VLLM, is_supported

    yield Check("python", "ok", platform.python_version())
    for name, found in installed.items():
        if found is None:
            yield Check(name, "bad", "not installed: it comes with vLLM, into the same environment")
        elif name == "vllm" and not is_supported(found):
            supported = " and ".join(SUPPORTED_VLLM)
            yield Check(name, "bad", f"{found} is not supported: this plugin is for {supported}")
        else:
            yield Check(name, "ok", found)


def visible_gpus() -> list[Gpu]:
    import torch

    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        found.append(Gpu(gpu.name, (gpu.major, gpu.minor), gpu.total_memory))
    return found


def check_devices(gpus: Sequence[Gpu], listed: Sequence[str], cpuinfo: Path) -> Iterator[Check]:
    """gpus are what torch sees, listed those with kernels that the driver has."""
    for index, gpu in enumerate(gpus):
        major, minor = gpu.capability
        words = f"{gpu.name}, compute capability {major}.{minor}, {gpu.memory / GIB:.0f} GiB"
        yield Check(f"GPU {index}", "ok", words)
    if gpus:
        return
    if listed:
        import torch

        cuda = torch.version.cuda
        built = f"was built for CUDA {cuda}: is the driver too old?" if cuda else "is a CPU build"
        words = f"{listed[0]} is there, and torch sees none: this torch {built}"
        yield Check("GPU", "bad", words)
        return
    flags = cpuinfo.read_text().split() if cpuinfo.exists() else []
    if "avx512_bf16" in flags:
        words = "none: vLLM's CPU build serves small checkpoints here (avx512_bf16 is there)"
        yield Check("GPU", "note", words)
    else:
        words = "none, and the CPU lacks avx512_bf16, which vLLM's CPU build needs for DeepSeek-V4"
        yield Check("GPU", "bad", words)


def check_entry_point(found: Sequence[EntryPoint], environ: Mapping[str, str]) -> Iterator[Check]:
    """What vLLM's plugin loader goes by: installed metadata, and VLLM_PLUGINS."""
    ours = [point for point in found if point.name == PLUGIN_NAME]
    if not ours:
        words = f"no entry point {PLUGIN_NAME} in {PLUGIN_GROUP}: pip install vllm-dsv4-moe"
        yield Check("plugin", "bad", words)
        return
    wanted = environ.get("VLLM_PLUGINS")
    if wanted is not None and PLUGIN_NAME not in wanted.split(","):
        words = f"VLLM_PLUGINS is {wanted!r} and leaves it out: add {PLUGIN_NAME}, or unset it"
        yield Check("plugin", "bad", words)
        return
    others = sorted({point.name for point in found} - {PLUGIN_NAME})
    also = f"; others: {', '.join(others)}" if others else ""
    yield Check("plugin", "ok", f"vLLM loads {PLUGIN_NAME} = {ours[0].value}{also}")


def check_registration() -> Iterator[Check]:
    """Load the plugin as vLLM does, and see that vLLM then takes our method."""
    try:
        from vllm.model_executor.layers.quantization import get_quantization_config

        from vllm_dsv4_moe import register

        register()
        method = get_quantization_config("deepseek_v4_fp8")
    except Exception as error:  # noqa: BLE001 (whatever it is, it is the finding)
        yield Check("register", "bad", f"{type(error).__name__}: {error}")
        return
    if method.__module__.partition(".")[0] == "vllm_dsv4_moe":
        yield Check("register", "ok", f"deepseek_v4_fp8 is {method.__name__}")
    else:
        words = f"deepseek_v4_fp8 is {method.__module__}.{method.__name__}: another plugin took it"
        yield Check("register", "bad", words)


def check_settings(environ: Mapping[str, str]) -> Iterator[Check]:
    from vllm_dsv4_moe.settings import ENV_PREFIX, read_settings

    try:
        settings = read_settings({}, environ)
    except ValueError as error:
        yield Check("settings", "bad", str(error))
        return
    for name in ("activation_scale_file", "kernel_objects"):
        path = getattr(settings, name)
        if path and not Path(path).exists():
            yield Check("settings", "bad", f"{name} is {path!r}, and there is no such path")
    given = sorted(name for name in environ if name.startswith(ENV_PREFIX))
    words = ", ".join(f"{name}={environ[name]}" for name in given) or "all at their defaults"
    yield Check("settings", "ok", words)


def check_backends(
    capability: tuple[int, int] | None, environ: Mapping[str, str]
) -> Iterator[Check]:
    """Which backend would run V4-Flash's layer, all experts on one GPU, and why not the others."""
    from dsv4_kernels.backends import AUTO, BACKENDS, choose_backend
    from dsv4_kernels.types import MoeShape

    from vllm_dsv4_moe.moe_method import check_device, quantizes_activations
    from vllm_dsv4_moe.settings import read_settings

    try:
        settings = read_settings({}, environ)
        quantized = quantizes_activations(settings, capability)
    except ValueError as error:
        yield Check("backend", "bad", str(error))
        return

    def choose(name: str) -> str:
        shape = MoeShape(256, 256, 6, 4096, 2048, 8192, quantized)
        chosen = choose_backend(name, shape, capability).name
        check_device(chosen, capability, is_eager=True)
        return chosen

    for name in dict.fromkeys([*AUTO.values(), *BACKENDS]):
        try:
            choose(name)
        except ValueError as error:
            yield Check(name, "note", f"would not run V4-Flash here: {error}")
        else:
            yield Check(name, "ok", "would run V4-Flash here")
    try:
        chosen = choose(settings.backend)
    except ValueError as error:
        yield Check("backend", "bad", f"{settings.backend}: {error}")
        return
    multiplies = "NVFP4 activations (W4A4)" if quantized else "bf16 activations (W4A16)"
    slow = ": for checking, not for speed" if chosen == "reference" else ""
    slow += ", and with --enforce-eager only" if slow and capability is not None else ""
    status = "note" if slow else "ok"
    yield Check("backend", status, f"{settings.backend} means {chosen}, {multiplies}{slow}")
