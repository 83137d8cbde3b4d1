"""The whole layer on one Hopper GPU: ours, and vLLM's Marlin and Humming, over what it must cost.

    python -m bench.layer run --out layer.json          (--backends sm90: needs no vLLM)
    python -m bench.layer report layer.json --plot layer.svg

`run` takes the routed experts from the router's ids to the summed output, as every backend does
them, on random NVFP4 weights and routing. Each backend's output is first compared with the oracle;
what fails is reported and not timed. Expert weights are L2-cold: a graph makes as many calls, each
with its own tokens and experts, as fill the cache twice. floor = max(bytes of the weights that the
routing touches / 4.3 TB/s, operations / 790 TFLOP/s), the rates measured on an H200.
"""

import argparse
import json
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from bench.layer_trial import expert_map
from bench.timing import checkout_commit, cold_sets, time_us, write_results
from dsv4_kernels import moe as layers
from dsv4_kernels import reference
from dsv4_kernels.backends import choose_backend
from dsv4_kernels.types import ExpertWeights, MoeShape, Routing

SHAPES = {
    "Pro, EP8 rank": MoeShape(384, 48, 6, 7168, 3072, 8192, False),
    "Flash": MoeShape(256, 256, 6, 4096, 2048, 8192, False),
}
TOKENS = (1, 8, 32, 128, 512, 2048, 8192)
LIMIT = 10.0
BYTES_PER_SECOND = 4.3e12
OPERATIONS_PER_SECOND = 790e12
# Norm of the error over the norm of the output. Ours rounds h and rows to bf16; the others also
# round where they please, and a wrong expert or scale is far above this.
TOLERANCE = 2.0**-6
Call = Callable[[], torch.Tensor]


class Inputs(NamedTuple):
    x: torch.Tensor
    routing: Routing
    local_rows: int
    experts_hit: int


