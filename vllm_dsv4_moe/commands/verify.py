"""Run one layer of each kind from the files, on this machine, against plain arithmetic.

A kind is a format (NVFP4 or MXFP4), a router (hash or dense), and whether the layer is a draft's.
One layer at a time, its gate and all of its experts are loaded and run on the backend that would
serve them; the same tokens also go through fp32 arithmetic on the dequantised weights. Exit status
0: all agree; 1: one does not; 2: there is nothing to verify.
"""

import argparse
import os
import re
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_dsv4_moe.commands.releases import read_config, text_config
from vllm_dsv4_moe.commands.tiny_config import IMAGE_TOKEN_ID
from vllm_dsv4_moe.layer_config import SCORING, LayerConfig
from vllm_dsv4_moe.safetensors_files import StoredTensor, read_checkpoint

if TYPE_CHECKING:
    import torch
    from dsv4_kernels.types import ExpertWeights, MoeLayer, Routing

    from vllm_dsv4_moe.settings import Settings

NUM_TOKENS = 128  # routed by the layer's own gate; more of them reach every expert
TIMED_TOKENS = (1, 64, 512)
REPLAYS = 20
# Relative L2 error of the worst token, by what activations are. Rounding to bf16 costs 0.003, fp8
# 0.06, NVFP4 0.16; one wrong expert of six, equally weighted, costs 0.4 and more.
TOLERANCE = {"bf16": 0.006, "fp8": 0.15, "nvfp4": 0.3}
# By which a score may differ from float64's where an expert is preferred to another.
SCORE_TOLERANCE = 1e-5
EXPERT = re.compile(r"((?:.*\.)?(layers|mtp)\.\d+\.ffn\.)experts\.\d+\.w1\.(weight_scale|scale)")
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class Layer:
    """A layer of the files, and what config.json says of its kind."""

    prefix: str  # layers.3.ffn.
    weight_format: str
    router: str  # hash or dense
    is_draft: bool
    num_experts: int
    top_k: int
    limit: float | None
    scaling: float

    @property
    def kind(self) -> tuple[str, str, bool]:
        return self.weight_format, self.router, self.is_draft

    def __str__(self) -> str:
        draft = "draft, " if self.is_draft else ""
        name = self.prefix.removesuffix(".ffn.")
        return f"{name} ({draft}{self.router}, {self.weight_format.upper()})"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="its folder")


def run(args: argparse.Namespace) -> int:
    # vLLM logs to stdout, which is the findings' alone.
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    from vllm_dsv4_moe.settings import activations_on, read_settings

    settings = read_settings({}, os.environ)
    stored = read_checkpoint(args.checkpoint)
    for problem in stored.problems:
        print(f"note: {problem}")
    layers = layers_of(stored.tensors, read_config(args.checkpoint))
    kinds = {layer.kind: layer for layer in reversed(layers)}
    if not kinds:
        raise ValueError(f"{args.checkpoint} holds no layer with NVFP4 or MXFP4 experts")
    backend = usable_backend(settings)
    num_ours = failed = 0
    for layer in reversed(kinds.values()):
        reason = vllms_reason(layer, settings, backend)
        if reason is not None:
            print(f"{layer}: vLLM's, as {reason}")
            continue
        num_ours += 1
        try:
            words, agrees = verify(layer, stored.tensors, settings)
            mode = activations_on(backend, settings.activations, layer.weight_format)
            if not agrees and mode == "fp8":
                _, in_bf16 = verify(layer, stored.tensors, replace(settings, activations="bf16"))
                words += "; with activations set to bf16 it agrees: serve so" if in_bf16 else ""
        except ValueError as error:
            words, agrees = str(error), False
        failed += not agrees
        print(f"{layer}: {words}: {'ok' if agrees else 'NOT OK'}", flush=True)
    if not num_ours:
        raise ValueError(f"this plugin runs no layer of {args.checkpoint} here")
    if failed:
        print(f"not verified: {failed} of {num_ours} kinds of layer are not as they should be")
        return 1
    print(f"verified: {num_ours} kinds of layer, each as plain arithmetic has it")
    return 0


