"""The expert tensors of a layer: created, loaded with a record of what came, and checked.

Names: `w13_weight` in vLLM is what the checkpoint calls `experts.E.w1.weight` (gate) above
`experts.E.w3.weight` (up), and so on with `weight_scale`, `weight_scale_2` and `input_scale`. MXFP4
experts have block scales only: `w13_weight_scale` in vLLM, `scale` in the checkpoint.
"""

import math
import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from dsv4_kernels.types import MXFP4_BLOCK, NVFP4_BLOCK, ExpertWeights
from torch.nn import Module, Parameter

GLOBAL_SCALES = ("w13_weight_scale_2", "w2_weight_scale_2")
BLOCK_SCALES = ("w13_weight_scale", "w2_weight_scale")
INPUT_SCALES = ("w13_input_scale", "w2_input_scale")
# ExpertWeights' fields in order.
WEIGHTS = tuple(
    f"{prefix}_{suffix}"
    for prefix in ("w13", "w2")
    for suffix in ("weight", "weight_scale", "weight_scale_2")
)
# The largest byte of a block scale that is a number and not negative: E4M3's 448, UE8M0's 2^127.
LARGEST_SCALE_BYTE = {torch.float8_e4m3fn: 0x7E, torch.uint8: 0xFE}
DUMMY_MXFP4_SCALE = 117  # 2^-10


class ExpertSizes(NamedTuple):
    """Sizes of one layer's experts on one rank."""

    num_experts: int  # local
    num_global_experts: int  # EPLB's copies included
    hidden: int
    intermediate: int  # of this rank
    tp_size: int  # into how many ranks the checkpoint's intermediate size is cut


class Stored(NamedTuple):
    """How a checkpoint stores one tensor of a linear layer."""

    suffix: str  # of its name
    # Of the same bytes: the checkpoint's first, the parameter's last.
    dtypes: tuple[torch.dtype, ...]
    values: int | None  # of the weight, along K, that an element stands for; None for a scalar


# Format -> parameter without its w13_ or w2_ -> what is stored. vLLM's models may hand over MXFP4
# scales as uint8 already.
FORMATS = {
    "nvfp4": {
        "weight": Stored("weight", (torch.uint8,), 2),
        "weight_scale": Stored("weight_scale", (torch.float8_e4m3fn,), NVFP4_BLOCK),
        "weight_scale_2": Stored("weight_scale_2", (torch.float32,), None),
        "input_scale": Stored("input_scale", (torch.float32,), None),
    },
    "mxfp4": {
        "weight": Stored("weight", (torch.int8, torch.uint8), 2),
        "weight_scale": Stored("scale", (torch.float8_e8m0fnu, torch.uint8), MXFP4_BLOCK),
    },
}


class CheckpointTensor(NamedTuple):
    """What a parameter is loaded from, for each expert and shard (w1, w2, w3)."""

    suffix: str
    dtypes: tuple[torch.dtype, ...]
    # (rows, columns) of the whole tensor, not this rank's part; () for a scalar
    shapes: dict[str, tuple[int, ...]]