def random_weights(shape: MoeShape) -> ExpertWeights:
    """Always the same; gate and up share their global scale, which the others take for granted."""
    generator = torch.Generator("cuda").manual_seed(0)
    local, hidden, inter = shape.num_local_experts, shape.hidden, shape.intermediate

    def codes(rows: int, k: int) -> torch.Tensor:
        size = (local, rows, k // 2)
        return torch.randint(0, 256, size, dtype=torch.uint8, device="cuda", generator=generator)

    def scales(rows: int, k: int) -> torch.Tensor:
        uniform = torch.rand((local, rows, k // 16), device="cuda", generator=generator)
        return (uniform * 200 + 24).to(torch.float8_e4m3fn)

    return ExpertWeights(
        codes(2 * inter, hidden),
        scales(2 * inter, hidden),
        torch.full((local, 2), 1e-4, device="cuda"),
        codes(hidden, inter),
        scales(hidden, inter),
        torch.full((local,), 1e-4, device="cuda"),
    )


def make_inputs(shape: MoeShape, num_tokens: int) -> list[Inputs]:
    """As many sets of tokens as touch twice the L2 cache's bytes of weights."""
    expert_bytes = 3 * shape.hidden * shape.intermediate * 9 // 16
    found: list[Inputs] = []
    for seed in range(64):
        generator = torch.Generator("cuda").manual_seed(seed * 10_007 + num_tokens)
        scores = torch.rand((num_tokens, shape.num_experts), device="cuda", generator=generator)
        ids = scores.topk(shape.top_k, dim=1).indices.int()
        weights = torch.rand(ids.shape, device="cuda", generator=generator)
        size = (num_tokens, shape.hidden)
        x = torch.randn(size, device="cuda", dtype=torch.bfloat16, generator=generator)
        local = ids[ids < shape.num_local_experts]
        hit = local.unique().numel()
        found.append(Inputs(x, Routing(weights, ids), local.numel(), hit))
        touched = sum(inputs.experts_hit for inputs in found) * expert_bytes
        if len(found) >= 2 and len(found) >= cold_sets(max(touched // len(found), 1)):
            break
    return found


def floor_us(shape: MoeShape, inputs: list[Inputs]) -> float:
    weights = 3 * shape.hidden * shape.intermediate  # of one expert
    times = (
        max(
            each.experts_hit * weights * 9 / 16 / BYTES_PER_SECOND,
            each.local_rows * 2 * weights / OPERATIONS_PER_SECOND,
        )
        for each in inputs
    )
    return sum(times) / len(inputs) * 1e6


def ours(shape: MoeShape) -> Callable[[Inputs], Call]:
    backend = choose_backend("sm90", shape, torch.cuda.get_device_capability())
    layer = layers.prepare_layer(
        backend, shape, random_weights(shape), limit=LIMIT, activation_scales=None
    )
    size = layers.workspace_bytes(backend, shape)
    workspace = torch.full((size,), 0xFF, dtype=torch.uint8, device="cuda")
    mapping = expert_map(shape, "cuda")
    out = torch.full((shape.max_num_tokens, shape.hidden), float("nan"), device="cuda").bfloat16()

    def call(inputs: Inputs) -> Call:
        x, routing, *_ = inputs
        mine = out[: len(x)]
        return lambda: layers.moe(x, routing, layer, workspace, expert_map=mapping, out=mine)

    return call


def peer(name: str, shape: MoeShape) -> Callable[[Inputs], Call]:
    """vLLM's own NVFP4 method with that backend, as its fused-MoE layer would call it."""
    from vllm.forward_context import set_forward_context
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import (
        FusedMoEConfig,
        FusedMoEParallelConfig,
        RoutingMethodType,
    )
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.layers.quantization.modelopt import (
        ModelOptNvFp4Config,
        ModelOptNvFp4FusedMoE,
    )

    config = vllm_context()
    local, hidden, inter = shape.num_local_experts, shape.hidden, shape.intermediate
    parallel = FusedMoEParallelConfig(
        tp_size=1,
        pcp_size=1,
        dp_size=1,
        ep_size=shape.num_experts // local,
        tp_rank=0,
        pcp_rank=0,
        dp_rank=0,
        ep_rank=0,
        sp_size=1,
        use_ep=local != shape.num_experts,
        all2all_backend="allgather_reducescatter",
        enable_eplb=False,
    )
    moe_config = FusedMoEConfig(
        num_experts=shape.num_experts,
        experts_per_token=shape.top_k,
        hidden_dim=hidden,
        intermediate_size=inter,
        num_local_experts=local,
        num_logical_experts=shape.num_experts,
        activation=MoEActivation.SILU,
        device=torch.device("cuda"),
        routing_method=RoutingMethodType.DeepSeekV3,
        moe_parallel_config=parallel,
        in_dtype=torch.bfloat16,
        moe_backend=name,
        max_num_tokens=shape.max_num_tokens,
        swiglu_limit=LIMIT,
    )
    quant = ModelOptNvFp4Config(
        is_checkpoint_nvfp4_serialized=True,
        kv_cache_quant_algo=None,
        exclude_modules=[],
        group_size=16,
    )
    method = ModelOptNvFp4FusedMoE(quant, moe_config)
    module = RoutedExperts.__new__(RoutedExperts)
    torch.nn.Module.__init__(module)
    facts = {
        "params_dtype": torch.bfloat16,
        "num_experts": local,
        "_expert_map": None,
        "moe_config": moe_config,
        "hidden_size": hidden,
        "intermediate_size_per_partition": inter,
        "global_num_experts": shape.num_experts,
        "local_num_experts": local,
        "swiglu_limit": LIMIT,
        "activation": MoEActivation.SILU,
        "layer_name": "model.layers.3.ffn.experts",
        "prefix": "model.layers.3.ffn.experts",
        "_expert_routing_tables": lambda: None,
    }
    for key, value in facts.items():
        object.__setattr__(module, key, value)
    with torch.device("cuda"):
        method.create_weights(
            module,
            local,
            hidden,
            inter,
            torch.bfloat16,
            weight_loader=None,
            global_num_experts=shape.num_experts,
        )
    weights = random_weights(shape)
    for key, codes, scales in (
        ("w13", weights.w13, weights.w13_block_scales),
        ("w2", weights.w2, weights.w2_block_scales),
    ):
        getattr(module, f"{key}_weight").data.copy_(codes)
        getattr(module, f"{key}_weight_scale").data.copy_(scales)
        getattr(module, f"{key}_weight_scale_2").data.fill_(1e-4)
        getattr(module, f"{key}_input_scale").data.fill_(3e-3)
    del weights
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    method.process_weights_after_loading(module)
    mapping = expert_map(shape, "cuda")

    def call(inputs: Inputs) -> Call:
        def run() -> torch.Tensor:
            with set_forward_context(None, config, num_tokens=len(inputs.x)):
                return method.moe_kernel.apply(
                    inputs.x,
                    module.w13_weight,
                    module.w2_weight,
                    topk_ids=inputs.routing.ids,
                    topk_weights=inputs.routing.weights,
                    activation=MoEActivation.SILU,
                    global_num_experts=shape.num_experts,
                    expert_map=mapping,
                    apply_router_weight_on_input=False,
                )

        return run

    return call


_CONTEXT = SimpleNamespace(config=None, entered=None)


def vllm_context():
    """vLLM's configuration and its one-process group, made once and kept."""
    if _CONTEXT.config is None:
        from vllm.config import VllmConfig, set_current_vllm_config
        from vllm.distributed import init_distributed_environment, initialize_model_parallel
        from vllm.v1.worker.workspace import init_workspace_manager

        _CONTEXT.config = VllmConfig()
        _CONTEXT.entered = set_current_vllm_config(_CONTEXT.config)
        _CONTEXT.entered.__enter__()
        init_distributed_environment(1, 0, "tcp://127.0.0.1:29511", 0)
        initialize_model_parallel(1, 1)
        init_workspace_manager(torch.device("cuda"))
    return _CONTEXT.config


BACKENDS: dict[str, Callable[[MoeShape], Callable[[Inputs], Call]]] = {
    "sm90": ours,
    "marlin": lambda shape: peer("marlin", shape),
    "humming": lambda shape: peer("humming", shape),
}


def oracle(shape: MoeShape, inputs: dict[int, list[Inputs]]) -> dict[int, torch.Tensor]:
    """Of the first input set of each number of tokens."""
    weights, mapping = random_weights(shape), expert_map(shape, "cuda")
    return {
        num_tokens: reference.moe(
            sets[0].x, sets[0].routing, weights, expert_map=mapping, limit=LIMIT
        )
        for num_tokens, sets in inputs.items()
    }


def measure(name: str, shape: MoeShape, inputs: dict, expected: dict) -> list[dict]:
    """Rows of one backend: microseconds and error at each number of tokens, or what failed."""
    rows = []
    make_call = BACKENDS[name](shape)
    for num_tokens, sets in inputs.items():
        calls = [make_call(each) for each in sets]
        out, want = calls[0]().float(), expected[num_tokens].float()
        error = float((out - want).norm() / want.norm().clamp(min=1e-30))
        row = {"backend": name, "tokens": num_tokens, "error": error}
        if error < TOLERANCE or not want.any():
            row["us"] = time_us(calls)
        rows.append(row)
        print(name, row, flush=True)
    return rows


def run(arguments: argparse.Namespace) -> None:
    rows = []
    for model in arguments.models.split(","):
        title, shape = list(SHAPES.items())[int(model)]
        print(title, flush=True)
        inputs = {num_tokens: make_inputs(shape, num_tokens) for num_tokens in TOKENS}
        expected = oracle(shape, inputs)
        for name in arguments.backends.split(","):
            torch.cuda.empty_cache()
            try:
                found = measure(name, shape, inputs, expected)
            except Exception as failure:  # one peer's failure must not cost the others' numbers
                traceback.print_exc()
                found = [{"backend": name, "tokens": 0, "failure": repr(failure)[:300]}]
            for row in found:
                if row["tokens"]:
                    row["floor_us"] = floor_us(shape, inputs[row["tokens"]])
                rows.append({"model": title, **row})
    write_results(Path(arguments.out), rows, arguments.commit, limit=LIMIT)


def report(arguments: argparse.Namespace) -> None:
    """The README's table on standard output, and the plot."""
    results = json.loads(Path(arguments.results).read_text())
    by_model: dict[str, dict[int, dict[str, dict]]] = {}
    for row in results["rows"]:
        if "us" in row:
            tokens = by_model.setdefault(row["model"], {}).setdefault(row["tokens"], {})
            tokens[row["backend"]] = row
    print(f"Microseconds a layer, {results['gpu']}, commit {results['commit']}; × is over floor.\n")
    names = {"sm90": "sm90", "marlin": "Marlin", "humming": "Humming"}
    print(f"| | tokens | floor | {' | '.join(names.values())} | faster than the better |")
    print("|---|---|---|---|---|---|---|")
    for model, per_tokens in by_model.items():
        for num_tokens, cells in sorted(per_tokens.items()):
            floor = next(iter(cells.values()))["floor_us"]
            shown = [
                f"{cells[n]['us']:.0f} ({cells[n]['us'] / floor:.2f}×)" if n in cells else "-"
                for n in names
            ]
            others = [cells[n]["us"] for n in ("marlin", "humming") if n in cells]
            gain = (
                f"{min(others) / cells['sm90']['us']:.2f}×" if others and "sm90" in cells else "-"
            )
            print(f"| {model} | {num_tokens} | {floor:.0f} | {' | '.join(shown)} | {gain} |")
    if arguments.plot:
        plot(by_model, names, results, Path(arguments.plot))


def plot(by_model: dict, names: dict, results: dict, path: Path) -> None:
    """Time over floor against tokens, one panel a model, one line a backend."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(by_model), figsize=(10, 4), sharey=True, squeeze=False)
    for axes, (model, per_tokens) in zip(panels[0], by_model.items(), strict=True):
        for name, label in names.items():
            points = [
                (tokens, cells[name]["us"] / cells[name]["floor_us"])
                for tokens, cells in sorted(per_tokens.items())
                if name in cells
            ]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", label=label)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set(xscale="log", yscale="log", title=model, xlabel="tokens")
        axes.set_xticks(TOKENS, [str(tokens) for tokens in TOKENS])
        axes.set_yticks(
            [1, 1.25, 1.5, 2, 3, 4, 6, 8], ["1", "1.25", "1.5", "2", "3", "4", "6", "8"]
        )
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("time over floor")
    panels[0][0].legend()
    figure.suptitle(f"The experts of one layer, {results['gpu']}, {results['commit']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True)
    runner = commands.add_parser("run", help="verify and time, write JSON")
    runner.add_argument("--out", required=True)
    runner.add_argument("--backends", default=",".join(BACKENDS))
    runner.add_argument("--models", default="0,1", help="which of the shapes, from 0")
    runner.add_argument("--commit", default=None, help="where there is no git")
    runner.set_defaults(call=run)
    reporter = commands.add_parser("report", help="table, and plot, of a JSON")
    reporter.add_argument("results")
    reporter.add_argument("--plot", help="an SVG or PNG to write")
    reporter.set_defaults(call=report)
    arguments = parser.parse_args()
    if "commit" in arguments and arguments.commit is None:
        arguments.commit = checkout_commit()
    arguments.call(arguments)


if __name__ == "__main__":
    main()