def layers_of(stored: dict[str, StoredTensor], config: Mapping[str, Any]) -> list[Layer]:
    """The layers with FP4 experts, in the order of their numbers, the model's before drafts'."""
    config = text_config(config)
    # By prefix, the name of a scale.
    found = {match[1]: match[3] for match in filter(None, map(EXPERT.fullmatch, stored))}
    layers = []
    for prefix in sorted(found, key=lambda p: ("mtp." in p, int(re.findall(r"\d+", p)[-1]))):
        scale, gate = found[prefix], stored.get(f"{prefix}gate.weight")
        is_draft = "mtp." in prefix
        top_k = config.get("dspark_num_experts_per_tok") if is_draft else None
        top_k = top_k or config.get("num_experts_per_tok")
        if not isinstance(top_k, int):
            raise ValueError(f"config.json has num_experts_per_tok {top_k!r}, which is no number")
        layers.append(
            Layer(
                prefix=prefix,
                weight_format="nvfp4" if scale == "weight_scale" else "mxfp4",
                router="hash" if f"{prefix}gate.tid2eid" in stored else "dense",
                is_draft=is_draft,
                # The files may have lost some experts.
                num_experts=gate.shape[0] if gate is not None else 0,
                top_k=top_k,
                limit=config.get("swiglu_limit"),
                scaling=config.get("routed_scaling_factor", 1.0),
            )
        )
    return layers


def usable_backend(settings: "Settings") -> str:
    """The backend that serves here; ValueError where there is none that this machine can run."""
    import torch

    from vllm_dsv4_moe.moe_method import backend_name, check_device, has_backend

    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    if capability is not None and not has_backend(settings, capability):
        major, minor = capability
        raise ValueError(
            f"no backend is made for compute capability {major}.{minor}: vLLM runs every layer here"
        )
    name = backend_name(settings, capability)
    check_device(name, capability, is_eager=True)
    return name


def vllms_reason(layer: Layer, settings: "Settings", backend: str) -> str | None:
    """Why vLLM runs the layer; None where this plugin does."""
    from vllm_dsv4_moe.settings import MXFP4_BACKENDS

    if layer.weight_format not in settings.formats.split(","):
        return f"the setting formats is {settings.formats}"
    if layer.weight_format == "mxfp4" and backend not in MXFP4_BACKENDS:
        return f"the {backend} backend runs NVFP4 alone"
    return None


