"""Compile every Triton kernel, as its op launches it, for a GPU that need not be there.

    python tests/kernels/compile_kernels.py 100      ten times the compute capability

The ops run on CPU tensors, with each launch replaced by a compilation to a cubin. Compiled kernels
and interpreted ones exclude one another in a process, so tests start this as a program.
"""

import inspect
import sys

import torch
import triton
from dsv4_kernels import pdl
from dsv4_kernels.backends import SM90, SM100
from dsv4_kernels.packed_tokens import pack_tokens, unpack_tokens
from dsv4_kernels.route.gate_route import gate_route
from dsv4_kernels.route.router_topk import router_topk
from dsv4_kernels.rows.combine import combine
from dsv4_kernels.rows.expert_layout import expert_layout
from dsv4_kernels.rows.fp8_quantize import fp8_quantize
from dsv4_kernels.rows.nvfp4_quantize import nvfp4_quantize
from dsv4_kernels.rows.place_codes import place_codes
from dsv4_kernels.rows.place_rows import place_rows
from dsv4_kernels.sm90.weights import prepare_weights
from dsv4_kernels.types import (
    ActivationScales,
    ExpertWeights,
    Fp8Rows,
    ImageBias,
    MoeLayer,
    MoeShape,
)
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type

HIDDEN, EXPERTS, TOP_K = 7168, 384, 6


def compile_launches(target: GPUTarget) -> None:
    """From here on, `kernel[grid](...)` compiles the kernel for the target and prints its size."""

    def run(self, *args, grid, warmup, **kwargs):
        parameters = inspect.signature(self.fn).parameters
        options = {k: v for k, v in kwargs.items() if k not in parameters or k == "launch_pdl"}
        kwargs = {k: v for k, v in kwargs.items() if k in parameters}
        values = inspect.signature(self.fn).bind(*args, **kwargs).arguments
        constexprs = {
            parameter.name: values[parameter.name]
            for parameter in self.params
            if parameter.is_constexpr or values[parameter.name] is None
        }
        signature = {
            name: "constexpr" if name in constexprs else mangle_type(value)
            for name, value in values.items()
        }
        aligned = {
            (place,): [["tt.divisibility", 16]]
            for place, kind in enumerate(signature.values())
            if kind.startswith("*") and not self.params[place].do_not_specialize_on_alignment
        }
        if "INTERPRETED" in constexprs:  # the tensors are on the CPU here
            constexprs["INTERPRETED"] = False
        source = ASTSource(self, signature, constexprs, aligned)
        asm = triton.compile(source, target=target, options=options).asm
        print(f"{self.fn.__name__}: {len(asm['cubin'])} bytes for sm_{target.arch}")
        # A kernel that ended without a wait would not say that the one before it has ended.
        assert "griddepcontrol.wait" in asm["ptx"] or "launch_pdl" not in parameters

    JITFunction.run = run
    pdl._has_pdl = lambda device: True


def launch_everything() -> None:
    table = torch.zeros(100, TOP_K, dtype=torch.int64)
    image_bias = ImageBias(torch.zeros(EXPERTS), 7)
    bias, expert_map = torch.zeros(EXPERTS), torch.zeros(EXPERTS, dtype=torch.int32)
    x = torch.zeros(8192, HIDDEN, dtype=torch.bfloat16)
    gate = torch.zeros(EXPERTS, HIDDEN, dtype=torch.bfloat16)
    for num_tokens in (1, 8192):
        logits = torch.zeros(num_tokens, EXPERTS)
        token_ids = torch.zeros(num_tokens, dtype=torch.int32)
        router_topk(logits, TOP_K, bias=bias)
        router_topk(logits, TOP_K, table=table, token_ids=token_ids, ids_dtype=torch.int64)
        ids = torch.zeros(num_tokens, TOP_K, dtype=torch.int32)
        layout = expert_layout(ids, EXPERTS, expert_map, tile=128)
    router_topk(logits, TOP_K, table=table, token_ids=token_ids, image_bias=image_bias)
    expert_layout(ids, EXPERTS, None, tile=8)
    gate_route(x[:1], gate, TOP_K, bias=bias)
    hashed = {"table": table, "token_ids": token_ids[:64], "hash_weights": "uniform"}
    gate_route(x[:64], gate, TOP_K, image_bias=image_bias, **hashed)
    saturated = torch.zeros(1, dtype=torch.int64)
    shape = MoeShape(EXPERTS, EXPERTS, TOP_K, HIDDEN, 64, len(x), True)
    for scale in (None, torch.ones(1)):
        placed = nvfp4_quantize(x, scale, layout, swizzled=True, saturated=saturated)
        scales = ActivationScales(scale, None)
        layer = MoeLayer(SM100, shape, zero_weights(), 10.0, scales, saturated, torch.zeros(1))
        tokens = unpack_tokens(pack_tokens(x, ids, layer), layer)
        place_codes(tokens, layout.slot_to_row, out=placed)
    nvfp4_quantize(x, torch.ones(len(x)), saturated=saturated)
    few = expert_layout(ids[:8], EXPERTS, None, tile=128)
    nvfp4_quantize(x[:8], torch.ones(1), few, swizzled=True)
    nvfp4_quantize(x, None, live=torch.zeros(8192, dtype=torch.int32), saturated=saturated)
    rows = torch.empty(len(layout.row_to_slot), HIDDEN, dtype=torch.bfloat16)
    for num_tokens in (1, 8192):
        combine(rows, layout.slot_to_row[:num_tokens])
        place_rows(x[:num_tokens], layout.slot_to_row[:num_tokens], out=rows)
    fp8_rows = Fp8Rows(rows.to(torch.float8_e4m3fn), torch.zeros(len(rows)))
    fp8_quantize(x, layout.slot_to_row, saturated=saturated, out=fp8_rows)
    fp8_quantize(x, early=True, saturated=saturated, out=Fp8Rows(*(p[: len(x)] for p in fp8_rows)))
    fp8_quantize(rows, live=layout.row_to_slot, saturated=saturated, out=fp8_rows)
    shape = shape._replace(quantize_activations=False, fp8=True)
    layer = MoeLayer(SM90, shape, zero_weights(), 10.0, None, saturated, torch.zeros(1))
    for num_tokens in (1, 8192):
        tokens = unpack_tokens(pack_tokens(x[:num_tokens], ids[:num_tokens], layer), layer)
        place_rows(tokens, layout.slot_to_row[:num_tokens], out=fp8_rows)
    for block, dtype in ((16, torch.float8_e4m3fn), (32, torch.uint8)):
        prepare_weights(zero_weights(block, dtype), torch.zeros(1))


def zero_weights(
    block: int = 16,
    scale_dtype: torch.dtype = torch.float8_e4m3fn,
    hidden: int = 256,
    intermediate: int = 64,
):
    def matrix(rows: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        scales = torch.zeros(1, rows, k // block, dtype=scale_dtype)
        return torch.zeros(1, rows, k // 2, dtype=torch.uint8), scales

    w13, w2 = matrix(2 * intermediate, hidden), matrix(hidden, intermediate)
    return ExpertWeights(*w13, torch.ones(1, 2), *w2, torch.ones(1))


if __name__ == "__main__":
    compile_launches(GPUTarget("cuda", int(sys.argv[1]), 32))
    launch_everything()
