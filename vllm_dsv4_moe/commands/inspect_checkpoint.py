"""Check a checkpoint from config.json, safetensors headers and hash tables; no weight is loaded."""

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from vllm_dsv4_moe.checkpoint_layout import (
    DTYPE_BYTES,
    V41,
    ModelSizes,
    TensorSpec,
    checkpoint_tensors,
)
from vllm_dsv4_moe.commands.checkpoint_scales import LayerScales, layer_scales
from vllm_dsv4_moe.commands.deployment import Deployment
from vllm_dsv4_moe.commands.memory import weights_of_rank
from vllm_dsv4_moe.commands.releases import FLASH, PRO, V41_FLASH, read_config, text_config
from vllm_dsv4_moe.layer_config import SCORING, LayerConfig
from vllm_dsv4_moe.safetensors_files import StoredTensor, read_checkpoint
from vllm_dsv4_moe.settings import ACTIVATIONS, MXFP4_BACKENDS, Settings, activations_on

# Sizes by which a model is recognised; every other size is taken from the config.
_SIZES = {
    "hidden": "hidden_size",
    "intermediate": "moe_intermediate_size",
    "num_experts": "n_routed_experts",
    "num_layers": "num_hidden_layers",
}
KNOWN_MODELS = {
    name: {field: text_config(config)[key] for field, key in _SIZES.items()}
    for name, config in {"V4-Flash": FLASH, "V4-Pro": PRO, "V4.1-Flash": V41_FLASH}.items()
}
# vLLM casts what is not quantised while it copies, so these load as one another.
CASTABLE = ({"BF16", "F16", "F32"}, {"I64", "I32"})


@dataclass
class Layer:
    """What one layer is, and who runs its experts."""

    name: str  # layers.N or mtp.N
    router: str  # hash or dense
    attention: str
    experts: str  # the format that vLLM will take them for: NVFP4 or MXFP4
    ours: bool
    num_bytes: int = 0
    expert_bytes: int = 0


class Kind(NamedTuple):
    """Expected tensors of one name (numbers apart), dtype and shape."""

    name: str  # layers.0-42.ffn.experts.0-255.w1.weight
    num_tensors: int
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


@dataclass
class Inspection:
    """The findings; `problems` is empty exactly when vLLM can load it and this plugin runs it."""

    folder: str
    model: str
    num_files: int
    num_bytes: int
    num_tensors: int
    layers: list[Layer]
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    # By format of experts that are ours, and by backend: what multiplies their activations.
    activations: dict[str, dict[str, str]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)  # of another shape or dtype
    extra: list[str] = field(default_factory=list)
    kinds: list["Kind"] = field(default_factory=list)
    scales: list[LayerScales] = field(default_factory=list)
    weight_bytes_per_gpu: dict[str, int] = field(default_factory=dict)


def inspect(
    folder: Path,
    tp: int = 1,
    dp: int = 1,
    scales: bool = False,
    num_sampled: int = 8,
    formats: str = "nvfp4,mxfp4",
    activations: str = "auto",
) -> Inspection:
    """Read config and headers, compare; with `scales`, read the scale tensors too.

    formats is the setting, which says whose the experts are, and activations another.
    Raises ValueError where there is nothing to compare.
    """
    config = read_config(folder)
    sizes = ModelSizes.from_config(config)
    stored = read_checkpoint(folder)
    found = Inspection(
        folder=str(folder),
        model=model_name(_recognised(sizes)),
        num_files=stored.num_files,
        num_bytes=stored.num_bytes,
        num_tensors=len(stored.tensors),
        layers=_layers(sizes, formats),
        problems=list(stored.problems),
    )
    for name in dict.fromkeys(layer.experts for layer in found.layers if layer.ours):
        found.activations[name] = _activations(name.lower(), activations)
    _check_ours(found, sizes, config, formats)
    expected = dict(checkpoint_tensors(sizes))
    if sizes.is_v41:
        _set_aside(found, stored.tensors, expected)
    _compare(found, stored.tensors, expected, another_model(sizes, stored.tensors))
    _add_bytes(found, expected)
    found.kinds = kinds(expected)
    _check_tables(found, stored.tensors, sizes.num_experts)
    if scales:
        _add_scales(found, sizes, stored.tensors, num_sampled)
    division = Deployment(
        config, Settings(), 1, tensor_parallel=tp, data_parallel=dp, is_expert_parallel=True
    )
    weights = weights_of_rank(expected.items(), division)
    found.weight_bytes_per_gpu = {"experts": weights.experts, "others": weights.others}
    return found