def create_expert_params(
    layer: Module, sizes: ExpertSizes, weight_loader: Callable, weight_format: str
) -> "LoadRecord":
    """Register the parameters, experts leading and contiguous as EPLB wants them.

    Input scales are kept for all global experts: a policy takes the maximum over them.
    """
    record = LoadRecord(layer, expected_tensors(sizes, weight_format), weight_loader)
    num_experts, num_global, hidden, inter, _ = sizes
    for prefix, rows, columns in (("w13", 2 * inter, hidden), ("w2", hidden, inter)):
        for suffix, (_, dtypes, values) in FORMATS[weight_format].items():
            name = f"{prefix}_{suffix}"
            if values is None:
                num_scales = num_global if name in INPUT_SCALES else num_experts
                data = _no_scales(num_scales, 2) if prefix == "w13" else _no_scales(num_scales)
            else:
                data = torch.empty(num_experts, rows, columns // values, dtype=dtypes[-1])
            param = Parameter(data, requires_grad=False)
            param.weight_loader = record.loader(name)
            if name in BLOCK_SCALES:
                param.quant_method = "block"  # vLLM's weight loader asks for it
            layer.register_parameter(name, param)
    return record


def add_global_scales(layer: Module) -> None:
    """For MXFP4 experts, whose checkpoint has none: all 1, which the backend may change."""
    num_experts, device = layer.local_num_experts, layer.w13_weight.device
    for name, shape in zip(GLOBAL_SCALES, ((num_experts, 2), (num_experts,)), strict=True):
        scales = torch.ones(shape, dtype=torch.float32, device=device)
        layer.register_parameter(name, Parameter(scales, requires_grad=False))


def _no_scales(*shape: int) -> torch.Tensor:
    # vLLM builds the model with bfloat16 as the default dtype.
    return torch.full(shape, torch.nan, dtype=torch.float32)


class LoadRecord:
    """vLLM's weight loader, with each tensor checked on its way in and remembered."""

    def __init__(
        self, layer: Module, expected: dict[str, CheckpointTensor], weight_loader: Callable
    ) -> None:
        self.layer = layer
        self.weight_loader = weight_loader
        self.expected = expected
        self.num_experts = layer.local_num_experts
        self.num_logical = layer.moe_config.num_logical_experts
        # Once on the host: asking vLLM for each of 100,000 tensors waits for the GPU each time.
        expert_map = layer.expert_map
        self.local_ids = range(self.num_experts) if expert_map is None else expert_map.tolist()
        # parameter -> (local expert, shard) that came
        self.loaded: dict[str, set[tuple[int, str]]] = {name: set() for name in self.expected}

    def loader(self, name: str) -> Callable:
        def load(
            param: Parameter,
            loaded_weight: torch.Tensor,
            weight_name: str,
            shard_id: str,
            expert_id: int,
            return_success: bool = False,
        ) -> bool | None:
            local = self.local_ids[expert_id]
            if local == -1 and name not in INPUT_SCALES:
                return False if return_success else None
            self._check(name, loaded_weight, shard_id, expert_id % self.num_logical)
            # MXFP4's codes are int8 in DeepSeek's files; a scale would be converted, not copied.
            same_bytes = loaded_weight.view(param.dtype)
            loaded = self.weight_loader(
                param, same_bytes, weight_name, shard_id, expert_id, return_success=True
            )
            self.loaded[name].add((local, shard_id))
            return loaded if return_success else None

        load.supports_moe_loading = True  # type: ignore[attr-defined]
        return load

    def _check(self, param: str, tensor: torch.Tensor, shard: str, expert: int) -> None:
        suffix, dtypes, shapes = self.expected[param]
        shape = tuple(tensor.shape)
        # A scalar may also come as one element of one dimension.
        matches = tensor.numel() == 1 if shapes[shard] == () else shape == shapes[shard]
        if not matches or tensor.dtype not in dtypes:
            name = f"{checkpoint_prefix(self.layer)}.{expert}.{shard}.{suffix}"
            raise ValueError(
                f"{name} is {_kind(tensor.dtype, shape)} in the checkpoint, and this model's "
                f"config wants {_kind(dtypes[0], shapes[shard])}"
            )

    def check_complete(self) -> None:
        """ValueError that names the first expert tensor which did not come; forgets what did.

        Input scales may be missing altogether: only the `checkpoint` policy reads them.
        """
        for name, (suffix, _, shapes) in self.expected.items():
            if name in INPUT_SCALES:
                continue
            wanted = {(e, shard) for e in range(self.num_experts) for shard in shapes}
            missing = sorted(wanted - self.loaded[name])
            if missing:
                local, shard = missing[0]
                expert = local_experts(self.layer)[local]
                raise ValueError(
                    f"{checkpoint_prefix(self.layer)}.{expert}.{shard}.{suffix} is missing from "
                    f"the checkpoint, with {len(missing)} of the {len(wanted)} {suffix} tensors of "
                    "this rank's experts"
                )
        for came in self.loaded.values():
            came.clear()


def expected_tensors(sizes: ExpertSizes, weight_format: str) -> dict[str, CheckpointTensor]:
    """Parameter -> what the checkpoint must have for each expert."""
    hidden, inter = sizes.hidden, sizes.intermediate * sizes.tp_size
    expected = {}
    for prefix, shards, rows, columns in (
        ("w13", ("w1", "w3"), inter, hidden),
        ("w2", ("w2",), hidden, inter),
    ):
        for name, (suffix, dtypes, values) in FORMATS[weight_format].items():
            shape: tuple[int, ...] = () if values is None else (rows, columns // values)
            shapes = dict.fromkeys(shards, shape)
            expected[f"{prefix}_{name}"] = CheckpointTensor(suffix, dtypes, shapes)
    return expected


def _kind(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    name = str(dtype).removeprefix("torch.")
    return f"{name} [{', '.join(map(str, shape))}]" if shape else f"a {name} scalar"


def checkpoint_prefix(layer: Module) -> str:
    """The layer's experts as the checkpoint calls them: layers.3.ffn.experts or, of a draft layer,
    which vLLM numbers after the model's, mtp.0.ffn.experts."""
    number = int(re.findall(r"layers\.(\d+)\.", layer.layer_name)[-1])
    draft = number - layer.num_model_layers
    return f"mtp.{draft}.ffn.experts" if draft >= 0 else f"layers.{number}.ffn.experts"


def local_experts(layer: Module) -> list[int]:
    """The checkpoint's id of each local expert, as loaded.

    EPLB's redundant experts come after the checkpoint's, and are copies of them in order.
    """
    num_local, num_logical = layer.local_num_experts, layer.moe_config.num_logical_experts
    if layer.expert_map is None:
        return [expert % num_logical for expert in range(num_local)]
    experts = [0] * num_local
    for expert, local in enumerate(layer.expert_map.tolist()):
        if local >= 0:
            experts[local] = expert % num_logical
    return experts


def check_global_scales(layer: Module) -> None:
    """ValueError that names the first scale which no calibration produces."""
    for name in GLOBAL_SCALES:
        scales = getattr(layer, name).data
        smallest, largest = scales.aminmax()  # NaN if any is
        if float(smallest) > 0 and float(largest) < math.inf:
            continue
        where = (~(scales.isfinite() & (scales > 0))).nonzero()[0].tolist()
        raise ValueError(
            f"{_tensor_name(layer, name, where)} is {float(scales[tuple(where)])}, and a "
            "global scale must be a positive number"
        )


def check_block_scales(layer: Module) -> None:
    """ValueError that names the first scale which no quantiser produces."""
    for name in BLOCK_SCALES:
        scales = getattr(layer, name).data
        codes, largest = scales.view(torch.uint8), LARGEST_SCALE_BYTE[scales.dtype]
        if int(codes.amax()) <= largest:
            continue
        bad_experts = codes.flatten(1).amax(1) > largest
        expert = int(bad_experts.nonzero()[0, 0])
        row, column = (codes[expert] > largest).nonzero()[0].tolist()
        value = math.nan if scales.dtype == torch.uint8 else float(scales[expert, row, column])
        shard_rows = codes.shape[1] // 2 if name.startswith("w13") else codes.shape[1]
        place = _tensor_name(layer, name, [expert, row // shard_rows])
        raise ValueError(
            f"{place}[{row % shard_rows}, {column}] of this rank's part is {value}, and a block "
            "scale must be 0 or a positive number"
        )


def _tensor_name(layer: Module, name: str, where: list[int]) -> str:
    """The checkpoint's name of an expert tensor; where is (local expert, 0 for w1 or 1 for w3)."""
    prefix, suffix = name.split("_", 1)
    if getattr(layer, name).dtype == torch.uint8:
        suffix = FORMATS["mxfp4"][suffix].suffix
    shard = "w2" if prefix == "w2" else ("w1", "w3")[where[1]]
    return f"{checkpoint_prefix(layer)}.{local_experts(layer)[where[0]]}.{shard}.{suffix}"


def gate_and_up_differ(layer: Module) -> bool:
    """Whether w1 and w3 of some expert have different global scales: legal, and rare."""
    scales = layer.w13_weight_scale_2.data
    return bool((scales[:, 0] != scales[:, 1]).any())


def fill_dummy_scales(layer: Module) -> None:
    """Scales that a `--load-format dummy` layer can run with: vLLM's are random, also negative."""
    for name in (*GLOBAL_SCALES, *INPUT_SCALES):
        if hasattr(layer, name):
            getattr(layer, name).data.fill_(1e-3)
    for name in BLOCK_SCALES:
        scales = getattr(layer, name).data
        scales.fill_(DUMMY_MXFP4_SCALE if scales.dtype == torch.uint8 else 1.0)


def expert_weights(layer: Module) -> ExpertWeights:
    """The layer's parameters under their names in the kernels' contract."""
    return ExpertWeights(*(getattr(layer, name).data for name in WEIGHTS))


def take_weights(layer: Module, prepared: ExpertWeights) -> None:
    """Have the parameters name the tensors that the kernels read, which EPLB moves and a reload
    overwrites: new ones where weights were padded, otherwise the same."""
    for name, tensor in zip(WEIGHTS, prepared, strict=True):
        getattr(layer, name).data = tensor
