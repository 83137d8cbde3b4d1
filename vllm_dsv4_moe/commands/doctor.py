"""Say whether this machine can serve, before minutes go into loading.

Checks versions, the GPU, that vLLM finds and takes the plugin, which backend would run the experts
and why not the others, and the settings in the environment; with --config, where the memory of each
GPU of that deployment goes. Exit status 0 healthy, 1 not.
"""

import argparse
import importlib
import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import EntryPoint, entry_points, version
from pathlib import Path

from vllm_dsv4_moe import METHOD_NAME, SUPPORTED_VLLM, install, is_supported
from vllm_dsv4_moe.commands import gpus as driver
from vllm_dsv4_moe.commands.config import find
from vllm_dsv4_moe.commands.deployment import read_deployment
from vllm_dsv4_moe.commands.memory import GPUS, rank_memory

PLUGIN_GROUP = "vllm.general_plugins"
PLUGIN_NAME = "dsv4_moe"
GIB = 2**30
# Distribution -> the module that it is there for.
LIBRARIES = {
    "torch": "torch",
    "triton": "triton",
    "nvidia-cutlass-dsl": "cutlass",
    "vllm": "vllm",
    "rich": "rich",
    "vllm-dsv4-moe": "vllm_dsv4_moe",
}
VLLM = f"vLLM {' or '.join(SUPPORTED_VLLM)}"
WITH_VLLM = f"it comes with vLLM: install {VLLM} into this environment"
REMEDIES = {"vllm": f"install {VLLM} into this environment", "rich": "pip install rich"}
AGAIN = f"install {VLLM} and then vllm-dsv4-moe into a new environment"


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
    parser.add_argument(
        "--config", metavar="FILE", help="a deployment's name, or a file for vllm serve --config"
    )
    parser.add_argument(
        "--gpu", choices=GPUS, help="sum up --config for this GPU instead of the one that is here"
    )


def run(args: argparse.Namespace) -> int:
    if args.gpu is not None and args.config is None:
        raise ValueError("--gpu is what --config is summed up for: name a deployment with --config")
    # vLLM logs to stdout, which is the checks' alone.
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    checks = list(diagnose())
    if args.config is not None:
        checks += _guarded("memory", check_memory(args.config, args.gpu, os.environ))
    healthy = all(check.status != "bad" for check in checks)
    if args.json:
        found = {"healthy": healthy, "checks": [asdict(check) for check in checks]}
        print(json.dumps(found, indent=1))
    else:
        _print(checks, healthy)
    return 0 if healthy else 1


def _print(checks: Sequence[Check], healthy: bool) -> None:
    """In plain text: rich may be what is missing."""
    marks = {"ok": "ok  ", "note": "note", "bad": "BAD "}
    for check in checks:
        print(f"{marks[check.status]} {check.name:<18} {check.text}")
    print("healthy" if healthy else "not healthy: see what is BAD")


def diagnose() -> Iterator[Check]:
    """Every check, in the order in which a failure explains the next."""
    yield Check("python", "ok", platform.python_version())
    listed = [str(gpu) for gpu in driver.supported_gpus(driver.visible_gpus())]
    broken = set()
    for name, module in LIBRARIES.items():
        check = check_library(name, module, _version(name), has_gpu=bool(listed))
        if check.status != "ok":
            broken.add(name)
        yield check
    gpus: list[Gpu] = []
    if "torch" not in broken:
        try:
            gpus, cuda = torch_devices()
        except Exception as error:
            words = f"torch cannot look for GPUs: {_named(error)}: is NVIDIA's driver installed?"
            yield Check("GPU", "bad", words)
        else:
            yield from check_devices(gpus, listed, cuda, Path("/proc/cpuinfo"))
    yield from _guarded("plugin", check_entry_point(entry_points(group=PLUGIN_GROUP), os.environ))
    yield from _guarded("settings", check_settings(os.environ))
    if not broken & {"vllm", "torch", "triton"}:
        yield from _guarded("register", check_registration())
        capability = gpus[0].capability if gpus else None
        yield from _guarded("backend", check_backends(capability, os.environ))
        yield from _guarded("formats", check_formats(capability, os.environ))


