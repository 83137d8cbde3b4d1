"""Statistics of a checkpoint's scales, layer by layer; only scale tensors are read."""

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import inf, isfinite

from vllm_dsv4_moe.safetensors_files import StoredTensor

LINEARS = ("w1", "w2", "w3")
E4M3_NAN = 0x7F
E4M3_MAX = 0x7E  # 448
E8M0_NAN = 0xFF


@dataclass
class Range:
    """Least and greatest of the positive finite values seen, and how many were neither."""

    low: float = inf
    high: float = -inf
    count: int = 0
    bad: int = 0  # NaN, infinite, zero or negative

    def add(self, value: float) -> None:
        self.count += 1
        if not isfinite(value) or value <= 0:
            self.bad += 1
            return
        self.low, self.high = min(self.low, value), max(self.high, value)


@dataclass
class LayerScales:
    """One layer's scales: `w13` is w1 and w3 together, as they share a global scale."""

    layer: str
    w13_global: Range = field(default_factory=Range)
    w2_global: Range = field(default_factory=Range)
    w13_input: Range = field(default_factory=Range)
    w2_input: Range = field(default_factory=Range)
    gate_up_differ: int = 0  # experts whose w1 and w3 have different weight_scale_2
    block_scale: str = "weight_scale"  # its name; MXFP4's is scale
    blocks: Range = field(default_factory=Range)  # positive block scales, as values
    blocks_read: int = 0
    blocks_zero: int = 0
    blocks_at_max: int = 0  # 448, the largest E4M3
    experts_sampled: int = 0

    def problems(self) -> list[str]:
        """What makes the layer compute nonsense, one sentence each."""
        named = {
            "w1 or w3 weight_scale_2": self.w13_global,
            "w2 weight_scale_2": self.w2_global,
            "w1 or w3 input_scale": self.w13_input,
            "w2 input_scale": self.w2_input,
        }
        sentences = [
            f"{self.layer}: {scale.bad} of {scale.count} {name} are NaN, infinite, zero or negative"
            for name, scale in named.items()
            if scale.bad
        ]
        if self.blocks.bad:
            sentences.append(
                f"{self.layer}: {self.blocks.bad} of {self.block_scale} are NaN or negative"
            )
        return sentences


def layer_scales(
    stored: dict[str, StoredTensor], experts: str, num_experts: int, num_sampled: int
) -> LayerScales:
    """Of `layers.N.ffn.experts`: global and input scales of all, block scales of some experts.

    The sampled experts are spread evenly; num_sampled 0 reads no block scale.
    """
    scales = LayerScales(experts.rpartition(".ffn.")[0])
    for expert in range(num_experts):
        shared = {}
        for linear in LINEARS:
            name = f"{experts}.{expert}.{linear}"
            part = "w2" if linear == "w2" else "w13"
            for value in _scalars(stored, f"{name}.weight_scale_2"):
                getattr(scales, f"{part}_global").add(value)
                shared[linear] = value
            for value in _scalars(stored, f"{name}.input_scale"):
                getattr(scales, f"{part}_input").add(value)
        scales.gate_up_differ += shared.get("w1") != shared.get("w3")
    scales.experts_sampled = min(num_sampled, num_experts)
    for position in range(scales.experts_sampled):
        expert = position * num_experts // scales.experts_sampled
        for linear in LINEARS:
            tensor = stored.get(f"{experts}.{expert}.{linear}.weight_scale")
            if tensor is not None and tensor.dtype == "F8_E4M3":
                _add_blocks(scales, tensor.read())
            tensor = stored.get(f"{experts}.{expert}.{linear}.scale")
            if tensor is not None and tensor.dtype == "F8_E8M0":
                scales.block_scale = "scale"
                _add_mxfp4_blocks(scales, tensor.read())
    return scales


def _scalars(stored: dict[str, StoredTensor], name: str) -> Iterator[float]:
    tensor = stored.get(name)
    if tensor is not None and tensor.dtype == "F32" and tensor.num_bytes == 4:
        yield struct.unpack("<f", tensor.read())[0]


def _add_blocks(scales: LayerScales, data: bytes) -> None:
    import numpy as np

    counts = np.bincount(np.frombuffer(data, dtype=np.uint8), minlength=256)
    scales.blocks_read += len(data)
    scales.blocks_zero += int(counts[0])
    scales.blocks_at_max += int(counts[E4M3_MAX])
    # 0x80 is -0, which scales to zero as 0 does.
    scales.blocks_zero += int(counts[0x80])
    scales.blocks.bad += int(counts[E4M3_NAN] + counts[0x81:].sum())
    present = [int(code) for code in np.flatnonzero(counts[:E4M3_NAN]) if code]
    _add_values(scales.blocks, (e4m3_value(code) for code in present))
    scales.blocks.count += len(data) - len(present)


def _add_mxfp4_blocks(scales: LayerScales, data: bytes) -> None:
    import numpy as np

    counts = np.bincount(np.frombuffer(data, dtype=np.uint8), minlength=256)
    scales.blocks_read += len(data)
    scales.blocks.bad += int(counts[E8M0_NAN])
    present = np.flatnonzero(counts[:E8M0_NAN]).tolist()
    _add_values(scales.blocks, (2.0 ** (code - 127) for code in present))
    scales.blocks.count += len(data) - len(present)


def _add_values(to: Range, values: Iterable[float]) -> None:
    for value in values:
        to.add(value)


def e4m3_value(code: int) -> float:
    """The value of a positive E4M3 code, 0 to 0x7E: 4 exponent bits of bias 7, 3 mantissa bits."""
    exponent, mantissa = code >> 3, code & 7
    if exponent == 0:
        return mantissa * 2.0**-9
    return (8 + mantissa) * 2.0 ** (exponent - 10)
