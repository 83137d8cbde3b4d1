"""A small random DeepSeek-V4 or V4.1 checkpoint, its experts in NVFP4 or MXFP4, for tests and demo.

Names, dtypes, quantisation_config and tokenizer are those of a published copy; only the sizes are
small and the values random. It loads in vLLM like any other checkpoint.
"""

import argparse
import json
from collections.abc import Iterable
from dataclasses import fields
from itertools import count, islice, product
from pathlib import Path
from string import ascii_lowercase
from typing import TYPE_CHECKING, Any

from vllm_dsv4_moe.checkpoint_layout import (
    FP8_BLOCK,
    MXFP4_BLOCK,
    NVFP4_BLOCK,
    ModelSizes,
    TensorSpec,
    checkpoint_tensors,
)
from vllm_dsv4_moe.commands.tiny_config import (
    IMAGE_TOKEN,
    IMAGE_TOKEN_ID,
    SPECIAL_TOKENS,
    V41_DEFAULTS,
    TinyConfig,
    linear_names,
    tiny_config_json,
)
from vllm_dsv4_moe.commands.v41_layout import FP8_BLOCK as V41_FP8_BLOCK
from vllm_dsv4_moe.commands.v41_layout import v41_tensors

if TYPE_CHECKING:
    import torch

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'user' %}<｜User｜>{{ message.content }}"
    "{% elif message.role == 'assistant' %}<｜Assistant｜>{{ message.content }}{{ eos_token }}"
    "{% else %}{{ message.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜></think>{% endif %}"
)