def _guarded(name: str, checks: Iterator[Check]) -> Iterator[Check]:
    """The checks, and one more for what they raise."""
    try:
        yield from checks
    except Exception as error:
        yield Check(name, "bad", f"{_named(error)}: {AGAIN}")


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except Exception:  # no metadata, or damaged ones
        return None


def check_library(name: str, module: str, found: str | None, has_gpu: bool) -> Check:
    """Import it, as serving will."""
    # Without a GPU the reference backend serves, which is plain PyTorch.
    bad = "note" if name == "nvidia-cutlass-dsl" and not has_gpu else "bad"
    try:
        imported = importlib.import_module(module)
    except KeyboardInterrupt:
        raise
    except ModuleNotFoundError as error:
        if error.name == module:
            return Check(name, bad, f"not installed: {REMEDIES.get(name, WITH_VLLM)}")
        return Check(name, bad, f"{_named(error)}: {AGAIN}")
    except BaseException as error:  # whatever it is, SystemExit too, it is the finding
        return Check(name, bad, f"importing it raises {_named(error)}: {AGAIN}")
    found = found or getattr(imported, "__version__", None) or "of unknown version"
    if name == "vllm" and not is_supported(found):
        return Check(name, "bad", f"{found} is not supported: this plugin is for {VLLM}")
    return Check(name, "ok", found)


def torch_devices() -> tuple[list[Gpu], str | None]:
    """The GPUs that torch sees, and the CUDA that it was built for."""
    import torch

    found = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            found.append(Gpu(gpu.name, (gpu.major, gpu.minor), gpu.total_memory))
    return found, torch.version.cuda


def check_devices(
    gpus: Sequence[Gpu], listed: Sequence[str], cuda: str | None, cpuinfo: Path
) -> Iterator[Check]:
    """gpus are what torch, built for that CUDA, sees; listed those with kernels that the driver
    has."""
    for index, gpu in enumerate(gpus):
        major, minor = gpu.capability
        words = f"{gpu.name}, compute capability {major}.{minor}, {gpu.memory / GIB:.0f} GiB"
        yield Check(f"GPU {index}", "ok", words)
    if gpus:
        return
    if listed:
        built = f"was built for CUDA {cuda}: update the driver if it is older"
        words = f"{listed[0]} is there, and torch sees none: this torch "
        words += built if cuda else f"is a CPU build: install {VLLM} as built for CUDA"
        yield Check("GPU", "bad", words)
        return
    if cuda:
        words = (
            "none: this vLLM is built for GPUs. If there is one, install NVIDIA's driver for CUDA "
            f"{cuda} (nvidia-smi must list it), or give it to this container"
        )
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
    from vllm.model_executor.layers.quantization import get_quantization_config

    reason = install()
    if reason is not None:
        yield Check("register", "bad", f"vLLM keeps every layer: {reason}: {AGAIN}")
        return
    method = get_quantization_config(METHOD_NAME)
    if method.__module__.partition(".")[0] == "vllm_dsv4_moe":
        yield Check("register", "ok", f"{METHOD_NAME} is {method.__name__}")
    else:
        words = f"{METHOD_NAME} is {method.__module__}.{method.__name__}: another plugin took it"
        yield Check("register", "bad", words)


def check_settings(environ: Mapping[str, str]) -> Iterator[Check]:
    from vllm_dsv4_moe.settings import options_in, read_settings

    try:
        settings = read_settings({}, environ)
    except ValueError as error:
        yield Check("settings", "bad", str(error))
        return
    path = settings.activation_scale_file
    if path and not Path(path).exists():
        words = f"activation_scale_file is {path!r}, and there is no such path"
        yield Check("settings", "bad", words)
    given = ", ".join(f"{name}={environ[name]}" for name in options_in(environ))
    yield Check("settings", "ok", given or "all at their defaults")


