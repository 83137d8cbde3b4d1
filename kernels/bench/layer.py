"""The whole layer on one Hopper GPU: ours, and vLLM's Marlin and Humming, over what it must cost.

    python -m bench.layer run --out layer.json          (--backends sm90: needs no vLLM)
    python -m bench.layer report layer.json --plot layer.svg

`run` takes the routed experts from the router's ids to the summed output, as every backend does
them, on random NVFP4 weights and routing. Each backend's output is first compared with the oracle,
over as many calls as have CHECKED_ROWS rows; what fails is reported and not timed. Expert weights
are L2-cold: a graph makes as many calls, each with its own tokens and experts, as fill the cache
twice. floor = max(bytes of the weights that the routing touches / 4.3 TB/s, operations / 790
TFLOP/s), the rates measured on an H200.
"""

import argparse
import json
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from statistics import mean

import torch
from bench.arguments import call, run_and_report
from bench.inputs import (
    LIMIT,
    Inputs,
    checked_inputs,
    cold_inputs,
    expert_map,
    floor_us,
    random_weights,
)
from bench.peers import Call, MakeCall, nvfp4_peer
from bench.released import released_shape
from bench.timing import query_gpu, time_us, write_results
from dsv4_kernels import moe as layers
from dsv4_kernels import reference
from dsv4_kernels.backends import Backend, choose_backend
from dsv4_kernels.types import ExpertWeights, MoeShape

SHAPES = {
    "Pro, EP8 rank": released_shape("pro", ep=8),
    "Flash": released_shape("flash"),
}
TOKENS = (1, 8, 32, 128, 512, 2048, 8192)
# Norm of the error over the norm of the output. Ours rounds h and rows to bf16; the others also
# round where they please, and a wrong expert or scale is far above this.
TOLERANCE = 2.0**-6
REPLAYS = 20  # a turn
Checked = list[tuple[Inputs, torch.Tensor]]  # calls, and what is to come out of each


def ours(shape: MoeShape, weights: ExpertWeights, backend: Backend | None = None) -> MakeCall:
    """weights are laid out for the kernels in place. The backend is sm90's unless given."""
    backend = backend or choose_backend("sm90", shape, torch.cuda.get_device_capability())
    layer = layers.prepare_layer(backend, shape, weights, limit=LIMIT, activation_scales=None)
    size = layers.workspace_bytes(backend, shape)
    workspace = torch.full((size,), 0xFF, dtype=torch.uint8, device="cuda")
    mapping = expert_map(shape.num_experts, shape.num_local_experts)
    out = torch.full((shape.max_num_tokens, shape.hidden), float("nan"), device="cuda").bfloat16()

    def call(inputs: Inputs) -> Call:
        x, routing, *_ = inputs
        mine = out[: len(x)]
        return lambda: layers.moe(x, routing, layer, workspace, expert_map=mapping, out=mine)

    return call


BACKENDS: dict[str, Callable[[MoeShape, ExpertWeights], MakeCall]] = {
    "sm90": ours,
    "marlin": partial(nvfp4_peer, "marlin"),
    "humming": partial(nvfp4_peer, "humming"),
}


def make(
    contender: Callable[[MoeShape, ExpertWeights], MakeCall],
    shape: MoeShape,
    weights: Callable[[], ExpertWeights],
) -> MakeCall:
    return contender(shape, weights())


def oracle(
    shape: MoeShape, weights: ExpertWeights, token_counts: Iterable[int]
) -> dict[int, Checked]:
    """Of each number of tokens."""
    mapping = expert_map(shape.num_experts, shape.num_local_experts)

    def checked(each: Inputs) -> tuple[Inputs, torch.Tensor]:
        out = reference.moe(each.x, each.routing, weights, expert_map=mapping, limit=LIMIT)
        return each, out

    return {n: [checked(each) for each in checked_inputs(shape, n)] for n in token_counts}