def write_tiny_checkpoint(
    out: str | Path,
    config: TinyConfig = TinyConfig(),  # noqa: B008
    device: str = "cpu",
) -> Path:
    """Write the checkpoint into the folder `out`, one safetensors file a layer; return the folder.

    The same config, seed and device give the same bytes; at a published model's sizes a GPU makes
    the values in seconds. Raises ValueError where `out` is not empty.
    """
    import torch
    from safetensors.torch import save_file

    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not an empty folder: give one that is, or that does not exist")
    out.mkdir(parents=True, exist_ok=True)
    config_json = tiny_config_json(config)
    sizes = ModelSizes.from_config(config_json)
    tensors_of = checkpoint_tensors(sizes)
    if sizes.is_v41:
        tensors_of = v41_tensors(config_json, linear_names(config))
    shards = _shards(tensors_of)
    weight_map: dict[str, str] = {}
    total = 0
    for number, specs in enumerate(shards.values(), start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        generator = torch.Generator(device).manual_seed(config.seed * 100_003 + number)
        filled = _fill(specs, generator, sizes)
        tensors = {key: value.cpu() for key, value in filled.items()}
        save_file(tensors, out / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(spec.num_bytes for spec in specs.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(out / "model.safetensors.index.json", index)
    write_json(out / "config.json", config_json)
    _write_tokenizer(out, config)
    return out


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _shards(named: Iterable[tuple[str, TensorSpec]]) -> dict[str, dict[str, TensorSpec]]:
    """Tensors by file: one for each layer, and one for what belongs to none."""
    shards: dict[str, dict[str, TensorSpec]] = {}
    for name, spec in named:
        parts = name.split(".")
        layer = ".".join(parts[:2]) if parts[0] in ("layers", "mtp") else ""
        shards.setdefault(layer, {})[name] = spec
    return shards


def _fill(
    specs: dict[str, TensorSpec], generator: "torch.Generator", sizes: ModelSizes
) -> dict[str, "torch.Tensor"]:
    """Random values for every tensor named, quantised ones from their own bf16 matrix."""
    import torch

    tensors: dict[str, torch.Tensor] = {}
    for name, spec in specs.items():
        module, _, leaf = name.rpartition(".")
        if name in tensors:
            continue
        if spec.dtype in ("U8", "I8"):
            tensors |= _expert(specs, module.rpartition(".")[0], generator)
        elif spec.dtype == "F8_E4M3":
            block = V41_FP8_BLOCK if sizes.is_v41 else FP8_BLOCK
            weight, scale = _fp8(_matrix(spec.shape, generator), block)
            tensors |= {f"{module}.weight": weight, f"{module}.scale": scale}
        elif leaf == "tid2eid":
            size, device = (spec.shape[0], sizes.num_experts), generator.device
            order = torch.rand(size, generator=generator, device=device).argsort(dim=1)
            tensors[name] = order[:, : spec.shape[1]].contiguous()
        else:
            tensors[name] = _plain(name, spec, generator)
    assert tensors.keys() == specs.keys(), tensors.keys() ^ specs.keys()
    for name, spec in specs.items():
        assert tuple(tensors[name].shape) == spec.shape, (name, tensors[name].shape, spec)
    return tensors


def _matrix(shape: tuple[int, ...], generator: "torch.Generator") -> "torch.Tensor":
    """(out, in) float32 whose product with a unit-RMS vector has unit RMS."""
    import torch

    noise = torch.randn(shape, generator=generator, device=generator.device)
    return noise * shape[-1] ** -0.5


def _plain(name: str, spec: TensorSpec, generator: "torch.Generator") -> "torch.Tensor":
    import torch

    dtype = {"BF16": torch.bfloat16, "F32": torch.float32}[spec.dtype]
    noise = torch.randn(spec.shape, generator=generator, device=generator.device)
    if name.endswith("norm.weight"):
        return (1 + 0.1 * noise).to(dtype)
    if name.endswith("_scale"):  # of the hyper-connections
        return torch.ones(spec.shape, dtype=dtype)
    if name == "embed.weight":
        return noise.to(dtype)
    if len(spec.shape) == 1 or name.endswith(".ape"):  # biases, sinks, position embeddings
        return (0.1 * noise).to(dtype)
    return (noise * spec.shape[-1] ** -0.5).to(dtype)


def _expert(
    specs: dict[str, TensorSpec], expert: str, generator: "torch.Generator"
) -> dict[str, "torch.Tensor"]:
    """w1, w2 and w3 of one expert, NVFP4 or MXFP4 as `specs` has them."""
    import torch

    spec = {name: specs[f"{expert}.{name}.weight"] for name in ("w1", "w2", "w3")}
    weights = {
        name: _matrix((rows, packed * 2), generator) for name, (_, (rows, packed)) in spec.items()
    }
    tensors: dict[str, torch.Tensor] = {}
    if spec["w1"].dtype == "I8":
        for name, weight in weights.items():
            codes, scales = _mxfp4(weight)
            tensors |= {f"{expert}.{name}.weight": codes, f"{expert}.{name}.scale": scales}
        return tensors
    gate_up_max = torch.maximum(weights["w1"].abs().max(), weights["w3"].abs().max())
    for name, weight in weights.items():
        amax = weight.abs().max() if name == "w2" else gate_up_max
        global_scale = (amax / (6 * 448)).float()
        codes, scales = _nvfp4(weight, global_scale)
        # What calibration on inputs of largest |x| 5 (3 for w2) would have written.
        input_amax = 3.0 if name == "w2" else 5.0
        linear = f"{expert}.{name}"
        tensors[f"{linear}.weight"] = codes
        tensors[f"{linear}.weight_scale"] = scales
        tensors[f"{linear}.weight_scale_2"] = global_scale.clone()
        tensors[f"{linear}.input_scale"] = torch.tensor(input_amax / (6 * 448))
    return tensors


def _e2m1(values: "torch.Tensor") -> "torch.Tensor":
    """Nearest E2M1 code of |x| <= 6, ties to the even code; two a byte, low nibble first."""
    import torch

    size = values.abs()
    steps = torch.where(size < 2, (size * 2).round(), torch.where(size < 4, size.round() + 2, 0))
    codes = torch.where(size < 4, steps, (size / 2).round() + 4).clamp(max=7).to(torch.uint8)
    codes |= (values < 0).to(torch.uint8) << 3
    return codes[..., 0::2] | codes[..., 1::2] << 4


def _nvfp4(
    weight: "torch.Tensor", global_scale: "torch.Tensor"
) -> tuple["torch.Tensor", "torch.Tensor"]:
    import torch

    blocks = weight.unflatten(-1, (-1, NVFP4_BLOCK))
    scales = (blocks.abs().amax(-1) / 6 / global_scale).to(torch.float8_e4m3fn)
    step = (scales.float() * global_scale).unsqueeze(-1)
    codes = torch.where(step > 0, blocks / step, 0).clamp(-6, 6)
    return _e2m1(codes.flatten(-2)), scales


def _mxfp4(weight: "torch.Tensor") -> tuple["torch.Tensor", "torch.Tensor"]:
    import torch

    blocks = weight.unflatten(-1, (-1, MXFP4_BLOCK))
    exponents = torch.ceil(torch.log2(blocks.abs().amax(-1) / 6))
    codes = _e2m1((blocks / torch.exp2(exponents).unsqueeze(-1)).flatten(-2))
    return codes.view(torch.int8), torch.exp2(exponents).to(torch.float8_e8m0fnu)


def _fp8(weight: "torch.Tensor", block: int) -> tuple["torch.Tensor", "torch.Tensor"]:
    """E4M3 codes, and one power-of-two scale for each block x block values."""
    import torch

    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -columns % block, 0, -rows % block))
    blocks = padded.unflatten(1, (-1, block)).unflatten(0, (-1, block))
    scales = torch.exp2(torch.ceil(torch.log2(blocks.abs().amax((1, 3)) / 448)))
    codes = (blocks / scales[:, None, :, None]).flatten(2).flatten(0, 1)[:rows, :columns]
    return codes.to(torch.float8_e4m3fn).contiguous(), scales.to(torch.float8_e8m0fnu)


def _write_tokenizer(out: Path, config: TinyConfig) -> None:
    """One token a byte, DeepSeek's special tokens first.

    The rest of the vocabulary is short words: text never becomes them, but the model may say them.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words = ("".join(w) for size in count(2) for w in product(ascii_lowercase, repeat=size))
    tokens += islice(words, config.vocab - len(tokens))
    special = list(SPECIAL_TOKENS)
    if config.model == "v41":
        tokens[IMAGE_TOKEN_ID] = IMAGE_TOKEN
        special.append(IMAGE_TOKEN)
    vocab = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.save(str(out / "tokenizer.json"))
    write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": SPECIAL_TOKENS[0],
            "eos_token": SPECIAL_TOKENS[1],
            "unk_token": SPECIAL_TOKENS[2],
            "pad_token": SPECIAL_TOKENS[1],
            "model_max_length": 4096,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write, new or empty")
    helps = {
        "model": "v4, or v41 for V4.1: vLLM serves it on GPUs, from 0.33 on",
        "layers": "decoder layers",
        "hidden": "hidden size",
        "intermediate": "an expert's intermediate size",
        "experts": "routed experts",
        "top_k": "experts for each token",
        "hash_layers": "first layers that route by token id",
        "heads": "attention heads; GPUs need 64 or 128",
        "vocab": "vocabulary",
        "linear": "all other linears: bf16, or fp8 as published; vLLM serves fp8 on GPUs, and "
        "on CPUs with AMX",
        "expert_format": "the experts' format: nvfp4, or mxfp4 as DeepSeek publishes them",
        "mtp": "multi-token-prediction layers, with MXFP4 experts as published",
        "seed": "seed of the random values",
    }
    options = {"experts": "num-experts", "expert_format": "experts"}
    choices = {
        "model": ("v4", "v41"),
        "linear": ("bf16", "fp8"),
        "expert_format": ("nvfp4", "mxfp4"),
    }
    for field in fields(TinyConfig):
        default = str(field.default)
        if field.name in V41_DEFAULTS:
            default += f"; {V41_DEFAULTS[field.name]} of v41"
        parser.add_argument(
            f"--{options.get(field.name, field.name).replace('_', '-')}",
            dest=field.name,
            type=type(field.default),
            default=argparse.SUPPRESS,
            choices=choices.get(field.name),
            help=f"{helps[field.name]} (default {default})",
        )


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    given = {f.name: getattr(args, f.name) for f in fields(TinyConfig) if hasattr(args, f.name)}
    defaults = V41_DEFAULTS if given.get("model") == "v41" else {}
    config = TinyConfig(**(defaults | given))
    out = write_tiny_checkpoint(args.out, config)
    files = sorted(out.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    Console(soft_wrap=True, highlight=False).print(
        f"{out}: {config.layers} layers, {config.hash_layers} of them hash, "
        f"{config.experts} {config.expert_format.upper()} experts, {size / 1e6:.1f} MB in "
        f"{len(files)} files",
        markup=False,
    )
    return 0