def check_backends(
    capability: tuple[int, int] | None, environ: Mapping[str, str]
) -> Iterator[Check]:
    """Which backend would run V4-Flash's layer and V4.1-Flash's at TP8, and why not the others."""
    from dsv4_kernels.backends import AUTO, BACKENDS, choose_backend
    from dsv4_kernels.types import MoeShape

    from vllm_dsv4_moe.moe_method import activation_mode, check_device
    from vllm_dsv4_moe.settings import MXFP4_BACKENDS, read_settings

    try:
        settings = read_settings({}, environ)
        mode = activation_mode(settings, capability)
    except ValueError as error:
        yield Check("backend", "bad", str(error))
        return

    def choose(name: str) -> str:
        for sizes in ((256, 256, 6, 4096, 2048), (384, 384, 6, 5120, 288)):
            shape = MoeShape(*sizes, 8192, mode == "nvfp4", fp8=mode == "fp8")
            chosen = choose_backend(name, shape, capability).name
        check_device(chosen, capability, is_eager=True)
        return chosen

    needs = {name: major for major, name in AUTO.items()}
    for name in dict.fromkeys([*needs, *BACKENDS]):
        if capability is None and name in needs:
            words = f"runs on NVIDIA GPUs of compute capability {needs[name]}, and there is none"
            yield Check(name, "note", words)
            continue
        try:
            choose(name)
        except (ValueError, ImportError) as error:
            yield Check(name, "note", f"would not run V4 and V4.1 here: {error}")
        else:
            yield Check(name, "ok", "would run V4 and V4.1 here")
    try:
        chosen = choose(settings.backend)
    except (ValueError, ImportError) as error:
        yield Check("backend", "bad", f"{settings.backend}: {error}")
        return
    multiplies = {
        "nvfp4": "NVFP4 activations (W4A4)",
        "fp8": "fp8 activations (W4A8)",
        "bf16": "bf16 activations (W4A16)",
    }
    words = multiplies[mode]
    if chosen in MXFP4_BACKENDS and "mxfp4" in settings.formats:
        of_mxfp4 = multiplies[activation_mode(settings, capability, "mxfp4")]
        if settings.formats == "mxfp4":
            words = of_mxfp4
        elif of_mxfp4 != words:
            words += f", and for MXFP4 experts {of_mxfp4}"
    slow = ": for checking, not for speed" if chosen == "reference" else ""
    slow += ", and with --enforce-eager only" if slow and capability is not None else ""
    status = "note" if slow else "ok"
    yield Check("backend", status, f"{settings.backend} means {chosen}, {words}{slow}")


def check_formats(
    capability: tuple[int, int] | None, environ: Mapping[str, str]
) -> Iterator[Check]:
    """Which experts this plugin would run here: by the setting, MXFP4 where a backend runs it."""
    from vllm_dsv4_moe.moe_method import backend_name, has_backend
    from vllm_dsv4_moe.settings import ENV_PREFIX, MXFP4_BACKENDS, read_settings

    try:
        settings = read_settings({}, environ)
    except ValueError:
        return  # said already
    if not has_backend(settings, capability):
        words = "all experts are vLLM's here: no backend is made for this compute capability"
        yield Check("formats", "note", words)
        return
    backend = backend_name(settings, capability)
    ours = settings.formats.split(",")
    if "mxfp4" in ours and backend not in MXFP4_BACKENDS:
        words = f"MXFP4 experts are vLLM's here: the {backend} backend runs NVFP4 alone"
        yield Check("formats", "note", words)
        return
    words = f"{' and '.join(map(str.upper, ours))} experts are this plugin's"
    if "mxfp4" not in ours and backend in MXFP4_BACKENDS:
        words += f"; MXFP4 is vLLM's, unless {ENV_PREFIX}FORMATS is nvfp4,mxfp4"
    yield Check("formats", "ok", words)


def check_memory(name: str, gpu: str | None, environ: Mapping[str, str]) -> Iterator[Check]:
    """Where the memory of a GPU goes with this deployment, and whether any is left."""
    try:
        deployment = read_deployment(find(name), environ)
        found = rank_memory(deployment, *_memory_and_arch(gpu))
    except (ValueError, OSError) as error:
        yield Check("memory", "bad", str(error))
        return
    yield Check("memory", "ok" if found.left > 0 else "bad", str(found))


def _memory_and_arch(gpu: str | None) -> tuple[int, str]:
    """Of the named GPU, or of the one that is here."""
    if gpu is not None:
        return GPUS[gpu]
    here = driver.supported_gpus(driver.visible_gpus())
    if not here:
        raise ValueError(f"there is no GPU to sum up for: add --gpu {' or --gpu '.join(GPUS)}")
    return here[0].memory, "sm_{}{}a".format(*here[0].capability)
