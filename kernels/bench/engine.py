"""Whole steps of vLLM's engine on one GPU at V4-Flash's layer sizes: one backend a process.

    python -m bench.engine run plugin --out plugin.json [--layers 16] [--probe]
    python -m bench.engine report plugin.json marlin.json humming.json

Fewer layers than V4-Flash's 43, all of random weights with which tokens route apart. Decode is the
median, over three runs, of the time for 64 more tokens of each sequence; prefill is in chunks of
8192 tokens. The engine runs in this process. `--probe` says where a step of one sequence goes
(bench.decode_probe).
"""

import argparse
import importlib.metadata
import json
import os
import random
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from bench.arguments import call, run_and_report

from vllm_dsv4_moe.commands.serving import server_environment
from vllm_dsv4_moe.commands.tiny_config import TinyConfig, tiny_config_json

BACKENDS = ("plugin", "marlin", "humming")
DECODE_BATCHES = (1, 8, 32, 64, 128, 256)
PREFILLS = ((4, 2048), (16, 2048), (4, 8000))  # sequences, tokens of each
MORE_TOKENS = 64
REPEATS = 3
VOCAB = 129280
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_DEEP_GEMM_WARMUP": "skip"}


def model_config(layers: int) -> dict:
    """V4-Flash's config.json with fewer layers."""
    sizes = TinyConfig(
        layers=layers,
        hidden=4096,
        intermediate=2048,
        experts=256,
        hash_layers=min(3, layers),
        heads=64,
        vocab=VOCAB,
        linear="fp8",
    )
    attention = {
        "q_lora_rank": 1024,
        "o_lora_rank": 1024,
        "o_groups": 8,
        "max_position_embeddings": 65536,
    }
    return tiny_config_json(sizes) | attention


def fill(model: torch.nn.Module, num_experts: int) -> None:
    """Give a model of `--load-format dummy` values with which its layers do what real ones do."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(0)
    for name, tensor in tensors.items():
        values = values_for(name, tensor, num_experts, generator)
        if values is not None:
            tensor.data.copy_(values)


def values_for(
    name: str, tensor: torch.Tensor, num_experts: int, generator: torch.Generator
) -> torch.Tensor | float | None:
    """By vLLM's name of a tensor: its values, one value, or None to leave it as it is."""
    shape, device = tensor.shape, tensor.device
    random = {"device": device, "generator": generator}
    if "w13_" in name or "w2_" in name:
        if name.endswith(("input_scale", "scale_2")):
            return full(tensor, 3e-3)
        if name.endswith("scale"):
            return torch.rand(shape, **random) + 0.5
        codes = torch.empty(shape, dtype=torch.uint8, device=device)
        return codes.random_(0, 256, generator=generator)
    if "tid2eid" in name or "hash_indices" in name:
        return torch.rand(shape[0], num_experts, **random).argsort(1)[:, : shape[1]]
    if not tensor.is_floating_point():
        return None
    if "norm" in name:
        return full(tensor, 1.0)
    if "embed" in name:
        return torch.randn(shape, **random)
    if name.endswith("gate.weight"):
        return torch.randn(shape, **random) * shape[-1] ** -0.5
    if "gate" in name and "bias" in name:
        return full(tensor, 0.0)
    if "scale" in name:
        return full(tensor, 2.0**-7)
    if tensor.dtype == torch.float8_e4m3fn:
        return torch.randn(shape, **random) * 2
    return None


def full(tensor: torch.Tensor, value: float) -> torch.Tensor:
    return torch.full(tensor.shape, value, device=tensor.device)


def fill_dummies(num_experts: int) -> None:
    """After vLLM's dummy loader; the plugin leaves the scales as they are then."""
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

    load_weights = DummyModelLoader.load_weights

    def load_and_fill(self, model, model_config) -> None:
        load_weights(self, model, model_config)
        fill(model, num_experts)

    DummyModelLoader.load_weights = load_and_fill