def verify(layer: Layer, stored: dict[str, StoredTensor], settings: "Settings") -> tuple[str, bool]:
    """What was found, and whether the layer is as it should be."""
    import torch
    from dsv4_kernels import activation_scale
    from dsv4_kernels.backends import choose_backend
    from dsv4_kernels.compile_processes import num_processes
    from dsv4_kernels.compiled import arch_of
    from dsv4_kernels.moe import moe, prepare_layer, workspace_bytes
    from dsv4_kernels.types import MoeShape, fp8_h_scale

    from vllm_dsv4_moe.kernel_cache import COMPILATION
    from vllm_dsv4_moe.moe_method import NUMERICS, activation_mode, backend_name

    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    device = torch.device("cpu" if capability is None else "cuda")
    name = backend_name(settings, capability)
    config = LayerConfig(layer.limit, SCORING, layer.top_k, layer.num_experts, {})
    if config.problems():
        raise ValueError(config.problems()[0])
    mode = activation_mode(settings, capability, layer.weight_format)
    torch.set_float32_matmul_precision("highest")
    with torch.no_grad():
        weights = read_experts(layer, stored, device)
        x, routing, router_agrees = route(layer, stored, name, device)
        x, routing = add_every_expert(layer, x, routing)
        expected = plain_experts(x, routing, weights, layer.limit)
        shape = MoeShape(
            num_experts=layer.num_experts,
            num_local_experts=layer.num_experts,
            top_k=layer.top_k,
            hidden=weights.hidden,
            intermediate=weights.intermediate,
            max_num_tokens=max(len(x), *TIMED_TOKENS),
            quantize_activations=mode == "nvfp4",
            scale_per_row=mode == "fp8" and fp8_h_scale(layer.limit) is None,
            weight_format=layer.weight_format,
            fp8=mode == "fp8",
        )
        scales = None
        if shape.quantize_activations:
            scales = activation_scale.token()
            if settings.activation_scale != "token":
                headroom = int(settings.headroom)
                scales = activation_scale.warmup(
                    weights, limit=layer.limit, scaling=layer.scaling, headroom=headroom
                )
        backend = choose_backend(settings.backend, shape, capability)
        if capability is not None:
            if scales is not None:
                shape = shape._replace(scale_per_row=scales.fc2 is None)
            COMPILATION.begin(backend, shape, arch_of(capability), num_processes())
        prepared = prepare_layer(
            backend, shape, weights, limit=layer.limit, activation_scales=scales
        )
        size = workspace_bytes(backend, prepared.shape)
        workspace = torch.empty(size, dtype=torch.uint8, device=device)
        out = torch.full_like(x, torch.nan)
        start = time.perf_counter()
        moe(x, routing, prepared, workspace, out=out)
        errors = (out.float() - expected).norm(dim=1) / expected.norm(dim=1)
        seconds = time.perf_counter() - start
        tolerance = TOLERANCE[mode]
        numerics, _, _ = NUMERICS[mode].partition(",")
        worst = float(errors.max())
        words = f"{name}, {numerics}, error {errors.mean():.4f}, of the worst token {worst:.4f} "
        words += f"(at most {tolerance}), "
        words += "router agrees" if router_agrees else "the router prefers other experts"
        if prepared.rounding > 0:
            words += f", scales rounded by {float(prepared.rounding):.1g} of the largest"
        if device.type == "cpu":
            words += f", {len(x)} tokens {seconds:.2f} s"
        else:
            words += f", {timed(x, routing, prepared, workspace)}"
    return words, router_agrees and worst <= tolerance


def read(stored: dict[str, StoredTensor], name: str, kinds: str, shape=None) -> "torch.Tensor":
    """A tensor from its file. ValueError where it is not there, or not as `kinds` and shape say."""
    import torch

    dtypes = {
        "U8": torch.uint8, "I8": torch.uint8, "BF16": torch.bfloat16, "F32": torch.float32,
        "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.uint8, "I64": torch.int64,
        "I32": torch.int32,
    }  # fmt: skip
    tensor = stored.get(name)
    if tensor is None:
        raise ValueError(f"{name} is missing from the checkpoint")
    if tensor.dtype not in kinds.split() or (shape is not None and tensor.shape != tuple(shape)):
        wanted = f"{kinds.replace(' ', ' or ')} {list(shape or tensor.shape)}"
        raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)} and not {wanted}")
    data = torch.frombuffer(bytearray(tensor.read()), dtype=dtypes[tensor.dtype])
    return data.view(tensor.shape)