def error_of(make_call: MakeCall, expected: Checked) -> float:
    """Norm of the error over the norm of the output, of all calls together."""
    errors = [(make_call(inputs)().float() - want.float()).norm() for inputs, want in expected]
    norms = [want.float().norm() for _, want in expected]
    return float(torch.stack(errors).norm() / torch.stack(norms).norm())


def measure(
    makers: Mapping[str, Callable[[], MakeCall]],
    inputs: dict[int, list[Inputs]],
    expected: dict[int, Checked],
    tolerances: Mapping[str, float],
) -> Iterator[dict]:
    """A row of each backend at each number of tokens: its error, and if that is within tolerance
    its microseconds, the SM's clock and the power; or what failed.

    All are resident and take turns at each number of tokens, forth and back, so that none has the
    cooler GPU; `us` is the mean of the two.
    """
    made: dict[str, MakeCall] = {}

    @contextmanager
    def failing(row: dict) -> Iterator[None]:
        try:
            yield
        except Exception as failure:  # one peer's failure must not cost the others' numbers
            traceback.print_exc()
            row["failure"] = repr(failure)[:300]
            made.pop(row["backend"], None)

    for name, maker in makers.items():
        row: dict = {"backend": name, "tokens": 0}
        with failing(row):
            made[name] = maker()
        torch.cuda.empty_cache()
        if "failure" in row:
            yield row
    for num_tokens, sets in inputs.items():
        rows: dict[str, dict] = {n: {"backend": n, "tokens": num_tokens} for n in made}
        calls: dict[str, list[Call]] = {}
        turns: dict[str, list[dict[str, float]]] = {name: [] for name in made}
        for name, row in rows.items():
            with failing(row):
                row["error"] = error_of(made[name], expected[num_tokens])
                if row["error"] < tolerances[name]:
                    calls[name] = [made[name](each) for each in sets]
        for name in (*calls, *reversed(calls)):
            if name in made:
                with failing(rows[name]):
                    turns[name].append(timed(calls[name]))
        for name, row in rows.items():
            if len(turns[name]) == 2:
                there, back = turns[name]
                row |= {key: mean((there[key], back[key])) for key in there if key in back}
            print(name, row, flush=True)
            yield row


def timed(calls: list[Call]) -> dict[str, float]:
    row: dict[str, float] = {}

    def look() -> None:
        with suppress(OSError, ValueError):  # no nvidia-smi, or a GPU without a power meter
            row["sm_mhz"], row["watts"] = map(float, query_gpu("clocks.sm", "power.draw"))

    return {"us": time_us(calls, replays=REPLAYS, meanwhile=look)} | row


def with_floor(row: dict, title: str, shape: MoeShape, inputs: dict) -> dict:
    floor = {"floor_us": floor_us(shape, inputs[row["tokens"]])} if row["tokens"] else {}
    return {"model": title, **row} | floor


def run(arguments: argparse.Namespace) -> None:
    rows: list[dict] = []
    for model in arguments.models.split(","):
        title, shape = list(SHAPES.items())[int(model)]
        print(title, flush=True)
        inputs = {num_tokens: cold_inputs(shape, num_tokens) for num_tokens in TOKENS}
        weights = partial(random_weights, shape, equal_scales=True)
        expected = oracle(shape, weights(), TOKENS)
        makers = {
            name: partial(make, BACKENDS[name], shape, weights)
            for name in arguments.backends.split(",")
        }
        for row in measure(makers, inputs, expected, dict.fromkeys(makers, TOLERANCE)):
            rows.append(with_floor(row, title, shape, inputs))
    write_results(arguments.out, rows, arguments.commit, limit=LIMIT)


def report(arguments: argparse.Namespace) -> None:
    """The README's table on standard output, and the plot."""
    results = json.loads(arguments.results.read_text())
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
        plot(by_model, names, results, arguments.plot)


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
    parser, runner, reporter = run_and_report(__doc__, run, report)
    runner.add_argument("--backends", default=",".join(BACKENDS))
    runner.add_argument("--models", default="0,1", help="which of the shapes, from 0")
    reporter.add_argument("--plot", type=Path, help="an SVG or PNG to write")
    call(parser)


if __name__ == "__main__":
    main()
