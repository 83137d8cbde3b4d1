"""A DeepSeek-V4 MoE layer in plain torch, straight from a checkpoint's safetensors.

It shares no code with vLLM, the plugin or the kernels: formulas of DeepSeek-V4 section 2.1,
ModelOpt's NVFP4 and OCP's MXFP4, in float64 except where the layer itself rounds (bf16, NVFP4 and
E4M3 activations, the gate and the shared expert in bf16, as the checkpoint has them).
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


class PlainMoe:
    """One layer. fc1_scale and fc2_scales (one an expert) quantise the activations to NVFP4;
    "token" gives each row its own scale; None leaves the activations in bf16. "fp8" for fc1_scale
    makes weights and activations E4M3, and puts the routing weight last. gate_dtype is what
    the logits are summed and kept in."""

    def __init__(
        self,
        checkpoint: Path,
        layer: int,
        fc1_scale=None,
        fc2_scales=None,
        gate_dtype=torch.bfloat16,
    ) -> None:
        self.config = json.loads((checkpoint / "config.json").read_text())
        index = json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
        prefix = f"layers.{layer}.ffn."
        names = [name for name in index if name.startswith(prefix)]
        self.tensors = {}
        for file in {index[name] for name in names}:
            with safe_open(checkpoint / file, "pt") as opened:
                for name in names:
                    if index[name] == file:
                        self.tensors[name.removeprefix(prefix)] = opened.get_tensor(name)
        self.fc1_scale, self.fc2_scales = fc1_scale, fc2_scales
        self.gate_dtype = gate_dtype
        self.matrices: dict[str, torch.Tensor] = {}

    def __call__(self, x: torch.Tensor, token_ids: torch.Tensor | None) -> torch.Tensor:
        """(num_tokens, hidden) bf16, (num_tokens,) -> routed plus shared experts, bf16."""
        return self.shared(x) + self.routed(x, *self.route(x, token_ids))

    def routed(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        rows = torch.empty(*ids.shape, x.shape[1], dtype=x.dtype)
        read = rounded(x, self.fc1_scale)
        for expert in ids.unique().tolist():
            token, slot = (ids == expert).nonzero(as_tuple=True)
            rows[token, slot] = self.expert(expert, read[token], weights[token, slot]).bfloat16()
        # Added in fp32, slot by slot.
        total = torch.zeros(x.shape, dtype=torch.float32)
        for slot_rows in rows.unbind(1):
            total += slot_rows.float()
        return total.bfloat16()

    def route(self, x: torch.Tensor, token_ids) -> tuple[torch.Tensor, torch.Tensor]:
        gate = self.tensors["gate.weight"].to(self.gate_dtype)
        scores = F.linear(x.to(self.gate_dtype), gate).double().exp().log1p().sqrt()
        if "gate.tid2eid" in self.tensors:
            ids = self.tensors["gate.tid2eid"].long()[token_ids.long()]
        else:
            biased = scores + self.tensors["gate.bias"].double()
            top_k = self.config["num_experts_per_tok"]
            ids = biased.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
        weights = scores.gather(1, ids)
        weights = weights / weights.sum(1, keepdim=True)
        return ids, weights * self.config["routed_scaling_factor"]

    def expert(self, expert: int, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        gate, up, down = (self.matrix(f"experts.{expert}.w{n}") for n in (1, 3, 2))
        limit = self.config["swiglu_limit"]
        g = (x @ gate.T).clamp(max=limit)
        u = (x @ up.T).clamp(-limit, limit)
        h = g / (1 + torch.exp(-g)) * u
        if self.fc1_scale == "fp8":
            # Under the limit no |h| is over limit^2.
            return e4m3(h, limit**2 / 448) @ down.T * weight[:, None]
        h = h * weight[:, None]
        scales = self.fc2_scales
        return rounded(h, scales[expert] if isinstance(scales, list) else scales) @ down.T

    def matrix(self, name: str) -> torch.Tensor:
        """(out, in) float64 of an NVFP4 or MXFP4 weight."""
        if name not in self.matrices:
            self.matrices[name] = self.dequantised(name)
        return self.matrices[name]

    def dequantised(self, name: str) -> torch.Tensor:
        codes = self.tensors[f"{name}.weight"].view(torch.uint8)
        nibbles = torch.stack((codes % 16, codes // 16), 2).flatten(1).long()
        values = torch.tensor(E2M1 + tuple(-v for v in E2M1), dtype=torch.float64)[nibbles]
        if f"{name}.scale" in self.tensors:
            exponents = self.tensors[f"{name}.scale"].view(torch.uint8).double() - 127
            matrix = values * torch.exp2(exponents).repeat_interleave(32, 1)
            largest = 2.0 ** float(exponents.max())
            return e4m3(matrix, largest / 64) if self.fc1_scale == "fp8" else matrix
        scales = self.tensors[f"{name}.weight_scale"].double().repeat_interleave(16, 1)
        if self.fc1_scale == "fp8":
            values, scales = e4m3(values * scales, 8.0), 1.0
        return values * scales * self.tensors[f"{name}.weight_scale_2"].double()

    def shared(self, x: torch.Tensor) -> torch.Tensor:
        gate, up, down = (self.tensors[f"shared_experts.w{n}.weight"] for n in (1, 3, 2))
        limit = self.config["swiglu_limit"]
        g, u = F.linear(x, gate).clamp(max=limit), F.linear(x, up).clamp(-limit, limit)
        return F.linear(g * torch.sigmoid(g) * u, down)


def e4m3(x: torch.Tensor, scale) -> torch.Tensor:
    """Multiples of the scale that E4M3 has, float64."""
    return (x.double() / scale).float().to(torch.float8_e4m3fn).double() * scale


def rounded(x: torch.Tensor, scale) -> torch.Tensor:
    """x as the GEMM reads it: bf16, or NVFP4 with this global scale, or E4M3, in float64."""
    if scale is None:
        return x.bfloat16().double()
    if scale == "fp8":
        # In float32, as it is defined: an exact quotient falls on the other side of some ties.
        scale = x.float().abs().amax(1, keepdim=True).clamp(min=1e-30) / 448
        codes = (x.float() * (1 / scale)).to(torch.float8_e4m3fn)
        return codes.double() * scale.double()
    x = x.float()
    if scale == "token":
        x = x.bfloat16().float()
        scale = x.abs().amax(1, keepdim=True) / (6 * 448)
        scale = torch.where(scale == 0, 1.0, scale)
    blocks = x.unflatten(1, (-1, 16))
    scale = torch.as_tensor(scale, dtype=torch.float32).reshape(-1, 1)
    block_scales = (blocks.abs().amax(2) / 6 / scale).clamp(max=448).to(torch.float8_e4m3fn)
    step = (block_scales.float() * scale)[..., None]
    scaled = torch.where(step > 0, blocks / step, 0.0)
    # The nearest of the 15 values; of two equally near ones, the one with the even code.
    values = torch.tensor(E2M1)
    distance = (scaled.abs()[..., None] - values).abs()
    odd = torch.arange(8) % 2 == 1
    nearest = (distance + odd * 1e-7).argmin(-1)
    return (values[nearest] * scaled.sign() * step).flatten(1).double()
