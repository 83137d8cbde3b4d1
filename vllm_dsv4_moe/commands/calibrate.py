"""Run prompts through vLLM and write the activation scales that `activation_scale` = `file` reads.

The experts run on the `reference` backend with unquantised activations, so that what is recorded
is the model's own and not an effect of a scale; it is slow, and runs on any device. PROMPTS is a
text file with one prompt a line, or .jsonl with {"prompt": "..."} or {"messages": [...]} a line.
"""

import argparse
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_dsv4_moe.commands.deployment import format_of
from vllm_dsv4_moe.commands.gpus import has_gpu
from vllm_dsv4_moe.commands.releases import RELEASES, model_config, text_config
from vllm_dsv4_moe.commands.serving import server_environment

if TYPE_CHECKING:
    from dsv4_kernels.activation_scale import LayerScales

# Layers in MXFP4, which have no such scales, are vLLM's.
SETTINGS = {"backend": "reference", "activations": "bf16", "formats": "nvfp4"}
Prompt = str | list[dict[str, Any]]  # text, or the messages of a chat


@dataclass
class LayerAmax:
    """One layer's largest magnitudes over all ranks."""

    fc1: float
    fc2: list[float]  # by global expert id; 0 for an expert that no token went to


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="checkpoint, as `vllm serve` takes it")
    parser.add_argument("prompts", type=Path, metavar="PROMPTS", help="text file or .jsonl")
    parser.add_argument("out", type=Path, metavar="OUT", help="file to write")
    parser.add_argument("--tp", type=int, default=1, help="GPUs, with expert parallelism")
    parser.add_argument("--max-model-len", type=int, default=4096, help="longest prompt + answer")
    parser.add_argument("--max-tokens", type=int, default=16, help="tokens to generate a prompt")
    parser.add_argument(
        "--headroom",
        type=int,
        default=4,
        help="times the largest value seen that must still fit; a power of two (default 4)",
    )
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")


def run(args: argparse.Namespace) -> int:
    if args.headroom < 1 or args.headroom & (args.headroom - 1):
        raise ValueError(f"--headroom is {args.headroom}: use a power of two, 1, 2, 4, ...")
    if min(args.tp, args.max_tokens, args.max_model_len) < 1:
        raise ValueError("--tp, --max-tokens and --max-model-len must be at least 1")
    if not args.out.resolve().parent.is_dir():
        raise ValueError(f"{args.out}: there is no folder {args.out.resolve().parent}")
    prompts = read_prompts(args.prompts)
    if has_no_nvfp4(args.model):
        raise ValueError(_refused(args.model))
    os.environ.update(server_environment())
    # vLLM logs to stdout, which is the summary's alone.
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    ranks, num_tokens = record(args, prompts)
    layers = merge(ranks)
    write(args, layers, len(prompts), num_tokens)
    _print_summary(args, layers, num_tokens)
    return 0


def has_no_nvfp4(model: str) -> bool:
    """Whether config.json says so, where it is known before vLLM downloads or loads the model."""
    if model not in RELEASES and not Path(model, "config.json").is_file():
        return False
    quant = text_config(model_config(model)).get("quantization_config") or {}
    return format_of(quant) != "nvfp4"