def _activations(weight_format: str, wanted: str) -> dict[str, str]:
    """By backend that has a GPU and this format."""
    found = {}
    for backend in MXFP4_BACKENDS if weight_format == "mxfp4" else ACTIVATIONS:
        if backend == "reference":
            continue
        try:
            found[backend] = activations_on(backend, wanted, weight_format)
        except ValueError:
            found[backend] = f"refused as {wanted}"
    return found


def _check_tables(found: Inspection, stored: dict[str, StoredTensor], num_experts: int) -> None:
    """A sentence for each hash table with ids of no expert, or rows that name one repeatedly."""
    import numpy as np

    for layer in found.layers:
        name = f"{layer.name}.ffn.gate.tid2eid"
        tensor = stored.get(name)
        if tensor is None or len(tensor.shape) != 2 or tensor.dtype not in ("I64", "I32"):
            continue
        dtype = np.int64 if tensor.dtype == "I64" else np.int32
        table = np.sort(np.frombuffer(tensor.read(), dtype).reshape(tensor.shape), axis=1)
        outside = ((table < 0) | (table >= num_experts)).any(axis=1)
        if outside.any():
            found.problems.append(
                f"{outside.sum():,} of {len(table):,} rows of {name} have ids that are not of the "
                f"{num_experts} experts, the first {int(outside.argmax())}"
            )
        count = int((table[:, 1:] == table[:, :-1]).any(axis=1).sum())
        if count:
            found.notes.append(
                f"{count:,} of {len(table):,} rows of {name} name an expert twice: both count"
            )


def _recognised(sizes: ModelSizes) -> dict[str, int]:
    return {field: getattr(sizes, field) for field in _SIZES}


def model_name(sizes: dict[str, int]) -> str:
    """A known model's name and sizes, or the sizes alone; what is unknown is left out."""
    words = {
        "hidden": "hidden {}",
        "intermediate": "intermediate {}",
        "num_experts": "{} experts",
        "num_layers": "{} layers",
    }
    listed = ", ".join(words[key].format(value) for key, value in sizes.items())
    known = [
        name for name, other in KNOWN_MODELS.items() if sizes and sizes.items() <= other.items()
    ]
    return f"{known[0]} ({listed})" if len(known) == 1 else listed


def _layers(sizes: ModelSizes, formats: str) -> list[Layer]:
    attention = {4: "compressed 4 with indexer", 128: "compressed 128"}
    layers = []
    for number in range(sizes.num_layers + sizes.num_mtp_layers):
        is_mtp = number >= sizes.num_layers
        name = f"mtp.{number - sizes.num_layers}" if is_mtp else f"layers.{number}"
        ratio = sizes.compress_ratios[number] if number < len(sizes.compress_ratios) else 0
        ratio = 0 if is_mtp else ratio
        experts = "NVFP4" if sizes.is_nvfp4(f"{name}.ffn.experts") else "MXFP4"
        layers.append(
            Layer(
                name=name,
                router="hash" if number < sizes.num_hash_layers else "dense",
                attention="not read" if sizes.is_v41 else attention.get(ratio, "sliding window"),
                experts=experts,
                ours=experts.lower() in formats.split(","),
            )
        )
    return layers


def _check_ours(found: Inspection, sizes: ModelSizes, config: dict[str, Any], formats: str) -> None:
    config = {**text_config(config), "model_type": config.get("model_type")}
    quant = config.get("quantization_config") or {}
    if config.get("model_type") not in ("deepseek_v4", V41):
        found.problems.append(
            f"model_type is {config.get('model_type')!r}: this plugin is for deepseek_v4 and {V41}"
        )
    if not any(layer.ours for layer in found.layers):
        found.problems.append(
            f"no layer has {' or '.join(formats.upper().split(','))} experts "
            f"(quantization_config.moe_quant_algo is {quant.get('moe_quant_algo')!r}): vLLM runs "
            "all of it with its own kernels, unless the setting formats says otherwise"
        )
    elif quant.get("quant_method") not in ("fp8", "deepseek_v4_fp8"):
        found.problems.append(
            f"quantization_config.quant_method is {quant.get('quant_method')!r}: "
            "vLLM resolves only fp8 to the method that this plugin extends"
        )
    if config.get("expert_dtype", "fp4") != "fp4":
        found.problems.append(f"expert_dtype is {config['expert_dtype']!r}, and must be fp4")
    layer = LayerConfig(
        config.get("swiglu_limit"),
        config.get("scoring_func", SCORING),
        sizes.top_k,
        sizes.num_experts,
        quant if any(layer.ours and layer.experts == "NVFP4" for layer in found.layers) else {},
    )
    found.problems += layer.problems()