def start(backend: str, config: dict, folder: Path):
    """The engine, loaded."""
    if backend == "plugin":
        from vllm_dsv4_moe import moe_method, register

        register()
        moe_method.fill_dummy_scales = lambda layer: None
    fill_dummies(config["n_routed_experts"])
    (folder / "config.json").write_text(json.dumps(config))
    from vllm import LLM

    return LLM(
        model=str(folder),
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=8192,
        max_num_seqs=max(DECODE_BATCHES),
        max_num_batched_tokens=8192,
        gpu_memory_utilization=0.93,
        kv_cache_dtype="fp8",
        block_size=256,
        enable_prefix_caching=False,
        compilation_config={"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64, 128, 256]},
        kernel_config={"moe_backend": "auto" if backend == "plugin" else backend},
    )


class Engine:
    """An engine that generates from random prompts, timed."""

    def __init__(self, llm) -> None:
        self.llm = llm
        self.random = random.Random(0)

    def seconds(self, sequences: int, prompt_tokens: int, new_tokens: int) -> float:
        from vllm import SamplingParams

        prompts = [
            {"prompt_token_ids": [self.random.randrange(10, VOCAB) for _ in range(prompt_tokens)]}
            for _ in range(sequences)
        ]
        sampling = SamplingParams(
            temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False
        )
        torch.cuda.synchronize()
        begun = time.perf_counter()
        self.llm.generate(prompts, sampling, use_tqdm=False)
        torch.cuda.synchronize()
        return time.perf_counter() - begun

    def decode_ms(self, sequences: int) -> float:
        """Milliseconds of a step in which each sequence takes one token."""
        self.seconds(sequences, 32, 8)
        first = [self.seconds(sequences, 32, 1) for _ in range(REPEATS)]
        more = [self.seconds(sequences, 32, 1 + MORE_TOKENS) for _ in range(REPEATS)]
        return median(b - a for a, b in zip(first, more, strict=True)) / MORE_TOKENS * 1e3

    def prefill_tokens_per_second(self, sequences: int, prompt_tokens: int) -> float:
        self.seconds(sequences, prompt_tokens, 1)
        taken = median(self.seconds(sequences, prompt_tokens, 1) for _ in range(REPEATS))
        return sequences * prompt_tokens / taken


def run(arguments: argparse.Namespace) -> None:
    environment = server_environment(ENVIRONMENT)
    if arguments.backend != "plugin":
        environment["VLLM_PLUGINS"] = ""
    os.environ.update(environment)
    with TemporaryDirectory() as folder:
        begun = time.perf_counter()
        llm = start(arguments.backend, model_config(arguments.layers), Path(folder))
        load_s = time.perf_counter() - begun
        engine = Engine(llm)
        results = {
            "gpu": torch.cuda.get_device_name(),
            "commit": arguments.commit,
            "vllm": importlib.metadata.version("vllm"),
            "backend": arguments.backend,
            "layers": arguments.layers,
            "load_s": load_s,
            "decode_ms": {n: engine.decode_ms(n) for n in DECODE_BATCHES},
            "prefill_tokens_per_s": {
                f"{n} × {size}": engine.prefill_tokens_per_second(n, size) for n, size in PREFILLS
            },
        }
        if arguments.probe:
            from bench.decode_probe import probe

            results["probe"] = probe(llm)
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    report(argparse.Namespace(results=[arguments.out]))


def report(arguments: argparse.Namespace) -> None:
    """One column a result; in brackets, how many times the first one's speed it has."""
    found = [json.loads(Path(path).read_text()) for path in arguments.results]
    gpu, layers, vllm = (found[0][key] for key in ("gpu", "layers", "vllm"))
    print(f"{gpu}, {layers} layers, vLLM {vllm}, commit {found[0]['commit']}\n")
    print(f"| | {' | '.join(each['backend'] for each in found)} |")
    print("|---" * (1 + len(found)) + "|")
    for what, unit, slower in (("decode_ms", "ms", True), ("prefill_tokens_per_s", "tok/s", False)):
        for size in found[0][what]:
            values = [each[what][size] for each in found]
            print(f"| {what.split('_')[0]} {size}, {unit} | {' | '.join(cells(values, slower))} |")


def cells(values: Sequence[float], slower: bool) -> list[str]:
    """slower: whether a larger value is a slower one."""
    first = values[0]
    ratios = [first / value if slower else value / first for value in values]
    digits = 2 if slower else 0
    return [f"{v:.{digits}f} ({r:.2f}×)" for v, r in zip(values, ratios, strict=True)]


def main() -> None:
    parser, runner, reporter = run_and_report(__doc__, run, report)
    runner.add_argument("backend", choices=BACKENDS)
    runner.add_argument("--layers", type=int, default=16)
    runner.add_argument("--probe", action="store_true", help="also look into a step")
    reporter.add_argument("results", nargs="+", help="each beside the first")
    call(parser)


if __name__ == "__main__":
    main()
