"""Random weights at real sizes for whole servers: vLLM's `--load-format dummy`, made sane.

vLLM's own dummies are tiny, equal in every layer and partly not set. These route tokens apart, keep
every layer's output near its input's size, and depend on a tensor's name alone, so that two
servers with different experts' kernels hold the same model. `register` is a plugin of vLLM's, named
by the entry point that `write_entry_point` makes, so that every process of a server has it.
"""

import math
import os
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from bench.released import layer_sizes

from vllm_dsv4_moe.checkpoint_layout import MXFP4_BLOCK, NVFP4_BLOCK
from vllm_dsv4_moe.commands.tiny import write_json
from vllm_dsv4_moe.commands.tiny_config import SPECIAL_TOKENS, TinyConfig, tiny_config_json

PLUGIN_NAME = "dsv4_random_weights"
# Of the GPU's memory, what a server's PyTorch may take. Where experts are repacked it would keep
# all that is free before it gives any back, and servers that start beside it would find none.
MEMORY_FRACTION = "DSV4_BENCH_MEMORY_FRACTION"
GLOBAL_SCALE = 2.0**-10  # of NVFP4 experts
CODE_RMS = 2.9  # of random E2M1 codes
UE8M0_BIAS = 127
CHUNK_BYTES = 2**28  # of random values made at a time
ATTENTION = {"q_lora_rank": 1024, "o_lora_rank": 1024, "o_groups": 8}


def real_config(model: str, expert_format: str, layers: int, mtp: int = 0) -> dict:
    """config.json of V4-Flash, or of a V4 with V4.1-Flash's MoE sizes, with that many layers."""
    sizes = TinyConfig(
        **layer_sizes(model, layers),
        vocab=129280,
        linear="fp8",
        expert_format=expert_format,
        mtp=mtp,
    )
    return tiny_config_json(sizes) | ATTENTION | {"max_position_embeddings": 65536}


def write_model(folder: Path, config: dict) -> Path:
    """A folder that vLLM serves with --load-format dummy: config.json and a tokenizer."""
    folder.mkdir(parents=True)
    write_json(folder / "config.json", config)
    write_tokenizer(folder, config["vocab_size"])
    return folder


def write_tokenizer(folder: Path, vocab: int) -> None:
    """One word a token, so that random tokens become text and the same tokens again."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    words = [*SPECIAL_TOKENS, *(f"w{number}" for number in range(vocab - len(SPECIAL_TOKENS)))]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": 0, "eos_token": 1, "unk_token": 2, "pad_token": 1}
    special = {name: SPECIAL_TOKENS[number] for name, number in names.items()}
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 65536, **special},
    )


def write_entry_point(folder: Path) -> Path:
    """A folder for PYTHONPATH in which vLLM finds `register` as a plugin."""
    info = folder / "dsv4_random_weights-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: dsv4-random-weights\nVersion: 0\n")
    entry = f"[vllm.general_plugins]\n{PLUGIN_NAME} = bench.random_weights:register\n"
    (info / "entry_points.txt").write_text(entry)
    return folder


def register() -> None:
    """Take the place of vLLM's loader of dummies, in this process."""
    from vllm.model_executor import model_loader
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

    if model_loader._LOAD_FORMAT_TO_MODEL_LOADER["dummy"] is not DummyModelLoader:
        return

    class RandomWeightsLoader(DummyModelLoader):
        def load_weights(self, model, model_config) -> None:
            fraction = os.environ.get(MEMORY_FRACTION)
            if fraction and torch.cuda.is_available():
                torch.cuda.set_per_process_memory_fraction(float(fraction))
            super().load_weights(model, model_config)
            fill(model, model_config.hf_text_config.n_routed_experts)
            # This plugin would put its own scales over those of a dummy.
            if plugin := sys.modules.get("vllm_dsv4_moe.moe_method"):
                plugin.fill_dummy_scales = lambda layer: None  # type: ignore[attr-defined]

    model_loader.register_model_loader("dummy")(RandomWeightsLoader)


def fill(model: torch.nn.Module, num_experts: int) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        generator = torch.Generator(tensor.device).manual_seed(zlib.crc32(name.encode()))
        for part in parts(tensor.data):
            values = values_for(name, part, num_experts, generator)
            if values is not None:
                part.copy_(values)


def parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensor, or its rows in turn where values for all of it would take much memory."""
    if tensor.nbytes <= CHUNK_BYTES:
        yield tensor
    else:
        yield from tensor.split(max(1, len(tensor) * CHUNK_BYTES // tensor.nbytes))


def values_for(
    name: str, tensor: torch.Tensor, num_experts: int, generator: torch.Generator
) -> torch.Tensor | float | None:
    """By vLLM's name of a tensor: its values, one value, or None to leave it as it is."""
    shape, device = tensor.shape, tensor.device

    def normal() -> torch.Tensor:
        return torch.randn(shape, device=device, generator=generator)

    if "w13_" in name or "w2_" in name:
        return expert_values(name, tensor, generator)
    if "tid2eid" in name or "hash_indices" in name:
        order = torch.rand(shape[0], num_experts, device=device, generator=generator).argsort(1)
        return order[:, : shape[1]]
    if not tensor.is_floating_point():
        return None
    if "norm" in name:
        return full(tensor, 1.0)
    if "embed" in name:
        return normal()
    if name.endswith(("gate.weight", "head.weight")):
        return normal() * shape[-1] ** -0.5
    if "gate" in name and "bias" in name:
        return full(tensor, 0.0)
    if "scale" in name:
        return full(tensor, 2.0**-7)
    if tensor.dtype == torch.float8_e4m3fn:
        return normal() * 2
    return None


def expert_values(name: str, tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Codes, block scales and global scales of NVFP4 or MXFP4 experts.

    A product with a vector of unit RMS has about unit RMS.
    """
    shape, device = tensor.shape, tensor.device
    if name.endswith(("input_scale", "scale_2")):
        return full(tensor, GLOBAL_SCALE)
    if not name.endswith("scale"):
        codes = torch.empty(shape, dtype=torch.uint8, device=device)
        return codes.random_(0, 256, generator=generator).view(tensor.dtype)
    is_mxfp4 = tensor.dtype == torch.uint8
    block = MXFP4_BLOCK if is_mxfp4 else NVFP4_BLOCK
    scale = 1 / (CODE_RMS * (shape[-1] * block) ** 0.5)
    if is_mxfp4:  # the power of two below, or that above
        low = UE8M0_BIAS + math.floor(math.log2(scale))
        return torch.randint(low, low + 2, shape, device=device, generator=generator)
    noise = torch.rand(shape, device=device, generator=generator) + 0.5
    return noise * (scale / GLOBAL_SCALE)


def full(tensor: torch.Tensor, value: float) -> torch.Tensor:
    return torch.full(tensor.shape, value, device=tensor.device)