def _compare(
    found: Inspection,
    stored: dict[str, StoredTensor],
    expected: dict[str, TensorSpec],
    another: str | None,
) -> None:
    """Every expected tensor by name, shape and dtype; what only a later choice needs is a note.

    Where the weights are of `another` model, one sentence says so and the differences are counted.
    """
    absent = [name for name in expected if name not in stored]
    needed = [name for name in absent if not _is_optional(name)]
    cast, wrong = differences(stored, expected)
    found.missing = [f"{name}: {_described(*expected[name])}" for name in needed]
    found.mismatched = [
        f"{name}: {_described(*expected[name])} expected, {_described(*stored[name][:2])} found"
        for name in wrong
    ]
    found.extra = [name for name in stored if name not in expected]
    foreign = [name for name in found.extra if _in_our_layers(name)]
    if another:
        found.problems.append(
            f"{another}: {len(needed):,} tensors are missing, {len(wrong):,} have another shape "
            f"or dtype and {len(foreign):,} are not of this model's MoE layers"
        )
        return
    mtp_extra = [name for name in found.extra if name.startswith("mtp.")]
    known = {*foreign, *mtp_extra}
    other = [name for name in found.extra if name not in known]
    _summarise(found.problems, "is missing", "are missing", needed)
    _summarise(found.problems, "has", "have", wrong, " another shape or dtype")
    _summarise(found.problems, "is", "are", foreign, " not of this model's MoE layers")
    _summarise(found.notes, "is", "are", other, " extra")
    if mtp_extra:
        found.notes.append(f"{len(mtp_extra):,} MTP tensors are extra, {mtp_extra[0]} among them")
    _summarise(found.notes, "has", "have", cast, " another dtype, which vLLM casts")
    _note_absent(found, absent)


def _is_optional(name: str) -> bool:
    return name.startswith("mtp.") or name.endswith(".input_scale")


def _note_absent(found: Inspection, absent: list[str]) -> None:
    """What is not there, and what cannot be done for it."""
    mtp = [name for name in absent if name.startswith("mtp.")]
    inputs = [name for name in absent if name.endswith(".input_scale")]
    if mtp:
        found.notes.append(f"{len(mtp):,} MTP tensors are absent: no speculative decoding with MTP")
    words = " absent: the activation-scale policy `checkpoint` cannot be used"
    _summarise(found.notes, "is", "are", inputs, words)


def _set_aside(
    found: Inspection, stored: dict[str, StoredTensor], expected: dict[str, TensorSpec]
) -> None:
    """Expect of V4.1's other tensors what is there: this plugin knows its gates and experts."""
    others = {
        name: TensorSpec(tensor.dtype, tensor.shape)
        for name, tensor in stored.items()
        if tensor.dtype in DTYPE_BYTES and not re.match(r"layers\.\d+\.ffn\.(gate|experts)\.", name)
    }
    expected.update(others)
    found.notes.append(
        f"{len(others):,} tensors of V4.1 that are no gate or expert were not checked"
    )


def differences(
    stored: dict[str, StoredTensor], expected: dict[str, TensorSpec]
) -> tuple[list[str], list[str]]:
    """Names of tensors that are there as expected but for (a dtype that vLLM casts, anything)."""
    cast: list[str] = []
    wrong: list[str] = []
    for name, spec in expected.items():
        tensor = stored.get(name)
        if tensor is None or _same(spec, tensor):
            continue
        castable = spec.shape == tensor.shape and _castable(spec.dtype, tensor.dtype)
        (cast if castable else wrong).append(name)
    return cast, wrong


def _in_our_layers(name: str) -> bool:
    return ".ffn." in name and not name.startswith("mtp.")


def _same(spec: TensorSpec, tensor: StoredTensor) -> bool:
    shape = () if tensor.shape == (1,) and spec.shape == () else tensor.shape
    return spec.dtype == tensor.dtype and spec.shape == shape


def _castable(expected: str, found: str) -> bool:
    return any({expected, found} <= group for group in CASTABLE)