def read_experts(
    layer: Layer, stored: dict[str, StoredTensor], device: "torch.device"
) -> "ExpertWeights":
    """All experts of the layer, in the order of the checkpoint."""
    import torch
    from dsv4_kernels.types import MXFP4_BLOCK, NVFP4_BLOCK, ExpertWeights

    is_mxfp4 = layer.weight_format == "mxfp4"
    block, suffix, kind = NVFP4_BLOCK, "weight_scale", "F8_E4M3"
    if is_mxfp4:
        block, suffix, kind = MXFP4_BLOCK, "scale", "F8_E8M0 U8"
    rows, packed = read(stored, f"{layer.prefix}experts.0.w1.weight", "U8 I8").shape
    hidden, inter, experts = 2 * packed, rows, layer.num_experts

    def empty(*size: int, dtype=torch.uint8) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    scale_dtype = torch.uint8 if is_mxfp4 else torch.float8_e4m3fn
    weights = ExpertWeights(
        empty(experts, 2 * inter, hidden // 2),
        empty(experts, 2 * inter, hidden // block, dtype=scale_dtype),
        torch.ones(experts, 2, device=device),
        empty(experts, hidden, inter // 2),
        empty(experts, hidden, inter // block, dtype=scale_dtype),
        torch.ones(experts, device=device),
    )
    for expert in range(experts):
        for linear, codes, scales, global_scale in (
            ("w1", *(part[expert, :inter] for part in weights[:2]), weights[2][expert, :1]),
            ("w3", *(part[expert, inter:] for part in weights[:2]), weights[2][expert, 1:]),
            ("w2", *(part[expert] for part in weights[3:5]), weights[5][expert : expert + 1]),
        ):
            name = f"{layer.prefix}experts.{expert}.{linear}"
            codes.copy_(read(stored, f"{name}.weight", "U8 I8", codes.shape))
            scales.copy_(read(stored, f"{name}.{suffix}", kind, scales.shape))
            if not is_mxfp4:
                global_scale.copy_(read(stored, f"{name}.weight_scale_2", "F32").view(1))
    return weights


def route(
    layer: Layer, stored: dict[str, StoredTensor], backend: str, device: "torch.device"
) -> "tuple[torch.Tensor, Routing, bool]":
    """(tokens, their experts by the router that would serve, whether those are the best). Where the
    gate has a bias for them, every second token is an image's."""
    import torch
    from dsv4_kernels.types import ImageBias

    if backend == "reference":
        from dsv4_kernels.reference import router_topk
    else:
        from dsv4_kernels.route.router_topk import router_topk
    gate = read(stored, f"{layer.prefix}gate.weight", "BF16 F32").float()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(NUM_TOKENS, gate.shape[1], generator=generator)
    norm = f"{layer.prefix.removesuffix('ffn.')}ffn_norm.weight"
    if norm in stored:
        x *= read(stored, norm, "BF16 F32").float()
    x = x.bfloat16()
    logits = (x.float() @ gate.T).to(device)
    scores = torch.nn.functional.softplus(logits.double()).sqrt()
    table = bias = token_ids = image_bias = None
    is_image = torch.zeros(NUM_TOKENS, dtype=torch.bool, device=device)
    if layer.router == "hash":
        table = read_table(layer, stored).to(device)
        token_ids = torch.randint(len(table), (NUM_TOKENS,), generator=generator).to(device)
        expected = table[token_ids].long()
    else:
        bias = read(stored, f"{layer.prefix}gate.bias", "F32 BF16").float().to(device)
    selects = scores if bias is None else scores + bias
    if f"{layer.prefix}gate.bias_vl" in stored:
        image = read(stored, f"{layer.prefix}gate.bias_vl", "F32 BF16").float().to(device)
        image_bias = ImageBias(image, IMAGE_TOKEN_ID)
        is_image[1::2] = True
        token_ids = torch.zeros_like(is_image, dtype=torch.int64) if bias is not None else token_ids
        token_ids = torch.where(is_image, IMAGE_TOKEN_ID, token_ids)
        selects = torch.where(is_image[:, None], scores + image, selects)
    routing = router_topk(
        logits,
        layer.top_k,
        bias=bias,
        table=table,
        token_ids=token_ids,
        image_bias=image_bias,
        scaling=layer.scaling,
    )
    ids = routing.ids.long()
    taken = selects.gather(1, ids).amin(1)
    left = selects.scatter(1, ids, -torch.inf).amax(1)
    as_expected = taken >= left - SCORE_TOLERANCE
    if bias is None:
        as_expected = torch.where(is_image, as_expected, (ids == expected).all(1))
    agrees = bool(as_expected.all())
    shares = scores.gather(1, ids)
    shares = shares / shares.sum(1, keepdim=True) * layer.scaling
    return x.to(device), routing, agrees and torch.allclose(shares.float(), routing.weights, 1e-4)


def read_table(layer: Layer, stored: dict[str, StoredTensor]) -> "torch.Tensor":
    """The experts of every token id; ValueError where the layer has no such experts."""
    name = f"{layer.prefix}gate.tid2eid"
    table = read(stored, name, "I64 I32")
    if table.ndim != 2 or table.shape[1] != layer.top_k:
        raise ValueError(f"{name} is {list(table.shape)} and a token has {layer.top_k} experts")
    outside = ((table < 0) | (table >= layer.num_experts)).nonzero()
    if len(outside):
        row, slot = outside[0].tolist()
        raise ValueError(
            f"{name}[{row}, {slot}] is {int(table[row, slot])}, and expert ids go from 0 to "
            f"{layer.num_experts - 1}"
        )
    return table


def add_every_expert(
    layer: Layer, x: "torch.Tensor", routing: "Routing"
) -> "tuple[torch.Tensor, Routing]":
    """More of the tokens, which go to every expert in turn."""
    import torch
    from dsv4_kernels.types import Routing

    count = -(-layer.num_experts // layer.top_k)
    ids = torch.arange(count * layer.top_k, device=x.device).view(count, -1) % layer.num_experts
    shares = torch.full(ids.shape, layer.scaling / layer.top_k, device=x.device)
    both = Routing(
        torch.cat((routing.weights, shares)), torch.cat((routing.ids, ids.to(routing.ids.dtype)))
    )
    return torch.cat((x, x.repeat(-(-count // len(x)), 1)[:count])), both


def plain_experts(
    x: "torch.Tensor", routing: "Routing", weights: "ExpertWeights", limit: float | None
) -> "torch.Tensor":
    """(num_tokens, hidden) fp32 sums of the routed experts, nothing rounded on the way."""
    import torch

    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in range(weights.num_local_experts):
        token, slot = (routing.ids == expert).nonzero(as_tuple=True)
        if len(token) == 0:
            continue
        w13 = dequantised(weights.w13[expert], weights.w13_block_scales[expert])
        w13 *= weights.w13_global_scales[expert].repeat_interleave(weights.intermediate)[:, None]
        gate, up = (x[token].float() @ w13.T).chunk(2, 1)
        if limit is not None:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        h = gate / (1 + torch.exp(-gate)) * up * routing.weights[token, slot][:, None]
        w2 = dequantised(weights.w2[expert], weights.w2_block_scales[expert])
        out.index_add_(0, token, h @ w2.T * weights.w2_global_scales[expert])
    return out


def dequantised(codes: "torch.Tensor", scales: "torch.Tensor") -> "torch.Tensor":
    """(rows, K) fp32 of a weight without its global scale; uint8 scales are powers of two."""
    import torch

    values = torch.tensor(E2M1 + tuple(-v for v in E2M1), device=codes.device)
    nibbles = torch.stack((codes % 16, codes // 16), 2).flatten(1).int()
    if scales.dtype == torch.uint8:
        # 255 is NaN.
        powers = torch.exp2(scales.float() - 127).masked_fill(scales == 255, torch.nan)
    else:
        powers = scales.float()
    return values[nibbles] * powers.repeat_interleave(nibbles.shape[1] // scales.shape[1], 1)


def timed(
    x: "torch.Tensor", routing: "Routing", layer: "MoeLayer", workspace: "torch.Tensor"
) -> str:
    """Median microseconds of the layer's launches in a replayed CUDA graph, by tokens."""
    import torch
    from dsv4_kernels.moe import moe
    from dsv4_kernels.types import Routing

    words = []
    for count in TIMED_TOKENS:
        copies = -(-count // NUM_TOKENS)
        some_x = x[:NUM_TOKENS].repeat(copies, 1)[:count]
        some = Routing(*(part[:NUM_TOKENS].repeat(copies, 1)[:count] for part in routing))
        out = torch.empty_like(some_x)
        us = replayed_us(partial(moe, some_x, some, layer, workspace, out=out))
        words.append(f"{count} {us:.0f}")
    return f"us by tokens: {', '.join(words)}"


def replayed_us(launch: Callable[[], Any]) -> float:
    import torch

    launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times)