def _refused(model: str) -> str:
    return (
        f"{model} has no layer with NVFP4 experts: activations of no others have scales that a "
        "file could hold"
    )


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file; ValueError names the line that is none."""
    lines = path.read_text(encoding="utf-8").splitlines()
    if path.suffix != ".jsonl":
        prompts: list[Prompt] = [line for line in lines if line.strip()]
    else:
        prompts = [
            _prompt(line, f"{path}:{number}")
            for number, line in enumerate(lines, start=1)
            if line.strip()
        ]
    if not prompts:
        raise ValueError(f"{path} has no prompt")
    return prompts


def _prompt(line: str, where: str) -> Prompt:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if isinstance(entry, dict) and isinstance(entry.get("prompt"), str):
        return entry["prompt"]
    if isinstance(entry, dict) and isinstance(entry.get("messages"), list):
        return entry["messages"]
    raise ValueError(f'{where} has neither a "prompt" that is text nor a list of "messages"')


def record(args: argparse.Namespace, prompts: Sequence[Prompt]) -> tuple[list[list[dict]], int]:
    """What every rank recorded, and the number of tokens that went through."""
    from vllm import LLM, SamplingParams

    try:
        llm = LLM(**engine_options(args))
    except RuntimeError as error:
        raise ValueError(f"vLLM did not start ({error}): its log above says why") from error
    if not all(llm.collective_rpc("dsv4_moe_start_recording")):
        raise ValueError(_refused(args.model))
    sampling = SamplingParams(max_tokens=args.max_tokens, temperature=0, ignore_eos=True)
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    chats = [prompt for prompt in prompts if not isinstance(prompt, str)]
    outputs = llm.generate(texts, sampling) if texts else []
    outputs += llm.chat(chats, sampling) if chats else []
    num_tokens = sum(
        len(output.prompt_token_ids or ()) + len(output.outputs[0].token_ids) for output in outputs
    )
    return llm.collective_rpc("dsv4_moe_recorded"), num_tokens


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """What LLM is made with: every token is computed once, eagerly, and seen."""
    options: dict[str, Any] = {"gpu_memory_utilization": 0.8} if has_gpu() else {}
    return options | dict(
        model=args.model,
        tensor_parallel_size=args.tp,
        enable_expert_parallel=args.tp > 1,
        max_model_len=args.max_model_len,
        max_num_batched_tokens=2048,
        max_num_seqs=16,
        enable_prefix_caching=False,  # a cached token would not be seen
        enforce_eager=True,  # a captured graph would not record
        worker_extension_cls="vllm_dsv4_moe.commands.calibration_worker.CalibrationWorker",
        additional_config={"dsv4_moe": SETTINGS},
    )


def merge(ranks: Iterable[Iterable[Mapping[str, Any]]]) -> dict[int, LayerAmax]:
    """Over ranks: an expert's magnitude is the largest of those that hold it (or a part of it).

    Raises ValueError for a magnitude that is not finite: the model overflows.
    """
    layers: dict[int, LayerAmax] = {}
    for recorded in (entry for rank in ranks for entry in rank):
        index = recorded["layer"]
        layer = layers.setdefault(index, LayerAmax(0.0, [0.0] * recorded["num_experts"]))
        if not all(map(math.isfinite, (recorded["fc1"], *recorded["fc2"]))):
            raise ValueError(
                f"layer {index} has activations that are not finite: the checkpoint or a prompt "
                "is damaged, and no scale can hold them"
            )
        layer.fc1 = max(layer.fc1, recorded["fc1"])
        for expert, amax in zip(recorded["experts"], recorded["fc2"], strict=True):
            layer.fc2[expert] = max(layer.fc2[expert], amax)
    return layers


def layer_scales(layer: LayerAmax, headroom: int) -> "LayerScales":
    import torch
    from dsv4_kernels.activation_scale import LayerScales, from_amax

    scales = from_amax(torch.tensor([layer.fc1]), torch.tensor(layer.fc2), headroom)
    assert scales.fc1 is not None and scales.fc2 is not None
    return LayerScales(float(scales.fc1), scales.fc2.tolist())


def write(
    args: argparse.Namespace, layers: Mapping[int, LayerAmax], num_prompts: int, num_tokens: int
) -> None:
    from dsv4_kernels.activation_scale import write_file

    write_file(
        args.out,
        {index: layer_scales(layer, args.headroom) for index, layer in layers.items()},
        model=Path(args.model).name,
        prompts=num_prompts,
        tokens=num_tokens,
        headroom=args.headroom,
    )


def _print_summary(
    args: argparse.Namespace, layers: Mapping[int, LayerAmax], num_tokens: int
) -> None:
    unseen = {index: sum(amax == 0 for amax in layer.fc2) for index, layer in layers.items()}
    if args.json:
        summary = {"out": str(args.out), "layers": len(layers), "tokens": num_tokens}
        print(json.dumps(summary | {"experts_unseen": unseen}))
        return
    print(f"{args.out}: scales of {len(layers)} layers from {num_tokens:,} tokens")
    if any(unseen.values()):
        worst = max(unseen, key=unseen.__getitem__)
        print(
            f"no token went to {sum(unseen.values())} experts (most, {unseen[worst]}, in layer "
            f"{worst}): they have their layer's largest scale; more prompts would reach them"
        )
    print(f"serve with activation_scale=file and activation_scale_file={args.out}")