def _described(dtype: str, shape: tuple[int, ...]) -> str:
    return f"{dtype} {list(shape)}"


def _summarise(to: list[str], one: str, many: str, names: list[str], rest: str = "") -> None:
    """A sentence for each kind of tensor, the kind being its name with * for the numbers."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(re.sub(r"\.\d+\.", ".*.", name), []).append(name)
    for kind, members in kinds.items():
        subject, verb = (kind, many) if len(members) > 1 else (members[0], one)
        counted = f" ({len(members):,}, first {members[0]})" if len(members) > 1 else ""
        to.append(f"{subject} {verb}{rest}{counted}")


def another_model(sizes: ModelSizes, stored: dict[str, StoredTensor]) -> str | None:
    """Whose weights these are, where they are not of the config's model; fewer layers are not."""
    weights = stored_sizes(stored)
    config = {key: value for key, value in _recognised(sizes).items() if key in weights}
    if all(weights[key] == config[key] or key == "num_layers" for key in weights) and (
        weights.get("num_layers", 0) <= sizes.num_layers
    ):
        return None
    return (
        f"the weights are those of {model_name(weights)}, "
        f"and config.json is that of {model_name(config)}"
    )


def stored_sizes(stored: dict[str, StoredTensor]) -> dict[str, int]:
    """The sizes that the files themselves show, those of them that they do."""
    sizes = {}
    layers = [int(name.split(".")[1]) for name in stored if name.startswith("layers.")]
    for key, pattern, axis in (
        ("hidden", r"norm\.weight", 0),
        ("intermediate", r"layers\.\d+\.ffn\.experts\.\d+\.w1\.weight", 0),
        ("num_experts", r"layers\.\d+\.ffn\.gate\.weight", 0),
    ):
        shapes = Counter(
            tensor.shape for name, tensor in stored.items() if re.fullmatch(pattern, name)
        )
        if shapes:
            sizes[key] = shapes.most_common(1)[0][0][axis]
    if layers:
        sizes["num_layers"] = max(layers) + 1
    return sizes


def _add_bytes(found: Inspection, expected: dict[str, TensorSpec]) -> None:
    by_name = {layer.name: layer for layer in found.layers}
    for name, spec in expected.items():
        layer = by_name.get(".".join(name.split(".")[:2]))
        if layer is not None:
            layer.num_bytes += spec.num_bytes
            layer.expert_bytes += spec.num_bytes * (".experts." in name)


def kinds(expected: dict[str, TensorSpec]) -> list[Kind]:
    """The expected tensors, those that differ by layer and expert numbers alone as one."""
    groups: dict[tuple[str, TensorSpec], list[str]] = {}
    for name, spec in expected.items():
        groups.setdefault((re.sub(r"\.\d+\.", ".*.", name), spec), []).append(name)
    found = []
    for (kind, spec), names in groups.items():
        for numbers in zip(*(re.findall(r"\.(\d+)\.", name) for name in names), strict=True):
            kind = kind.replace("*", _ranges(sorted(set(map(int, numbers)))), 1)
        size = spec.num_bytes * len(names)
        found.append(Kind(kind, len(names), spec.dtype, spec.shape, size))
    return found


def _ranges(numbers: list[int]) -> str:
    """0-3 for consecutive numbers, 2,4..42 for evenly spaced ones, 0,1,3..59 otherwise."""
    first, last = numbers[0], numbers[-1]
    if last - first + 1 == len(numbers):
        return f"{first}-{last}" if last > first else str(first)
    start = next(
        position
        for position in range(len(numbers))
        if len({b - a for a, b in zip(numbers[position:], numbers[position + 1 :], strict=False)})
        <= 1
    )
    head = numbers[: start + 2]
    return ",".join(map(str, head)) + (f"..{last}" if last != head[-1] else "")


def _add_scales(
    found: Inspection, sizes: ModelSizes, stored: dict[str, StoredTensor], num_sampled: int
) -> None:
    for layer in found.layers:
        if not layer.ours:
            continue
        scales = layer_scales(stored, f"{layer.name}.ffn.experts", sizes.num_experts, num_sampled)
        found.scales.append(scales)
        found.problems += scales.problems()
    differ = sum(scales.gate_up_differ for scales in found.scales)
    if differ:
        found.notes.append(
            f"{differ:,} experts have another weight_scale_2 for w1 than for w3: both are honoured"
        )
